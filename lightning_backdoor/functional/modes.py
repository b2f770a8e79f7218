"""A second population inside one label, absent from all others: what a backdoor looks like to the units of a network."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_backdoor.errors import ArgumentError

__all__ = ["MIN_EXCLUSIVENESS", "MIN_SEPARATION", "Mode", "find_modes", "mode_scores", "split_units"]

MIN_SEPARATION = 2.5  # one Gaussian cut at its mean has 1.32; clean CIFAR-10 classes stay below 1.8
MIN_EXCLUSIVENESS = 20.0
MIN_MEMBERS = 5
CANDIDATES = 3  # units per label from which the search for a direction starts
ROUNDS = 3  # of split and discriminant
RIDGE = 0.1
MAX_UNITS = 512  # of a direction
FOLDS = 2  # halvings of a label that a direction is tested on


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
        separation: Distance of the centres over the sum of the two standard deviations, on held-out samples.
        exclusiveness: Share of the label's samples above the threshold over the share of all others above it.
        members: Samples of the label above the threshold.
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

    def project(self, values: Tensor) -> Tensor:
        """Position of every sample along the direction, float ``(N,)``, for values ``(N, U)``."""
        return values[:, self.units].float() @ self.weights


@dataclass(frozen=True)
class _Split:
    threshold: Tensor
    low: Tensor
    high: Tensor
    separation: Tensor
    members: Tensor


def split_units(values: Tensor, min_members: int = MIN_MEMBERS) -> _Split:
    """Split every column into the two groups with the smallest squared deviations (exact, vectorised over units).

    Args:
        values: Float, shape ``(N, U)``.
        min_members: Smallest size of a group.

    Returns:
        Threshold, centre of the lower and of the upper group, separation and size of the upper group, each ``(U,)``.
    """
    n = len(values)
    if n < 2 * min_members:
        raise ArgumentError(f"`values` must have at least {2 * min_members} rows, got {n}.")
    ordered = values.double().sort(dim=0).values
    sums, squares = ordered.cumsum(0), ordered.square().cumsum(0)
    count = torch.arange(1, n, dtype=torch.float64)[:, None]
    lower, total = sums[:-1], sums[-1:]
    explained = lower.square() / count + (total - lower).square() / (n - count)
    explained[: min_members - 1] = -torch.inf
    explained[n - min_members :] = -torch.inf
    at = explained.argmax(dim=0, keepdim=True)
    n_low = at.squeeze(0) + 1.0
    n_high = n - n_low
    sum_low, square_low = sums.gather(0, at).squeeze(0), squares.gather(0, at).squeeze(0)
    low, high = sum_low / n_low, (sums[-1] - sum_low) / n_high
    var_low = (square_low / n_low - low.square()).clamp(min=0)
    var_high = ((squares[-1] - square_low) / n_high - high.square()).clamp(min=0)
    spread = (var_low.sqrt() + var_high.sqrt()).clamp(min=1e-6)
    threshold = (ordered.gather(0, at) + ordered.gather(0, at + 1)).squeeze(0) / 2
    return _Split(threshold, low, high, (high - low) / spread, n_high.long())


def find_modes(
    values: Tensor,
    labels: Tensor,
    *,
    min_separation: float = MIN_SEPARATION,
    min_exclusiveness: float = MIN_EXCLUSIVENESS,
) -> list[Mode]:
    """Find the labels that hold two populations, the second of which is absent from all other labels.

    A backdoor gives one label a second population: the samples that carry the trigger. On some unit they form a mode
    far from the label's other samples and absent elsewhere (the idea of a neuron that cuts a label in two is that of
    NONE, `Wang et al., 2022 <https://arxiv.org/abs/2202.06382>`_). The search starts from the best separated single
    units of a label, and sharpens each split in turns of Fisher's linear discriminant and an exact two-group split of
    the projections. A direction counts when its two modes are far apart on samples that had no part in fitting it, and
    the upper one is exclusive to the label; ordinary variety inside a class is neither.

    Args:
        values: Response of every unit to every sample, float, shape ``(N, U)``.
        labels: Labels as given, long, shape ``(N,)``.
        min_separation: Smallest distance of the two centres in sums of the two standard deviations.
        min_exclusiveness: Smallest ratio of the share above the threshold inside and outside the label.

    Returns:
        At most one mode per label, the best separated one that passes both bounds. Empty when nothing stands out.
    """
    found = []
    for label in labels.unique().tolist():
        inside = labels == label
        if int(inside.sum()) < 4 * MIN_MEMBERS:
            continue
        modes = [m for m in _candidates(values, inside, int(label)) if m.exclusiveness >= min_exclusiveness]
        modes = [m if len(m.units) == 1 else replace(m, separation=_held_out(values[inside], m)) for m in modes]
        passed = [m for m in modes if m.separation >= min_separation]
        found.extend(sorted(passed, key=lambda mode: -mode.separation)[:1])
    return found


def _candidates(values: Tensor, inside: Tensor, label: int) -> list[Mode]:
    """The sharpened directions that start from the best separated units of one label."""
    members = values[inside].float()
    split = split_units(members)
    modes = []
    for unit in split.separation.topk(min(CANDIDATES, members.shape[1])).indices.tolist():
        upper = members[:, unit] > split.threshold[unit]
        mode = _mode(values, members, inside, label, torch.tensor([unit]), torch.ones(1))
        modes.append(mode)
        for _ in range(ROUNDS if members.shape[1] > 1 else 0):
            units, weights = _discriminant(members, upper)
            sharper = _mode(values, members, inside, label, units, weights)
            if sharper.separation <= modes[-1].separation:
                break
            modes.append(sharper)
            upper = sharper.project(members) > sharper.threshold
    return modes


def _mode(values: Tensor, members: Tensor, inside: Tensor, label: int, units: Tensor, weights: Tensor) -> Mode:
    """Split the projections of one label and count who else lies above the threshold."""
    split = split_units((members[:, units] @ weights)[:, None])
    threshold = float(split.threshold)
    outside = torch.cat([part[:, units].float() @ weights for part in values.split(2**14)])[~inside] > threshold
    share_outside = max(int(outside.sum()), 0.5) / max(len(outside), 1)
    return Mode(
        label=label,
        units=units,
        weights=weights,
        threshold=threshold,
        low=float(split.low),
        high=float(split.high),
        separation=float(split.separation),
        exclusiveness=int(split.members) / len(members) / share_outside,
        members=int(split.members),
    )


def _held_out(members: Tensor, mode: Mode) -> float:
    """Mean separation on samples that had no part in the direction.

    A discriminant of many units splits any few samples neatly. Here it is fitted on one half of the label, with the
    groups that the mode names, and the other half is split along it; both ways, for ``FOLDS`` random halvings.
    """
    members = members.float()
    upper = mode.project(members) > mode.threshold
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(FOLDS):
        half = torch.rand(len(members), generator=generator) < 0.5
        for fit, look in ((half, ~half), (~half, half)):
            if min(int(upper[fit].sum()), int((~upper[fit]).sum())) < 2 or int(look.sum()) < 2 * MIN_MEMBERS:
                return 0.0
            units, weights = _discriminant(members[fit], upper[fit])
            found.append(float(split_units((members[look][:, units] @ weights)[:, None]).separation))
    return sum(found) / len(found)


def _discriminant(members: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Fisher's linear discriminant between two groups, with a ridge, on the units that differ most."""
    high, low = members[upper], members[~upper]
    gap = high.mean(dim=0) - low.mean(dim=0)
    scale = members.std(dim=0).clamp(min=1e-6)
    units = (gap / scale).abs().topk(min(MAX_UNITS, members.shape[1])).indices.sort().values
    centred = torch.cat([high - high.mean(dim=0), low - low.mean(dim=0)])[:, units] / scale[units]
    within = centred.T @ centred / len(members)
    ridge = RIDGE * within.diagonal().mean() * torch.eye(len(units))
    weights = torch.linalg.solve(within + ridge, gap[units] / scale[units])
    return units, weights / scale[units] / weights.norm()


def mode_scores(values: Tensor, labels: Tensor, modes: list[Mode], ranking: Tensor) -> Tensor:
    """Turn modes into one score per sample; above 0.5 lies the second mode of the sample's own label.

    Samples of a label with a mode score by their position between its centres: 0 at the centre of the lower mode, 0.5 at
    the threshold, 1 at the centre of the upper one. All others score half of their rank in ``ranking``, so that they
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
