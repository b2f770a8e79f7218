"""Near-duplicates among images, such as shots of one thing or frames of one video. They are one sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_backdoor.detection.directions import full_precision

__all__ = [
    "SIDE",
    "closed_share",
    "effective_number",
    "near_duplicates",
    "repeated_share",
    "thumbnails",
    "usual_distance",
]

SIDE = 12  # of a thumbnail, in pixels: coarse enough for a shift by a pixel or two, fine enough to tell things apart
NEAR = 0.1  # of the usual distance of two images of a label, at most
BLOCK = 2**22  # correlations that are computed at once
PAIRS = 2000  # of a label and in all, from which the usual distance is taken
LOOKED_UP = 1000  # members of a group whose nearest image is sought, drawn at random where there are more
SOUGHT = 300  # samples, at most, by which it is seen whether the data hold near-duplicates


def thumbnails(images: Tensor) -> Tensor:
    """Small grey pictures with a mean of zero and a length of one.

    Args:
        images: Of any scale, ``(B, C, H, W)`` or ``(B, H, W)``.

    Returns:
        Half, shape ``(B, 144)``; zeros for an image of one brightness.
    """
    grey = images.detach().float()
    grey = grey.mean(dim=1, keepdim=True) if grey.ndim == 4 else grey[:, None]
    small = F.adaptive_avg_pool2d(grey, SIDE).flatten(1)
    small = small - small.mean(dim=1, keepdim=True)
    return F.normalize(small, dim=1).half()


def usual_distance(pictures: Tensor, labels: Tensor) -> float:
    """Median distance, one minus the correlation, of two images that have the same label and are drawn at random.

    Args:
        pictures: From :func:`thumbnails`, ``(N, 144)``.
        labels: Labels as given, long ``(N,)``.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    order = order[labels[order].argsort(stable=True)]  # neighbors in this order have the same label, mostly
    one, other = order[:-1], order[1:]
    same = (labels[one] == labels[other]).nonzero().squeeze(1)
    if not len(same):
        return 0.0
    same = same[torch.randperm(len(same), generator=generator)[:PAIRS].to(same.device)]
    alike = (pictures[one[same]].float() * pictures[other[same]].float()).sum(dim=1)
    return float((1 - alike).median())


def effective_number(numbers: Tensor) -> float:
    """How many different things there are among samples, by the numbers of :func:`near_duplicates`, long ``(n,)``.

    Simpson's number: a thing that makes up most of them counts as most of one, beside which single ones count little.
    """
    counts = torch.unique(numbers, return_counts=True)[1].double()
    return float(counts.sum().square() / counts.square().sum()) if len(counts) else 0.0


def near_duplicates(pictures: Tensor, usual: float) -> Tensor:
    """Number images so that near-duplicates have the same number.

    Two images are near-duplicates if their distance is a tenth of the usual one at most, or if a chain of such pairs
    leads from one to the other, as it does through the frames of a video.

    Pairs are found and joined in blocks: beside the pictures 300 MB at most, however many samples there are and however
    many of them are alike. The time grows with the square of their number.

    Args:
        pictures: From :func:`thumbnails`, ``(n, 144)``.
        usual: Of two images of a label, from :func:`usual_distance`.

    Returns:
        Numbers from zero, long ``(n,)``.
    """
    pictures, n = pictures.float(), len(pictures)
    numbers = torch.arange(n, device=pictures.device)
    size = max(BLOCK // max(n, 1), 1)
    with full_precision():
        for start, rows in zip(range(0, n, size), torch.split(pictures, size), strict=True):
            one, other = (rows @ pictures[start:].T >= 1 - NEAR * usual).nonzero().T
            numbers = _joined(numbers, one + start, other + start)
    found: Tensor = torch.unique(numbers, return_inverse=True)[1]
    return found


def repeated_share(pictures: Tensor, labels: Tensor, usual: float) -> float:
    """Share of the samples that have a near-duplicate in their label, among a few that are drawn at random.

    It says whether data are tracks of things that were taken many times, as the frames of a video are.

    Args:
        pictures: From :func:`thumbnails`, ``(N, 144)``.
        labels: Labels as given, long ``(N,)``, on the device of the pictures.
        usual: Of two images of a label, from :func:`usual_distance`.
    """
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:SOUGHT].to(labels.device)
    if not len(drawn):
        return 0.0
    some, found = pictures[drawn].float(), torch.zeros_like(drawn, dtype=torch.bool)
    with full_precision():
        for places in torch.split(torch.arange(len(labels), device=labels.device), max(BLOCK // len(drawn), 1)):
            near = some @ pictures[places].float().T >= 1 - NEAR * usual
            near &= (labels[drawn, None] == labels[places]) & (drawn[:, None] != places)
            found |= near.any(dim=1)
    return float(found.float().mean())


def _joined(numbers: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Numbers, long ``(n,)``, after pairs of samples have become the same: the smallest place among them."""
    while True:
        smallest = numbers.scatter_reduce(0, numbers[one], numbers[other], "amin")
        smallest = smallest.scatter_reduce(0, numbers[other], numbers[one], "amin")
        smallest = smallest[smallest]
        if smallest.equal(numbers):
            return numbers
        numbers = smallest


def closed_share(inside: Tensor, upper: Tensor, numbers: Tensor, outside: Tensor) -> float:
    """Share of the things in a group whose nearest image is in the group, too, beyond what their label explains.

    Shots of one thing under changing light and from different distances are not all near-duplicates, but the image that
    is nearest to a shot is another one of them, and in the same group. Images that somebody has chosen and marked are
    nearest to images that he has not: where labels are wrong, to those of their true classes, and otherwise to members
    as often as there are members in the label. What the group has in common is taken out of all pictures first, by the
    direction between the means of both groups, since a trigger makes images alike.

    Args:
        inside: Pictures of the label's samples, from :func:`thumbnails`, ``(n, 144)``.
        upper: The group, bool ``(n,)``.
        numbers: Of the label's samples, from :func:`near_duplicates`, long ``(n,)``. The nearest image is sought among
            those that have another number.
        outside: Pictures of the samples of all other labels, ``(M, 144)``.

    Returns:
        About 0 where the members are drawn at random from any labels, or from their own; 1 where all are nearest to
        members.
    """
    n, size = len(upper), int(upper.sum())
    if not 0 < size < n:
        return 0.0
    look = inside[upper].float().mean(dim=0) - inside[~upper].float().mean(dim=0)
    look = F.normalize(look, dim=0)

    def without(pictures: Tensor) -> Tensor:
        pictures = pictures.float()
        return F.normalize(pictures - (pictures @ look)[:, None] * look, dim=1)

    _, thing, counts = torch.unique(numbers[upper], return_inverse=True, return_counts=True)
    weights, members = 1 / counts[thing].double(), upper.nonzero().squeeze(1)
    if size > LOOKED_UP:
        drawn = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:LOOKED_UP].to(upper.device)
        weights, members = weights[drawn], members[drawn]
    with full_precision():
        pictures = without(inside[members])
        alike = pictures @ without(inside).T
        alike, nearest = alike.masked_fill(numbers[members][:, None] == numbers, -1).max(dim=1)
        elsewhere = torch.full_like(alike, -1)
        for rows in torch.split(outside, max(BLOCK // len(members), 1)):
            elsewhere = torch.maximum(elsewhere, (pictures @ without(rows).T).amax(dim=1))
    own = alike > elsewhere
    of_label = float((weights * own).sum() / weights.sum())
    of_group = float((weights * (own & upper[nearest])).sum() / weights.sum())
    expected = (size - 1) / (n - 1)
    return max(of_group - expected * of_label, 0.0) / (1 - expected)
