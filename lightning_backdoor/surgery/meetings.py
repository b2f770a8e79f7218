"""Watch where the weights of a model meet its activations, in a layer or in an operation of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lightning_backdoor.surgery.nested import mapped, tensors_in

__all__ = ["CREATION", "Meeting", "Meetings"]

CREATION = {f"new_{kind}" for kind in ("empty", "full", "ones", "zeros", "tensor")} | {
    f"{kind}_like" for kind in ("empty", "full", "ones", "zeros", "rand", "randn")
}
"""Operations that use only the shape and the type of a tensor."""
_ALIKE = {"to", "type_as", "expand_as", "view_as", "reshape_as"}  # take no values of what comes after the first


@dataclass(frozen=True, eq=False)
class Meeting:
    """An operation on an activation and on something that is made of weights alone.

    Attributes:
        number: Its place among the meetings of the pass.
        weights: Names of the weights, as in ``module.named_parameters()``.
        shape: Shape of what is made of them.
        features: The activation, samples first.
        axis: Where its channels are.
        source: The latest meeting on the way to the activation, ``None`` if it is an input.
    """

    number: int
    weights: frozenset[str]
    shape: torch.Size
    features: Tensor
    axis: int
    source: Meeting | None


class Meetings(TorchFunctionMode):
    """Records all meetings of weights and activations while it is entered.

    Weights are parameters, buffers and other tensors that the modules hold, with two axes at least: biases, scales and
    the like are ignored. What is computed from weights alone, as a normalised weight, counts as they do.

    Args:
        module: The model.
        at: Called with every meeting before the operation is done.
        cut: Names of weights. The operation on one of them gets its activation without its graph, and from there on a
            graph is recorded even where gradients are off.
    """

    def __init__(
        self, module: nn.Module, at: Callable[[Meeting], object] = lambda meeting: None, *, cut: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.count = 0
        self._at, self._cut = at, frozenset(cut)
        self._constants: Any = WeakIdKeyDictionary()  # tensors that no image has changed -> names of their weights
        self._latest: Any = WeakIdKeyDictionary()  # activation -> latest meeting on the way to it
        self.names: dict[int, str] = {}
        for prefix, part in module.named_modules():
            own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False), *vars(part).items()]
            for key, value in own:
                if isinstance(value, Tensor):
                    name = f"{prefix}.{key}" if prefix else key
                    self.names[id(value)] = name
                    layers = key == "weight" and isinstance(part, nn.Linear | nn.Conv2d)  # of one output perhaps
                    self._constants[value] = frozenset({name}) if layers else _named({name}, value)

    def latest(self, tensor: Tensor) -> Meeting | None:
        """The latest meeting on the way to a tensor."""
        found: Meeting | None = self._latest.get(tensor)
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and record its effect."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_")
        inputs = [] if name in CREATION else list(tensors_in((args, kwargs)))
        inputs = inputs[:1] if name in _ALIKE else inputs
        activations = [x for x in inputs if x not in self._constants]
        made_of = {id(x): names for x in inputs if (names := self._constants.get(x))}
        weights = frozenset[str]().union(*made_of.values())
        cuts = bool(weights & self._cut)
        if not activations:
            with torch.enable_grad() if cuts else nullcontext():
                output = func(*args, **kwargs)
            for x in tensors_in(output):
                self._constants[x] = _named(weights, x)
            return output
        features = next((x for x in activations if x.is_floating_point()), None)
        if weights and features is not None:
            weight = next(x for x in inputs if id(x) in made_of)
            turned = weight is inputs[0] and name in ("matmul", "mm") and features.ndim == 2
            meeting: Meeting | None = Meeting(
                self.count,
                weights,
                weight.shape,
                features.t() if turned else features,
                1 if name.startswith("conv") else _axis(features, weight),
                self.latest(features),
            )
            self.count += 1
            self._at(meeting)  # type: ignore[arg-type]
            if cuts:
                args, kwargs = mapped((args, kwargs), lambda x: x if x in self._constants else x.detach())
                torch.set_grad_enabled(True)
        else:
            before = [found for x in activations if (found := self.latest(x)) is not None]
            meeting = max(before, key=lambda found: found.number, default=None)
        output = func(*args, **kwargs)
        for x in [*tensors_in(output)] or (inputs[:1] if name == "setitem" else []):
            self._constants.pop(x, None)
            self._latest[x] = meeting
        return output


def _named(names: Collection[str], tensor: Tensor) -> frozenset[str]:
    """The names, if the tensor is a weight still and no bias or scale."""
    return frozenset(names if sum(size > 1 for size in tensor.shape) > 1 else ())


def _axis(features: Tensor, weight: Tensor) -> int:
    """Where channels are: on the last axis that the weight has, too."""
    return next((dim for dim in range(features.ndim - 1, 0, -1) if features.shape[dim] in weight.shape), -1)
