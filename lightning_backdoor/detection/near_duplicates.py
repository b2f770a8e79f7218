"""Near-duplicates among images, such as shots of one thing or frames of one video. They are one sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_backdoor.detection.directions import full_precision

__all__ = ["SIDE", "effective_number", "near_duplicates", "thumbnails", "usual_distance"]

SIDE = 12  # of a thumbnail, in pixels: coarse enough for a shift by a pixel or two, fine enough to tell things apart
NEAR = 0.1  # of the usual distance of two images of a label, at most
BLOCK = 2**24  # correlations that are computed at once
PAIRS = 2000  # of a label and in all, from which the usual distance is taken


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
        pairs = [
            (rows @ pictures.T >= 1 - NEAR * usual).nonzero() + torch.tensor([start, 0], device=pictures.device)
            for start, rows in zip(range(0, n, size), torch.split(pictures, size), strict=True)
        ]
    one, other = torch.cat(pairs).T
    while True:
        smallest = numbers.scatter_reduce(0, numbers[one], numbers[other], "amin")
        smallest = smallest[smallest]
        if smallest.equal(numbers):
            break
        numbers = smallest
    found: Tensor = torch.unique(numbers, return_inverse=True)[1]
    return found
