"""One second population in every label: what an all-to-all backdoor looks like to a network's units."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_backdoor.detection.directions import Direction, directions_of, split_label
from lightning_backdoor.detection.splits import MIN_MEMBERS
from lightning_backdoor.detection.subpopulations import STRICT_GAP, Subpopulation

__all__ = ["find_all_to_all_subpopulation"]

MIN_LABELS = 0.5  # of the other labels must be split by the direction that one label gave


def find_all_to_all_subpopulation(
    values: Tensor, labels: Tensor, *, min_separation: float = STRICT_GAP
) -> list[Subpopulation]:
    """Find a direction that splits most labels into two far populations, the upper one the smaller.

    An all-to-all backdoor shifts every label by the same trigger, so no label has a population of its own. A direction
    is sought in one label at a time, as in :func:`~lightning_backdoor.functional.find_subpopulations`, and tried on the others,
    which had no part in it.

    A second population in every label can be innocent, too: two cameras, a logo. Whoever removes it should look
    afterwards whether the model still gives these samples their label. It does if the labels are right; a backdoor's
    are wrong.

    Args:
        values: Response of every unit to every sample, float and finite, shape ``(N, U)``.
        labels: Labels as given, long, shape ``(N,)``.
        min_separation: Smallest distance of the two centres in sums of the two standard deviations.

    Returns:
        One mode per label that the direction splits, all with the same units and weights; ``enrichment`` is 1.
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
            modes = _split_all(values, labels, present, direction, min_separation)
            if len(modes) - 1 >= MIN_LABELS * (len(present) - 1):
                return modes
    return []


def _split_all(
    values: Tensor, labels: Tensor, present: list[int], direction: Direction, min_separation: float
) -> list[Subpopulation]:
    """The labels that a direction splits into a larger lower and a smaller upper group."""
    found, units, weights = [], direction.units, direction.weights
    for label in present:
        position = values[labels == label][:, units].float() @ weights
        split = split_label(position[:, None])
        members = int(split.members)
        if float(split.standardized_gap) >= min_separation and members < len(position) / 2:
            threshold, low, high = float(split.threshold), float(split.low), float(split.high)
            found.append(
                Subpopulation(label, units, weights, threshold, low, high, float(split.standardized_gap), 1.0, members)
            )
    return found
