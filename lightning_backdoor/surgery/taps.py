"""Listen to layers: one vector per sample from any layer's output or input."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from difflib import get_close_matches
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_backdoor.errors import ModelError
from lightning_backdoor.functional.kinds import plain
from lightning_backdoor.surgery.meetings import Meeting, Meetings
from lightning_backdoor.surgery.nested import mapped

__all__ = ["Taps", "channel_axis", "eager_forward", "module_named", "pool"]

Place = Literal["input", "output", "weight"]
Pooling = Literal["max", "mean"]


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
