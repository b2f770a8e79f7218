"""Small helpers of the triggers: rounding, enlarging, choices that an image makes for itself."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from lightning_backdoor.errors import ArgumentError

__all__ = ["Verbatim", "channels_like", "chosen_by", "enlarged", "in_proportion", "one_of", "span", "to_uint8"]


class Verbatim(str):
    """Text whose repr has no quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def to_uint8(pixels: Tensor) -> Tensor:
    """Round to the nearest grey level and saturate at 0 and 255, so that nothing wraps around."""
    return pixels.round().clamp(0, 255).to(torch.uint8)


def enlarged(cells: Tensor, rows: int, columns: int) -> Tensor:
    """Resize ``(..., R, C)`` to ``(..., rows, columns)`` by repeating the nearest cell."""
    row = torch.arange(rows) * cells.shape[-2] // rows
    column = torch.arange(columns) * cells.shape[-1] // columns
    return cells[..., row, :][..., column]


def span(side: int, pixels: float, of: int) -> int:
    """Return how many pixels of ``side`` correspond to ``pixels`` of an image with ``of`` pixels, at least 1."""
    return max(1, round(pixels * side / of))


def in_proportion(side: int) -> tuple[int, int]:
    """Return start and length of the span that covers pixels 25-27 of 32."""
    length = span(side, 3, of=32)
    return min(round(25 * side / 32), side - length), length


def channels_like(colors: Tensor, channels: int) -> Tensor:
    """Give a float pattern ``(3, ...)`` other channels: grey gets the mean of the three, further ones repeat them."""
    return colors.mean(0, keepdim=True) if channels == 1 else colors[torch.arange(channels) % 3]


def chosen_by(image: Tensor, seed: int) -> torch.Generator:
    """Return random numbers that depend on the pixels of an image and on ``seed`` alone.

    What differs between images is thus the same in every epoch, worker and order, and for one image and a batch.
    """
    return torch.Generator().manual_seed(zlib.crc32(image.cpu().contiguous().numpy().tobytes(), seed))


def one_of(name: str, value: object, options: tuple[str, ...], more: str = "") -> None:
    """Refuse a value that is not one of the options."""
    if value not in options:
        raise ArgumentError(f"`{name}` must be {' or '.join(map(repr, options))} {more}".rstrip() + f", got {value!r}.")
