"""Non-local means in a few kernel launches, for CUDA devices; importing this module imports Triton.

The launches for a block of color images: pixels to L*a*b* with a reflected margin; for each of the two groups of planes
the packing and the means; L*a*b* to pixels. Gray images need the first three.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from lightning_backdoor.functional.nlm import bent_eighths, weight_fall
from lightning_backdoor.functional.nlm_kernels import means, pack, to_planes, to_rgb

__all__ = ["LARGEST_TEMPLATE", "images_per_launch", "smooth_images"]

LARGEST_TEMPLATE = 7  # the middle of a patch lies in the first word of its row
ROWS = 4  # pixels of a thread; more of them share more words, but compiling takes time by the third power
LANES = 128  # threads of a program
BLOCK = 128  # pixels of a program that goes through pixels one by one; more than its threads unroll the code
BYTES = 2**28  # of the packed planes of a block of images
SMALLEST_PITCH = 64  # words in a row of packed planes; a power of two, so that few widths need a kernel of their own


def images_per_launch(height: int, width: int, template: int, search: int) -> int:
    """Return how many images to smooth at once: the packed planes of a group fit into ``BYTES``."""
    tall, pitch = _padded(height, width, template, search)
    return max(1, BYTES // (12 * tall * pitch))  # a word and a sum of squares


def smooth_images(images: Tensor, groups: Sequence[tuple[int, float]], template: int, search: int) -> Tensor:
    """Return the non-local means of a block of images, uint8, of the same shape.

    Args:
        images: uint8, contiguous, shape ``(N, 3, H, W)`` for two groups and ``(N, 1, H, W)`` for one, at most
            :func:`images_per_launch` of them.
        groups: ``(number of planes, h)`` of the planes that share their weights: lightness and color, or gray.
        template: Side of the patches, odd, at most ``LARGEST_TEMPLATE``.
        search: Side of the search window, odd.
    """
    with torch.cuda.device_of(images):  # type: ignore[no-untyped-call]  # Triton launches on the current device
        return _launch(images, groups, template, search)


def _launch(images: Tensor, groups: Sequence[tuple[int, float]], template: int, search: int) -> Tensor:
    number, channels, height, width = images.shape
    tall, pitch = _padded(height, width, template, search)
    color, reach = channels == 3, search // 2
    padded = images.new_empty(number, tall, channels, pitch)
    bent = bent_eighths(images.device) if color else images
    pixels, places = images.numel() // channels, number * tall * pitch
    to_planes[(triton.cdiv(places, BLOCK),)](
        images, padded, bent, places, height, width, tall, reach + template // 2, PITCH=pitch, COLOR=color, BLOCK=BLOCK
    )
    smooth, first = torch.empty_like(images), 0
    for planes, h in groups:
        words = images.new_empty(number, tall, pitch, dtype=torch.int64)
        squares = images.new_empty(number, tall, pitch, dtype=torch.int32)
        pack[(triton.cdiv(places, BLOCK),)](
            padded,
            words,
            squares,
            places,
            first,
            CHANNELS=channels,
            PLANES=planes,
            TEMPLATE=template,
            PITCH=pitch,
            BLOCK=BLOCK,
        )
        _, last, *factors = weight_fall(h, template, planes)
        means[(triton.cdiv(number * width, LANES), triton.cdiv(height, ROWS))](
            words,
            squares,
            smooth,
            first,
            number,
            height,
            width,
            tall,
            int(last),
            *factors,
            CHANNELS=channels,
            PLANES=planes,
            TEMPLATE=template,
            SHIFT=(template**2 - 1).bit_length(),
            REACH=reach,
            PITCH=pitch,
            ROWS=ROWS,
            LANES=LANES,
            NATIVE=images.is_cuda,
            num_warps=LANES // 32,
            num_stages=1,
            enable_fp_fusion=False,
        )
        first += planes
    if color:
        to_rgb[(triton.cdiv(pixels, BLOCK),)](smooth, pixels, height * width, BLOCK=BLOCK, enable_fp_fusion=False)
    return smooth


def _padded(height: int, width: int, template: int, search: int) -> tuple[int, int]:
    """Return the rows and columns of padded planes: whole strips of ``ROWS`` and a margin, and a power of two."""
    margin = 2 * (search // 2 + template // 2)
    return triton.cdiv(height, ROWS) * ROWS + margin, max(SMALLEST_PITCH, triton.next_power_of_2(width + margin))
