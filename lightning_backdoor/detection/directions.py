"""Directions along which the samples of one label fall into two groups: discriminants, fitted for many labels at once.

From top to bottom: the values of labels in standard deviations, Fisher's discriminant with every sample left out once,
and the search that takes turns of both with exact splits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_backdoor.detection.label_groups import LabelBatch, LabelGroups
from lightning_backdoor.detection.splits import MIN_MEMBERS, Split, require_finite, split_rows

__all__ = [
    "Direction",
    "LabelSplit",
    "Standardized",
    "allowed_gap",
    "discriminant",
    "discriminants",
    "full_precision",
    "sharpened_directions",
    "smallest_group",
    "split_labels",
    "standardize",
]

MIN_SHARE = 0.01  # of the label in either group; fewer samples are outliers
CANDIDATES = 3  # units per label from which the search for a direction starts
ROUNDS = 3  # of split and discriminant
ERRORS = 2.0  # standard errors that are allowed for chance in figures of small groups
RIDGE = 0.1
MAX_UNITS = 512  # of a direction

SMALL = 64  # rows of a matrix that is factorized at once
STRIP = 128  # rows of a triangular product at once: the zeros beside the triangle are left out
CANCELED = 0.25  # of the scatter is left within the groups, at least, where it is found by a difference


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32, whatever the user has set for the training (TF32, bfloat16)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# Fisher's linear discriminant.


@dataclass(frozen=True)
class Standardized:
    """Values of L labels in standard deviations of their label, about its mean.

    Attributes:
        columns: Float ``(L, M, n)``, M units of n samples; zero where a unit is constant, and in the padding.
        center: Means, float ``(L, M)``.
        scale: Standard deviations, float ``(L, M)``; infinite where a unit is constant but for rounding.
        scatter: Mean products of the columns, float ``(L, M, M)``.
        counts: Samples of each label, long ``(L,)``.
        inside: Which of the n samples there are, bool ``(L, n)``.
    """

    columns: Tensor
    center: Tensor
    scale: Tensor
    scatter: Tensor
    counts: Tensor
    inside: Tensor


def standardize(columns: Tensor, counts: Tensor, inside: Tensor) -> Standardized:
    """Standardize the values of L labels, float ``(L, M, n)``; see :class:`Standardized`."""
    n, mask = counts[:, None].to(columns.dtype), inside[:, None].to(columns.dtype)
    columns = columns * mask
    largest = columns.abs().amax(dim=2)
    center = columns.sum(dim=2) / n
    columns = (columns - center[..., None]) * mask
    scale = (columns.square().sum(dim=2) / (n - 1)).sqrt()
    scale = scale.masked_fill(scale <= 1e-6 * largest, torch.inf)
    columns /= scale[..., None]
    return Standardized(columns, center, scale, _scatter(columns, n), counts, inside)


def _scatter(columns: Tensor, n: Tensor) -> Tensor:
    """Mean products of the columns, ``(L, M, M)``; the matrix is symmetric, so that half of it is multiplied."""
    scatter = columns.new_empty(*columns.shape[:2], columns.shape[1])
    for start in range(0, columns.shape[1], STRIP):
        end = min(start + STRIP, columns.shape[1])
        strip = columns[:, start:end] @ columns[:, :end].mT / n[..., None]
        scatter[:, start:end, :end], scatter[:, :end, start:end] = strip, strip.mT
    return scatter


def discriminants(values: Standardized, upper: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """Fisher's linear discriminant between two groups of a label, with a ridge, for P divisions of labels.

    Args:
        values: Of L labels, M units and at most n samples.
        upper: Samples of the upper group, bool ``(P, n)``, none in the padding; two of either group at least.
        of: The label that is divided, long ``(P,)`` below L.

    Returns:
        Weights, float ``(P, M)``, and the position, float ``(P, n)``, of every sample along the weights that were
        fitted without it (leave one out, in closed form by the Sherman-Morrison identity).
    """
    columns, inside, n = values.columns[of], values.inside[of], values.counts[of].double()[:, None]
    n_upper = upper.sum(dim=1, keepdim=True).double()
    n_lower = n - n_upper
    sums = columns @ torch.stack([upper, inside & ~upper], dim=2).to(columns.dtype)
    gap = sums[..., 0] / n_upper.float() - sums[..., 1] / n_lower.float()
    # The mean of a sample's group is `share * gap`, because the mean of all samples is zero.
    share = torch.where(upper, n_lower / n, -n_upper / n)
    columns.baddbmm_(gap[:, :, None], (share * inside).float()[:, None], alpha=-1)  # now deviations
    within = _within(values.scatter[of], columns, gap, n_upper * n_lower / n.square(), n)
    ridge = RIDGE * within.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=1e-6)
    within.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    root = inverse_root(within)
    white_gap = root @ gap[..., None]
    weights = (root.mT @ white_gap).squeeze(2)
    h, along = torch.zeros_like(share), torch.zeros_like(share)  # of a deviation d: d' A^-1 d and d' A^-1 gap
    for start in range(0, root.shape[1], STRIP):
        rows = slice(start, start + STRIP)
        white = root[:, rows, : rows.stop] @ columns[:, : rows.stop]
        along += (white_gap[:, rows].mT @ white).squeeze(1)
        h += white.square_().sum(dim=1)
    # Without sample i, whose deviation is d, the scatter loses c d d' and the gap moves by s d.
    size = torch.where(upper, n_upper, n_lower)
    c = size / (size - 1) / n
    s = torch.where(upper, -1.0, 1.0) / (size - 1)
    own = h + share * along  # x' A^-1 d for a sample at x
    plain = along + share * white_gap.double().square().sum(dim=1) + s * own
    returned = c * own * (along + s * h) / (1 - c * h)
    norm = torch.linalg.vector_norm(weights, dim=1, keepdim=True)
    weights = weights / values.scale[of] / norm
    positions = (plain + returned) / norm + (values.center[of] * weights).sum(dim=1, keepdim=True)
    return weights, positions.float()


def _within(scatter: Tensor, deviations: Tensor, gap: Tensor, between: Tensor, n: Tensor) -> Tensor:
    """Scatter within the groups, ``(P, M, M)``: all of it without that between them, or summed up anew.

    The difference takes no sum over samples. It is not exact enough where little is left.
    """
    gap = gap * between.sqrt().float()
    within = torch.baddbmm(scatter, gap[:, :, None], gap[:, None], alpha=-1)
    left, whole = (matrix.diagonal(dim1=1, dim2=2).mean(dim=1) for matrix in (within, scatter))
    (anew,) = (left < CANCELED * whole).nonzero(as_tuple=True)
    if len(anew):
        within[anew] = _scatter(deviations[anew], n[anew].float())
    return within


def inverse_root(matrices: Tensor) -> Tensor:
    """The inverse R of the Cholesky factor of positive definite matrices ``(P, M, M)``: lower, ``R A R' = 1``.

    By halves, so that nearly all of the work is products of matrices, which every device does fastest.
    """
    size = matrices.shape[-1]
    if size <= SMALL:
        factor = torch.linalg.cholesky(matrices)
        one = torch.eye(size, dtype=matrices.dtype, device=matrices.device)
        inverse: Tensor = torch.linalg.solve_triangular(factor, one.expand_as(factor), upper=False)
        return inverse
    half = size // 2
    first = inverse_root(matrices[:, :half, :half])
    below = matrices[:, half:, :half] @ first.mT
    second = inverse_root(matrices[:, half:, half:] - below @ below.mT)
    root = torch.zeros_like(matrices)
    root[:, :half, :half], root[:, half:, half:] = first, second
    root[:, half:, :half] = second @ (below @ first) * -1
    return root


def discriminant(members: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`discriminants` of one division of the samples ``(n, M)`` by ``upper``, bool ``(n,)``.

    Returns:
        Weights ``(M,)`` and positions ``(n,)``.
    """
    one = torch.ones_like(upper)[None]
    values = standardize(members.T[None], one.sum(dim=1), one)
    weights, positions = discriminants(values, upper[None], torch.zeros(1, dtype=torch.long, device=members.device))
    return weights[0], positions[0]


# The search.


@dataclass(frozen=True)
class Direction:
    """Units, their weights, and how the projections of one label's samples split.

    Attributes:
        label: The label.
        size: Number of its samples.
        units: Columns of the values, long ``(M,)``.
        weights: Their weights, float ``(M,)``.
        fitted: Columns on which the discriminants of the label are fitted, long ``(M,)``.
        threshold, low, high, members: See :class:`~lightning_backdoor.detection.splits.Split`.
        standardized_gap: With the allowance of :func:`allowed_gap`.
    """

    label: int
    size: int
    units: Tensor
    weights: Tensor
    fitted: Tensor
    threshold: float
    low: float
    high: float
    members: int
    standardized_gap: float


def smallest_group(counts: Tensor) -> Tensor:
    """Samples that either group of a label must have, of its ``counts`` samples: 10 and 1 %; long, the same shape."""
    return (MIN_SHARE * counts.double()).ceil().long().clamp(min=MIN_MEMBERS)


def allowed_gap(split: Split, counts: Tensor) -> Tensor:
    """Standardized gap if the spread is larger by twice the sampling error of the smaller group, ``1 / sqrt(2 m)``.

    Among many units some have a few samples that lie close together by chance, above all where tails are heavy.

    Args:
        split: Figures of any shape.
        counts: Number of samples that were split, of the same shape.
    """
    smaller = torch.minimum(split.members, counts - split.members).clamp(min=1)
    return split.standardized_gap / (1 + ERRORS / (2 * smaller).double().sqrt())


@dataclass(frozen=True)
class LabelSplit:
    """How positions of one label's samples split; ``allowed_gap`` is the standardized gap with the allowance."""

    threshold: float
    low: float
    high: float
    standardized_gap: float
    members: int
    allowed_gap: float


def split_labels(positions: Tensor, groups: LabelGroups) -> dict[int, LabelSplit]:
    """Split the positions ``(N,)`` of all samples, in every label of at least 20 samples."""
    found = {}
    for batch in groups.batches(2 * MIN_MEMBERS, 1):
        split = split_rows(positions[batch.rows][:, None], batch.counts, smallest_group(batch.counts)).flatten()
        gap = allowed_gap(split, batch.counts)
        figures = split.threshold, split.low, split.high, split.standardized_gap, split.members.double(), gap
        for label, row in zip(batch.labels, torch.stack(figures, dim=1).tolist(), strict=True):
            threshold, low, high, plain, members, allowed = row
            found[label] = LabelSplit(threshold, low, high, plain, int(members), allowed)
    return found


def sharpened_directions(values: Tensor, groups: LabelGroups, least: float) -> dict[int, list[Direction]]:
    """Directions along which the samples of a label fall into two groups, for every label.

    They start from the best separated units of the label. Each is sharpened in turns of a discriminant and a split of
    the positions, as long as the gap grows.

    Args:
        values: Response of every unit to every sample, float, shape ``(N, U)``.
        groups: The samples by label.
        least: Smallest standardized gap of a direction that is returned.

    Returns:
        For every label that has any, its directions, largest gap first.

    Raises:
        ArgumentError: A value is not finite.
    """
    found: dict[int, list[Direction]] = {}
    with full_precision():
        for batch in groups.batches(2 * MIN_MEMBERS, values.shape[1], min(values.shape[1], MAX_UNITS)):
            found |= _directions_of_batch(values, batch, least)
    return found


def _directions_of_batch(values: Tensor, batch: LabelBatch, least: float) -> dict[int, list[Direction]]:
    counts, smallest = batch.counts, smallest_group(batch.counts)
    columns = values[batch.rows].mT.float().contiguous()  # (L, U, n)
    single = split_rows(columns, counts, smallest)
    require_finite(single)
    ranked = single.standardized_gap.argsort(dim=1, descending=True, stable=True)
    starts, units = ranked[:, :CANDIDATES], ranked[:, :MAX_UNITS].sort(dim=1).values
    # Pairs of a label and a unit from which the search starts. They drop out when the gap does not grow any more: also
    # when the groups are those that the discriminant was fitted to, as the next one would be the same.
    split = single.at(starts).flatten()
    positions = columns.gather(1, starts[..., None].expand(-1, -1, columns.shape[2])).flatten(0, 1)
    pair = torch.arange(starts.numel(), device=values.device)
    of, best = pair // starts.shape[1], torch.zeros_like(split.standardized_gap)
    standardized: Standardized | None = None
    turns: list[tuple[Tensor, Tensor | None]] = []
    weights, upper = None, torch.zeros_like(positions, dtype=torch.bool)
    for turn in range(ROUNDS + 1):
        grown = split.standardized_gap > best
        gap = allowed_gap(split, counts[of])
        figures = pair, grown & (gap >= least), split.threshold, split.low, split.high, split.members, gap
        turns.append((torch.stack([figure.double() for figure in figures], dim=1), weights))
        divided, upper = upper, (positions.double() > split.threshold[:, None]) & batch.inside[of]
        (still,) = (grown & (upper != divided).any(dim=1)).nonzero(as_tuple=True)
        if turn == ROUNDS or not len(still):
            break
        if standardized is None:
            rows = columns.gather(1, units[..., None].expand(-1, -1, columns.shape[2]))
            standardized = standardize(rows if units.shape[1] < columns.shape[1] else columns, counts, batch.inside)
        pair, of, upper, best = pair[still], of[still], upper[still], split.standardized_gap[still]
        weights, positions = discriminants(standardized, upper, of)
        split = split_rows(positions[:, None], counts[of], smallest[of]).flatten()
    found: dict[int, list[Direction]] = {}
    lengths = [len(figures) for figures, _ in turns]
    told = torch.cat([figures for figures, _ in turns]).tolist()
    places = ((turn, place) for turn, length in enumerate(lengths) for place in range(length))
    passed = [(int(row[0]), *place, row) for place, row in zip(places, told, strict=True) if row[1]]
    for of_pair, turn, place, row in sorted(passed, key=lambda one: (-one[3][6], one[0], one[1])):
        at, candidate = divmod(of_pair, starts.shape[1])
        fitted = turns[turn][1]
        chosen = units[at].clone() if fitted is not None else starts[at, candidate : candidate + 1].clone()
        along = fitted[place].clone() if fitted is not None else columns.new_ones(1)
        threshold, low, high, members, gap = row[2:]
        which = batch.labels[at], batch.sizes[at], chosen, along, units[at].clone()
        found.setdefault(batch.labels[at], []).append(Direction(*which, threshold, low, high, int(members), gap))
    return found
