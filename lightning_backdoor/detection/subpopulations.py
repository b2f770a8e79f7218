"""Subpopulations: groups of samples that lie apart from the rest of their label. How they are found and tested.

From top to bottom: what a subpopulation is, the gates that a direction must pass, the search over all labels, scores,
and the subpopulation that most labels have in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor.detection.directions import (
    ERRORS,
    MIN_MEMBERS,
    Direction,
    LabelGroups,
    block_size,
    discriminant,
    full_precision,
    group_by_label,
    sharpened_directions,
    smallest_group,
    split_labels,
    split_rows,
    split_units,
)
from lightning_backdoor.detection.evidence import replication
from lightning_backdoor.detection.look_alikes import like_others, tell_labels_apart, wrong_labels_p_value
from lightning_backdoor.detection.near_duplicates import (
    closed_share,
    near_duplicates,
    repeated_share,
    usual_distance,
)
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.verdict import GateFigure

__all__ = [
    "Search",
    "Subpopulation",
    "early_neighbor_gate",
    "find_all_to_all_subpopulation",
    "find_subpopulations",
    "overlap_gate",
    "search_labels",
    "split_units",
    "strict_gate",
    "subpopulation_scores",
]


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
        gate: Name of the gate that was passed: ``"strict"``, ``"overlap"``, ``"early_neighbors"``, ``"look_alikes"`` or
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
        """Position of every sample along the direction, float ``(N,)``, for values ``(N, U)`` on any device."""
        return project(values, self.units.to(values.device), self.weights.to(values.device))

    def to(self, device: torch.device) -> Subpopulation:
        """The same with its tensors on a device."""
        return replace(self, units=self.units.to(device), weights=self.weights.to(device))

    def passed(self, gate: str, *figures: GateFigure) -> Subpopulation:
        """The same subpopulation with the name of a gate that it passed, and the figures."""
        return replace(self, gate=gate, figures=figures)


def project(values: Tensor, units: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of the columns ``units`` of the values ``(N, U)``, float ``(N,)``."""
    rows = torch.split(values, max(block_size(values.device) // len(units), 1))
    with full_precision():
        return torch.cat([part[:, units].float() @ weights for part in rows])


# The gates. A direction splits off a subpopulation if it passes one of four gates. For each of them the lower group
# must be the class itself (`own_auroc`): where many labels are wrong, the class is the upper group.

OWN_AUROC = 0.75  # of the lower group against all other labels, at least; a mixture of other classes has 0.5
TOGETHER = 256  # candidates whose directions all samples are projected on at once

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


def overlap_gate(found: Subpopulation, values: Tensor, groups: LabelGroups, units: Tensor) -> Subpopulation | None:
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
        groups: The samples by label.
        units: Columns in which the variation is compared, long ``(M,)``.
    """
    size = groups.sizes[found.label]
    far = found.standardized_gap >= OVERLAP_GAP and found.enrichment >= OVERLAP_ENRICHMENT
    if not far or found.members > OVERLAP_MEMBERS * size:
        return None
    others = [k for k, count in groups.sizes.items() if k != found.label and count >= 2 * MIN_MEMBERS]
    if values.shape[1] == 1 or len(others) < OVERLAP_OTHERS:
        return None
    variation = excess_variation(found, values[groups.positions(found.label)], units)
    if not variation > OVERLAP_VARIATION:
        return None
    positions = found.project(values)
    splits = split_labels(positions, groups)
    elsewhere = max(splits[label].allowed_gap for label in others)
    if elsewhere >= OVERLAP_ELSEWHERE:
        return None
    above = dict(zip(groups.sizes, groups.totals((positions > found.threshold).long()).tolist(), strict=True))
    shares = [above[k] / groups.sizes[k] for k in others]
    small = [k for k, count in groups.sizes.items() if count < 2 * MIN_MEMBERS]
    share_of_small = sum(above[k] for k in small) / max(sum(groups.sizes[k] for k in small), 2 * MIN_MEMBERS)
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
    found: Subpopulation, values: Tensor, groups: LabelGroups, agreement: Tensor
) -> Subpopulation | None:
    """Pass a subpopulation whose neighbours early in training had its label less often than those of the lower group.

    Early in training, before a weak backdoor is learned, poisoned samples lie among those of their true classes, while
    a clean kind of image lies among its label. Two standard errors are allowed for chance.
    """
    if found.enrichment < EARLY_ENRICHMENT:
        return None
    figures = early_figures(found, values, groups, agreement)
    if figures is None:
        return None
    gap, *others = figures
    return found.passed(
        "early_neighbors", gap, GateFigure("enrichment", found.enrichment, ">=", EARLY_ENRICHMENT), *others
    )


def early_figures(
    found: Subpopulation, values: Tensor, groups: LabelGroups, agreement: Tensor
) -> tuple[GateFigure, ...] | None:
    """Gap, share of the label, and how often early neighbors agree; None if one of them misses its bound."""
    inside = groups.positions(found.label)
    agree = agreement[inside].float()
    if found.standardized_gap < EARLY_GAP or found.members > EARLY_MEMBERS * len(agree):
        return None
    upper = found.project(values[inside]) > found.threshold
    sizes = [int(upper.sum()), len(upper) - int(upper.sum())]
    if min(sizes) < MIN_MEMBERS:
        return None
    chance = ERRORS * float(agree.std()) * math.sqrt(sum(1 / size for size in sizes))
    of_upper, of_lower = float(agree[upper].mean()) + chance, float(agree[~upper].mean())
    if not of_upper < EARLY_AGREEMENT * of_lower:
        return None
    return (
        GateFigure("standardized_gap", found.standardized_gap, ">=", EARLY_GAP),
        GateFigure("member_share", found.members / len(agree), "<=", EARLY_MEMBERS),
        GateFigure("early_agreement_ratio", of_upper / of_lower, "<", EARLY_AGREEMENT),
    )


ALIKE_EXCESS = 3.0  # times as many members look like another label as samples of an ordinary label do, at least: labels
# that are wrong throughout the data are no attack on one of them (10 and 20 % of label noise reach 0.4 to 1.3)


def look_alike_gate(found: Subpopulation, search: Search) -> Subpopulation | None:
    """Pass a subpopulation whose early neighbors had other labels, and whose pictures look like many other labels.

    Covers, and whole labels that what is attacked has in common with it, can lie above the threshold: the enrichment
    says nothing then. Instead the pictures must speak for wrong labels (an exact test, see
    ``lightning_backdoor/detection/look_alikes.py``): of many classes, as poisons are, and more often than elsewhere in
    the data.

    The test of both halves searches them without early agreement, which is measured on all samples: with it as a start
    both halves would find any axis along which it falls. A class that holds many kinds by design ("other",
    "background") passes this gate.
    """
    others = [size for label, size in search.groups.sizes.items() if label != found.label and size >= 2 * MIN_MEMBERS]
    if search.pictures is None or search.agreement is None or len(others) < OVERLAP_OTHERS:
        return None
    figures = early_figures(found, search.values, search.groups, search.agreement)
    if figures is None:
        return None
    members = members_of(search.values, search.groups, [found])
    alike = like_others(search.pictures, search.groups.labels, members, search.usual_distance)
    least = min(OVERLAP_LABELS, max(2.0, sum(others) ** 2 / sum(size**2 for size in others) / 2))
    bound = min(search.bound, 1.0)
    if alike.p_value > bound or alike.excess < ALIKE_EXCESS or alike.labels < least:
        return None
    return found.passed(
        "look_alikes",
        *figures,
        GateFigure("other_label_p_value", alike.p_value, "<=", bound),
        GateFigure("other_label_excess", alike.excess, ">=", ALIKE_EXCESS),
        GateFigure("looks_like_labels", alike.labels, ">=", least),
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
        others = others[drawn.sort().values.to(others.device)]
    if min(len(lower), len(others)) < 2:
        return 0.0
    is_lower = torch.arange(len(lower) + len(others), device=values.device) < len(lower)
    _, positions = discriminant(values[torch.cat([lower, others])][:, units].float(), is_lower)
    rank = _ranks(positions)
    return float((rank[is_lower].mean() - (len(lower) - 1) / 2) / len(others))


# The search over all labels.

FALSE_ALARM_RATE = 0.01
TESTED = 5000  # samples of a label, at most, drawn at random where there are more
REPEATED = 0.5  # of the members, as many different things or fewer: the group may be shots of a few things
TRACKS = 0.3  # of all samples, as many or more, have a near-duplicate in their label: any group may be shots of a few
# things. Traffic signs in tracks: 0.63 and more; photographs, digits, and classes with some copies: 0.12 at most
CLOSED = 0.4  # of the things in such a group, less than that by two standard errors, are nearest to another one of it
SCANS = 3  # of a training, at most, over which the rate is shared: half way, at the end, and after a restart


def find_subpopulations(
    values: Tensor,
    labels: Tensor,
    *,
    agreement: Tensor | None = None,
    pictures: Tensor | None = None,
    false_alarm_rate: float = FALSE_ALARM_RATE,
) -> list[Subpopulation]:
    """Find the labels that hold two groups of samples, the second of which no other label holds.

    A backdoor gives one label a second group: the samples that carry the trigger. On some unit they lie far from the
    label's other samples, and no other label falls into two groups there (the idea of a neuron that cuts a label in two
    is that of NONE, `Wang et al., 2022 <https://arxiv.org/abs/2202.06382>`_). The search starts from the best separated
    single units of a label, and sharpens each split in turns of Fisher's linear discriminant and an exact two-group
    split of the projections. With ``agreement`` and ``pictures`` it starts from the samples whose early neighbors have
    other labels, too, which leads to groups that no single unit shows; these count by the gate of look-alikes alone.
    Every sample is projected with a discriminant that was fitted without it, so that many units and few samples do not
    lead to a gap by chance.

    A direction counts if it passes one of four gates:

    - ``strict``: The gap is large, and hardly any sample of another label lies above the threshold.
    - ``overlap``: The gap is large, samples of many other labels lie above the threshold, and the direction splits none
      of these labels. At most 55 % of the label are above it. There must be three other labels of at least 20 samples;
      smaller ones, which cannot be split, count against the subpopulation if they lie above the threshold. Its samples
      must vary more than the rest of the label, beyond chance: poisons are images of many classes, the rest of one.
    - ``early_neighbors``: Used with ``agreement`` and only where no direction of the label passes another gate. The
      gap can be smaller and other labels may lie above the threshold, if the neighbours of the upper group had its
      label much less often early in training than those of the lower group. Some attacks add triggered images with
      their own labels, which the other gates do not pass.
    - ``look_alikes``: As ``early_neighbors``, however many samples of other labels lie above the threshold, if the
      pictures of the upper group look like many other labels: an exact test, for data in which small pictures tell
      labels apart. So many of them must, three times as many as in an ordinary label: labels that are wrong throughout
      the data, or those of one class, are no attack.

    With every gate the lower group must be the class itself, told from all other labels by its features (of many
    units): where some labels are wrong, the class is the *upper* group and the lower one is a mixture of other classes;
    the class must not be removed then.

    And the group must show again in samples that had no part in finding it: the search is repeated in two halves of the
    label, and both must find the same samples, beyond chance (an exact test). With ``pictures``, ten different things
    at least must be among them: shots of one thing lie close together in the features of any network. Where there are
    half as many things as members or fewer, or near-duplicates throughout the data, these must not be nearest to each
    other among all images, apart from what the group has in common: then they are shots of a few things under changing
    conditions.

    Labels with fewer than 20 samples are left out. With one label only there is no other to compare it with, and
    nothing is found.

    Args:
        values: Response of every unit to every sample, float and finite, shape ``(N, U)``.
        labels: Labels as given, long, shape ``(N,)``.
        agreement: Share of every sample's neighbours that had its label early in training, float, shape ``(N,)``
            (:func:`~lightning_backdoor.functional.neighbor_agreement`); ``None`` if that is not known.
        pictures: Small grey pictures of the samples, half ``(N, 144)``, by which near-duplicates are known
            (:func:`~lightning_backdoor.functional.thumbnails`); ``None`` if all samples count as different.
        false_alarm_rate: Chance at most that noise passes the test above in a training, over all labels and scans.
            ``math.inf`` leaves the test out.

    Returns:
        At most one subpopulation per label: of the first gate that one passes (strict or overlap, look_alikes,
        early_neighbors), the one with the largest gap. Empty when nothing stands out.

    Raises:
        ArgumentError: ``agreement`` or ``pictures`` are not as many as ``labels``, or the rate is not positive.
    """
    search = search_labels(values, labels, agreement=agreement, pictures=pictures, false_alarm_rate=false_alarm_rate)
    return own_subpopulations(search)


@dataclass(frozen=True)
class Search:
    """Directions that split some label, from which subpopulations are chosen.

    Attributes:
        values: Response of every unit to every sample, float, shape ``(N, U)``.
        groups: The samples by label, on the device of the values.
        directions: For every label that has any, the directions that are far enough for a gate, largest gap first.
        early: For every label that has any, the best direction to which its early neighbors led.
        agreement: Share of every sample's early neighbours that had its label, float ``(N,)``, on that device.
        pictures: Small pictures of the samples, half ``(N, 144)``, on that device.
        usual_distance: Of two pictures of a label; 0 without pictures.
        false_alarm_rate: Of a training; see :func:`find_subpopulations`.
    """

    values: Tensor
    groups: LabelGroups
    directions: dict[int, list[Direction]]
    early: dict[int, Direction]
    agreement: Tensor | None
    pictures: Tensor | None
    usual_distance: float
    false_alarm_rate: float

    def tested(self, label: int) -> tuple[Tensor, Tensor | None]:
        """Samples of a label on which a group is tested, long ``(n,)``, and their numbers as near-duplicates."""
        rows = self.groups.positions(label)
        if len(rows) > TESTED:
            drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:TESTED]
            rows = rows[drawn.to(rows.device)]
        return rows, None if self.pictures is None else near_duplicates(self.pictures[rows], self.usual_distance)

    @cached_property
    def in_tracks(self) -> bool:
        """Whether the samples are shots of things that were taken many times, as the frames of a video are."""
        if self.pictures is None:
            return False
        return repeated_share(self.pictures, self.groups.labels, self.usual_distance) >= TRACKS

    @property
    def bound(self) -> float:
        """Of the p-value of one test: one in each label that can be split, and one of what labels share, in a scan."""
        return self.false_alarm_rate / (SCANS * (_large(self.groups) + 1))


def search_labels(
    values: Tensor,
    labels: Tensor,
    *,
    agreement: Tensor | None = None,
    pictures: Tensor | None = None,
    false_alarm_rate: float = FALSE_ALARM_RATE,
    least: float | None = None,
) -> Search:
    """Search all labels of at least 20 samples for directions; see :func:`find_subpopulations` for the arguments.

    ``least`` is the smallest standardized gap of a direction; by default the least of a gate that can be passed.
    """
    if agreement is not None and agreement.shape != labels.shape:
        raise ArgumentError(
            f"`agreement` must have shape (N,) as `labels`, got {tuple(agreement.shape)} and {tuple(labels.shape)}."
        )
    if pictures is not None and (pictures.ndim != 2 or len(pictures) != len(labels)):
        raise ArgumentError(
            f"`pictures` must have shape (N, P) for `labels` of shape (N,), got {tuple(pictures.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if not false_alarm_rate > 0:
        raise ArgumentError(f"`false_alarm_rate` must be positive, got {false_alarm_rate}. Pass for example 0.01.")
    groups = group_by_label(labels.to(values.device))
    if least is None:
        least = min(STRICT_GAP, OVERLAP_GAP) if agreement is None else EARLY_GAP
    device = values.device
    agreement, pictures = (None if column is None else column.to(device) for column in (agreement, pictures))
    usual, start = 0.0 if pictures is None else usual_distance(pictures, groups.labels), None
    if agreement is not None and pictures is not None and _large(groups) > OVERLAP_OTHERS:
        start = agreement if tell_labels_apart(pictures, groups.labels, usual) else None  # no other gate takes these
    directions = sharpened_directions(values, groups, least, start) if len(groups.sizes) > 1 else {}
    by_unit = {label: [one for one in some if not one.early] for label, some in directions.items()}
    early = {label: [one for one in some if one.early] for label, some in directions.items()}
    return Search(
        values,
        groups,
        {label: some for label, some in by_unit.items() if some},
        {label: some[0] for label, some in early.items() if some},
        agreement=agreement,
        pictures=pictures,
        usual_distance=usual,
        false_alarm_rate=false_alarm_rate,
    )


def _large(groups: LabelGroups) -> int:
    """How many labels can be split."""
    return sum(size >= 2 * MIN_MEMBERS for size in groups.sizes.values())


@full_precision()
def own_subpopulations(search: Search) -> list[Subpopulation]:
    """The subpopulations of single labels: see :func:`find_subpopulations`."""
    found, tested = [], cache(search.tested)
    by_unit = _candidates(search, [one for label in sorted(search.directions) for one in search.directions[label]])
    by_neighbors = _candidates(search, list(search.early.values()))
    for label in sorted({*by_unit, *by_neighbors}):
        inside = search.groups.labels == label
        units = search.early[label].fitted if label not in by_unit else search.directions[label][0].fitted
        for candidate in _through_gates(by_unit.get(label, []), by_neighbors.get(label, []), search, units):
            auroc = own_auroc(candidate, search.values, inside, units)
            if auroc < OWN_AUROC:
                continue
            figures = _replicated(candidate, search, tested)
            if figures is not None:
                own = GateFigure("own_auroc", auroc, ">=", OWN_AUROC)
                found.append(replace(candidate, figures=(*candidate.figures, own, *figures)))
                break
    return found


def _replicated(
    found: Subpopulation, search: Search, tested: Callable[[int], tuple[Tensor, Tensor | None]]
) -> tuple[GateFigure, ...] | None:
    """The figures of a subpopulation in both halves of its label; None if these do not find it, beyond chance."""
    if search.false_alarm_rate == math.inf:
        return ()
    rows, things = tested(found.label)
    values = search.values[rows]
    seen = replication(values, found.project(values) > found.threshold, things)
    if seen.p_value > search.bound or seen.distinct < MIN_MEMBERS:
        return None
    figures = [GateFigure("replication_p_value", seen.p_value, "<=", search.bound)]
    repeated = seen.distinct <= REPEATED * found.members or search.in_tracks
    if search.pictures is not None and things is not None and repeated:
        upper, outside = found.project(values) > found.threshold, search.pictures[search.groups.labels != found.label]
        closed = closed_share(search.pictures[rows], upper, things, outside)
        closed += ERRORS * math.sqrt(closed * (1 - closed) / len(torch.unique(things[upper])))
        if closed >= CLOSED:
            return None
        figures.append(GateFigure("closed_share", closed, "<", CLOSED))
    return (*figures, GateFigure("different_things", seen.distinct, ">=", MIN_MEMBERS))


def _candidates(search: Search, directions: Sequence[Direction]) -> dict[int, list[Subpopulation]]:
    """The samples above the threshold of every direction, with the share of other labels that lie above it, too."""
    found: dict[int, list[Subpopulation]] = {}
    for first in range(0, len(directions), TOGETHER):
        some = directions[first : first + TOGETHER]
        for one, above in zip(some, _outside_above(search, some), strict=True):
            size = search.groups.sizes[one.label]
            share_outside = max(above, 0.5) / (len(search.values) - size)
            candidate = Subpopulation(
                label=one.label,
                units=one.units,
                weights=one.weights,
                threshold=one.threshold,
                low=one.low,
                high=one.high,
                standardized_gap=one.standardized_gap,
                enrichment=one.members / size / share_outside,
                members=one.members,
            )
            found.setdefault(one.label, []).append(candidate)
    return found


def _weights(search: Search, directions: Sequence[Direction]) -> Tensor:
    """The weights of directions side by side, float ``(U, D)``."""
    weights = torch.zeros(search.values.shape[1], len(directions), device=search.values.device)
    for column, one in enumerate(directions):
        weights[one.units, column] = one.weights
    return weights


def _outside_above(search: Search, directions: Sequence[Direction]) -> list[int]:
    """For each direction the number of samples of other labels above its threshold."""
    values, device, weights = search.values, search.values.device, _weights(search, directions)
    figures = torch.tensor([[one.threshold, one.label] for one in directions], dtype=torch.float64).to(device)
    thresholds, own = figures[:, 0], figures[:, 1].long()
    above = torch.zeros(len(directions), dtype=torch.long, device=device)
    size = max(block_size(device) // max(values.shape[1], len(directions)), 1)
    with full_precision():
        for rows, labels in zip(torch.split(values, size), torch.split(search.groups.labels, size), strict=True):
            apart = (rows.float() @ weights).double() > thresholds
            above += (apart & (labels[:, None] != own)).sum(dim=0)
    return above.tolist()


def _through_gates(
    by_unit: list[Subpopulation], by_neighbors: list[Subpopulation], search: Search, units: Tensor
) -> Iterator[Subpopulation]:
    """The candidates that pass a gate; those of the gates that need early neighbors after all others.

    Args:
        by_unit: Candidates to which single units led.
        by_neighbors: Those to which early neighbors led, for the gate of look-alikes alone.
        search: The search that led to them.
        units: Columns in which the variation is compared, long ``(M,)``.
    """
    values, groups, agreement = search.values, search.groups, search.agreement
    plain = (strict_gate(one) or overlap_gate(one, values, groups, units) for one in by_unit)
    early = (early_neighbor_gate(one, values, groups, agreement) for one in by_unit if agreement is not None)
    alike = (look_alike_gate(one, search) for one in by_neighbors)
    return (one for one in chain(plain, alike, early) if one is not None)


# Scores.


def members_of(values: Tensor, groups: LabelGroups, found: Sequence[Subpopulation]) -> Tensor:
    """Samples of the subpopulations, bool ``(N,)``, on the device of the values."""
    members = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    for one in found:
        inside = groups.positions(one.label)
        members[inside] |= one.project(values[inside]) > one.threshold
    return members


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
    return scores_in(values, group_by_label(labels.to(values.device)), subpopulations, ranking)


def scores_in(values: Tensor, groups: LabelGroups, subpopulations: Sequence[Subpopulation], ranking: Tensor) -> Tensor:
    """:func:`subpopulation_scores` of samples that are grouped by label; on the device of the ranking."""
    scores = _ranks(ranking) / len(ranking) / 2
    for found in subpopulations:
        inside = groups.positions(found.label)
        position = found.project(values[inside]).to(scores.device)
        below = 0.5 * (position - found.low) / (found.threshold - found.low)
        above = 0.5 + 0.5 * (position - found.threshold) / (found.high - found.threshold)
        scores[inside.to(scores.device)] = torch.where(position > found.threshold, above, below.clamp(0, 0.5))
    return scores


def _ranks(values: Tensor) -> Tensor:
    """Place of every value in rising order, float ``(N,)``; equal ones by position."""
    rank = torch.empty(len(values), device=values.device)
    rank[values.argsort(stable=True)] = torch.arange(len(values), dtype=torch.float32, device=values.device)
    return rank


# One subpopulation in most labels, as under an all-to-all attack.

ALL_TO_ALL_LABELS = 0.5  # of the other labels, at least, must be split by the direction that one label gave
ALL_TO_ALL_MEMBERS = 0.5  # of the label, less than that: the upper group is the smaller one
SAME_DIVISION = 0.5  # of the samples that one of two divisions splits off, or both; if both split off more than that
# share, the divisions count as one, and wrong labels are tested for the first of them alone


def find_all_to_all_subpopulation(
    values: Tensor,
    labels: Tensor,
    *,
    pictures: Tensor | None = None,
    false_alarm_rate: float = FALSE_ALARM_RATE,
    min_separation: float = STRICT_GAP,
) -> list[Subpopulation]:
    """Find a direction that splits most labels into two far groups, the upper one the smaller.

    An all-to-all backdoor shifts every label by the same trigger, so no label has a subpopulation of its own. A
    direction is sought in one label at a time, as in :func:`~lightning_backdoor.functional.find_subpopulations`, and
    tried on the others, which had no part in it.

    A second group in every label can be clean, too: two cameras, a logo, writing that slants. With ``pictures`` the
    group of a label must look like samples of another label (an exact test, see
    ``lightning_backdoor/detection/look_alikes.py``). Without, check whether a model that is trained without the groups
    gives these samples their label. It does if the labels are right, and does not for the wrong labels of a backdoor.

    Args:
        values: Response of every unit to every sample, float and finite, shape ``(N, U)``.
        labels: Labels as given, long, shape ``(N,)``.
        pictures: Small grey pictures of the samples, half ``(N, 144)``
            (:func:`~lightning_backdoor.functional.thumbnails`); ``None`` leaves the test out.
        false_alarm_rate: Chance at most that groups with right labels pass it in a training; ``math.inf`` leaves the
            test out.
        min_separation: Smallest distance of the two means in sums of the two standard deviations.

    Returns:
        One subpopulation per label that the direction splits, all with the same units and weights; ``enrichment`` is 1.
        Empty when nothing stands out.
    """
    evidence: dict[str, Any] = {"pictures": pictures, "false_alarm_rate": false_alarm_rate}
    return common_subpopulations(search_labels(values, labels, least=min_separation, **evidence), min_separation)


def common_subpopulations(search: Search, min_separation: float = STRICT_GAP) -> list[Subpopulation]:
    """The subpopulation that most labels have in common: see :func:`find_all_to_all_subpopulation`."""
    present = [label for label, size in search.groups.sizes.items() if size >= 2 * MIN_MEMBERS]
    if len(present) < 3:
        return []
    tested: list[Tensor] = []
    largest_first = sorted(present, key=lambda k: -search.groups.sizes[k])
    directions = [one for label in largest_first for one in search.directions.get(label, [])]
    directions = [one for one in directions if one.standardized_gap >= min_separation]
    for first in range(0, len(directions), TOGETHER):
        some = directions[first : first + TOGETHER]
        for direction, about in zip(some, _labels_about_split(search, some, min_separation), strict=True):
            if about - 1 < ALL_TO_ALL_LABELS * (len(present) - 1):
                continue
            found = _split_all(search, direction, min_separation)
            if len(found) - 1 >= ALL_TO_ALL_LABELS * (len(present) - 1):
                share = GateFigure("split_labels", (len(found) - 1) / (len(present) - 1), ">=", ALL_TO_ALL_LABELS)
                figures = _of_other_labels(found, search, tested)
                if figures is not None:
                    return [replace(one, figures=(*one.figures, share, *figures)) for one in found]
    return []


@full_precision()
def _labels_about_split(search: Search, directions: Sequence[Direction], min_separation: float) -> list[int]:
    """How many labels each direction splits by the criteria of :func:`_split_all`, or misses by less than rounding.

    All samples are projected on all directions at once: one after the other takes as long for each.
    """
    values, weights = search.values, _weights(search, directions)
    labels = torch.zeros(len(directions), dtype=torch.long, device=values.device)
    for batch in search.groups.batches(2 * MIN_MEMBERS, max(values.shape[1], len(directions))):
        split = split_rows((values[batch.rows].float() @ weights).mT, batch.counts, smallest_group(batch.counts))
        few = split.members < ALL_TO_ALL_MEMBERS * batch.counts[:, None] + 1
        labels += (few & (split.standardized_gap >= 0.99 * min_separation)).sum(dim=0)
    return labels.tolist()


def _of_other_labels(found: list[Subpopulation], search: Search, tested: list[Tensor]) -> tuple[GateFigure, ...] | None:
    """The figures of the test whether groups have wrong labels; None if they look right, or were tested before.

    The first division has half of the bound, the next one a sixth, a twelfth, ...: together they have all of it.

    Args:
        found: The groups of all labels.
        search: With pictures, or the test is left out.
        tested: Members of the divisions that were tested before, bool ``(N,)`` each; this one is added.
    """
    if search.pictures is None or search.false_alarm_rate == math.inf:
        return ()
    upper = members_of(search.values, search.groups, found)
    if any(int((upper & other).sum()) > SAME_DIVISION * int((upper | other).sum()) for other in tested):
        return None
    tested.append(upper)
    bound = search.bound / (len(tested) * (len(tested) + 1))
    p_value = wrong_labels_p_value(search.pictures, search.groups.labels, upper, search.usual_distance)
    return (GateFigure("other_label_p_value", p_value, "<=", bound),) if p_value <= bound else None


def _split_all(search: Search, direction: Direction, min_separation: float) -> list[Subpopulation]:
    """The labels that a direction splits into a larger lower and a smaller upper group."""
    found, units, weights = [], direction.units, direction.weights
    for label, split in sorted(split_labels(project(search.values, units, weights), search.groups).items()):
        gap, members, size = split.standardized_gap, split.members, search.groups.sizes[label]
        if gap >= min_separation and members < ALL_TO_ALL_MEMBERS * size:
            one = Subpopulation(label, units, weights, split.threshold, split.low, split.high, gap, 1.0, members)
            found.append(
                one.passed(
                    "all_to_all",
                    GateFigure("standardized_gap", gap, ">=", min_separation),
                    GateFigure("member_share", members / size, "<", ALL_TO_ALL_MEMBERS),
                )
            )
    return found
