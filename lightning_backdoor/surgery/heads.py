"""Find the classifier head, its features, and the layers whose units can be measured, by tracing one forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_backdoor.errors import ModelError
from lightning_backdoor.surgery.taps import (
    Meeting,
    Meetings,
    Place,
    channel_axis,
    eager_forward,
    first_tensor,
    module_named,
    pool,
)

__all__ = ["Head", "find_head", "head_features", "unit_layers"]

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Head:
    """Where penultimate features are found.

    Attributes:
        name: Name of the layer within the module that was searched, or of a weight.
        module: The layer; for a weight, the module whose forward pass holds the operation on it.
        place: ``"input"`` of a classifier head, ``"output"`` of a layer that the user named, or the activation that a
            ``"weight"`` is applied to, where the head is no layer, as in ``F.linear(x, F.normalize(self.weight))``.
        certain: Whether the output of the layer is the logits themselves.
    """

    name: str
    module: nn.Module
    place: Place = "input"
    certain: bool = True


def find_head(module: nn.Module, run: Run, feature_layer: str | None = None) -> Head:
    """Find what makes the class logits; what goes into it are the features.

    The head is the last layer with weights whose output is the logits (same storage or same values). Where none is,
    it is what applies the last weights on the way to the logits: a layer with as many outputs as there are logits, with
    a warning (as when the outputs of two heads are averaged or a softmax follows), else an operation in the
    forward pass of a larger module. Where that way cannot be followed, it is the last layer with as many outputs.

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
    found = _watch(module, run)
    if found.head is None:
        raise ModelError(
            f"No layer with {found.classes} outputs (the number of logits) ran in {type(module).__name__}, and no "
            "weights could be followed to the logits. Pass `feature_layer`, the name of the layer whose output are the "
            "features."
        )
    if found.head.place == "input" and not found.head.certain:
        warnings.warn(
            f"No layer's output is the logits themselves; features are taken before {found.head.name!r}, the last "
            f"layer with {found.width} outputs. Pass `feature_layer` to choose another.",
            UserWarning,
            stacklevel=2,
        )
    return found.head


def head_features(module_input: Tensor, head: nn.Module | None = None) -> Tensor:
    """Pool the input of a head to float32 ``(B, D)``: the mean over all positions of a map or a token sequence.

    Args:
        module_input: ``(B, D)``, tokens ``(B, T, D)``, or maps ``(B, D, H, W)`` (linear heads: ``(B, H, W, D)``).
        head: Determines the axis of the channels; None: from the number of dimensions.
    """
    return pool(module_input, channel_axis(head or nn.Identity(), module_input))


def unit_layers(module: nn.Module, run: Run) -> dict[str, nn.Module]:
    """Hidden layers whose output channels are units of their own, in the order in which they run.

    These are 2-D convolutions, grouped ones included and depthwise ones left out (their channels only filter another
    layer's unit), and linear layers. What runs from the classifier head on is left out, and so are further heads of
    the same shape right before it. Where no head is found, all layers count.

    Args:
        module: The model.
        run: As in :func:`find_head`.

    Returns:
        Name to layer; a layer that runs several times stands at its first place.
    """
    found = _watch(module, run)
    hidden = list(found.before)
    while hidden and hidden[-1].weight_shape == found.head_shape:  # the other head of a distilled model
        hidden.pop()
    layers = {call.name: call.layer for call in hidden if _has_units(call.layer)}
    if found.head is not None:
        layers.pop(found.head.name, None)
    return layers


@dataclass(frozen=True, eq=False)
class _Call:
    """A module that ran, and the meetings of weights and activations within it, by number."""

    name: str
    layer: nn.Module
    output: Tensor
    meetings: range

    @property
    def width(self) -> int:
        return self.output.shape[channel_axis(self.layer, self.output)]

    @property
    def weight_shape(self) -> torch.Size:
        return cast("Tensor", self.layer.weight).shape


@dataclass(frozen=True)
class _Found:
    """What one forward pass showed: the head, and the calls of layers with weights before it."""

    classes: int
    before: list[_Call]
    head: Head | None = None
    head_shape: torch.Size | None = None
    width: int = 0


def _watch(module: nn.Module, run: Run) -> _Found:
    """One forward pass; the outputs are held until its end, so that no storage is reused and mistaken for another."""
    meetings: list[Meeting] = []
    watch = Meetings(module, meetings.append)
    calls: list[_Call] = []
    with ExitStack() as stack:
        for name, layer in module.named_modules():
            if isinstance(layer, torch.jit.ScriptModule):  # takes no hooks
                continue
            begun: list[int] = []
            stack.callback(layer.register_forward_pre_hook(lambda *_, b=begun: b.append(watch.count)).remove)
            stack.callback(layer.register_forward_hook(_recorder(name, calls, begun, watch)).remove)
        stack.enter_context(eager_forward())
        stack.enter_context(torch.no_grad())
        stack.enter_context(watch)
        logits = run()
    layers = [call for call in calls if _has_weights(call.layer)]
    whole = [call for call in layers if _is_whole(call, watch, meetings)]
    exact = [call for call in whole if _is_logits(call.output, logits)]
    widths = {logits.shape[1], 1} if logits.shape[1] == 2 else {logits.shape[1]}
    wide = [call for call in whole if call.width in widths]
    last = watch.latest(logits)
    likely = wide if last is None else [call for call in wide if last.number in call.meetings]
    if exact or likely:
        call = (exact or likely)[-1]
        head = Head(call.name, call.layer, certain=bool(exact))
        return _Found(logits.shape[1], layers[: layers.index(call)], head, call.weight_shape, call.width)
    if last is None:
        return _Found(logits.shape[1], layers)
    around = [call for call in calls if last.number in call.meetings]
    ends = [call.layer for call in around if _is_logits(call.output, logits)]
    inner = [call.layer for call in around]
    head = Head(min(last.weights), [*ends, *inner, module][0], "weight", certain=bool(ends))
    return _Found(logits.shape[1], [call for call in layers if call.meetings.stop <= last.number], head, last.shape)


def _is_whole(call: _Call, watch: Meetings, meetings: list[Meeting]) -> bool:
    """Whether the weight of a layer is applied to what goes into the layer, and not to what it computed of that."""
    name = watch.names.get(id(call.layer.weight))
    if name is None or not call.meetings:  # a computed weight, or operations that cannot be watched
        return True
    own = [meetings[number] for number in call.meetings if name in meetings[number].weights]
    return bool(own) and (own[-1].source is None or own[-1].source.number < call.meetings.start)


def _recorder(
    name: str, calls: list[_Call], begun: list[int], watch: Meetings
) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def record(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        value, start = first_tensor(output), begun.pop()
        if value is not None and value.ndim >= 2:
            calls.append(_Call(name, layer, value.detach(), range(start, watch.count)))

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
