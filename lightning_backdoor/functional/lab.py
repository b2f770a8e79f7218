"""The 8-bit CIE L*a*b* of OpenCV's colour denoiser: linear light, no gamma, and OpenCV's fixed-point steps."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["lab_to_rgb", "rgb_to_lab"]

# kornia's `rgb_to_lab` expects sRGB and multiplies by its matrices in convolutions, which CUDA may round to TF32: too
# coarse for a result in whole numbers. The constants (D65, white point divided out) are the same; a test compares both.
TO_XYZ = (
    (0.412453 / 0.950456, 0.357580 / 0.950456, 0.180423 / 0.950456),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.088754, 0.119193 / 1.088754, 0.950227 / 1.088754),
)
TO_RGB = (
    (3.240479 * 0.950456, -1.53715, -0.498535 * 1.088754),
    (-0.969256 * 0.950456, 1.875991, 0.041556 * 1.088754),
    (0.055648 * 0.950456, -0.204043, 1.057311 * 1.088754),
)
FORWARD = tuple(tuple(round(4096 * factor) / 512 for factor in row) for row in TO_XYZ)  # to eighths of a grey level
LIGHTNESS = (296.0, 40.8)  # 116 · 255 / 100 as OpenCV rounds it, 16 · 255 / 100
BEND = 0.008856  # below it the cube root becomes a straight line
SLOPE, FOOT = 7.787, 16 / 116


def rgb_to_lab(images: Tensor) -> Tensor:
    """Convert linear 8-bit RGB ``(N, 3, H, W)`` to L·2.55, a + 128 and b + 128, whole float32 numbers 0 to 255."""
    bent = _bent_eighths().to(images.device)
    eighths = [value.add_(0.5).to(torch.int32) for value in _mix(images.to(torch.float32), FORWARD)]
    x, y, z = (bent.index_select(0, value.flatten()).view_as(value) for value in eighths)
    scale, foot = LIGHTNESS
    lab = torch.stack([y * scale - foot, (x - y) * 500 + 128, (y - z) * 200 + 128], dim=1)
    return lab.add_(0.5).floor_().clamp_(0, 255)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """Convert back to linear 8-bit RGB, uint8 ``(N, 3, H, W)``: rounded to 12 bits, then cut to 8 as OpenCV does."""
    lightness, a, b = lab.unbind(1)
    y = (lightness * (100 / 255) + 16) / 116
    xyz = torch.stack([y + (a - 128) / 500, y, y - (b - 128) / 200], dim=1)
    xyz = torch.where(xyz > SLOPE * BEND + FOOT, xyz * xyz * xyz, (xyz - FOOT) / SLOPE)
    fine = torch.stack(_mix(xyz, TO_RGB), dim=1).mul_(4096).add_(0.5).floor_().clamp_(0, 4095)
    return fine.mul_(255 / 4096).to(torch.uint8)


@cache
def _bent_eighths() -> Tensor:
    """Return the bent cube root of 0, 1, 2 … eighths of a grey level, to 15 bits."""
    value = torch.arange(255 * 8 + 8, dtype=torch.float64, device="cpu") / (255 * 8)
    bent = torch.where(value > BEND, value.pow(1 / 3), value * SLOPE + FOOT)
    return bent.mul(2**15).add(0.5).floor().div(2**15).to(torch.float32)


def _mix(channels: Tensor, matrix: tuple[tuple[float, ...], ...]) -> list[Tensor]:
    """Multiply the three channels of ``(N, 3, H, W)`` by a matrix, one element at a time."""
    first, second, third = channels.unbind(1)
    return [first * a + second * b + third * c for a, b, c in matrix]
