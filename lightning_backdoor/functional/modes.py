"""A second population inside one label, and in no other one: what a backdoor looks like to a network's units."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional.directions import (
    ERRORS,
    Direction,
    directions_and_units,
    discriminant,
    split_label,
)
from lightning_backdoor.functional.splits import BLOCK, MIN_MEMBERS

__all__ = ["DENIED_AGREEMENT", "DENIED_SEPARATION", "STRICT_SEPARATION", "Mode", "find_modes", "mode_scores"]

# Every gate: the lower mode must be the class itself.
OWN_AUROC = 0.75  # by which the lower mode is told from all other labels; wrong labels have 0.5
OWN_OTHERS = 2**14  # samples of other labels that it is compared with, drawn at random where there are more

# The strict gate: hardly any sample of another label lies beside the upper mode.
STRICT_SEPARATION = 2.5  # and of the leaning gate; a Gaussian cut at its mean has 1.32, clean CIFAR-10 classes < 2.4
STRICT_EXCLUSIVENESS = 20.0

# The leaning gate: samples of many other labels lie beside it, and none of these labels is split by the direction.
LEANING_EXCLUSIVENESS = 2.0
LEANING_MEMBERS = 0.55  # of the label at most: where a class has a rare kind, the upper mode is the class
LEANING_OTHERS = 3  # labels that are compared, at least
LEANING_KINDS = 4.5  # effective number of labels beside it; half of the others, 2 at least, where they are fewer
LEANING_ELSEWHERE = 1.6  # separation of any other label along the direction, less than that

# The gate of modes that early neighbours deny their label.
DENIED_SEPARATION = 2.0
DENIED_EXCLUSIVENESS = 2.0
DENIED_MEMBERS = 0.55  # of the label at most: beside a kind of near-duplicates, the upper mode is the class
DENIED_AGREEMENT = 0.7  # of that of the label's other samples; clean CIFAR-10 classes stay above 0.95


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
    """Find the labels that hold two populations, the second of which no other label holds.

    A backdoor gives one label a second population: the samples that carry the trigger. On some unit they form a mode
    far from the label's other samples, and no other label falls into two there (the idea of a neuron that cuts a label
    in two is that of NONE, `Wang et al., 2022 <https://arxiv.org/abs/2202.06382>`_). The search starts from the best
    separated single units of a label, and sharpens each split in turns of Fisher's linear discriminant and an exact
    two-group split of the projections. Every sample is projected with a discriminant that was fitted without it, so
    that many units and few samples do not feign a separation. A direction counts when its two modes are far apart and
    the upper one is exclusive to the label; ordinary variety inside a class is neither. The lower mode must be the
    class itself, told from all other labels by its own features (of many units): where some labels are wrong, the class
    is the *upper* mode, and the lower one is a mixture of other classes that must not cost it its samples.

    Exclusive is a mode beside which hardly any sample of other labels lies; or one of up to 55 % of its label, beside
    which samples of many others lie, none of which is split by the direction. For the latter there must be three others
    of at least 20 samples; smaller ones, which cannot be split, count against the mode if they lie beside it. It must
    also vary more than the rest of its label, beyond chance: poisons are images of many classes, the rest of one.

    Early in training, before a weak backdoor is learned, its samples lie among those of their true classes, while a
    clean kind of image lies among its label. With ``agreement`` from then on, a mode whose neighbours deny it its label
    counts even if it is less separate and less exclusive, where no other does: some attacks add triggered images with
    their own labels.

    Labels with fewer than 20 samples are not looked at. With one label only nothing can be exclusive to it, and
    nothing is found.

    Args:
        values: Response of every unit to every sample, float and finite, shape ``(N, U)``.
        labels: Labels as given, long, shape ``(N,)``.
        agreement: Share of every sample's neighbours that had its label early in training, float, shape ``(N,)``
            (:func:`~lightning_backdoor.functional.neighbour_agreement`); ``None`` if that is not known.

    Returns:
        At most one mode per label, the best separated one that passes all bounds. Empty when nothing stands out.

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
    least = STRICT_SEPARATION if agreement is None else DENIED_SEPARATION
    found = []
    for label in present:
        inside = labels == label
        if int(inside.sum()) < 2 * MIN_MEMBERS:
            continue
        directions, units = directions_and_units(values[inside].float())
        apart = sorted((one for one in directions if one.separation >= least), key=lambda one: -one.separation)
        modes = [_mode(values, inside, int(label), direction) for direction in apart]
        separate = (m for m in modes if m.separation >= STRICT_SEPARATION)
        exclusive = (
            m for m in separate if m.exclusiveness >= STRICT_EXCLUSIVENESS or _leaning(values, labels, m, units)
        )
        denied = (
            replace(m, denied=True) for m in modes if agreement is not None and _denied(values, inside, m, agreement)
        )
        if first := next((m for m in chain(exclusive, denied) if _own(values, inside, m, units) >= OWN_AUROC), None):
            found.append(first)
    return found


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
    agree = agreement[inside].float()
    if mode.exclusiveness < DENIED_EXCLUSIVENESS or mode.members > DENIED_MEMBERS * len(agree):
        return False
    upper = mode.project(values[inside]) > mode.threshold
    sizes = [int(upper.sum()), int((~upper).sum())]
    if min(sizes) < MIN_MEMBERS:
        return False
    chance = ERRORS * float(agree.std()) * math.sqrt(sum(1 / size for size in sizes))
    return float(agree[upper].mean()) + chance < DENIED_AGREEMENT * float(agree[~upper].mean())


def _leaning(values: Tensor, labels: Tensor, mode: Mode, units: Tensor) -> bool:
    """Whether samples of many other labels lie above the threshold, and no other label is split by the direction.

    Others can lie above the threshold as a whole, since what tells poisons from the rest of their label points at their
    true classes, too: at many of them. A population that labels share splits the others as well; a rare clean kind of
    image is the smaller part of its label; one that resembles other classes points at one or two of them (a 1 that is
    written like a 2 and a 3). The effective number of labels is Simpson's, by the share of every label above the
    threshold: ``(sum of shares)^2 / sum of squared shares``, so that a large label counts as one. Labels that are too
    small to be split are none of the many; all together they add one share to the squares.

    Poisons that point at many true classes vary more than the rest of their label, which is one class. A mode that does
    not is a clean kind, or the class itself beside at least as many poisons.
    """
    counts = torch.bincount(labels)
    if mode.exclusiveness < LEANING_EXCLUSIVENESS or mode.members > LEANING_MEMBERS * int(counts[mode.label]):
        return False
    others = [k for k in range(len(counts)) if k != mode.label and int(counts[k]) >= 2 * MIN_MEMBERS]
    if values.shape[1] == 1 or len(others) < LEANING_OTHERS or not _varied(values[labels == mode.label], mode, units):
        return False
    shares = []
    for k in others:
        positions = mode.project(values[labels == k])[:, None]
        if Direction(mode.units, mode.weights, split_label(positions), len(positions)).separation >= LEANING_ELSEWHERE:
            return False
        shares.append(int((positions > mode.threshold).sum()) / len(positions))
    small = mode.project(values[counts[labels] < 2 * MIN_MEMBERS]) > mode.threshold
    share_of_small = int(small.sum()) / max(len(small), 2 * MIN_MEMBERS)
    least = min(LEANING_KINDS, max(2.0, len(others) / 2))
    squares = sum(share**2 for share in [*shares, share_of_small])
    return squares > 0 and sum(shares) ** 2 >= least * squares


def _varied(members: Tensor, mode: Mode, units: Tensor) -> bool:
    """Whether the upper mode varies more than the lower one, beyond chance: squared distances from their own centres.

    Args:
        members: Values of the label's samples, float ``(n, U)``; every unit is taken in standard deviations of these.
        mode: A mode of the label.
        units: Columns that are compared, long ``(M,)``.
    """
    upper = mode.project(members) > mode.threshold
    if min(int(upper.sum()), int((~upper).sum())) < 2:
        return False
    members = members[:, units].float()
    scale = members.std(dim=0)
    scaled = members[:, scale > 0] / scale[scale > 0]
    parts = (scaled[upper], scaled[~upper])
    above, below = ((part - part.mean(dim=0)).square().sum(dim=1) * len(part) / (len(part) - 1) for part in parts)
    chance = ERRORS * math.sqrt(float(above.var()) / len(above) + float(below.var()) / len(below))
    return float(above.mean() - below.mean()) > chance


def _own(values: Tensor, inside: Tensor, mode: Mode, units: Tensor) -> float:
    """How well the lower mode is told from the samples of all other labels, as AUROC of a held-out discriminant."""
    if values.shape[1] == 1:
        return 1.0  # one number per sample, such as a susceptibility, does not describe classes
    lower = inside.nonzero().squeeze(1)
    lower = lower[mode.project(values[lower]) <= mode.threshold]
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
