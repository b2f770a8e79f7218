"""What belongs to a unit, and where it is in an activation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["NOTHING", "Producer", "Role", "Slice", "Strand"]

Role = Literal["weight", "bias", "scale", "shift", "mean", "variance", "column"]
NOTHING = -1.0


@dataclass(frozen=True, eq=False)
class Slice:
    """Entries of one parameter or buffer that belong to the units of a layer.

    Attributes:
        module: The module that holds the tensor.
        attribute: Its name there; it is read when needed, so that a parameter may be replaced meanwhile.
        owner: Long, one number per entry of the tensor's leading dimensions (size 1 is broadcast): the unit to which
            the entry belongs, -1 where it belongs to none.
        role: ``weight`` and ``bias`` make the unit (its row, or its filter in a depthwise convolution), ``scale``,
            ``shift``, ``mean`` and ``variance`` normalise it, a ``column`` reads it.
    """

    module: nn.Module
    attribute: str
    owner: Tensor
    role: Role

    @property
    def tensor(self) -> Tensor:
        """The parameter or buffer."""
        value: Tensor = getattr(self.module, self.attribute)
        return value

    def mask(self, units: Tensor) -> Tensor:
        """Bool, broadcast to the shape of the tensor: the entries of these units (long ``(M,)``)."""
        tensor = self.tensor
        found = torch.isin(self.owner, units.to(self.owner.device)).to(tensor.device)
        return found.reshape(*found.shape, *[1] * (tensor.ndim - found.ndim)).expand(tensor.shape)


@dataclass(eq=False)
class Producer:
    """A layer that makes units, and what is known of them so far.

    Attributes:
        name: Its name.
        layer: The layer.
        size: Number of units.
        slices: What belongs to its units, in order of the forward pass.
        joins: For each sum that the units enter: the affine stages on the way there, first to last.
        lost: Why its units cannot be cut, None as long as they can.
        read_behind_sum: Whether the first weight that reads a sum of them is known.
    """

    name: str
    layer: nn.Module
    size: int
    slices: list[Slice] = field(default_factory=list)
    joins: list[tuple[tuple[Slice, ...], ...]] = field(default_factory=list)
    lost: str | None = None
    read_behind_sum: bool = False


@dataclass(frozen=True, eq=False)
class Strand:
    """Where the units of one producer are in one activation.

    Attributes:
        producer: Where they come from.
        labels: Float, shape of the activation: 1 + unit, 0 where something else flows, ``NOTHING`` in a padding. Being
            a tensor, it goes through views, permutations, concatenations and the like as the activation does.
        zero: Whether a unit is zero here when its last affine stage is.
        stages: What can switch the unit off: the producer's own row and bias, then depthwise filters and norms.
        joined: Whether other units were added on the way.
    """

    producer: Producer
    labels: Tensor
    zero: bool = True
    stages: tuple[tuple[Slice, ...], ...] = ()
    joined: bool = False

    def owners(self, axis: int) -> Tensor | None:
        """The unit of each channel (-1: none) where channels are on this axis, None where they are not."""
        rows = self.labels.movedim(axis, 0)
        for dim in range(1, rows.ndim):
            if rows.stride(dim) == 0 and rows.shape[dim] > 1:
                rows = rows.narrow(dim, 0, 1)
        rows = rows.reshape(len(rows), -1)
        top = rows.amax(dim=1)
        constant = (rows == top[:, None]) | (rows == NOTHING)
        return top.long().cpu().clamp(min=0) - 1 if bool(constant.all()) else None

    def matches(self, other: Strand) -> bool:
        """Whether the other strand is another function of the same units at the same places, switched alike."""
        return (
            self.producer is other.producer
            and not (self.joined or other.joined)
            and len(self.stages) == len(other.stages)
            and all(one is two for one, two in zip(self.stages, other.stages, strict=True))
            and bool((self.labels == other.labels).all())
        )
