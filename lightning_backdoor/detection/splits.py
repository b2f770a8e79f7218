"""The exact split of one-dimensional values into two groups, of many rows of values at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_backdoor.errors import ArgumentError

__all__ = ["Split", "running_sums", "split_rows", "split_units"]

MIN_MEMBERS = 10  # of either group of a split; fewer samples are outliers
CACHED = 2**17  # numbers of rows that are split at once on a CPU: they stay in its cache
BLOCK = 2**23  # the same on an accelerator, which bounds the memory


@dataclass(frozen=True)
class Split:
    """Two groups in every row, or column.

    Attributes:
        threshold: Halfway between the groups, double ``(...)``.
        low: Mean of the lower group, double ``(...)``.
        high: Mean of the upper group, double ``(...)``.
        standardized_gap: Distance of the means over the sum of the two standard deviations, double ``(...)``; zero
            where a row cannot be split.
        members: Size of the upper group, long ``(...)``; zero where a row cannot be split.
    """

    threshold: Tensor
    low: Tensor
    high: Tensor
    standardized_gap: Tensor
    members: Tensor

    def flatten(self) -> Split:
        """The same with all figures in one row."""
        return Split(*(figure.flatten() for figure in self._figures()))

    def at(self, places: Tensor) -> Split:
        """The figures ``(L, C)`` at ``places``, long ``(L, C)``, of figures ``(L, U)``."""
        return Split(*(figure.gather(1, places) for figure in self._figures()))

    def _figures(self) -> tuple[Tensor, ...]:
        return self.threshold, self.low, self.high, self.standardized_gap, self.members


def split_units(values: Tensor, min_members: int = MIN_MEMBERS) -> Split:
    """Split every column into the two groups with the smallest squared deviations (exact, all units at once).

    Equal values stay together: a column without two different groups of ``min_members`` has a standardized gap of 0.

    Args:
        values: Float, shape ``(N, U)``.
        min_members: Smallest size of a group.

    Raises:
        ArgumentError: If there are fewer than two groups' worth of rows, or a value is not finite.
    """
    if len(values) < 2 * min_members:
        raise ArgumentError(f"`values` must have at least {2 * min_members} rows, got {len(values)}.")
    found = split_rows(values.T[None], torch.tensor([len(values)]), torch.tensor([min_members]))
    require_finite(found)
    return found.flatten()


def require_finite(split: Split) -> None:
    """Raise an ArgumentError if values that were split are not finite."""
    if not bool(split.low.isfinite().all()):
        raise ArgumentError("`values` must be finite, got NaN or infinity. Clamp them to the range of their dtype.")


def split_rows(values: Tensor, counts: Tensor, smallest: Tensor) -> Split:
    """Split the first values of every row into the two groups with the smallest squared deviations (exact).

    Sums are in double precision. Equal values stay together.

    Args:
        values: Float ``(L, R, n)``, R rows for each of L labels.
        counts: How many values of a label's rows are split, the others being padding, long ``(L,)``.
        smallest: Smallest size of a group, long ``(L,)``.

    Returns:
        Figures ``(L, R)``; a lower mean that is not finite where a value of the row is not.
    """
    counts, smallest = counts.to(values.device)[:, None, None], smallest.to(values.device)[:, None, None]
    size = max((CACHED if values.device.type == "cpu" else BLOCK) // max(len(values) * values.shape[2], 1), 1)
    parts = [_split_block(block, counts, smallest) for block in torch.split(values, size, dim=1)]
    return Split(*(torch.cat(figure, dim=1) for figure in zip(*parts, strict=True)))


def _split_block(values: Tensor, counts: Tensor, smallest: Tensor) -> list[Tensor]:
    # Products with zeros and ones stand for masks: on a CPU they take a tenth of the time of `where`.
    values = values if values.dtype == torch.float64 else values.float()
    places = torch.arange(values.shape[2], device=values.device)
    inside = places < counts
    padding = torch.finfo(values.dtype).max * (~inside).to(values.dtype)
    values = values * inside.to(values.dtype)
    center = values.sum(dim=2, keepdim=True, dtype=torch.float64) / counts
    ordered = _sorted(values.add_(padding)).double().sub_(center).mul_(inside.double())
    sums = running_sums(ordered)
    total = sums[..., -1:].clone()
    low_size = places[1:].double()  # of the lower group, for a cut before every value but the first
    high_size = (counts - low_size).clamp(min=1)
    possible = (low_size >= smallest) & (high_size >= smallest) & inside[..., 1:]
    # The sum of squares between the groups, from how much the lower sum exceeds its share of the total. A cut between
    # equal values explains nothing.
    explained = sums[..., :-1].addcmul(low_size, -total / counts).square_()
    explained.mul_((1 / low_size + 1 / high_size) * possible).mul_((ordered[..., 1:] - ordered[..., :-1]).sign_())
    best, at = explained.max(dim=2, keepdim=True)
    found = best > 0
    n_low = at + 1.0
    n_high = counts - n_low
    cut = (ordered.gather(2, at) + ordered.gather(2, at + 1)) / 2
    largest = torch.maximum(-ordered[..., :1], ordered.gather(2, (counts - 1).expand_as(at)))
    squares = running_sums(ordered.square_())
    sum_low, square_low = sums.gather(2, at), squares.gather(2, at)
    low, high = sum_low / n_low, (total - sum_low) / n_high
    var_low = (square_low / n_low - low.square()).clamp(min=0)
    var_high = ((squares[..., -1:] - square_low) / n_high - high.square()).clamp(min=0)
    # Groups without any spread are common among silent units.
    spread = torch.maximum(var_low.sqrt() + var_high.sqrt(), 1e-6 * largest)
    standardized_gap = torch.where(found, (high - low) / spread, 0)
    members = torch.where(found, n_high, 0).long()
    return [figure.squeeze(2) for figure in (cut + center, low + center, high + center, standardized_gap, members)]


def running_sums(values: Tensor) -> Tensor:
    """Sums of the first 1, 2, ... values along the last dimension, in the same order of additions every time.

    The sum that CUDA comes with has no fixed order, and is refused where a user wants kernels to be deterministic.
    """
    if values.device.type == "cpu":
        return values.cumsum(dim=-1)
    step = 1
    while step < values.shape[-1]:
        values = torch.cat([values[..., :step], values[..., step:] + values[..., :-step]], dim=-1)
        step *= 2
    return values


def _sorted(values: Tensor) -> Tensor:
    """Every row in rising order. NumPy sorts values alone, which takes a tenth of the time of values with places."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(force=True), axis=2))
    return values.sort(dim=2).values
