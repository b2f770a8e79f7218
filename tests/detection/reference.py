"""The decision in small literal loops: label by label, one candidate and one sample after the other, on the CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST, SHARE, UNITS, STARTS, ROUNDS, RIDGE, STEPS = 10, 0.01, 512, 3, 3, 0.1, 1024


@dataclass(frozen=True)
class Found:
    """One direction of one label: weights of all units ``(U,)``, and how the label's samples split."""

    weights: Tensor
    threshold: float
    gap: float
    members: int


def split(column: Tensor) -> tuple[float, float, int]:
    """Threshold, standardized gap and size of the upper group of the best cut, by trying every cut."""
    ordered = column.double().sort().values
    n, best, found = len(ordered), -math.inf, (0.0, 0.0, 0)
    smallest = max(LEAST, math.ceil(SHARE * n))
    mean = ordered.mean()
    for cut in range(smallest, n - smallest + 1):
        if ordered[cut - 1] == ordered[cut]:
            continue
        low, high = ordered[:cut], ordered[cut:]
        between = float(cut * (low.mean() - mean) ** 2 + (n - cut) * (high.mean() - mean) ** 2)
        if between > best:
            best = between
            spread = max(
                float(low.std(correction=0) + high.std(correction=0)), 1e-6 * float((ordered - mean).abs().max())
            )
            gap = float(high.mean() - low.mean()) / spread
            found = float(ordered[cut - 1] + ordered[cut]) / 2, gap, n - cut
    return found


def discriminant(members: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Fisher's discriminant with a ridge; every sample projected on the weights that were fitted without it."""
    members, n = members.double(), len(members)
    center, scale = members.mean(dim=0), members.std(dim=0)
    scale[scale <= 1e-6 * members.abs().amax(dim=0)] = math.inf
    scaled = (members - center) / scale
    means = torch.stack([scaled[~upper].mean(dim=0), scaled[upper].mean(dim=0)])
    deviations = scaled - means[upper.long()]
    scatter = deviations.T @ deviations
    ridge = RIDGE * (scatter.diagonal().mean() / n).clamp(min=1e-6)
    ridge = 2 ** ((ridge.log2() * STEPS).round() / STEPS) * torch.eye(scatter.shape[0], dtype=torch.float64)
    weights = torch.linalg.solve(scatter / n + ridge, means[1] - means[0])
    positions = []
    for i in range(n):
        size = int((upper == upper[i]).sum())
        # Without sample i the mean of its group moves away from it, and the group's scatter loses a multiple of it.
        moved = means.clone()
        moved[int(upper[i])] -= deviations[i] / (size - 1)
        without = scatter - size / (size - 1) * torch.outer(deviations[i], deviations[i])
        fitted = torch.linalg.solve(without / n + ridge, moved[1] - moved[0])
        positions.append(scaled[i] @ fitted / weights.norm())
    weights = weights / scale / weights.norm()
    return weights, torch.stack(positions) + center @ weights


def directions(members: Tensor) -> list[Found]:
    """All directions of one label's values ``(n, U)``, largest gap first, with the allowance for small groups."""
    n, width = members.shape
    single = [split(members[:, unit]) for unit in range(width)]
    ranked = sorted(range(width), key=lambda unit: -single[unit][1])
    units = torch.tensor(sorted(ranked[:UNITS]))
    found = []
    for unit in ranked[:STARTS]:
        positions, best = members[:, unit], 0.0
        weights = torch.zeros(width, dtype=torch.float64)
        weights[unit] = 1.0
        divided = None
        for _ in range(ROUNDS + 1):
            threshold, gap, count = split(positions)
            if gap <= best:
                break
            best = gap
            allowed = gap / (1 + 2.0 / math.sqrt(2 * max(min(count, n - count), 1)))
            found.append(Found(weights, threshold, allowed, count))
            upper = positions.double() > threshold
            if divided is not None and torch.equal(upper, divided):
                break  # the next discriminant would be the same
            divided = upper
            fitted, positions = discriminant(members[:, units], upper)
            positions = positions.float()
            weights = torch.zeros(width, dtype=torch.float64)
            weights[units] = fitted
    return sorted(found, key=lambda one: -one.gap)
