"""Non-local means over many images at once: the arithmetic behind ``functional.nl_means``.

Layout: images lie in the last dimension, ``(planes, rows, columns, lanes)``, so every shift is a view and every
operation runs over long contiguous stretches whatever the image size. Large images are cut into tiles that carry their
own border; a tile is a lane.

Cost: the patch distances of an offset serve the opposite offset as well, so a 13×13 search needs 84 maps, not 169.

Colour images are smoothed in the 8-bit CIE L*a*b* of OpenCV's denoiser: linear light, no gamma, and OpenCV's
fixed-point steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_backdoor.functional.native import LANES, native_kernel

__all__ = ["bent_eighths", "images_per_block", "lab_to_rgb", "rgb_to_lab", "smooth_planes", "weight_fall"]

TILE = 64  # longest side of a tile, pixels
CPU_VALUES = 2**17  # values per map on a CPU: half a megabyte stays in the second-level cache
DEVICE_VALUES = 2**24  # values per map on an accelerator, where launches cost more than memory traffic
SMALLEST_WEIGHT = 0.001  # OpenCV sets smaller weights to zero
CUBIC = (-0.135227, 0.492199, -0.999429)  # exp(-16 y) ≈ (((a y + b) y + c) y + 1)^16 within 0.02 % down to 0.001

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


def smooth_planes(
    planes: Tensor, groups: Sequence[tuple[int, float]], template: int, search: int, *, native: bool = False
) -> Tensor:
    """Replace each pixel by the mean over its search window, weighted by the likeness of the patches around.

    Weights as in OpenCV's ``fastNlMeansDenoising`` (8 bit, squared differences): the patch distance is floored to a
    multiple of a power of two, the weight is ``exp(-distance / (h² · planes))`` and zero below 0.001. The border is a
    reflection without the edge pixel.

    Args:
        planes: Whole numbers 0 to 255, shape ``(N, P, H, W)``, a block of at most :func:`images_per_block` images.
        groups: ``(number of planes, h)`` in plane order. The planes of a group share their weights.
        template: Side of the patches, odd.
        search: Side of the search window, odd.
        native: Use the C kernel, which must exist and needs CPU tensors and one or two planes in a group.

    Returns:
        Whole numbers 0 to 255, float32, shape ``(N, P, H, W)``.
    """
    reach = search // 2
    tiles = _cut(planes, reach + template // 2, LANES if native else 1)
    smooth = smooth_tiles_natively if native else smooth_tiles
    parts = torch.split(tiles, [count for count, _ in groups])
    return _join(
        torch.cat([smooth(part, h, template, reach) for part, (_, h) in zip(parts, groups, strict=True)]), planes.shape
    )


def images_per_block(height: int, width: int, margin: int, device: torch.device, native: bool = False) -> int:
    """Return how many images to smooth at once: maps stay in the cache and memory does not grow with their number."""
    (n_rows, tall), (n_columns, wide) = _tiles(height), _tiles(width)
    per_image = n_rows * n_columns
    if native:  # whole vectors of lanes, unless a single image nearly fills its last one anyway
        return LANES // math.gcd(LANES, per_image) if per_image < 4 * LANES else 1
    values = CPU_VALUES if device.type == "cpu" else DEVICE_VALUES
    return max(1, values // ((tall + 2 * margin) * (wide + 2 * margin) * per_image))


def smooth_tiles(tiles: Tensor, h: float, template: int, reach: int) -> Tensor:
    """Return the weighted means inside the margin ``m = reach + template // 2`` of tiles whose planes share weights.

    Args:
        tiles: Whole numbers 0 to 255, float32, shape ``(p, H + 2m, W + 2m, L)``.
        h: Strength.
        template: Side of the patches, odd.
        reach: Half the side of the search window.

    Returns:
        Whole numbers 0 to 255, float32, shape ``(p, H, W, L)``.
    """
    margin = reach + template // 2
    height, width = tiles.shape[1] - 2 * margin, tiles.shape[2] - 2 * margin
    unit, table = _weight_table(h, template, len(tiles), tiles.device)

    def window(row: int, column: int, more_rows: int = 0, more_columns: int = 0) -> Tensor:
        row, column = row + margin, column + margin
        return tiles[:, row : row + height + more_rows, column : column + width + more_columns]

    weighted = window(0, 0).clone()
    total = torch.ones_like(weighted[0])  # a pixel has weight 1 for itself
    for dy, dx in product(range(reach + 1), range(-reach, reach + 1)):
        if (dy, dx) <= (0, 0):
            continue  # computed with the opposite offset
        # The map covers the image and the image moved by the opposite offset; patches reach beyond it on all sides.
        left, half = max(dx, 0), template // 2
        more = (dy + template - 1, abs(dx) + template - 1)
        here, there = window(-dy - half, -left - half, *more), window(-half, dx - left - half, *more)
        squares = [(a - b).square_() for a, b in zip(here, there, strict=True)]
        distance = sum(squares[1:], squares[0])
        distance = _box(_box(distance, 0, template), 1, template)  # whole numbers, exact below 2^24: template <= 11
        steps = distance.mul_(unit).clamp_(max=len(table) - 1).to(torch.int32)
        weights = table.index_select(0, steps.flatten()).view_as(steps)
        behind = weights[:height, left - dx : left - dx + width]
        ahead = weights[dy:, left : left + width]
        total.add_(behind).add_(ahead)
        weighted.add_(behind * window(-dy, -dx)).add_(ahead * window(dy, dx))
    return weighted.div_(total).add_(0.5).floor_()


def smooth_tiles_natively(tiles: Tensor, h: float, template: int, reach: int) -> Tensor:
    """Do the same as :func:`smooth_tiles` in C, for one or two planes and ``L`` a multiple of ``LANES``."""
    kernel = native_kernel(template)
    assert kernel is not None
    assert len(tiles) in (1, 2)
    planes, tall, wide, _ = tiles.shape
    margin = reach + template // 2
    height, width = tall - 2 * margin, wide - 2 * margin
    scratch = tiles.new_empty(height * width + 2 * wide, LANES)
    fall = torch.tensor(weight_fall(h, template, planes), dtype=torch.float32, device="cpu")
    means = []
    for part in torch.split(tiles, LANES, dim=-1):
        source, mean = part.contiguous(), tiles.new_empty(planes, height, width, LANES)
        pointers = (source.data_ptr(), mean.data_ptr(), scratch.data_ptr())
        kernel(*pointers, planes, height, width, reach, fall.data_ptr())
        means.append(mean)
    return torch.cat(means, dim=-1)


def weight_fall(h: float, template: int, planes: int) -> tuple[float, ...]:
    """Return how weights fall: unit of the distance, last step that counts, factors of the polynomial in steps."""
    shift = (template**2 - 1).bit_length()
    rate = 2**shift / template**2 / (h * h * planes)  # fall of the logarithm per step
    last = min(int(-math.log(SMALLEST_WEIGHT) / rate), 255**2 * planes * template**2 >> shift)
    return 0.5**shift, last, *(factor * (rate / 16) ** power for factor, power in zip(CUBIC, (3, 2, 1), strict=True))


def _weight_table(h: float, template: int, planes: int, device: torch.device) -> tuple[float, Tensor]:
    """Return the unit of the distance and the weights of 0, 1, 2 … units; the last weight is zero."""
    unit, last, a, b, c = weight_fall(h, template, planes)
    steps = torch.arange(int(last) + 2, dtype=torch.float32, device=device)
    weights = (((steps * a + b) * steps + c) * steps + 1.0).pow(2).pow(2).pow(2).pow(2)
    weights[-1] = 0.0
    return unit, weights


def _box(values: Tensor, dim: int, size: int) -> Tensor:
    """Sum over windows of ``size`` along ``dim``; the length shrinks by ``size - 1``. Doubling: 4 additions for 7."""
    length = values.shape[dim] - size + 1
    parts, start, span = [], 0, 1
    while span <= size:
        if size & span:
            parts.append(values.narrow(dim, start, length))
            start += span
        if 2 * span <= size:
            shorter = values.shape[dim] - span
            values = values.narrow(dim, 0, shorter) + values.narrow(dim, span, shorter)
        span *= 2
    return sum(parts[1:], parts[0])


def _tiles(length: int) -> tuple[int, int]:
    """Return number and length of the equal tiles that cover ``length``."""
    count = -(-length // TILE)
    return count, -(-length // count)


def _cut(planes: Tensor, margin: int, multiple: int) -> Tensor:
    """Cut ``(N, P, H, W)`` into float32 tiles with a reflected margin, ``(P, h + 2m, w + 2m, lanes)``.

    Lanes of zeros fill up to a ``multiple``.
    """
    tiles = planes.permute(1, 2, 3, 0).to(torch.float32, memory_format=torch.contiguous_format)
    for dim in (1, 2):
        length = tiles.shape[dim]
        count, size = _tiles(length)
        position = torch.arange(count).unsqueeze(1) * size + torch.arange(-margin, size + margin)
        period = max(2 * length - 2, 1)
        position = position.remainder(period)
        position = torch.minimum(position, period - position).clamp_(max=length - 1)
        tiles = tiles.index_select(dim, position.flatten().to(tiles.device))
        tiles = tiles.reshape(*tiles.shape[:dim], count, -1, *tiles.shape[dim + 1 :])
        tiles = tiles.movedim(dim, -2)  # (P, h, W, rows, N), then (P, h, w, rows, columns, N)
    tiles = tiles.flatten(3)
    return pad(tiles, (0, -tiles.shape[-1] % multiple)).contiguous()


def _join(tiles: Tensor, shape: torch.Size) -> Tensor:
    """Put smoothed tiles ``(P, h, w, lanes)`` together, ``(N, P, H, W)``; lanes beyond the last image are dropped."""
    number, _, height, width = shape
    n_rows, n_columns = _tiles(height)[0], _tiles(width)[0]
    tiles = tiles[..., : n_rows * n_columns * number].reshape(*tiles.shape[:3], n_rows, n_columns, number)
    return tiles.permute(5, 0, 3, 1, 4, 2).flatten(4).flatten(2, 3)[..., :height, :width]


def rgb_to_lab(images: Tensor) -> Tensor:
    """Convert linear 8-bit RGB ``(N, 3, H, W)`` to L·2.55, a + 128 and b + 128, whole float32 numbers 0 to 255."""
    bent = bent_eighths(images.device)
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
def bent_eighths(device: torch.device) -> Tensor:
    """Return the bent cube root of 0, 1, 2 … eighths of a grey level, to 15 bits; made on the CPU, for any device."""
    value = torch.arange(255 * 8 + 8, dtype=torch.float64, device="cpu") / (255 * 8)
    bent = torch.where(value > BEND, value.pow(1 / 3), value * SLOPE + FOOT)
    return bent.mul(2**15).add(0.5).floor().div(2**15).to(torch.float32).to(device)


def _mix(channels: Tensor, matrix: tuple[tuple[float, ...], ...]) -> list[Tensor]:
    """Multiply the three channels of ``(N, 3, H, W)`` by a matrix, one element at a time."""
    first, second, third = channels.unbind(1)
    return [first * a + second * b + third * c for a, b, c in matrix]
