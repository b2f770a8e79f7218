"""Which images to show, and their pixels ready for the screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.verdict import Verdict

__all__ = ["Exhibit", "Group", "choose", "collect", "fetched", "fitted", "three_channels"]

_LARGEST = 160  # pixels: what a tile needs on a sharp screen
_BRIGHTEST = 16  # the strongest amplification; beyond it one grey level of rounding looks like a pattern


class Group(NamedTuple):
    """Images that are shown under one heading."""

    heading: str
    positions: list[int]


class Exhibit(NamedTuple):
    """One image and what each denoising changed in it.

    Args:
        position: Position in the dataset.
        tiles: The image, then the amplified difference of each variant, uint8, shape ``(1 + V, H, W, 3)``.
        factor: The amplification, the same for all exhibits of a report.
    """

    position: int
    tiles: Tensor
    factor: int


def choose(verdict: Verdict, limit: int = 24) -> list[Group]:
    """Choose the images by which a reader can check the verdict.

    If something was removed: the most suspicious images, the last ones that were removed and, across the line, the
    most suspicious ones that were kept. If nothing was removed: the most suspicious ones.

    Args:
        verdict: The verdict.
        limit: Most images in all groups together.

    Returns:
        The groups that are not empty.
    """
    removed = verdict.removed
    kept = verdict.keep.nonzero().squeeze(1)
    if len(removed) == 0:
        top = kept[verdict.scores[kept].topk(min(limit, len(kept))).indices]
        return [Group("The highest scores (all kept)", top.tolist())]
    half, quarter = limit // 2, limit // 4
    top = kept[verdict.scores[kept].topk(min(quarter, len(kept))).indices]
    groups = [
        Group("Removed: the most suspicious", removed[:half].tolist()),
        Group("Removed: the least suspicious", removed[half:][-quarter:].tolist()),
        Group("Kept: the most suspicious", top.tolist()),
    ]
    return [group for group in groups if group.positions]


def three_channels(images: Tensor) -> Tensor:
    """Return ``(n, C, H, W)`` as ``(n, 3, H, W)``: colour as it is, anything below three channels as grey."""
    if images.shape[1] >= 3:
        return images[:, :3]
    return images.float().mean(dim=1, keepdim=True).round().to(torch.uint8).expand(-1, 3, -1, -1)


def fitted(images: Tensor, largest: int = _LARGEST) -> Tensor:
    """Shrink float images ``(n, 3, H, W)`` whose longer side exceeds the largest tile, in pixels."""
    height, width = images.shape[-2:]
    scale = largest / max(height, width)
    if scale >= 1:
        return images
    return interpolate(images, size=(max(1, round(height * scale)), max(1, round(width * scale))), mode="area")


def fetched(positions: Sequence[int], evidence: Evidence) -> Tensor:
    """Call ``images`` of the evidence, which must be there, and check what it returns: uint8 ``(n, C, H, W)``.

    Raises:
        ArgumentError: It returns another type or shape.
    """
    if evidence.images is None:
        raise ArgumentError("`images` must be there for pictures in a report, got None.")
    images = evidence.images(positions)
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(positions):
        raise ArgumentError(
            f"`images` must return uint8 pixels of shape ({len(positions)}, C, H, W), "
            f"got {images.dtype} {tuple(images.shape)}. Convert them to 8-bit pixels first."
        )
    return images.cpu()


def _amplification(differences: Tensor) -> int:
    """Return the whole number that brings the strongest differences close to full brightness."""
    strongest = float(differences.flatten().sort().values[int(0.98 * (differences.numel() - 1))])
    return int(min(max(255 / max(strongest, 1), 1), _BRIGHTEST))


def collect(groups: list[Group], evidence: Evidence) -> list[Exhibit]:
    """Fetch the images of all groups and prepare them for the screen.

    Returns:
        One exhibit per position, in the order of the groups; empty if the evidence has no ``images``.

    Raises:
        ArgumentError: If ``images`` or ``denoised`` return another type or shape.
    """
    positions = [position for group in groups for position in group.positions]
    if evidence.images is None or not positions:
        return []
    images = fetched(positions, evidence)
    variants = [] if evidence.denoised is None else list(evidence.denoised(positions))
    if evidence.denoised is not None and len(variants) != len(evidence.variants):
        raise ArgumentError(
            f"`denoised` must return one tensor for each name in `variants` {tuple(evidence.variants)}, "
            f"got {len(variants)}. Name the variants that it returns."
        )
    if any(variant.shape != images.shape for variant in variants):
        shapes = [tuple(variant.shape) for variant in variants]
        raise ArgumentError(
            f"`denoised` must return tensors of the shape of `images` {tuple(images.shape)}, got {shapes}."
        )
    pixels = three_channels(images).float()
    differences = [(three_channels(variant.cpu()).float() - pixels).abs() for variant in variants]
    factor = _amplification(torch.stack(differences)) if differences else 1
    shown = [fitted(pixels), *(fitted((difference * factor).clamp(max=255)) for difference in differences)]
    tiles = torch.stack(shown, dim=1).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()
    return [Exhibit(position, tile, factor) for position, tile in zip(positions, tiles, strict=True)]
