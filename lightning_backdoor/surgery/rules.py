"""How units pass each operation: one short rule per kind, found by the operation's name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor.surgery.graph import Call, Pairs, register_rule
from lightning_backdoor.surgery.taps import tensors_in
from lightning_backdoor.surgery.unit_trace import NOTHING, Slice, Strand

__all__ = ["register_rule"]


@register_rule("conv1d", "conv2d", "conv3d")
def _convolution(call: Call) -> Pairs:
    weight, groups = call.argument(1, "weight"), call.argument(6, "groups", 1)
    channels = weight.shape[1] * groups
    if groups == channels > 1:
        return list(_depthwise(call, len(weight) // channels))
    row = torch.arange(len(weight)) // (len(weight) // groups)
    column = torch.arange(weight.shape[1])
    return _mix(call, 1, row[:, None] * weight.shape[1] + column)


@register_rule("linear")
def _linear(call: Call) -> Pairs:
    return _mix(call, -1, torch.arange(call.argument(1, "weight").shape[1])[None])


def _mix(call: Call, axis: int, channel: Tensor) -> Pairs:
    """Units end in the columns of a weight (``channel``: which input each leading entry reads), new ones begin."""
    weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
    for strand in call.strands(call.first):
        owners = strand.owners(axis)
        column = None if owners is None else call.graph.slice(weight, owners[channel], "column")
        if column is None or not isinstance(weight, torch.nn.Parameter):
            call.graph.lose(strand, "the weight that reads it is computed, or reads it across channels")
        else:
            call.graph.consume(strand, column)
    producer = call.graph.producer(weight)
    if producer is None:
        return ()
    rows = torch.arange(producer.size)
    stage = call.graph.stage((weight, rows, "weight"), (bias, rows, "bias"))
    if stage is None:
        producer.lost = "its bias is computed"
        return ()
    producer.slices += stage
    shape = [1] * call.output.ndim
    shape[axis] = producer.size
    labels = (rows + 1.0).to(call.output.device).reshape(shape).expand(call.output.shape)
    return [(call.output, Strand(producer, labels, stages=(stage,)))]


def _depthwise(call: Call, copies: int) -> Iterator[tuple[Tensor, Strand]]:
    """Filters of single channels belong to the unit of the channel."""
    weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
    for strand in call.strands(call.first):
        owners = strand.owners(1)
        owners = None if owners is None else owners.repeat_interleave(copies)
        stage = None if owners is None else call.graph.stage((weight, owners, "weight"), (bias, owners, "bias"))
        if owners is None or stage is None:
            call.graph.lose(strand, "a depthwise filter of it is computed")
        else:
            yield call.output, _staged(strand, stage, _along(owners, 1, call.output))


@register_rule("batch_norm", "instance_norm")
def _norm(call: Call) -> Pairs:
    weight, bias = call.argument(3, "weight"), call.argument(4, "bias")
    statistics = call.argument(1, "running_mean"), call.argument(2, "running_var")
    return _normalize(call, weight, bias, statistics)


@register_rule("group_norm")
def _group_norm(call: Call) -> Pairs:
    if call.argument(1, "num_groups") != call.first.shape[1]:
        for strand in call.everything():
            call.graph.lose(strand, "a group norm couples it to other channels")
        return ()
    return _normalize(call, call.argument(2, "weight"), call.argument(3, "bias"), (None, None))


def _normalize(call: Call, weight: Any, bias: Any, statistics: tuple[Any, Any]) -> Pairs:
    """A norm that treats every channel alone; its affine entries and running statistics belong to the unit."""
    for strand in call.strands(call.first):
        owners = strand.owners(1)
        if owners is None:
            call.graph.lose(strand, "a norm couples it to other units")
            continue
        mean, variance = statistics
        kept = call.graph.stage((mean, owners, "mean"), (variance, owners, "variance"))
        stage = call.graph.stage((weight, owners, "scale"), (bias, owners, "shift"))
        if not strand.joined or call.graph.mode == "full_group":
            strand.producer.slices += kept or ()
            passed = _staged(strand, stage, strand.labels) if stage else replace(strand, zero=False)
        else:
            passed = replace(strand, zero=False)
        yield call.output, passed


def _staged(strand: Strand, stage: tuple[Slice, ...], labels: Tensor) -> Strand:
    if strand.joined:
        return replace(strand, labels=labels)
    strand.producer.slices += stage
    return replace(strand, labels=labels, zero=True, stages=(*strand.stages, stage))


@register_rule(
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish",
    "hardtanh", "hardsigmoid", "sigmoid", "tanh", "softplus", "softsign", "log_sigmoid", "clamp", "clamp_min",
    "clamp_max", "abs", "square", "sqrt", "pow", "exp", "neg", "sign", "erf", "threshold", "hardshrink", "softshrink",
    "tanhshrink",
    "nan_to_num", "round", "floor", "ceil",
)  # fmt: skip
def _function(call: Call) -> Pairs:
    """A function of single numbers: a unit stays off where the function of zero is zero."""
    strands = call.strands(call.first)
    if len(call.flows) > 1 or call.output.shape != call.first.shape:
        return _lost(call, "a function that also depends on something else")
    keeps = bool((call.repeat(lambda x: torch.zeros_like(x) if x is call.first else x) == 0).all())
    return [(call.output, replace(strand, zero=strand.zero and keeps)) for strand in strands]


@register_rule(
    "contiguous", "clone", "detach", "to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda",
    "positive", "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout",
)  # fmt: skip
def _same(call: Call) -> Pairs:
    return [(call.output, strand) for strand in call.strands(call.first)]


@register_rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "lp_pool1d", "lp_pool2d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "adaptive_max_pool3d", "interpolate", "upsample",
)  # fmt: skip
def _pool(call: Call) -> Pairs:
    """What gathers or spreads the positions of each channel."""
    if not isinstance(call.output, Tensor):
        return _lost(call, "a pooling with indices")
    owners = [(strand, strand.owners(1)) for strand in call.strands(call.first)]
    if any(owner is None for _, owner in owners):
        return _lost(call, "a pooling across channels")
    return [(call.output, replace(s, labels=_along(o, 1, call.output))) for s, o in owners if o is not None]


@register_rule("mean", "sum", "amax", "amin")
def _reduce(call: Call) -> Pairs:
    dims, keep = call.argument(1, "dim"), call.argument(2, "keepdim", False)
    pairs = []
    for strand in call.strands(call.first):
        dims = tuple(range(strand.labels.ndim)) if dims is None else dims
        labels = strand.labels.amax(dims, keepdim=keep)
        if torch.equal(labels, strand.labels.where(strand.labels >= 0, strand.labels.amax()).amin(dims, keepdim=keep)):
            pairs.append((call.output, replace(strand, labels=labels)))
        else:
            call.graph.lose(strand, f"{call.name!r} is taken over several units")
    return pairs


@register_rule(
    "view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "permute", "transpose", "movedim", "moveaxis",
    "swapaxes", "swapdims", "t", "get", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "repeat",
    "repeat_interleave", "cat", "concat", "concatenate", "stack", "chunk", "split", "tensor_split", "unbind", "getitem",
    "narrow", "select", "index_select", "roll", "flip", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "pad",
)  # fmt: skip
def _move(call: Call) -> Pairs:
    """What only moves numbers moves the labels alike."""
    if call.name == "view":  # labels are not laid out in memory as the activation is
        call = replace(call, func=torch.Tensor.reshape)
    if call.name == "pad" and call.argument(2, "mode", "constant") == "constant":
        call = replace(call, args=(call.first, call.argument(1, "pad")), kwargs={"value": NOTHING})
    pairs: list[tuple[Tensor, Strand]] = []
    for key, strands in call.flows.items():
        for strand in strands:
            moved = call.repeat(lambda x, key=key, strand=strand: _stand_in(x, id(x) == key, strand))  # type: ignore[misc]
            for output, labels in zip(tensors_in(call.output), tensors_in(moved), strict=True):
                if bool((labels > 0).any()):
                    _gather(pairs, output, replace(strand, labels=labels))
    return pairs


def _gather(pairs: list[tuple[Tensor, Strand]], output: Tensor, strand: Strand) -> None:
    """Parts of one strand that come together again become one."""
    for i, (place, other) in enumerate(pairs):
        if place is output and replace(other, labels=strand.labels).matches(strand) and other.zero == strand.zero:
            pairs[i] = output, replace(other, labels=other.labels.maximum(strand.labels))
            return
    pairs.append((output, strand))


def _stand_in(x: Tensor, here: bool, strand: Strand) -> Tensor:
    return strand.labels if here else torch.zeros_like(x) if x.is_floating_point() else x


@register_rule("add", "iadd", "radd", "sub", "isub", "subtract", "rsub")
def _sum(call: Call) -> Pairs:
    one, two = call.first, call.argument(1, "other")
    if call.is_activation(one) and call.is_activation(two):
        return _combined(call, one, two, lambda a, b: a and b) or _joined(call, one, two)
    pairs = []
    for strand in _broadcast(call):
        norm = call.graph.norms[-1] if call.graph.norms else None
        owners = strand.owners(1)
        if norm is None or owners is None or len(owners) != len(norm.weight):
            pairs.append((call.output, replace(strand, zero=False)))
        else:  # a norm that is written out, as frozen ones are: scaled before, shifted here
            pairs += _normalize(call, norm.weight, norm.bias, (norm.running_mean, norm.running_var))
    return pairs


@register_rule("mul", "imul", "rmul", "multiply", "div", "idiv", "truediv", "itruediv", "divide", "true_divide")
def _product(call: Call) -> Pairs:
    """A factor that is zero when its unit is off switches the product off; other factors are gates of other units."""
    one, two = call.first, call.argument(1, "other")
    if call.is_activation(two) and "div" in call.name:
        return _lost(call, "it is divided by")
    if not (call.is_activation(one) and call.is_activation(two)):
        return [(call.output, strand) for strand in _broadcast(call)]
    matched = _combined(call, one, two, lambda a, b: a or b)
    if matched:
        return matched
    pairs = []
    for strand in _broadcast(call):
        if strand.zero:
            pairs.append((call.output, strand))
        else:
            call.graph.lose(strand, "it is a gate of other units")
    return pairs


def _combined(call: Call, one: Any, two: Any, zero: Any) -> list[tuple[Tensor, Strand]]:
    """Two functions of the same units make another function of them; empty if they are not that."""
    ones, twos = call.strands(one), call.strands(two)
    pairs = list(zip(ones, twos, strict=False))
    if len(ones) != len(twos) or one.shape != two.shape or not all(a.matches(b) for a, b in pairs):
        return []
    return [(call.output, replace(a, zero=zero(a.zero, b.zero))) for a, b in pairs]


def _joined(call: Call, one: Any, two: Any) -> Pairs:
    if call.graph.mode == "full_group":
        return [(call.output, strand) for strand in call.graph.unite(call.strands(one), call.strands(two))]
    return [(call.output, joined) for strand in _broadcast(call) for joined in call.graph.join(strand)]


def _broadcast(call: Call) -> Iterator[Strand]:
    for strand in call.everything():
        yield replace(strand, labels=strand.labels.expand(call.output.shape))


def _along(owners: Tensor, axis: int, output: Tensor) -> Tensor:
    """Labels of an activation whose channels, with these owners, are on this axis."""
    shape = [1] * output.ndim
    shape[axis] = len(owners)
    return (owners + 1.0).to(output.device).reshape(shape).expand(output.shape)


def _lost(call: Call, why: str) -> Pairs:
    for strand in call.everything():
        call.graph.lose(strand, why)
    return ()
