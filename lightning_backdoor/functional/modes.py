"""A second population inside one label, absent from all others: what a backdoor looks like to a network's units."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_backdoor.functional.splits import BLOCK, MIN_MEMBERS, Split, split_units

__all__ = ["DENIED", "MIN_EXCLUSIVENESS", "MIN_SEPARATION", "Mode", "find_modes", "mode_scores"]

MIN_SEPARATION = 2.5  # one Gaussian cut at its mean has 1.32; clean CIFAR-10 classes stay below 1.8
MIN_EXCLUSIVENESS = 20.0
LEAST_SEPARATION = 2.0  # of a mode that early neighbours deny its label
LEAST_EXCLUSIVENESS = 2.0  # of a mode that is no other label's, or that early neighbours deny its label
MAX_MEMBERS = 0.55  # of a label may be such a mode: where a class has a rare kind, the upper mode is the class
MIN_OTHERS = 3  # labels that are compared
MAX_ELSEWHERE = 1.6  # separation of other labels along the direction of a mode that is no other label's
DENIED = 0.7  # of the agreement of the label's other samples; clean CIFAR-10 classes stay above 0.95
MIN_SHARE = 0.01  # of the label, for the same reason
CANDIDATES = 3  # units per label from which the search for a direction starts
ROUNDS = 3  # of split and discriminant
ERRORS = 2.0  # standard errors by which what a small group shows may be chance
RIDGE = 0.1
MAX_UNITS = 512  # of a direction
MIN_OWN = 0.75  # AUROC by which the lower mode is told from all other labels; wrong labels have 0.5
MAX_OTHERS = 2**14  # samples of other labels that it is compared with


@dataclass(frozen=True)
class Mode:
    """A second mode of one label.

    Attributes:
        label: Class index of the samples that are split.
        units: Columns of the values that take part, long ``(M,)``.
        weights: Their weights, float ``(M,)``: the direction along which the modes are apart.
        threshold: Split point of the projection; members of the upper mode lie above it.
        low: Centre of the lower mode.
        high: Centre of the upper mode.
        separation: Distance of the centres over the sum of the two standard deviations, of samples held out one by one,
            with an allowance for the sampling error of small modes.
        exclusiveness: Share of the label's samples above the threshold over the share of all others above it.
        members: Samples of the label above the threshold.
        denied: Whether it counts because early neighbours deny the upper mode its label.
    """

    label: int
    units: Tensor
    weights: Tensor
    threshold: float
    low: float
    high: float
    separation: float
    exclusiveness: float
    members: int
    denied: bool = False

    def project(self, values: Tensor) -> Tensor:
        """Position of every sample along the direction, float ``(N,)``, for values ``(N, U)``."""
        return values[:, self.units].float() @ self.weights


def find_modes(values: Tensor, labels: Tensor, *, agreement: Tensor | None = None) -> list[Mode]:
    """Find the labels that hold two populations, the second of which is absent from all other labels.

    A backdoor gives one label a second population: the samples that carry the trigger. On some unit they form a mode
    far from the label's other samples and absent elsewhere (the idea of a neuron that cuts a label in two is that of
    NONE, `Wang et al., 2022 <https://arxiv.org/abs/2202.06382>`_). The search starts from the best separated single
    units of a label, and sharpens each split in turns of Fisher's linear discriminant and an exact two-group split of
    the projections. Every sample is projected with a discriminant that was fitted without it, so that many units and
    few samples do not feign a separation. A direction counts when its two modes are far apart and the upper one is
    absent from all others: hardly any of their samples lie beside it, or none of them is split by the direction;
    ordinary variety inside a class is neither. The lower mode must be the class itself, told from all other labels by
    its own features: where some labels are wrong, the class is the *upper* mode, and the lower one is a mixture of
    other classes that must not cost it its samples (not asked of a single unit).

    Early in training, before a weak backdoor is learned, its samples lie among those of their true classes, while a
    clean kind of image lies among its label. With ``agreement`` from then on, a mode whose neighbours deny it its label
    counts even if it is less separate and less exclusive: some attacks add triggered images with their own labels.

    Labels with fewer than 20 samples are not looked at. With one label only nothing can be exclusive to it, and
    nothing is found.

    Args:
        values: Response of every unit to every sample, float and finite, shape ``(N, U)``.
        labels: Labels as given, long, shape ``(N,)``.
        agreement: Share of every sample's neighbours that had its label early in training, float, shape ``(N,)``
            (:func:`~lightning_backdoor.functional.neighbour_agreement`); ``None`` if that is not known.

    Returns:
        At most one mode per label, the best separated one that passes all bounds. Empty when nothing stands out.
    """
    present = torch.unique(labels).tolist()
    if len(present) < 2:
        return []
    least = MIN_SEPARATION if agreement is None else LEAST_SEPARATION
    found = []
    for label in present:
        inside = labels == label
        if int(inside.sum()) < 2 * MIN_MEMBERS:
            continue
        directions, units = _directions(values[inside].float())
        apart = sorted((one for one in directions if one.separation >= least), key=lambda one: -one.separation)
        modes = [_mode(values, inside, int(label), direction) for direction in apart]
        count = [m for m in modes if m.separation >= MIN_SEPARATION and _exclusive(values, labels, m)]
        if agreement is not None:
            count += [replace(m, denied=True) for m in modes if _denied(values, inside, m, agreement)]
        if first := next((m for m in count if _own(values, inside, m, units) >= MIN_OWN), None):
            found.append(first)
    return found


@dataclass(frozen=True)
class Direction:
    """Units, their weights, and how the projections of one label's n samples split."""

    units: Tensor
    weights: Tensor
    split: Split
    n: int

    @property
    def separation(self) -> float:
        """Separation if the spread is as large as the sampling error of the smaller group allows, ``1 / sqrt(2 m)``.

        Among many units some few samples always lie close together by chance, above all on units with heavy tails.
        """
        members = int(self.split.members)
        smaller = max(min(members, self.n - members), 1)
        return float(self.split.separation) / (1 + ERRORS / math.sqrt(2 * smaller))


def directions_of(members: Tensor) -> list[Direction]:
    """Directions along which the samples of one label, ``(n, U)``, fall into two groups; see :func:`find_modes`."""
    return _directions(members)[0]


def _directions(members: Tensor) -> tuple[list[Direction], Tensor]:
    """Sharpened directions that start from the best separated units of one label, for its values ``(n, U)``.

    Returns:
        The directions, and the units ``(M,)`` on which discriminants are fitted.
    """
    single = split_label(members)
    ranked = single.separation.argsort(descending=True, stable=True)
    units = ranked[:MAX_UNITS]
    directions = []
    for unit in ranked[:CANDIDATES]:
        positions, best = members[:, unit], 0.0
        weights, chosen = torch.ones(1), unit[None]
        for _ in range(ROUNDS + 1):
            split = split_label(positions[:, None])
            if float(split.separation) <= best:
                break
            best = float(split.separation)
            directions.append(Direction(chosen, weights, split, len(members)))
            weights, positions = _discriminant(members[:, units], positions > split.threshold)
            chosen = units
    return directions, units


def _mode(values: Tensor, inside: Tensor, label: int, direction: Direction) -> Mode:
    """Count who else lies above the threshold."""
    units, weights, split = direction.units, direction.weights, direction.split
    rows = torch.split(values, max(BLOCK // len(units), 1))
    above = torch.cat([part[:, units].float() @ weights for part in rows]) > split.threshold
    outside = ~inside
    share_outside = max(int((above & outside).sum()), 0.5) / int(outside.sum())
    return Mode(
        label=label,
        units=units,
        weights=weights,
        threshold=float(split.threshold),
        low=float(split.low),
        high=float(split.high),
        separation=direction.separation,
        exclusiveness=int(split.members) / int(inside.sum()) / share_outside,
        members=int(split.members),
    )


def _denied(values: Tensor, inside: Tensor, mode: Mode, agreement: Tensor) -> bool:
    """Whether the neighbours of the upper mode agree with the label less than those of the lower one, beyond chance."""
    if mode.exclusiveness < LEAST_EXCLUSIVENESS:
        return False
    upper, agree = mode.project(values[inside]) > mode.threshold, agreement[inside].float()
    chance = ERRORS * float(agree[upper].std()) / math.sqrt(mode.members)
    return float(agree[upper].mean()) + chance < DENIED * float(agree[~upper].mean())


def _exclusive(values: Tensor, labels: Tensor, mode: Mode) -> bool:
    """Whether no other label has a second population along the direction of a mode.

    Others can lie above the threshold as a whole, since what tells poisons from the rest of their label points at their
    true classes, too. A population that labels share splits the others as well, and a rare clean kind of image is the
    smaller part of its label.
    """
    if not LEAST_EXCLUSIVENESS <= mode.exclusiveness < MIN_EXCLUSIVENESS:
        return mode.exclusiveness >= MIN_EXCLUSIVENESS
    positions, counts = mode.project(values)[:, None], torch.bincount(labels)
    if mode.members > MAX_MEMBERS * int(counts[mode.label]):
        return False
    others = [k for k in range(len(counts)) if k != mode.label and int(counts[k]) >= 2 * MIN_MEMBERS]
    found = (Direction(mode.units, mode.weights, split_label(positions[labels == k]), int(counts[k])) for k in others)
    return values.shape[1] > 1 and len(others) >= MIN_OTHERS and all(one.separation < MAX_ELSEWHERE for one in found)


def split_label(members: Tensor) -> Split:
    """Two groups in every column of a label's values, neither of them a handful of outliers."""
    return split_units(members, max(MIN_MEMBERS, math.ceil(MIN_SHARE * len(members))))


def _own(values: Tensor, inside: Tensor, mode: Mode, units: Tensor) -> float:
    """How well the lower mode is told from the samples of all other labels, as AUROC of a held-out discriminant."""
    if values.shape[1] == 1:
        return 1.0  # one number per sample, such as a susceptibility, does not describe classes
    lower = inside.nonzero().squeeze(1)
    lower = lower[mode.project(values[lower]) <= mode.threshold]
    others = (~inside).nonzero().squeeze(1)
    others = others[:: math.ceil(len(others) / MAX_OTHERS)]
    if min(len(lower), len(others)) < 2:
        return 0.0
    is_lower = torch.arange(len(lower) + len(others)) < len(lower)
    _, positions = _discriminant(values[torch.cat([lower, others])][:, units].float(), is_lower)
    rank = torch.empty(len(positions))
    rank[positions.argsort()] = torch.arange(len(positions), dtype=torch.float32)
    return float((rank[is_lower].mean() - (len(lower) - 1) / 2) / len(others))


def _discriminant(members: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Fisher's linear discriminant between two groups, with a ridge.

    Returns:
        Weights ``(M,)``, and the position ``(n,)`` of every sample along the weights that were fitted without it (leave
        one out, in closed form by the Sherman-Morrison identity).
    """
    n, sizes = len(members), torch.stack([(~upper).sum(), upper.sum()]).float()
    centre, scale = members.mean(dim=0), members.std(dim=0)
    scale[scale <= 1e-6 * members.abs().amax(dim=0)] = torch.inf  # constant but for rounding: no part in the direction
    scaled = (members - centre) / scale
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
    return weights, (plain + returned) / norm + centre @ weights


def mode_scores(values: Tensor, labels: Tensor, modes: list[Mode], ranking: Tensor) -> Tensor:
    """Turn modes into one score per sample; above 0.5 lies the second mode of the sample's own label.

    Samples of a label with a mode score by their position between its centres: 0 at the centre of the lower mode, 0.5
    at the threshold, 1 at the centre of the upper one. All others score half of their rank in ``ranking``, so that they
    stay below 0.5 and remain ordered.

    Args:
        values: Response of every unit to every sample, float, shape ``(N, U)``.
        labels: Labels as given, long, shape ``(N,)``.
        modes: What :func:`find_modes` returned.
        ranking: A general suspicion, float, shape ``(N,)``; only its order is used.

    Returns:
        Scores, float, shape ``(N,)``; larger is more suspicious.
    """
    rank = torch.empty(len(ranking))
    rank[ranking.argsort(stable=True)] = torch.arange(len(ranking), dtype=torch.float32) / len(ranking)
    scores = rank / 2
    for mode in modes:
        inside = labels == mode.label
        value = mode.project(values[inside])
        below = 0.5 * (value - mode.low) / (mode.threshold - mode.low)
        above = 0.5 + 0.5 * (value - mode.threshold) / (mode.high - mode.threshold)
        scores[inside] = torch.where(value > mode.threshold, above, below.clamp(0, 0.5))
    return scores
