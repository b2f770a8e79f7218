"""Directions along which the samples of one label fall into two groups."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_backdoor.detection.splits import MIN_MEMBERS, Split, split_units

__all__ = ["ERRORS", "Direction", "directions_and_units", "directions_of", "discriminant", "split_label"]

MIN_SHARE = 0.01  # of the label in either group: a handful of outliers is no population
CANDIDATES = 3  # units per label from which the search for a direction starts
ROUNDS = 3  # of split and discriminant
ERRORS = 2.0  # standard errors by which what a small group shows may be chance
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
        """Separation if the spread is as large as the sampling error of the smaller group allows, ``1 / sqrt(2 m)``.

        Among many units some few samples always lie close together by chance, above all on units with heavy tails.
        """
        members = int(self.split.members)
        smaller = max(min(members, self.n - members), 1)
        return float(self.split.standardized_gap) / (1 + ERRORS / math.sqrt(2 * smaller))


def directions_of(members: Tensor) -> list[Direction]:
    """Directions along which the samples of one label, ``(n, U)``, fall into two groups; see :func:`find_subpopulations`."""
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
    """Two groups in every column of a label's values, neither of them a handful of outliers."""
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
