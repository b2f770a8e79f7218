"""Subpopulations: groups of samples that lie apart from the rest of their label. How they are split off and tested.

From top to bottom: what a subpopulation is, the exact split of a column, the directions that are searched, the gates
that a direction must pass, the search over all labels, scores, and the subpopulation that most labels have in common.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.verdict import GateFigure

__all__ = [
    "Subpopulation",
    "early_neighbor_gate",
    "find_all_to_all_subpopulation",
    "find_subpopulations",
    "overlap_gate",
    "split_units",
    "strict_gate",
    "subpopulation_scores",
]

MIN_MEMBERS = 10  # of either group of a split; fewer samples are outliers
BLOCK = 2**22  # numbers that are sorted or projected at once, which bounds the memory


# What a subpopulation is.


@dataclass(frozen=True)
class Subpopulation:
    """Samples of one label that lie above a threshold along a direction, apart from the rest of the label.

    Attributes:
        label: Class index of the samples that are split.
        units: Columns of the values that take part, long ``(M,)``.
        weights: Their weights, float ``(M,)``. The direction is the weighted sum of these columns.
        threshold: Split point of the projection; members lie above it.
        low: Mean projection of the label's other samples.
        high: Mean projection of the members.
        standardized_gap: ``high - low`` over the sum of the two standard deviations, of samples held out one by one,
            with an allowance for the sampling error of small groups.
        enrichment: Share of the label's samples above the threshold over the share of all others above it.
        members: Samples of the label above the threshold.
        gate: Name of the gate that was passed: ``"strict"``, ``"overlap"``, ``"early_neighbors"`` or
            ``"all_to_all"``; empty before any.
        figures: What this gate measured, with its bounds.
    """

    label: int
    units: Tensor
    weights: Tensor
    threshold: float
    low: float
    high: float
    standardized_gap: float
    enrichment: float
    members: int
    gate: str = ""
    figures: tuple[GateFigure, ...] = ()

    def project(self, values: Tensor) -> Tensor:
        """Position of every sample along the direction, float ``(N,)``, for values ``(N, U)``."""
        return values[:, self.units].float() @ self.weights

    def passed(self, gate: str, *figures: GateFigure) -> Subpopulation:
        """The same subpopulation with the name of a gate that it passed, and the figures."""
        return replace(self, gate=gate, figures=figures)


# The exact split of a column into two groups.


@dataclass(frozen=True)
class Split:
    """Two groups in every column.

    Attributes:
        threshold: Halfway between the groups, double ``(U,)``.
        low: Mean of the lower group, double ``(U,)``.
        high: Mean of the upper group, double ``(U,)``.
        standardized_gap: Distance of the means over the sum of the two standard deviations, double ``(U,)``; zero where
            a column cannot be split.
        members: Size of the upper group, long ``(U,)``; zero where a column cannot be split.
    """

    threshold: Tensor
    low: Tensor
    high: Tensor
    standardized_gap: Tensor
    members: Tensor


def split_units(values: Tensor, min_members: int = MIN_MEMBERS) -> Split:
    """Split every column into the two groups with the smallest squared deviations (exact, vectorised over units).

    Equal values stay together: a column without two different groups of ``min_members`` has a standardized gap of 0.

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


# Directions along which the samples of one label fall into two groups.

MIN_SHARE = 0.01  # of the label in either group; fewer samples are outliers
CANDIDATES = 3  # units per label from which the search for a direction starts
ROUNDS = 3  # of split and discriminant
ERRORS = 2.0  # standard errors that are allowed for chance in figures of small groups
RIDGE = 0.1
MAX_UNITS = 512  # of a direction


@dataclass(frozen=True)
class Direction:
    """Units, their weights, and how the projections of one label's n samples split."""

    units: Tensor
    weights: Tensor
    split: Split
    n: int

    @property
    def standardized_gap(self) -> float:
        """Standardized gap if the spread is larger by twice the sampling error of the smaller group, ``1 / sqrt(2 m)``.

        Among many units some have a few samples that lie close together by chance, above all where tails are heavy.
        """
        members = int(self.split.members)
        smaller = max(min(members, self.n - members), 1)
        return float(self.split.standardized_gap) / (1 + ERRORS / math.sqrt(2 * smaller))


def directions_of(members: Tensor) -> list[Direction]:
    """Directions along which the samples of one label, ``(n, U)``, fall into two groups."""
    return directions_and_units(members)[0]


def directions_and_units(members: Tensor) -> tuple[list[Direction], Tensor]:
    """Sharpened directions that start from the best separated units of one label, for its values ``(n, U)``.

    Returns:
        The directions, and the units ``(M,)`` on which discriminants are fitted.
    """
    single = split_label(members)
    ranked = single.standardized_gap.argsort(descending=True, stable=True)
    units = ranked[:MAX_UNITS]
    directions = []
    for unit in ranked[:CANDIDATES]:
        positions, best = members[:, unit], 0.0
        weights, chosen = torch.ones(1), unit[None]
        for _ in range(ROUNDS + 1):
            split = split_label(positions[:, None])
            if float(split.standardized_gap) <= best:
                break
            best = float(split.standardized_gap)
            directions.append(Direction(chosen, weights, split, len(members)))
            weights, positions = discriminant(members[:, units], positions > split.threshold)
            chosen = units
    return directions, units


def split_label(members: Tensor) -> Split:
    """Two groups in every column of a label's values, either of at least 10 samples and 1 % of the label."""
    return split_units(members, max(MIN_MEMBERS, math.ceil(MIN_SHARE * len(members))))


def discriminant(members: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Fisher's linear discriminant between two groups, with a ridge.

    Returns:
        Weights ``(M,)``, and the position ``(n,)`` of every sample along the weights that were fitted without it (leave
        one out, in closed form by the Sherman-Morrison identity).
    """
    n, sizes = len(members), torch.stack([(~upper).sum(), upper.sum()]).float()
    center, scale = members.mean(dim=0), members.std(dim=0)
    scale[scale <= 1e-6 * members.abs().amax(dim=0)] = torch.inf  # constant but for rounding: no part in the direction
    scaled = (members - center) / scale
    means = torch.stack([scaled[~upper].mean(dim=0), scaled[upper].mean(dim=0)])
    gap, deviations = means[1] - means[0], scaled - means[upper.long()]
    within = deviations.T @ deviations / n
    ridge = RIDGE * within.diagonal().mean().clamp(min=1e-6)
    factor = torch.linalg.cholesky(within + ridge * torch.eye(len(gap)))
    weights = torch.cholesky_solve(gap[:, None], factor).squeeze(1)
    # Without sample i, whose deviation is d, the scatter loses c d d' and the gap moves by s d.
    size = sizes[upper.long()]
    c = size / (size - 1) / n
    s = torch.where(upper, -1.0, 1.0) / (size - 1)
    solved = torch.cholesky_solve(deviations.T, factor).T
    h = (deviations * solved).sum(dim=1)
    plain = scaled @ weights + s * (scaled * solved).sum(dim=1)
    returned = c * (scaled * solved).sum(dim=1) * (solved @ gap + s * h) / (1 - c * h)
    norm = weights.norm()
    weights = weights / scale / norm
    return weights, (plain + returned) / norm + center @ weights


# The gates. A direction splits off a subpopulation if it passes one of three gates. For each of them the lower group
# must be the class itself (`own_auroc`): where many labels are wrong, the class is the upper group.

OWN_AUROC = 0.75  # of the lower group against all other labels, at least; a mixture of other classes has 0.5
OWN_OTHERS = 2**14  # samples of other labels that it is compared with, drawn at random where there are more

STRICT_GAP = 2.5  # a Gaussian cut at its mean has 1.32; classes of clean CIFAR-10 stay below 2.4
STRICT_ENRICHMENT = 20.0  # hardly any sample of another label lies above the threshold


def strict_gate(found: Subpopulation) -> Subpopulation | None:
    """Pass a subpopulation far from the rest of its label, with hardly a sample of other labels above the threshold."""
    if found.standardized_gap < STRICT_GAP or found.enrichment < STRICT_ENRICHMENT:
        return None
    return found.passed(
        "strict",
        GateFigure("standardized_gap", found.standardized_gap, ">=", STRICT_GAP),
        GateFigure("enrichment", found.enrichment, ">=", STRICT_ENRICHMENT),
    )


OVERLAP_GAP = STRICT_GAP
OVERLAP_ENRICHMENT = 2.0  # the true classes of the poisons lie above the threshold, too, with a part of their samples
OVERLAP_MEMBERS = 0.55  # of the label at most: where a class has a rare kind of image, the upper group is the class
OVERLAP_OTHERS = 3  # other labels that are large enough to be compared, at least
OVERLAP_LABELS = 4.5  # effective number of other labels above the threshold, at least: a clean kind of image that
# resembles other classes resembles one or two of them. Half of the others, 2 at least, where they are fewer than nine.
OVERLAP_ELSEWHERE = 1.6  # standardized gap of every other label, less than that: the direction splits this label alone
OVERLAP_VARIATION = 2.0  # standard errors by which members vary more than the rest of their label, more than that


def overlap_gate(found: Subpopulation, values: Tensor, labels: Tensor, units: Tensor) -> Subpopulation | None:
    """Pass a subpopulation beside which samples of many other labels lie, none of which the direction splits.

    What tells poisons from the rest of their label points at their true classes, too, which are many. So whole other
    labels can lie above the threshold. A subpopulation that labels have in common splits the others as well; a rare
    clean kind of image is the smaller part of its label; one that resembles other classes points at one or two of them
    (a 1 that is written like a 2 and a 3).

    The effective number of labels is Simpson's, by the share of every label above the threshold:
    ``(sum of shares)^2 / sum of squared shares``, so that a large label counts as one. Labels that are too small to be
    split are none of the many; all together they add one share to the squares.

    Poisons of many true classes vary more than the rest of their label, which is one class. Members that do not are a
    clean kind of image, or the class itself beside at least as many poisons.

    Args:
        found: The subpopulation.
        values: Response of every unit to every sample, float, shape ``(N, U)``.
        labels: Labels as given, long, shape ``(N,)``.
        units: Columns in which the variation is compared, long ``(M,)``.
    """
    counts = torch.bincount(labels)
    size = int(counts[found.label])
    far = found.standardized_gap >= OVERLAP_GAP and found.enrichment >= OVERLAP_ENRICHMENT
    if not far or found.members > OVERLAP_MEMBERS * size:
        return None
    others = [k for k in range(len(counts)) if k != found.label and int(counts[k]) >= 2 * MIN_MEMBERS]
    if values.shape[1] == 1 or len(others) < OVERLAP_OTHERS:
        return None
    variation = excess_variation(found, values[labels == found.label], units)
    if not variation > OVERLAP_VARIATION:
        return None
    shares, elsewhere = [], 0.0
    for k in others:
        positions = found.project(values[labels == k])[:, None]
        direction = Direction(found.units, found.weights, split_label(positions), len(positions))
        elsewhere = max(elsewhere, direction.standardized_gap)
        if elsewhere >= OVERLAP_ELSEWHERE:
            return None
        shares.append(int((positions > found.threshold).sum()) / len(positions))
    small = found.project(values[counts[labels] < 2 * MIN_MEMBERS]) > found.threshold
    share_of_small = int(small.sum()) / max(len(small), 2 * MIN_MEMBERS)
    least = min(OVERLAP_LABELS, max(2.0, len(others) / 2))
    squares = sum(share**2 for share in [*shares, share_of_small])
    if squares == 0 or sum(shares) ** 2 < least * squares:
        return None
    return found.passed(
        "overlap",
        GateFigure("standardized_gap", found.standardized_gap, ">=", OVERLAP_GAP),
        GateFigure("enrichment", found.enrichment, ">=", OVERLAP_ENRICHMENT),
        GateFigure("member_share", found.members / size, "<=", OVERLAP_MEMBERS),
        GateFigure("other_labels", len(others), ">=", OVERLAP_OTHERS),
        GateFigure("excess_variation", variation, ">", OVERLAP_VARIATION),
        GateFigure("largest_other_gap", elsewhere, "<", OVERLAP_ELSEWHERE),
        GateFigure("effective_labels", sum(shares) ** 2 / squares, ">=", least),
    )


def excess_variation(found: Subpopulation, members: Tensor, units: Tensor) -> float:
    """How much more the upper group varies than the lower one, in standard errors.

    The variation of a group is the mean squared distance of its samples from their own centre.

    Args:
        found: The subpopulation.
        members: Values of its label's samples, float ``(n, U)``; every unit is taken in standard deviations of these.
        units: Columns that are compared, long ``(M,)``.

    Returns:
        The difference; minus infinity if a group has fewer than two samples.
    """
    upper = found.project(members) > found.threshold
    if min(int(upper.sum()), int((~upper).sum())) < 2:
        return -math.inf
    members = members[:, units].float()
    scale = members.std(dim=0)
    scaled = members[:, scale > 0] / scale[scale > 0]
    parts = (scaled[upper], scaled[~upper])
    above, below = ((part - part.mean(dim=0)).square().sum(dim=1) * len(part) / (len(part) - 1) for part in parts)
    error = math.sqrt(float(above.var()) / len(above) + float(below.var()) / len(below))
    return float(above.mean() - below.mean()) / max(error, 1e-12)


EARLY_GAP = 2.0
EARLY_ENRICHMENT = 2.0  # triggered images with their own labels lie above the threshold, too, under some attacks
EARLY_MEMBERS = 0.55  # of the label at most: where a class has near-duplicates, the upper group is the class
EARLY_AGREEMENT = 0.7  # of that of the label's other samples, less than that; clean CIFAR-10 classes stay above 0.95


def early_neighbor_gate(
    found: Subpopulation, values: Tensor, labels: Tensor, agreement: Tensor
) -> Subpopulation | None:
    """Pass a subpopulation whose neighbours early in training had its label less often than those of the lower group.

    Early in training, before a weak backdoor is learned, poisoned samples lie among those of their true classes, while
    a clean kind of image lies among its label. Two standard errors are allowed for chance.
    """
    inside = labels == found.label
    agree = agreement[inside].float()
    if found.standardized_gap < EARLY_GAP or found.enrichment < EARLY_ENRICHMENT:
        return None
    if found.members > EARLY_MEMBERS * len(agree):
        return None
    upper = found.project(values[inside]) > found.threshold
    sizes = [int(upper.sum()), int((~upper).sum())]
    if min(sizes) < MIN_MEMBERS:
        return None
    chance = ERRORS * float(agree.std()) * math.sqrt(sum(1 / size for size in sizes))
    of_upper, of_lower = float(agree[upper].mean()) + chance, float(agree[~upper].mean())
    if not of_upper < EARLY_AGREEMENT * of_lower:
        return None
    return found.passed(
        "early_neighbors",
        GateFigure("standardized_gap", found.standardized_gap, ">=", EARLY_GAP),
        GateFigure("enrichment", found.enrichment, ">=", EARLY_ENRICHMENT),
        GateFigure("member_share", found.members / len(agree), "<=", EARLY_MEMBERS),
        GateFigure("early_agreement_ratio", of_upper / of_lower, "<", EARLY_AGREEMENT),
    )


def own_auroc(found: Subpopulation, values: Tensor, inside: Tensor, units: Tensor) -> float:
    """How well the lower group is separated from all other labels, as AUROC of a held-out discriminant.

    Args:
        found: The subpopulation.
        values: Response of every unit to every sample, float, shape ``(N, U)``.
        inside: Samples of its label, bool ``(N,)``.
        units: Columns on which the discriminant is fitted, long ``(M,)``.
    """
    if values.shape[1] == 1:
        return 1.0  # one number per sample, such as a susceptibility, does not describe classes: not tested
    lower = inside.nonzero().squeeze(1)
    lower = lower[found.project(values[lower]) <= found.threshold]
    others = (~inside).nonzero().squeeze(1)
    if len(others) > OWN_OTHERS:  # every n-th would be of a single label where labels take turns
        drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[:OWN_OTHERS]
        others = others[drawn.sort().values]
    if min(len(lower), len(others)) < 2:
        return 0.0
    is_lower = torch.arange(len(lower) + len(others)) < len(lower)
    _, positions = discriminant(values[torch.cat([lower, others])][:, units].float(), is_lower)
    rank = torch.empty(len(positions))
    rank[positions.argsort()] = torch.arange(len(positions), dtype=torch.float32)
    return float((rank[is_lower].mean() - (len(lower) - 1) / 2) / len(others))


# The search over all labels.


def find_subpopulations(values: Tensor, labels: Tensor, *, agreement: Tensor | None = None) -> list[Subpopulation]:
    """Find the labels that hold two groups of samples, the second of which no other label holds.

    A backdoor gives one label a second group: the samples that carry the trigger. On some unit they lie far from the
    label's other samples, and no other label falls into two groups there (the idea of a neuron that cuts a label in two
    is that of NONE, `Wang et al., 2022 <https://arxiv.org/abs/2202.06382>`_). The search starts from the best separated
    single units of a label, and sharpens each split in turns of Fisher's linear discriminant and an exact two-group
    split of the projections. Every sample is projected with a discriminant that was fitted without it, so that many
    units and few samples do not lead to a gap by chance.

    A direction counts if it passes one of three gates:

    - ``strict``: The gap is large, and hardly any sample of another label lies above the threshold.
    - ``overlap``: The gap is large, samples of many other labels lie above the threshold, and the direction splits none
      of these labels. At most 55 % of the label are above it. There must be three other labels of at least 20 samples;
      smaller ones, which cannot be split, count against the subpopulation if they lie above the threshold. Its samples
      must vary more than the rest of the label, beyond chance: poisons are images of many classes, the rest of one.
    - ``early_neighbors``: Used with ``agreement`` and only where no direction of the label passes the other two. The
      gap can be smaller and other labels may lie above the threshold, if the neighbours of the upper group had its
      label much less often early in training than those of the lower group. Some attacks add triggered images with
      their own labels, which the other gates do not pass.

    With every gate the lower group must be the class itself, told from all other labels by its features (of many
    units): where some labels are wrong, the class is the *upper* group and the lower one is a mixture of other classes;
    the class must not be removed then.

    Labels with fewer than 20 samples are left out. With one label only there is no other to compare it with, and
    nothing is found.

    Args:
        values: Response of every unit to every sample, float and finite, shape ``(N, U)``.
        labels: Labels as given, long, shape ``(N,)``.
        agreement: Share of every sample's neighbours that had its label early in training, float, shape ``(N,)``
            (:func:`~lightning_backdoor.functional.neighbor_agreement`); ``None`` if that is not known.

    Returns:
        At most one subpopulation per label, the one with the largest gap that passes a gate. Empty when nothing stands
        out.

    Raises:
        ArgumentError: ``agreement`` has another shape than ``labels``.
    """
    if agreement is not None and agreement.shape != labels.shape:
        raise ArgumentError(
            f"`agreement` must have shape (N,) as `labels`, got {tuple(agreement.shape)} and {tuple(labels.shape)}."
        )
    present = torch.unique(labels).tolist()
    if len(present) < 2:
        return []
    least = min(STRICT_GAP, OVERLAP_GAP) if agreement is None else EARLY_GAP
    found = []
    for label in present:
        inside = labels == label
        if int(inside.sum()) < 2 * MIN_MEMBERS:
            continue
        directions, units = directions_and_units(values[inside].float())
        apart = sorted(
            (one for one in directions if one.standardized_gap >= least), key=lambda one: -one.standardized_gap
        )
        candidates = [_above(values, inside, int(label), direction) for direction in apart]
        for candidate in _through_gates(candidates, values, labels, units, agreement):
            auroc = own_auroc(candidate, values, inside, units)
            if auroc >= OWN_AUROC:
                own = GateFigure("own_auroc", auroc, ">=", OWN_AUROC)
                found.append(replace(candidate, figures=(*candidate.figures, own)))
                break
    return found


def _above(values: Tensor, inside: Tensor, label: int, direction: Direction) -> Subpopulation:
    """The samples above the threshold of a direction, with the share of other labels that lie above it, too."""
    units, weights, split = direction.units, direction.weights, direction.split
    rows = torch.split(values, max(BLOCK // len(units), 1))
    above = torch.cat([part[:, units].float() @ weights for part in rows]) > split.threshold
    outside = ~inside
    share_outside = max(int((above & outside).sum()), 0.5) / int(outside.sum())
    return Subpopulation(
        label=label,
        units=units,
        weights=weights,
        threshold=float(split.threshold),
        low=float(split.low),
        high=float(split.high),
        standardized_gap=direction.standardized_gap,
        enrichment=int(split.members) / int(inside.sum()) / share_outside,
        members=int(split.members),
    )


def _through_gates(
    candidates: list[Subpopulation], values: Tensor, labels: Tensor, units: Tensor, agreement: Tensor | None
) -> Iterator[Subpopulation]:
    """The candidates that pass a gate; those of the gate of early neighbours after all others."""
    plain = (strict_gate(one) or overlap_gate(one, values, labels, units) for one in candidates)
    early = (early_neighbor_gate(one, values, labels, agreement) for one in candidates if agreement is not None)
    return (one for one in chain(plain, early) if one is not None)


# Scores.


def subpopulation_scores(
    values: Tensor, labels: Tensor, subpopulations: list[Subpopulation], ranking: Tensor
) -> Tensor:
    """Turn subpopulations into one score per sample; the members of the label's own subpopulation lie above 0.5.

    Samples of a label with a subpopulation score by their position along its direction: 0 at the mean of the lower
    group, 0.5 at the threshold, 1 at the mean of the members. All others score half of their rank in ``ranking``, so
    that they stay below 0.5 and remain ordered.

    Args:
        values: Response of every unit to every sample, float, shape ``(N, U)``.
        labels: Labels as given, long, shape ``(N,)``.
        subpopulations: What :func:`find_subpopulations` returned.
        ranking: A general suspicion, float, shape ``(N,)``; only its order is used.

    Returns:
        Scores, float, shape ``(N,)``; larger is more suspicious.
    """
    rank = torch.empty(len(ranking))
    rank[ranking.argsort(stable=True)] = torch.arange(len(ranking), dtype=torch.float32) / len(ranking)
    scores = rank / 2
    for found in subpopulations:
        inside = labels == found.label
        position = found.project(values[inside])
        below = 0.5 * (position - found.low) / (found.threshold - found.low)
        above = 0.5 + 0.5 * (position - found.threshold) / (found.high - found.threshold)
        scores[inside] = torch.where(position > found.threshold, above, below.clamp(0, 0.5))
    return scores


# One subpopulation in most labels, as under an all-to-all attack.

ALL_TO_ALL_LABELS = 0.5  # of the other labels, at least, must be split by the direction that one label gave
ALL_TO_ALL_MEMBERS = 0.5  # of the label, less than that: the upper group is the smaller one


def find_all_to_all_subpopulation(
    values: Tensor, labels: Tensor, *, min_separation: float = STRICT_GAP
) -> list[Subpopulation]:
    """Find a direction that splits most labels into two far groups, the upper one the smaller.

    An all-to-all backdoor shifts every label by the same trigger, so no label has a subpopulation of its own. A
    direction is sought in one label at a time, as in :func:`~lightning_backdoor.functional.find_subpopulations`, and
    tried on the others, which had no part in it.

    A second group in every label can be clean, too: two cameras, a logo. After its removal, check whether the model
    still gives these samples their label. It does if the labels are right, and does not for the wrong labels of a
    backdoor.

    Args:
        values: Response of every unit to every sample, float and finite, shape ``(N, U)``.
        labels: Labels as given, long, shape ``(N,)``.
        min_separation: Smallest distance of the two means in sums of the two standard deviations.

    Returns:
        One subpopulation per label that the direction splits, all with the same units and weights; ``enrichment`` is 1.
        Empty when nothing stands out.
    """
    counts = torch.bincount(labels)
    present = (counts >= 2 * MIN_MEMBERS).nonzero().squeeze(1).tolist()
    if len(present) < 3:
        return []
    for label in sorted(present, key=lambda k: -int(counts[k])):
        for direction in sorted(directions_of(values[labels == label].float()), key=lambda one: -one.standardized_gap):
            if direction.standardized_gap < min_separation:
                break
            found = _split_all(values, labels, present, direction, min_separation)
            if len(found) - 1 >= ALL_TO_ALL_LABELS * (len(present) - 1):
                share = GateFigure("split_labels", (len(found) - 1) / (len(present) - 1), ">=", ALL_TO_ALL_LABELS)
                return [replace(one, figures=(*one.figures, share)) for one in found]
    return []


def _split_all(
    values: Tensor, labels: Tensor, present: list[int], direction: Direction, min_separation: float
) -> list[Subpopulation]:
    """The labels that a direction splits into a larger lower and a smaller upper group."""
    found, units, weights = [], direction.units, direction.weights
    for label in present:
        position = values[labels == label][:, units].float() @ weights
        split = split_label(position[:, None])
        gap, members = float(split.standardized_gap), int(split.members)
        if gap >= min_separation and members < ALL_TO_ALL_MEMBERS * len(position):
            threshold, low, high = float(split.threshold), float(split.low), float(split.high)
            one = Subpopulation(label, units, weights, threshold, low, high, gap, 1.0, members)
            found.append(
                one.passed(
                    "all_to_all",
                    GateFigure("standardized_gap", gap, ">=", min_separation),
                    GateFigure("member_share", members / len(position), "<", ALL_TO_ALL_MEMBERS),
                )
            )
    return found
