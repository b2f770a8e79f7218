"""Listen to layers: one vector per sample from any layer's output or input, or where a weight meets an activation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lightning_backdoor._lightning import plain
from lightning_backdoor.errors import ModelError

__all__ = [
    "CREATION",
    "Meeting",
    "Meetings",
    "Taps",
    "channel_axis",
    "eager_forward",
    "mapped",
    "module_named",
    "pool",
    "tensors_in",
]

CREATION = {f"new_{kind}" for kind in ("empty", "full", "ones", "zeros", "tensor")} | {
    f"{kind}_like" for kind in ("empty", "full", "ones", "zeros", "rand", "randn")
}
"""Operations that use only the shape and the type of a tensor."""
_ALIKE = {"to", "type_as", "expand_as", "view_as", "reshape_as"}  # take no values of what comes after the first

Place = Literal["input", "output", "weight"]
Pooling = Literal["max", "mean"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested value with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)({key: mapped(item, change) for key, item in value.items()})
    if isinstance(value, tuple | list):
        items = [mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


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


class Taps:
    """Record what named layers put out (or take in) during forward passes, pooled to one vector per sample.

    Works on compiled models too: inside the context they run eagerly, because hooks do not fire in compiled code.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
    >>> with Taps(net, ["0"], pooling="max") as taps:
    ...     logits = net(torch.zeros(2, 3, 8, 8))
    ...     taps.read()["0"].shape
    torch.Size([2, 8])

    Args:
        module: The model, or anything that contains the layers.
        names: Names of layers as in ``module.named_modules()``; of weights as in ``module.named_parameters()`` where
            the place is ``"weight"``.
        place: Record what comes out of a layer, the first argument that goes in, or the activation that a weight is
            applied to, by any operation.
        pooling: Over all positions of a sample, the largest value or the mean (see :func:`pool`).
        gradients: Leave the values in the graph, so that a loss on them can be differentiated.
        cut: What runs after a layer gets its values without their graph, and records one of its own even where
            gradients are off: a loss on the outputs then reaches what runs after the layer alone.

    Raises:
        ModelError: A name does not exist.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Iterable[str],
        *,
        place: Place = "output",
        pooling: Pooling = "mean",
        gradients: bool = False,
        cut: bool = False,
    ) -> None:
        self._module, self._names, self._place = module, list(names), place
        self._layers = {} if place == "weight" else {name: module_named(module, name) for name in self._names}
        self._pooling = pooling
        self._gradients = gradients
        self._cut = cut
        self._values: dict[str, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Taps:
        self._stack.enter_context(eager_forward())
        for name, layer in self._layers.items():
            if self._place == "input":
                handle = layer.register_forward_pre_hook(self._recorder(name))
            else:
                handle = layer.register_forward_hook(self._recorder(name))
            self._stack.callback(handle.remove)
        if self._place == "weight":
            self._stack.enter_context(Meetings(self._module, self._meet, cut=self._names if self._cut else ()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self) -> dict[str, Tensor]:
        """What the last forward pass left, float32 ``(B, C)`` per name in the order of the request; it is then dropped.

        A layer that ran several times in that pass shows its last call.

        Raises:
            ModelError: A layer did not run.
        """
        silent = [name for name in self._names if name not in self._values]
        if silent:
            raise ModelError(
                f"The layers {silent} did not run in the forward pass. Pass `feature_layer` with the name of a layer "
                "that runs."
            )
        values = {name: self._values[name] for name in self._names}
        self._values = {}
        return values

    def _meet(self, meeting: Meeting) -> None:
        for name in meeting.weights.intersection(self._names):
            self._keep(name, meeting.features, meeting.axis)

    def _keep(self, name: str, value: Tensor, axis: int) -> None:
        self._values[name] = pool(value if self._gradients else value.detach(), axis, self._pooling)

    def _recorder(self, name: str) -> Callable[..., Any]:
        def record(layer: nn.Module, arguments: tuple[Any, ...], output: Any = None) -> Any:
            given = arguments if self._place == "input" else output
            value = first_tensor(given)
            if value is not None:
                self._keep(name, value, channel_axis(layer, value))
            if not self._cut:
                return None
            torch.set_grad_enabled(True)
            return mapped(given, Tensor.detach)

        return record


def pool(values: Tensor, axis: int, pooling: Pooling = "mean") -> Tensor:
    """Reduce ``(B, ...)`` with channels at ``axis`` to float32 ``(B, C)``: largest value or mean over the positions."""
    if values.ndim <= 2:
        return values.float().reshape(len(values), -1)
    if pooling == "max":  # no copy in another layout or type: the pass over a network's units is bound by memory
        positions = [dim for dim in range(1, values.ndim) if dim != axis % values.ndim]
        return values.amax(dim=positions).float()
    return values.float().movedim(axis, 1).flatten(2).mean(dim=2)


def channel_axis(layer: nn.Module, values: Tensor) -> int:
    """Where a layer keeps its channels: 1 for convolutions and image-like tensors, -1 for linear layers and tokens."""
    weight = getattr(layer, "weight", None)
    rank = weight.ndim if isinstance(weight, Tensor) else 0
    if rank >= 3:
        return 1
    if rank == 2 or type(layer) is nn.LayerNorm:
        return -1
    return 1 if values.ndim >= 4 else -1


def module_named(module: nn.Module, name: str) -> nn.Module:
    """The layer of this name.

    Raises:
        ModelError: There is none; the message proposes similar names.
    """
    layers: dict[str, nn.Module] = dict(module.named_modules())
    if name not in layers:
        near = get_close_matches(name, layers, n=3, cutoff=0.3) or list(layers)[-3:]
        raise ModelError(
            f"`feature_layer` must name a layer of {type(module).__name__}, got {name!r}. Similar: {', '.join(near)}."
        )
    return layers[name]


def eager_forward() -> AbstractContextManager[Any]:
    """Run compiled models eagerly, so that hooks fire."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def first_tensor(value: Any) -> Tensor | None:
    """The tensor itself, or the first one in a tuple, list or dict; one of a derived class as a plain tensor."""
    if isinstance(value, Tensor):
        return plain(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return next((first_tensor(item) for item in items if isinstance(item, Tensor)), None)
