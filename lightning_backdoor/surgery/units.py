"""Find the units of a model: which weights belong to one neuron, and who reads it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_backdoor.errors import ModelError
from lightning_backdoor.surgery.graph import Graph, ResidualMode, record
from lightning_backdoor.surgery.heads import unit_layers
from lightning_backdoor.surgery.unit_trace import Producer, Slice

__all__ = ["UnitLayer", "find_units"]


@dataclass(frozen=True, eq=False)
class UnitLayer:
    """A layer whose units (output channels or features) can be cut out of the network exactly.

    Attributes:
        name: Name of the layer, as in ``module.named_modules()``.
        layer: The layer.
        size: Number of units.
        slices: The entries of parameters and buffers that belong to each unit: its row and bias; depthwise filters
            and norms that act on it alone; the columns that read it.
        switches: Entries that turn it off on its ways into sums: a norm's scale and shift, or the row and bias.
        branch: Whether it enters a residual sum; cutting it leaves the other summands.
        trainable: Whether a unit that is drawn anew can learn: False where its row, what reads it or its switch
            is frozen (``requires_grad=False``).
    """

    name: str
    layer: nn.Module
    size: int
    slices: tuple[Slice, ...]
    switches: tuple[Slice, ...] = ()
    branch: bool = False
    trainable: bool = True


def find_units(
    module: nn.Module, run: Callable[[], Tensor], *, residual_mode: ResidualMode = "branch_only"
) -> list[UnitLayer]:
    """Find the layers whose units can be reset, and the weights of each unit, by following one forward pass.

    A layer is offered where cutting one of its units is exact: everything that reads the unit is a column of a weight,
    or a sum to which it adds 0 once it is off. So a hidden layer of a transformer's MLP is offered and its
    queries and keys are not, a convolution before a batch norm is and one before a layer norm is not. Gates (the last
    layer of a squeeze-and-excitation) belong to the units that they scale and are not offered.

    Args:
        module: The model.
        run: Does one forward pass of a few images and returns its logits ``(B, K)``; called twice.
        residual_mode: Which weights belong to a unit that enters a residual sum. ``"branch_only"``: those of
            the branch. ``"reference"``: also the columns of the layer that reads the sum first, as in NONE's code (it
            leaves out the columns behind projection shortcuts; here they are cut, too). ``"full_group"``: the channel
            in all summands of its stage and all that reads any of the sums; sums that a norm couples across channels
            (transformers, ConvNeXt) or that hold anything else than units offer none.

    Returns:
        The layers in the order in which they run, without the classifier head.

    Raises:
        ModelError: No unit can be reset, or the weights are quantised or sharded.
    """
    _check_weights(module)
    layers = unit_layers(module, run)
    graph = record(module, run, layers, residual_mode)
    by_name = {producer.name: producer for producer in graph.producers}
    found: list[UnitLayer] = []
    odd = [name for name in layers if name not in by_name]
    for producer in by_name.values():
        if any(graph.is_shared(piece.tensor) for piece in producer.slices):
            odd.append(producer.name)
            producer.lost = "a weight of it, or of what reads it, is shared or used several times"
    for name in layers:
        if name in by_name:
            found += _offer(by_name[name], graph)
    if not found:
        reasons = "; ".join(f"{p.name!r}: {p.lost or 'nothing reads it'}" for p in list(by_name.values())[-3:])
        reasons = reasons or "it has no hidden layer with weights of its own"
        raise ModelError(
            f"No unit of {type(module).__name__} can be reset ({reasons}). "
            "Use a defence that works on samples (UltraCleanCallback), or a model with batch norm or MLP layers."
        )
    if odd:
        warnings.warn(
            f"The units of {odd} are left alone: their weights are computed (parametrised), or weights are shared.",
            UserWarning,
            stacklevel=2,
        )
    return found


def _offer(producer: Producer, graph: Graph) -> list[UnitLayer]:
    """The layer, if its units and those that are added to them in one group can be cut."""
    group = [member for member in graph.producers if member in graph.group(producer)]
    slices = tuple(piece for member in group for piece in member.slices)
    columns = [piece for piece in slices if piece.role == "column"]
    if any(member.lost for member in group) or not (columns or producer.joins):
        return []
    switches = [_switch(stages) for stages in producer.joins]
    learns = [*columns, *(piece for piece in slices if piece.module is producer.layer and piece.role == "weight")]
    return [
        UnitLayer(
            producer.name,
            producer.layer,
            producer.size,
            slices,
            tuple(piece for switch in switches for piece in switch),
            branch=bool(switches),
            trainable=all(piece.tensor.requires_grad for piece in learns) and all(switches),
        )
    ]


def _switch(stages: tuple[tuple[Slice, ...], ...]) -> tuple[Slice, ...]:
    """The last stage on the way into a sum that learns; a frozen norm behind it lets a zero pass once it is reset."""
    for stage in reversed(stages):
        if stage[0].tensor.requires_grad:
            return stage
        if stage[0].role != "scale":
            break
    return ()


def _check_weights(module: nn.Module) -> None:
    for name, part in module.named_modules():
        parameters = list(part.parameters(recurse=False))
        if "quantized" in type(part).__module__ or any(not p.is_floating_point() for p in parameters):
            raise ModelError(
                f"Units cannot be reset in quantised weights, but {name!r} is a {type(part).__name__}. "
                "Train and defend the model in floating point, quantise it afterwards."
            )
        sharded = any(type(p).__name__ == "DTensor" or hasattr(p, "ds_id") for p in parameters)
        if sharded or "FullySharded" in type(part).__name__:
            raise ModelError(
                f"Units cannot be reset in sharded weights, but {name!r} ({type(part).__name__}) is sharded. "
                'Use a strategy that keeps whole weights, such as strategy="ddp".'
            )
