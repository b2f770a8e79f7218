"""Gentle denoising of 8-bit images: the two filters of UltraClean, in batches and on any device."""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional.blocks import map_blocks
from lightning_backdoor.functional.lab import lab_to_rgb, rgb_to_lab
from lightning_backdoor.functional.native import native_kernel
from lightning_backdoor.functional.nlm import images_per_block, smooth_planes

__all__ = ["local_median", "nl_means"]

COLOUR_WINDOW = (2, 2, 3)
NATIVE_FROM = 2**18  # pixels from which compiling a kernel repays its second
MEDIAN_VALUES = 2**16  # values per comparison on a CPU: a dozen such rows of bytes stay in the second-level cache
DEVICE_MEDIAN_VALUES = 2**24  # values per comparison on an accelerator


@torch.no_grad()
def local_median(images: Tensor, window: tuple[int, int, int] = COLOUR_WINDOW) -> Tensor:
    """Replace every value by the median of its neighbours, those in the other colour channels included.

    Local median of UltraClean (`Zhao and Lao, 2023 <https://arxiv.org/abs/2312.10657>`_). Equal bit for bit to
    ``scipy.ndimage.median_filter`` on an image ``(H, W, C)``: borders are reflected with the edge pixel, an even side
    reaches one further up or left, and an even number of values gives the upper of the two middle ones. A
    selection network of minima and maxima takes the place of sorting.

    Args:
        images: uint8, shape ``(N, C, H, W)``, on any device.
        window: Rows, columns and channels of the neighbourhood, each at least 1. The default mixes the three channels
            of a colour image; images with another number of channels are filtered channel by channel under it.

    Returns:
        uint8, shape ``(N, C, H, W)``.

    Raises:
        ArgumentError: If ``images`` is not uint8 ``(N, C, H, W)`` or ``window`` not three whole numbers from 1.

    Example:
        >>> import torch
        >>> speck = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
        >>> speck[0, 0, 1, 1] = 255
        >>> int(local_median(speck).max())
        0
    """
    _check_images(images)
    if len(window) != 3 or any(not isinstance(side, int) or side < 1 for side in window):
        raise ArgumentError(
            f"`window` must be three whole numbers from 1 (rows, columns, channels), got {window!r}. "
            "UltraClean uses (2, 2, 3)."
        )
    if images.numel() == 0:
        return images.clone()
    if tuple(window) == COLOUR_WINDOW and images.shape[1] != 3:
        window = (2, 2, 1)
    rows, columns, channels = window
    network = _selection(rows * columns * channels, rows * columns * channels // 2)

    def filtered(pixels: Tensor) -> Tensor:
        padded = pixels
        for dim, side in ((1, channels), (2, rows), (3, columns)):
            before = side // 2
            indices = _symmetric(pixels.shape[dim], before, side - 1 - before, pixels.device)
            padded = padded.index_select(dim, indices)
        _, _, height, width = padded.shape
        starts = [(c * height + y) * width + x for c, y, x in product(range(channels), range(rows), range(columns))]
        flat = padded.flatten()  # every neighbour is the same distance away, across borders too: those are cut off below
        values = [flat[start : flat.numel() - starts[-1] + start] for start in starts]
        for i, j, lower, upper in network:
            a, b = values[i], values[j]
            if lower:
                values[i] = torch.minimum(a, b)
            if upper:
                values[j] = torch.maximum(a, b)
        median = pad(values[len(starts) // 2], (0, starts[-1])).view_as(padded)
        return median[:, : pixels.shape[1], : pixels.shape[2], : pixels.shape[3]]

    values = MEDIAN_VALUES if images.device.type == "cpu" else DEVICE_MEDIAN_VALUES
    return map_blocks(filtered, images, max(1, values // images[0].numel()))


@torch.no_grad()
def nl_means(images: Tensor, h: float = 5.0, h_color: float = 5.0, template: int = 7, search: int = 13) -> Tensor:
    """Replace every pixel by the mean of pixels around it whose neighbourhood looks alike.

    Non-local means (`Buades et al., 2005 <https://doi.org/10.1109/CVPR.2005.38>`_) as UltraClean (`Zhao and Lao, 2023
    <https://arxiv.org/abs/2312.10657>`_) calls it: OpenCV's ``fastNlMeansDenoisingColored`` on RGB images, which that
    function takes for BGR. Lightness and colour (8-bit L*a*b* of linear light) are smoothed apart and differ from OpenCV's
    result by a small fraction of a grey level. Grey images: OpenCV's ``fastNlMeansDenoising``. Any other number of
    channels: each channel as a grey image.

    Cost: on two CPU cores about TODO; memory beyond the result does not grow with ``N``.

    Args:
        images: uint8, shape ``(N, C, H, W)``, on any device.
        h: Strength for lightness (and for grey), grey levels, above 0. Larger removes more noise and more detail.
        h_color: Strength for the two colour components, above 0.
        template: Side of the neighbourhoods that are compared, pixels, odd.
        search: Side of the window from which pixels are averaged, pixels, odd.

    Returns:
        uint8, shape ``(N, C, H, W)``.

    Raises:
        ArgumentError: If ``images`` is not uint8 ``(N, C, H, W)``, a strength is not positive or a side not odd.

    Example:
        >>> import torch
        >>> noisy = torch.tensor([[100, 104], [104, 100]], dtype=torch.uint8).repeat(1, 1, 4, 4)
        >>> nl_means(noisy).unique().tolist()
        [102]
    """
    _check_images(images)
    for name, strength in (("h", h), ("h_color", h_color)):
        if not strength > 0:
            raise ArgumentError(f"`{name}` must be above 0 (grey levels), got {strength!r}. UltraClean uses 5.")
    for name, side in (("template", template), ("search", search)):
        if not isinstance(side, int) or side < 1 or side % 2 == 0:
            raise ArgumentError(f"`{name}` must be an odd whole number of pixels, got {side!r}. Pass 7 or 13, say.")
    if images.numel() == 0:
        return images.clone()
    colour = images.shape[1] == 3
    batch = images if colour else images.flatten(0, 1).unsqueeze(1)
    groups = [(1, h), (2, h_color)] if colour else [(1, h)]
    pixels = batch.shape[0] * batch.shape[2] * batch.shape[3]
    native = batch.device.type == "cpu" and pixels >= NATIVE_FROM and native_kernel(template) is not None
    block = images_per_block(*batch.shape[-2:], template // 2 + search // 2, batch.device, native)

    def smooth(pixels: Tensor) -> Tensor:
        if not colour:
            return smooth_planes(pixels, groups, template, search, native=native)
        lab = smooth_planes(rgb_to_lab(pixels.flip(1)), groups, template, search, native=native)
        return lab_to_rgb(lab).flip(1)

    return map_blocks(smooth, batch, block).view_as(images)


def _symmetric(length: int, before: int, after: int, device: torch.device) -> Tensor:
    """Indices of an axis that is extended by reflection with its edge value: ``b a | a b c | c b``."""
    position = torch.arange(-before, length + after, device=device).remainder(2 * length)
    return torch.minimum(position, 2 * length - 1 - position)


@cache
def _selection(count: int, rank: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """Return the comparisons ``(i, j, lower wanted, upper wanted)`` that bring the value of ``rank`` to place ``rank``.

    Batcher's odd-even merge sort for ``count`` values, without what the wanted place does not depend on.
    """
    comparisons = []
    size = 1 << (count - 1).bit_length()
    for p in (1 << e for e in range(size.bit_length() - 1)):
        for k in (p >> e for e in range(p.bit_length())):
            for j in range(k % p, size - k, 2 * k):
                comparisons += [
                    (i + j, i + j + k)
                    for i in range(min(k, size - j - k))
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p) and i + j + k < count
                ]
    wanted, kept = {rank}, []
    for i, j in reversed(comparisons):
        if wanted & {i, j}:
            kept.append((i, j, i in wanted, j in wanted))
            wanted |= {i, j}
    return tuple(reversed(kept))


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ArgumentError(
            f"`images` must be uint8 pixels of shape (N, C, H, W), got {got}. "
            "Turn images in [0, 1] into pixels with `(images * 255).round().to(torch.uint8)`."
        )
