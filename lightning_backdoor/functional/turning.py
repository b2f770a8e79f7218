"""The transformation that breaks a trigger: a rotation and a shift, fixed for each image whatever its batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

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
    height, width = pixels.shape[-2:]
    origins = _origins(_draws(indices, seed), height, width).to(pixels.device)[:, None, None]
    across = torch.linspace(-1, 1, width, device=pixels.device)[:, None]
    along = torch.linspace(-1, 1, height, device=pixels.device)[:, None, None]
    # not `affine_grid`, a matrix product, which a GPU may compute with ten bits
    grid = origins[..., 0] * across + origins[..., 1] * along + origins[..., 2]
    return F.grid_sample(pixels.float(), grid, mode="nearest", align_corners=True).to(torch.uint8)


def _origins(drawn: Tensor, height: int, width: int) -> Tensor:
    """Where pixels come from: affine maps ``(B, 2, 3)`` of places, of which the centers of the corners are at -1 and 1.

    Back by the shift, then back by the turn, about the center. In double precision, so that rounding is the same in
    any batch.

    Args:
        drawn: Turn, shift to the right and shift down, each in ``[-1, 1]`` for its range, ``(B, 3)``.
        height: Of the images.
        width: Of the images.
    """
    angle, right, down = drawn.double().unbind(dim=1)
    cos, sin = (angle * math.radians(ANGLE)).cos(), (angle * math.radians(ANGLE)).sin()
    right, down = right * SHIFT * width, down * SHIFT * height
    half_width, half_height = max(width - 1, 1) / 2, max(height - 1, 1) / 2
    rows = (
        (cos, sin * half_height / half_width, -(cos * right + sin * down) / half_width),
        (-sin * half_width / half_height, cos, (sin * right - cos * down) / half_height),
    )
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1).float()


def _draws(indices: Tensor, seed: int) -> Tensor:
    """Three numbers in ``[-1, 1)`` for every image, float ``(B, 3)``."""
    drawn, generator = torch.empty(len(indices), 3), torch.Generator()
    for row, index in zip(drawn, indices.tolist(), strict=True):
        row.uniform_(generator=_seeded(generator, seed, index))
    return drawn * 2 - 1


def _seeded(generator: torch.Generator, seed: int, index: int) -> torch.Generator:
    return generator.manual_seed((seed * 1_000_003 + index) * 0x9E3779B97F4A7C15 % 2**63)
