"""The exact cut of many columns into two groups each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_backdoor.errors import ArgumentError

__all__ = ["BLOCK", "MIN_MEMBERS", "Split", "split_units"]

MIN_MEMBERS = 10  # of either group: a handful of outliers is no population
BLOCK = 2**22  # numbers that are sorted at once


@dataclass(frozen=True)
class Split:
    """Two groups in every column.

    Attributes:
        threshold: Halfway between the groups, double ``(U,)``.
        low: Centre of the lower group, double ``(U,)``.
        high: Centre of the upper group, double ``(U,)``.
        standardized_gap: Distance of the centres over the sum of the two standard deviations, double ``(U,)``; zero where a
            column cannot be split.
        members: Size of the upper group, long ``(U,)``; zero where a column cannot be split.
    """

    threshold: Tensor
    low: Tensor
    high: Tensor
    standardized_gap: Tensor
    members: Tensor


def split_units(values: Tensor, min_members: int = MIN_MEMBERS) -> Split:
    """Split every column into the two groups with the smallest squared deviations (exact, vectorised over units).

    Equal values stay together: a column without two different groups of ``min_members`` has separation 0.

    Args:
        values: Float, shape ``(N, U)``.
        min_members: Smallest size of a group.

    Raises:
        ArgumentError: If there are fewer than two groups' worth of rows, or a value is not finite.
    """
    if len(values) < 2 * min_members:
        raise ArgumentError(f"`values` must have at least {2 * min_members} rows, got {len(values)}.")
    if not bool(values.isfinite().all()):
        raise ArgumentError("`values` must be finite, got NaN or infinity. Clamp them to the range of their dtype.")
    blocks = torch.split(values, max(BLOCK // len(values), 1), dim=1)
    parts = [_split_block(block.double(), min_members) for block in blocks]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return Split(*columns)


def _split_block(values: Tensor, min_members: int) -> tuple[Tensor, ...]:
    n = len(values)
    center = values.mean(dim=0)
    ordered = (values - center).sort(dim=0).values
    sums, squares = ordered.cumsum(0), ordered.square().cumsum(0)
    count = torch.arange(1, n, dtype=torch.float64)[:, None]
    lower, total = sums[:-1], sums[-1:]
    explained = lower.square() / count + (total - lower).square() / (n - count)
    explained[ordered[:-1] == ordered[1:]] = -torch.inf
    explained[: min_members - 1] = -torch.inf
    explained[n - min_members :] = -torch.inf
    best, at = explained.max(dim=0, keepdim=True)
    possible = best.squeeze(0) > -torch.inf
    n_low = at.squeeze(0) + 1.0
    n_high = n - n_low
    sum_low, square_low = sums.gather(0, at).squeeze(0), squares.gather(0, at).squeeze(0)
    low, high = sum_low / n_low, (sums[-1] - sum_low) / n_high
    var_low = (square_low / n_low - low.square()).clamp(min=0)
    var_high = ((squares[-1] - square_low) / n_high - high.square()).clamp(min=0)
    smallest = 1e-6 * ordered.abs().amax(dim=0)  # of a spread: groups without any are common among silent units
    spread = (var_low.sqrt() + var_high.sqrt()).clamp(min=smallest)
    threshold = (ordered.gather(0, at) + ordered.gather(0, at + 1)).squeeze(0) / 2
    standardized_gap = torch.where(possible, (high - low) / spread, 0)
    members = torch.where(possible, n_high, 0).long()
    return threshold + center, low + center, high + center, standardized_gap, members
