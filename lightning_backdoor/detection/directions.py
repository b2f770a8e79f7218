"""Directions along which the samples of a label fall into two groups, searched for many labels at once.

From top to bottom: samples by label, the exact split of a row of values, the values of labels in standard deviations,
Fisher's discriminant with every sample left out once, and the search that takes turns of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_backdoor.errors import ArgumentError

__all__ = [
    "Direction",
    "LabelBatch",
    "LabelGroups",
    "LabelSplit",
    "Split",
    "Standardized",
    "allowed_gap",
    "block_size",
    "discriminant",
    "discriminants",
    "full_precision",
    "group_by_label",
    "running_sums",
    "sharpened_directions",
    "smallest_group",
    "split_labels",
    "split_rows",
    "split_units",
    "standardize",
]

# Samples by label: sorted once, and labels of like size side by side, so that a step works on many labels at once.

LIKE = 0.5  # of the largest label of a batch, at least: what is computed for the padding is less than for the samples


def block_size(device: torch.device) -> int:
    """Numbers that are worked on at once: what a CPU holds in its cache, or what keeps an accelerator busy."""
    return 2**19 if device.type == "cpu" else 2**23


@dataclass(frozen=True)
class LabelBatch:
    """L labels, padded to the size n of the largest one.

    Attributes:
        labels: Class indices, L of them.
        sizes: Samples of each label.
        rows: Positions of its samples in the dataset, long ``(L, n)``; any position where a label has no more samples.
        counts: ``sizes`` as a tensor, long ``(L,)``.
        inside: Which of ``rows`` are samples of the label, bool ``(L, n)``.
    """

    labels: list[int]
    sizes: list[int]
    rows: Tensor
    counts: Tensor
    inside: Tensor


@dataclass(frozen=True)
class LabelGroups:
    """The samples of every label, on the device of the values that are to be grouped.

    Attributes:
        labels: Labels of the samples, long ``(N,)``.
        order: Positions of the samples sorted by label, in rising order within a label, long ``(N,)``.
        starts: Label to the place in ``order`` where it begins.
        sizes: Label to the number of its samples; labels in rising order.
    """

    labels: Tensor
    order: Tensor
    starts: dict[int, int]
    sizes: dict[int, int]

    def _extents(self) -> Iterator[tuple[int, int]]:
        return zip(self.starts.values(), self.sizes.values(), strict=True)

    def positions(self, label: int) -> Tensor:
        """Dataset positions of a label's samples in rising order, long ``(n,)``."""
        return self.order[self.starts[label] : self.starts[label] + self.sizes[label]]

    def totals(self, values: Tensor) -> Tensor:
        """Sum of whole numbers, long ``(N,)``, of every label, in the order of ``sizes``: exact on any device."""
        ends = torch.tensor([start + size - 1 for start, size in self._extents()])
        return values[self.order].cumsum(0)[ends.to(values.device)].diff(prepend=values.new_zeros(1))

    def batches(self, least: int, width: int, rows: int = 1) -> Iterator[LabelBatch]:
        """All labels of at least ``least`` samples, largest first, as many at once as the memory allows.

        Args:
            least: Smallest size of a label.
            width: Numbers that are computed for each sample.
            rows: Rows of as many numbers that are computed for each label, however few its samples are.
        """
        remaining = sorted((label for label, size in self.sizes.items() if size >= least), key=lambda k: -self.sizes[k])
        block = block_size(self.order.device)
        while remaining:
            largest = self.sizes[remaining[0]]
            many = max(block // (max(largest, rows) * width), 1)
            taken = [label for label in remaining[:many] if self.sizes[label] >= LIKE * largest]
            remaining = remaining[len(taken) :]
            yield self._batch(taken, largest)

    def _batch(self, labels: list[int], n: int) -> LabelBatch:
        sizes = [self.sizes[label] for label in labels]
        both = torch.tensor([[self.starts[label] for label in labels], sizes]).to(self.order.device)
        places = torch.arange(n, device=self.order.device)
        inside = places < both[1][:, None]
        return LabelBatch(labels, sizes, self.order[(both[0][:, None] + places) * inside], both[1], inside)


def group_by_label(labels: Tensor) -> LabelGroups:
    """Sort samples by their label, long ``(N,)``."""
    present, counts = torch.unique(labels, return_counts=True)
    counts = counts.cumsum(0)
    names, ends = torch.stack([present, counts]).tolist()
    starts = dict(zip(names, [0, *ends[:-1]], strict=True))
    sizes = {label: end - starts[label] for label, end in zip(names, ends, strict=True)}
    return LabelGroups(labels, labels.argsort(stable=True), starts, sizes)


# The exact split of one-dimensional values into two groups, of many rows of values at once.

MIN_MEMBERS = 10  # of either group of a split; fewer samples are outliers
CACHED = 2**18  # numbers of rows that are split at once on a CPU: few calls, and they stay in its cache
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

    def joined(self, other: Split) -> Split:
        """The figures of both, one row each."""
        return Split(*(torch.cat(pair) for pair in zip(self._figures(), other._figures(), strict=True)))

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


# Directions.

MIN_SHARE = 0.01  # of the label in either group; fewer samples are outliers
CANDIDATES = 3  # units per label from which the search for a direction starts
ROUNDS = 3  # of split and discriminant
EARLY_ROUNDS = 6  # the same from early neighbors, which name a part of a group and some others
ERRORS = 2.0  # standard errors that are allowed for chance in figures of small groups
RIDGE = 0.1
MAX_UNITS = 512  # of a direction

SMALL = 64  # rows of a matrix that is factorized at once
STRIP = 128  # rows of a triangular product at once: the zeros beside the triangle are left out
STEPS = 1024  # between a ridge and one of twice the size, to which it is rounded, so that divisions of a label share it
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

    def columns_of(self, labels: Tensor) -> Tensor:
        """The columns of some labels; no copy where there is one: divisions of a large label share its values."""
        if len(self.columns) == 1:
            return self.columns.expand(len(labels), -1, -1)
        return self.columns[labels]


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

    The ridge is a tenth of the mean variance within the groups, to the nearest step of 0.07 %.

    Args:
        values: Of L labels, M units and at most n samples.
        upper: Samples of the upper group, bool ``(P, n)``, none in the padding; two of either group at least.
        of: The label that is divided, long ``(P,)`` below L.

    Returns:
        Weights, float ``(P, M)``, and the position, float ``(P, n)``, of every sample along the weights that were
        fitted without it (leave one out, in closed form by the Sherman-Morrison identity).
    """
    inside, n = values.inside[of], values.counts[of].double()[:, None]
    columns = values.columns_of(of)
    n_upper = upper.sum(dim=1, keepdim=True).double()
    n_lower = n - n_upper
    # The mean of all samples is zero: that of the upper group gives the gap, and that of a sample's group is
    # `share * gap`.
    gap = (columns @ upper[..., None].to(columns.dtype)).squeeze(2) * (n / (n_upper * n_lower)).float()
    share = torch.where(upper, n_lower / n, -n_upper / n) * inside
    root, between, lengths = _inverse_roots(values, of, gap, share, n_upper * n_lower / n.square())
    white_gap = root @ gap[..., None]
    weights = (root.mT @ white_gap).squeeze(2)
    whole_gap = white_gap.double().square().sum(dim=1)
    along = (weights[:, None] @ columns).squeeze(1).double() - share * whole_gap
    h = lengths - share * (2 * along + share * whole_gap)
    # These are d' B^-1 gap and d' B^-1 d of a deviation d. With A = B - between gap gap' (Sherman and Morrison):
    rest = (1 - between * whole_gap).clamp(min=1e-9)
    h, along, whole_gap, weights = (
        h + between * along.square() / rest, along / rest, whole_gap / rest, weights / rest.float(),
    )  # fmt: skip
    # Without sample i, whose deviation is d, the scatter loses c d d' and the gap moves by s d.
    size = torch.where(upper, n_upper, n_lower)
    c = size / (size - 1) / n
    s = torch.where(upper, -1.0, 1.0) / (size - 1)
    own = h + share * along  # x' A^-1 d for a sample at x
    plain = along + share * whole_gap + s * own
    returned = c * own * (along + s * h) / (1 - c * h)
    norm = torch.linalg.vector_norm(weights, dim=1, keepdim=True)
    weights = weights / values.scale[of] / norm
    positions = (plain + returned) / norm + (values.center[of] * weights).sum(dim=1, keepdim=True)
    return weights, positions.float()


def _inverse_roots(
    values: Standardized, of: Tensor, gap: Tensor, share: Tensor, between: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Factorize the scatter of labels with the ridges of P divisions: once for those of a label with the same ridge.

    The scatter A within the groups is ``B - between gap gap'``, with B that of the label. Such a difference is not
    exact enough where little is left: there A is summed up anew and stands in the place of B.

    Returns:
        The root R of the inverse of B, ``(P, M, M)``; ``between``, zero where A stands in its place, ``(P, 1)``; and
        ``x' B^-1 x`` of every sample, double ``(P, n)``.
    """
    whole = values.scatter.diagonal(dim1=1, dim2=2).double().mean(dim=1)[of]
    left = whole - between.squeeze(1) * gap.double().square().mean(dim=1)
    (anew,) = (left < CANCELED * whole).nonzero(as_tuple=True)
    apart = torch.zeros_like(of)
    if len(anew):
        apart[anew] = torch.arange(1, len(anew) + 1, device=of.device)
        means = gap[anew][:, :, None] * share[anew].float()[:, None]
        within = _scatter(values.columns_of(of[anew]) - means, values.counts[of[anew], None].float())
        left[anew] = within.diagonal(dim1=1, dim2=2).double().mean(dim=1)
        between = between.index_fill(0, anew, 0)
    steps = ((RIDGE * left.clamp(min=1e-6)).log2() * STEPS).round().long()
    systems, place = torch.unique(torch.stack([of, steps, apart]), dim=1, return_inverse=True)
    matrices = values.scatter[systems[0]]
    if len(anew):
        matrices[place[anew]] = within
    matrices.diagonal(dim1=1, dim2=2).add_((2 ** (systems[1].double() / STEPS)).float()[:, None])
    root = inverse_root(matrices)
    return root[place], between, _lengths(values.columns_of(systems[0]), root)[place]


def _lengths(columns: Tensor, root: Tensor) -> Tensor:
    """Squared length, double ``(Q, n)``, of every sample of the columns ``(Q, M, n)`` times a lower root."""
    lengths = []
    for some in torch.split(columns, max(block_size(columns.device) // (len(columns) * STRIP), 1), dim=2):
        length = torch.zeros(len(some), some.shape[2], dtype=torch.float64, device=columns.device)
        for start in range(0, root.shape[1], STRIP):
            rows = slice(start, start + STRIP)
            length += (root[:, rows, : rows.stop] @ some[:, : rows.stop]).square_().sum(dim=1)
        lengths.append(length)
    return torch.cat(lengths, dim=1)


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
        threshold, low, high, members: See :class:`~lightning_backdoor.detection.directions.Split`.
        standardized_gap: With the allowance of :func:`allowed_gap`.
        early: Whether the search began with the samples whose early neighbors have other labels.
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
    early: bool = False


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


def sharpened_directions(
    values: Tensor, groups: LabelGroups, least: float, agreement: Tensor | None = None
) -> dict[int, list[Direction]]:
    """Directions along which the samples of a label fall into two groups, for every label.

    They start from the best separated units of the label, and from the exact split of the agreement of its samples with
    their early neighbors. Each is sharpened in turns of a discriminant and a split of the positions, as long as the gap
    grows.

    Args:
        values: Response of every unit to every sample, float, shape ``(N, U)``.
        groups: The samples by label.
        least: Smallest standardized gap of a direction that is returned.
        agreement: Share of every sample's early neighbors that had its label, float ``(N,)``.

    Returns:
        For every label that has any, its directions, largest gap first.

    Raises:
        ArgumentError: A value is not finite.
    """
    found: dict[int, list[Direction]] = {}
    with full_precision():
        for batch in groups.batches(2 * MIN_MEMBERS, values.shape[1], min(values.shape[1], MAX_UNITS)):
            found |= _directions_of_batch(values, batch, least, agreement)
    return found


def _directions_of_batch(
    values: Tensor, batch: LabelBatch, least: float, agreement: Tensor | None
) -> dict[int, list[Direction]]:
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
    of = pair // starts.shape[1]
    if agreement is not None:  # as one more unit, on which the samples lie high whose neighbors had other labels
        against = -agreement[batch.rows].float()
        split = split.joined(split_rows(against[:, None], counts, smallest).flatten())
        positions = torch.cat([positions, against])
        pair = torch.arange(len(positions), device=values.device)
        of = torch.cat([of, torch.arange(len(against), device=values.device)])
    best = torch.zeros_like(split.standardized_gap)
    standardized: Standardized | None = None
    turns: list[tuple[Tensor, Tensor | None]] = []
    weights, upper = None, torch.zeros_like(positions, dtype=torch.bool)
    for turn in range((ROUNDS if agreement is None else EARLY_ROUNDS) + 1):
        early = pair >= starts.numel()
        grown = split.standardized_gap > best
        gap = allowed_gap(split, counts[of])
        far = grown & (gap >= least) & ~(early & (turn == 0))
        figures = pair, far, split.threshold, split.low, split.high, split.members, gap
        turns.append((torch.stack([figure.double() for figure in figures], dim=1), weights))
        divided, upper = upper, (positions.double() > split.threshold[:, None]) & batch.inside[of]
        more = turn < torch.where(early, EARLY_ROUNDS, ROUNDS)
        (still,) = (grown & more & (upper != divided).any(dim=1)).nonzero(as_tuple=True)
        if not len(still):
            break
        if standardized is None:
            if units.shape[1] < columns.shape[1]:
                columns = columns.gather(1, units[..., None].expand(-1, -1, columns.shape[2]))
            standardized = standardize(columns, counts, batch.inside)
        best = split.standardized_gap.masked_fill(early & (turn == 0), 0)[still]  # the gap of the values counts
        pair, of, upper = pair[still], of[still], upper[still]
        weights, positions = discriminants(standardized, upper, of)
        split = split_rows(positions[:, None], counts[of], smallest[of]).flatten()
    return _listed(turns, batch, starts, units)


def _listed(
    turns: list[tuple[Tensor, Tensor | None]], batch: LabelBatch, starts: Tensor, units: Tensor
) -> dict[int, list[Direction]]:
    """The directions of all turns that are far enough, by label, largest gap first.

    Args:
        turns: Of each turn the figures of its pairs, double ``(P, 7)``: number of the pair, whether it is far enough,
            threshold, low, high, members, gap; and their weights, ``(P, M)``, none in the first turn.
        batch: The labels.
        starts: Units from which the search started, long ``(L, C)``; pairs above their number started from neighbors.
        units: On which the discriminants are fitted, long ``(L, M)``.
    """
    found: dict[int, list[Direction]] = {}
    lengths = [len(figures) for figures, _ in turns]
    told = torch.cat([figures for figures, _ in turns]).tolist()
    places = ((turn, place) for turn, length in enumerate(lengths) for place in range(length))
    passed = [(int(row[0]), *place, row) for place, row in zip(places, told, strict=True) if row[1]]
    for of_pair, turn, place, row in sorted(passed, key=lambda one: (-one[3][6], one[0], one[1])):
        early_pair = of_pair >= starts.numel()
        at, candidate = (of_pair - starts.numel(), 0) if early_pair else divmod(of_pair, starts.shape[1])
        fitted = turns[turn][1]
        chosen = units[at].clone() if fitted is not None else starts[at, candidate : candidate + 1].clone()
        along = fitted[place].clone() if fitted is not None else torch.ones(1, device=units.device)
        threshold, low, high, members, gap = row[2:]
        which = batch.labels[at], batch.sizes[at], chosen, along, units[at].clone()
        one = Direction(*which, threshold, low, high, int(members), gap, early=early_pair)
        found.setdefault(batch.labels[at], []).append(one)
    return found
