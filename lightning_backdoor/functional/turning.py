"""The transformation that breaks a trigger: a rotation and a shift, fixed for each image whatever its batch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["turn_and_shift"]

ANGLE = 180.0  # degrees, either way
SHIFT = 0.2  # of the side, either way


def turn_and_shift(pixels: Tensor, indices: Tensor, *, seed: int) -> Tensor:
    """Turn every image by up to 180 degrees and shift it by up to a fifth of its sides, on the device; black outside.

    Args:
        pixels: uint8 ``(B, C, H, W)``.
        indices: Dataset positions, long ``(B,)``: an image gets the same transformation in any batch.
        seed: Any integer.

    Returns:
        uint8 ``(B, C, H, W)``, from the nearest pixels.
    """
    from kornia.geometry.transform import get_affine_matrix2d, warp_affine  # noqa: PLC0415  (slow to import)

    draws = [torch.rand(3, generator=_generator(seed, int(index))) * 2 - 1 for index in indices]
    drawn = torch.stack(draws).to(pixels.device)
    height, width = pixels.shape[-2:]
    sides = drawn.new_tensor([width, height])
    center = ((sides - 1) / 2).expand(len(pixels), 2)
    matrices = get_affine_matrix2d(
        translations=drawn[:, 1:] * SHIFT * sides,
        center=center,
        scale=torch.ones_like(center),
        angle=drawn[:, 0] * ANGLE,
    )
    moved = warp_affine(pixels.float(), matrices[:, :2], (height, width), mode="nearest", padding_mode="zeros")
    return moved.round().clamp(0, 255).to(torch.uint8)


def _generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + index) * 0x9E3779B97F4A7C15 % 2**63)
