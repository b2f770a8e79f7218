"""What a group of images has in common, put on other images in three ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["WAYS", "agreed_region", "put_on", "resized"]

AGREED = 0.1  # of the mean square that ordinary images lie away from the members, also after JPEG


def add_difference(images: Tensor, members: Tensor, usual: Tensor, region: Tensor) -> Tensor:
    """Add the difference of two mean images: of the members, and of usual images of all labels."""
    return images + members.float().mean(dim=0) - usual.float().mean(dim=0)


def blend(images: Tensor, members: Tensor, usual: Tensor, region: Tensor) -> Tensor:
    """Take half of each image and half of a member."""
    return (images.float() + members) / 2


def paste(images: Tensor, members: Tensor, usual: Tensor, region: Tensor) -> Tensor:
    """Replace the region by that of a member."""
    return torch.where(region, members, images)


Way = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

WAYS: dict[str, Way] = {"difference": add_difference, "blend": blend, "paste": paste}
"""Functions of images ``(B, C, H, W)``, members and usual images ``(n, C, H, W)`` each, and a region ``(1, H, W)``."""


def agreed_region(members: Tensor, ordinary: Tensor) -> Tensor:
    """Pixels in which members lie far closer to their mean than ordinary images of their label do.

    Args:
        members: ``(n, C, H, W)``.
        ordinary: ``(m, C, H, W)``.

    Returns:
        bool ``(1, H, W)``: where the mean square is less than a tenth.
    """
    mean = members.float().mean(dim=0)
    own, usual = ((images.float() - mean).square().mean(dim=(0, 1)) for images in (members, ordinary))
    return (own < AGREED * usual)[None]


def put_on(images: Tensor, positions: Tensor, members: Tensor, *, usual: Tensor, region: Tensor, way: str) -> Tensor:
    """Put what members have in common on images, each with a member of its own.

    Args:
        images: uint8 ``(B, C, H, W)``.
        positions: Numbers of the images, long ``(B,)``, by which members are given to them in turn.
        members: uint8 ``(n, C, h, w)``; where they differ in size from the images they are resized, as all else is.
        usual: Usual images of all labels, uint8 ``(m, C, h, w)``.
        region: Where members are pasted, bool ``(1, h, w)``.
        way: Key of :data:`WAYS`.

    Returns:
        uint8 ``(B, C, H, W)``.
    """
    size = images.shape[2:]
    members, usual, region = resized(members, size), resized(usual, size), resized(region[None], size)[0] > 0.5
    own = members if way == "difference" else members[positions.to(members.device) % len(members)]
    return WAYS[way](images, own, usual, region).round().clamp(0, 255).to(torch.uint8)


def resized(images: Tensor, size: Sequence[int]) -> Tensor:
    """Images ``(n, C, h, w)`` in this height and width, float ``(n, C, H, W)``."""
    images = images.float()
    return images if images.shape[2:] == torch.Size(size) else F.interpolate(images, list(size), mode="bilinear")
