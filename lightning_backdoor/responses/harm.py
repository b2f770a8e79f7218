"""What a treatment costs each class: the accuracy of a small class is hardly seen in that of all images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Harm", "drawn_by_label", "harmed_class"]

CLASS_LOSS = 0.1  # of the accuracy of a class, twice what all images together may lose: classes differ
CHANCE = 3.0 * 0.3  # three standard errors of a share of ten in a hundred, times the root of the number of samples: one
# in a thousand classes would be beyond them
LEAST = 20  # samples of a class that are measured, at least: of fewer the standard error says little

Harm = tuple[int, float, float]
"""Label, and share of its samples that get it, in ``[0, 1]``, before and after a treatment."""


def harmed_class(before: Tensor, after: Tensor, labels: Tensor, first: Sequence[int] = ()) -> Harm | None:
    """The class that has lost more of its accuracy than a treatment may cost it; ``None`` if none has.

    That is ten points, and three standard errors of the share of ten in a hundred: 30 points of a class of 20 measured
    samples, 19 of 100, 13 of 1,000.

    Args:
        before: Samples that got their label before the treatment, bool ``(N,)``.
        after: The same samples after it.
        labels: Their labels, long ``(N,)``; -1 where none is known.
        first: Labels that are named before others: those that the treatment is about.

    Returns:
        Of several classes one of ``first``, and of these the one that has lost most.

    Example:
        >>> import torch
        >>> labels = torch.arange(80) % 2
        >>> harmed_class(torch.ones(80, dtype=torch.bool), labels == 0, labels)
        (1, 1.0, 0.0)
    """
    known = labels >= 0
    present, places = torch.unique(labels[known], return_inverse=True)
    sizes = torch.bincount(places, minlength=len(present)).double()
    shares = [torch.bincount(places[hits[known]], minlength=len(present)) / sizes for hits in (before, after)]
    lost = shares[0] - shares[1]
    allowed = CLASS_LOSS + CHANCE / sizes.sqrt()
    harmed = ((sizes >= LEAST) & (lost > allowed)).nonzero().squeeze(1).tolist()
    if not harmed:
        return None
    worst = max(harmed, key=lambda place: (int(present[place]) in first, float(lost[place])))
    return int(present[worst]), float(shares[0][worst]), float(shares[1][worst])


def drawn_by_label(mask: Tensor, labels: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most so many samples of each label, drawn at random among those of a mask, bool ``(N,)``."""
    positions = mask.nonzero().squeeze(1)
    positions = positions[torch.randperm(len(positions), generator=generator)]
    positions = positions[labels[positions].argsort(stable=True)]
    _, counts = torch.unique(labels[positions], return_counts=True)
    starts = counts.cumsum(0) - counts
    rank = torch.arange(len(positions)) - starts.repeat_interleave(counts)
    drawn = torch.zeros_like(mask)
    drawn[positions[rank < most]] = True
    return drawn
