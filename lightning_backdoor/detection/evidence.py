"""Does a group of samples show again in samples that had no part in finding it? An exact test.

A search over many units finds two groups in any noise, the more so the fewer samples there are: what it finds is no
evidence by itself. Here the search is repeated in two halves of the label that share no near-duplicates. A direction
that was found in one half says which samples of the other half belong to the group; a search in the other half says so,
too, from its own values alone. Where the values of a label are noise without a common axis, the two are independent,
and as many samples in common as were seen have a known probability (Fisher's exact test), whatever the distribution of
the noise is. An axis on which a label varies continuously (brightness, size) is found by both halves, too: that its
samples fall into two groups is for the gates to say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_backdoor.detection.directions import MAX_UNITS, MIN_SHARE, ROUNDS, allowed_gap, discriminant, split_units
from lightning_backdoor.detection.near_duplicates import effective_number

__all__ = ["Replication", "replication"]

STARTS = 5  # units from which the search in a half starts
MIN_HALF = 3  # members of either group in a half, at least: of 10 members, one half has fewer in 5 of 100 draws
PART = 4  # of the group in question, or of the rest: half of what a half has of it. Smaller groups are not sought


@dataclass(frozen=True)
class Replication:
    """How far the two halves of a label find the same group.

    Attributes:
        p_value: Probability of an overlap as large as that seen, or larger, if there is no group: times the number of
            pairs of different divisions from which one was taken, and of sizes from which the smallest one was taken.
        distinct: Effective number of different things among the members; see
            :func:`~lightning_backdoor.detection.near_duplicates.effective_number`.
    """

    p_value: float
    distinct: float


@dataclass(frozen=True)
class _Direction:
    units: Tensor
    weights: Tensor
    threshold: float
    upper: Tensor


def replication(values: Tensor, members: Tensor, groups: Tensor | None = None, *, seed: int = 0) -> Replication:
    """Search both halves of a label for a group, and test whether they find the same.

    Groups that are far smaller than the one in question are not sought: among thousands of units that are mostly
    silent there are always some on which three or four samples of a half stand alone, further than any group.

    Args:
        values: Of the n samples of one label, float ``(n, U)``.
        members: The group in question, bool ``(n,)``. Of the directions that are found in a half, the one that is most
            like it is taken.
        groups: Samples with the same number are near-duplicates, long ``(n,)``; they come into the same half. ``None``:
            there are none.
        seed: Of the halves.

    Returns:
        The figures; a p-value of 1 where a half cannot be searched.
    """
    groups = torch.arange(len(values), device=values.device) if groups is None else groups
    distinct = effective_number(groups[members])
    first = first_half(groups, seed)
    sides = (first, ~first)
    smallest, tried = _smallest(members)
    found = []
    for side in sides:
        candidates = _search(values[side].float(), smallest)
        if not candidates:
            return Replication(1.0, distinct)
        found.append(max(candidates, key=lambda one: _likeness(one.upper, members[side])))
        tried *= len({tuple(one.upper.tolist()) for one in candidates})
    log_p = 0.0
    for direction, other, side in zip(found, found[::-1], sides[::-1], strict=True):
        positions = values[side][:, direction.units].float() @ direction.weights
        log_p += overlap_log_p(positions > direction.threshold, other.upper)
    # Fisher's combination of two p-values whose product is q: q (1 - log q).
    combined = math.exp(min(log_p + math.log(1 - log_p) + math.log(tried), 0.0))
    return Replication(combined, distinct)


def _smallest(members: Tensor) -> tuple[int, int]:
    """The smallest group that is sought in a half, 3, 6, 12, ..., and how many of these there are for any group."""
    n, upper = len(members), int(members.sum())
    sizes = [MIN_HALF]
    while 2 * sizes[-1] <= n // 2 / PART:
        sizes.append(2 * sizes[-1])
    return max((size for size in sizes if size <= min(upper, n - upper) / PART), default=MIN_HALF), len(sizes)


def first_half(groups: Tensor, seed: int) -> Tensor:
    """Divide samples into two halves of about the same size, all of a group into the same; bool, as ``groups``."""
    numbers = torch.unique(groups.cpu(), return_inverse=True)[1]
    sizes = torch.bincount(numbers)
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))
    order = order[sizes[order].argsort(descending=True, stable=True)]
    chosen, balance = torch.zeros(len(sizes), dtype=torch.bool), 0
    for group, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        chosen[group] = balance <= 0
        balance += size if balance <= 0 else -size
    return chosen[numbers].to(groups.device)


def _search(values: Tensor, smallest: int) -> list[_Direction]:
    """The search of :func:`~lightning_backdoor.detection.directions.sharpened_directions`, in half of a label."""
    n = len(values)
    smallest = max(smallest, math.ceil(MIN_SHARE * n))
    if n < 2 * smallest:
        return []
    counts = torch.tensor(n, device=values.device)
    single = split_units(values, smallest)
    ranked = allowed_gap(single, counts).argsort(descending=True, stable=True)
    units, found = ranked[:MAX_UNITS], []
    for unit in ranked[:STARTS]:
        chosen, weights = unit[None], torch.ones(1, device=values.device)
        positions, best = values[:, unit], 0.0
        for _ in range(ROUNDS + 1):
            split = split_units(positions[:, None], smallest)
            upper = positions.double() > split.threshold
            if float(split.standardized_gap) <= best:
                break
            best = float(split.standardized_gap)
            found.append(_Direction(chosen, weights, float(split.threshold), upper))
            weights, positions = discriminant(values[:, units], upper)
            chosen = units
    return found


def _likeness(one: Tensor, other: Tensor) -> float:
    """Correlation of two divisions of the same samples, bool ``(n,)`` each."""
    a, b = (mask.double() - mask.double().mean() for mask in (one, other))
    return float((a * b).sum() / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)).clamp(min=1e-12))


def overlap_log_p(one: Tensor, other: Tensor) -> float:
    """Logarithm of the probability that two independent divisions, bool ``(n,)``, have so many samples in common."""
    n, a, b, both = len(one), int(one.sum()), int(other.sum()), int((one & other).sum())
    common = torch.arange(max(both, a + b - n), min(a, b) + 1, dtype=torch.float64)

    def ways(of: float, taken: Tensor) -> Tensor:
        whole = torch.tensor(of, dtype=torch.float64)
        return torch.lgamma(whole + 1) - torch.lgamma(taken + 1) - torch.lgamma(whole - taken + 1)

    terms = ways(a, common) + ways(n - a, b - common) - ways(n, torch.tensor(float(b), dtype=torch.float64))
    return min(float(torch.logsumexp(terms, dim=0)), 0.0)
