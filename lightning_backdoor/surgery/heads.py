"""Find the classifier head, its features, and the layers whose units can be looked at, by watching one forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_backdoor.errors import ModelError
from lightning_backdoor.surgery.taps import Place, channel_axis, eager_forward, first_tensor, module_named, pool

__all__ = ["Head", "find_head", "head_features", "unit_layers"]

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Head:
    """Where penultimate features are found.

    Attributes:
        name: Name of the layer within the module that was searched.
        module: The layer.
        place: ``"input"`` of a classifier head, ``"output"`` of a layer that the user named.
        certain: Whether the output of the layer is the logits themselves.
    """

    name: str
    module: nn.Module
    place: Place = "input"
    certain: bool = True


def find_head(module: nn.Module, run: Run, feature_layer: str | None = None) -> Head:
    """Find the layer that makes the class logits; what goes into it are the features.

    The head is the last layer with weights whose output is the logits (same storage or same values). Where none is,
    as when the outputs of two heads are averaged or a softmax follows, it is the last layer with as many outputs as
    there are logits, and a warning says so.

    Args:
        module: The model.
        run: Does one forward pass of a few images (all activations are kept) and returns its logits ``(B, K)``.
        feature_layer: Name of a layer whose *output* is used instead; nothing is searched then.

    Returns:
        A record for :class:`~lightning_backdoor.surgery.taps.Taps`: ``Taps(module, [head.name], place=head.place)``.

    Raises:
        ModelError: No such layer ran, or ``feature_layer`` does not exist.
    """
    if feature_layer is not None:
        return Head(feature_layer, module_named(module, feature_layer), "output", certain=False)
    _, head, certain = _watch(module, run)
    if not certain:
        warnings.warn(
            f"No layer's output is the logits themselves; features are taken before {head.name!r}, the last layer with "
            f"{head.width} outputs. Pass `feature_layer` to choose another.",
            UserWarning,
            stacklevel=2,
        )
    return Head(head.name, head.layer, certain=certain)


def head_features(module_input: Tensor, head: nn.Module | None = None) -> Tensor:
    """Pool the input of a head to float32 ``(B, D)``: the mean over all positions of a map or a token sequence.

    Args:
        module_input: ``(B, D)``, tokens ``(B, T, D)``, or maps ``(B, D, H, W)`` (linear heads: ``(B, H, W, D)``).
        head: Tells where the channels are; None: read from the number of dimensions.
    """
    return pool(module_input, channel_axis(head or nn.Identity(), module_input))


def unit_layers(module: nn.Module, run: Run) -> dict[str, nn.Module]:
    """Hidden layers whose output channels are units of their own, in the order in which they run.

    These are 2-D convolutions, grouped ones included and depthwise ones left out (their channels only filter another
    layer's unit), and linear layers. What runs from the classifier head on is left out, and so are further heads of
    the same shape right before it.

    Args:
        module: The model.
        run: As in :func:`find_head`.

    Returns:
        Name to layer; a layer that runs several times stands at its first place.
    """
    calls, head, _ = _watch(module, run)
    hidden = calls[: calls.index(head)]
    while hidden and hidden[-1].weight_shape == head.weight_shape:  # the other head of a distilled model
        hidden.pop()
    layers = {call.name: call.layer for call in hidden if _has_units(call.layer)}
    layers.pop(head.name, None)
    return layers


@dataclass(frozen=True, eq=False)
class _Call:
    name: str
    layer: nn.Module
    output: Tensor

    @property
    def width(self) -> int:
        return self.output.shape[channel_axis(self.layer, self.output)]

    @property
    def weight_shape(self) -> torch.Size:
        return cast("Tensor", self.layer.weight).shape


def _watch(module: nn.Module, run: Run) -> tuple[list[_Call], _Call, bool]:
    """One forward pass: the calls of all layers with weights, the head's call, and whether it is surely the head.

    The outputs stay alive until the end, so that no storage is reused and taken for another.
    """
    calls: list[_Call] = []
    with ExitStack() as stack:
        for name, layer in module.named_modules():
            if _has_weights(layer):
                handle = layer.register_forward_hook(_recorder(name, calls))
                stack.callback(handle.remove)
        stack.enter_context(eager_forward())
        stack.enter_context(torch.no_grad())
        logits = run()
    widths = {logits.shape[1], 1} if logits.shape[1] == 2 else {logits.shape[1]}
    exact = [call for call in calls if _is_logits(call.output, logits)]
    likely = exact or [call for call in calls if call.width in widths]
    if not likely:
        raise ModelError(
            f"No layer with {logits.shape[1]} outputs (the number of logits) ran in {type(module).__name__}. "
            "Pass `feature_layer`, the name of the layer whose output are the features."
        )
    return calls, likely[-1], bool(exact)


def _recorder(name: str, calls: list[_Call]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def record(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        value = first_tensor(output)
        if value is not None and value.ndim >= 2:
            calls.append(_Call(name, layer, value.detach()))

    return record


def _has_weights(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim >= 2


def _is_logits(output: Tensor, logits: Tensor) -> bool:
    """Whether these are the logits: the same memory, or the same numbers (cast, or a binary model's second column)."""
    if output.numel() == logits.numel():
        same = output.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
        return same or torch.equal(output.reshape(logits.shape).float(), logits.float())
    binary = logits.shape[1] == 2 and output.numel() == len(logits)
    return binary and torch.equal(output.flatten().float(), logits[:, 1].float())


def _has_units(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 or layer.groups < layer.in_channels
    return isinstance(layer, nn.Linear)
