"""Gentle denoising of 8-bit images: the two filters of UltraClean, in batches and on any device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional.blocks import map_blocks
from lightning_backdoor.functional.lab import lab_to_rgb, rgb_to_lab
from lightning_backdoor.functional.native import native_kernel
from lightning_backdoor.functional.nlm import images_per_block, smooth_planes
from lightning_backdoor.functional.selection import select

__all__ = ["local_median", "nl_means"]

COLOR_WINDOW = (2, 2, 3)
NATIVE_FROM = 2**16  # pixels from which compiling a kernel, half a second once, repays itself over a scan
MEDIAN_VALUES = 2**16  # values per comparison on a CPU: a dozen such rows of bytes stay in the second-level cache
DEVICE_MEDIAN_VALUES = 2**24  # values per comparison on an accelerator


@torch.no_grad()
def local_median(images: Tensor, window: tuple[int, int, int] = COLOR_WINDOW) -> Tensor:
    """Replace every value by the median of its neighbours, those in the other colour channels included.

    Local median of UltraClean (`Zhao and Lao, 2023 <https://arxiv.org/abs/2312.10657>`_). Equal bit for bit to
    ``scipy.ndimage.median_filter`` on an image ``(H, W, C)``: borders are reflected with the edge pixel, an even side
    reaches one further up or left, and an even number of values gives the upper of the two middle ones.

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
    if tuple(window) == COLOR_WINDOW and images.shape[1] != 3:
        window = (2, 2, 1)
    rows, columns, channels = window
    rank = rows * columns * channels // 2

    def median(pixels: Tensor) -> Tensor:
        padded = pixels
        for dim, side in ((1, channels), (2, rows), (3, columns)):
            padded = padded.index_select(dim, _reflected(pixels.shape[dim], side, pixels.device))
        plane = padded[0, 0].numel()
        # In flat memory a neighbour is always the same distance away. What that mixes across borders is cut off below.
        flat = padded.flatten()
        shifts = [y * padded.shape[3] + x for y, x in product(range(rows), range(columns))]
        values = _shifted(flat, shifts)
        if channels > 1:  # the channels share the sorting of their own neighbours
            values = select(values, range(len(values)))
            by_channel = [_shifted(value, range(0, channels * plane, plane)) for value in values]
            values = [value for channel in zip(*by_channel, strict=True) for value in channel]
        (middle,) = select(values, [rank], presorted=len(shifts) if channels > 1 else 1)
        middle = pad(middle, (0, flat.numel() - middle.numel())).view_as(padded)
        return middle[:, : pixels.shape[1], : pixels.shape[2], : pixels.shape[3]]

    values = MEDIAN_VALUES if images.device.type == "cpu" else DEVICE_MEDIAN_VALUES
    return map_blocks(median, images, max(1, values // images[0].numel()))


@torch.no_grad()
def nl_means(images: Tensor, h: float = 5.0, h_color: float = 5.0, template: int = 7, search: int = 13) -> Tensor:
    """Replace every pixel by the mean of the pixels around it that have a similar neighbourhood.

    Non-local means (`Buades et al., 2005 <https://doi.org/10.1109/CVPR.2005.38>`_) as UltraClean (`Zhao and Lao, 2023
    <https://arxiv.org/abs/2312.10657>`_) calls it: OpenCV's ``fastNlMeansDenoisingColored`` on RGB images, which that
    function takes for BGR. Lightness and colour (8-bit L*a*b* of linear light) are smoothed apart; on CIFAR-10 the
    result differs from OpenCV's by 0.04 grey levels on average. Grey images: OpenCV's ``fastNlMeansDenoising``. Any
    other number of channels: each channel as a grey image. Like OpenCV's, the way through 8-bit colour components and
    back alone can darken a colour by a grey level or two; grey images come through a flat region unchanged.

    Cost: about 5,000 images of 32×32 or 100 of 224×224 a second on two cores of a 2023 server CPU; memory beyond the
    result does not grow with ``N``. From a few hundred small images on, a CPU compiles the inner loop once (half a
    second) if a C compiler is installed. Without one, and for a ``template`` above 11, it takes some six times as long,
    and the result is the same.

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
        [101, 103]
    """
    _check_images(images)
    for name, strength in (("h", h), ("h_color", h_color)):
        if not 0 < strength < math.inf:
            raise ArgumentError(f"`{name}` must be above 0 and finite (grey levels), got {strength!r}. Pass 5.0, say.")
    for name, side in (("template", template), ("search", search)):
        if not isinstance(side, int) or side < 1 or side % 2 == 0:
            raise ArgumentError(f"`{name}` must be an odd whole number of pixels, got {side!r}. Pass 7 or 13, say.")
    if images.numel() == 0:
        return images.clone()
    color = images.shape[1] == 3
    batch = images if color else images.flatten(0, 1).unsqueeze(1)
    groups = [(1, h), (2, h_color)] if color else [(1, h)]
    number, _, height, width = batch.shape
    worthwhile = batch.device.type == "cpu" and number * height * width >= NATIVE_FROM
    native = worthwhile and native_kernel(template) is not None
    block = images_per_block(height, width, template // 2 + search // 2, batch.device, native)

    def smooth(pixels: Tensor) -> Tensor:
        if not color:
            return smooth_planes(pixels, groups, template, search, native=native)
        lab = smooth_planes(rgb_to_lab(pixels.flip(1)), groups, template, search, native=native)
        return lab_to_rgb(lab).flip(1)

    return map_blocks(smooth, batch, block).view_as(images)


def _reflected(length: int, side: int, device: torch.device) -> Tensor:
    """Indices of an axis extended for a window, by reflection with the edge value: ``b a | a b c | c b``."""
    position = torch.arange(-(side // 2), length + (side - 1) // 2, device=device).remainder(2 * length)
    return torch.minimum(position, 2 * length - 1 - position)


def _shifted(flat: Tensor, shifts: Sequence[int]) -> list[Tensor]:
    """Return views of ``flat`` that begin at each of the ``shifts`` (ascending), all as long as the last one."""
    length = flat.numel() - shifts[-1]
    return [flat[shift : shift + length] for shift in shifts]


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ArgumentError(
            f"`images` must be uint8 pixels of shape (N, C, H, W), got {got}. "
            "Turn images in [0, 1] into pixels with `(images * 255).round().to(torch.uint8)`."
        )
