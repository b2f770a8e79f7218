"""Gentle denoising of 8-bit images: the two filters of UltraClean, and the score of what they change in the outputs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional.native import native_kernel
from lightning_backdoor.functional.nlm import images_per_block, lab_to_rgb, rgb_to_lab, smooth_planes

__all__ = ["local_median", "map_blocks", "nl_means", "select", "susceptibility_scores"]

COLOR_WINDOW = (2, 2, 3)
NATIVE_FROM = 2**16  # pixels from which compiling a kernel, half a second once, repays itself over a scan
PROBED = 16  # rows of the image on which kernels of a device are compared with the CPU
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
    and the result is the same. On a CUDA device, Triton compiles kernels for a ``template`` up to 7 (some seconds, once
    per machine and power of two of the width).

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
    if (launched := device_kernel(batch.device, color, width, template, search)) is not None:
        block = launched.images_per_launch(height, width, template, search)
        return map_blocks(
            lambda pixels: launched.smooth_images(pixels.contiguous(), groups, template, search), batch, block
        ).view_as(images)
    worthwhile = batch.device.type == "cpu" and number * height * width >= NATIVE_FROM
    native = worthwhile and native_kernel(template) is not None
    block = images_per_block(height, width, template // 2 + search // 2, batch.device, native)

    def smooth(pixels: Tensor) -> Tensor:
        return _smooth_without_kernels(pixels, groups, template, search, native=native)

    return map_blocks(smooth, batch, block).view_as(images)


def _smooth_without_kernels(
    pixels: Tensor, groups: Sequence[tuple[int, float]], template: int, search: int, *, native: bool = False
) -> Tensor:
    """Non-local means by operations of torch, or the C kernel; gray images ``(N, 1, H, W)``, color ``(N, 3, H, W)``."""
    if pixels.shape[1] == 1:
        return smooth_planes(pixels, groups, template, search, native=native)
    lab = smooth_planes(rgb_to_lab(pixels.flip(1)), groups, template, search, native=native)
    return lab_to_rgb(lab).flip(1)


@cache
def device_kernel(device: torch.device, color: bool, width: int, template: int, search: int) -> ModuleType | None:
    """Return the module of Triton's kernels if they serve a device, images of a width and the settings, else ``None``.

    The first call compiles them, and compares what they make of one small image of that width with the result on the
    CPU. Where that fails, or differs, a warning has the reason.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    try:
        from lightning_backdoor.functional import nlm_triton  # noqa: PLC0415  (not everybody has Triton)

        if template > nlm_triton.LARGEST_TEMPLATE:
            return None
        require_same_means(nlm_triton.smooth_images, device, color, width, template=template, search=search)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, of its compilers, of what they need from the system
        warnings.warn(
            f"`nl_means` runs without its Triton kernels on {device} and takes longer: {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return None
    return nlm_triton


def require_same_means(
    smooth_images: Callable[..., Tensor], device: torch.device, color: bool, width: int, *, template: int, search: int
) -> None:
    """Compare what kernels make of one small image with the result of torch's operations on the CPU.

    Args:
        smooth_images: The kernels, as :func:`lightning_backdoor.functional.nlm_triton.smooth_images`.
        device: Where they run.
        color: Whether the image has three channels.
        width: Its width, in pixels.
        template: Side of the patches.
        search: Side of the search window.

    Raises:
        ArithmeticError: The results differ.
    """
    places = torch.arange((3 if color else 1) * PROBED * width)
    image = (100 + 7 * places % 31 + places % 13).to(torch.uint8).view(1, -1, PROBED, width)
    groups = [(1, 9.0), (2, 9.0)] if color else [(1, 9.0)]
    smoothed = smooth_images(image.to(device), groups, template, search).cpu()
    if not smoothed.equal(_smooth_without_kernels(image, groups, template, search)):
        raise ArithmeticError("their result is another than on the CPU")


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


class Comparison(NamedTuple):
    """Order two values; a result that no later comparison uses is not computed."""

    first: int
    second: int
    lower: bool
    upper: bool


def select(values: Sequence[Tensor], ranks: Sequence[int], presorted: int = 1) -> list[Tensor]:
    """Return the elementwise order statistics ``ranks`` (0 is the smallest) of tensors of one shape.

    Args:
        values: Tensors to be ordered against each other, element by element.
        ranks: Which of the sorted values are wanted.
        presorted: Length of the runs, from the start of ``values``, that are known to be sorted. Divides their number.
    """
    network, places = _network(len(values), tuple(ranks), presorted)
    slots = list(values)
    for first, second, lower, upper in network:
        a, b = slots[first], slots[second]
        if lower:
            slots[first] = torch.minimum(a, b)
        if upper:
            slots[second] = torch.maximum(a, b)
    return [slots[place] for place in places]


@cache
def _network(count: int, ranks: tuple[int, ...], run: int) -> tuple[tuple[Comparison, ...], tuple[int, ...]]:
    """Return the comparisons and the slots in which the wanted ranks end up.

    Batcher's odd-even merge sort on a power of two of wires. Runs start at multiples of a power of two, so the merges
    that would sort them are left out; wires without a value stand for infinity and cost nothing.
    """
    room = 1 << (run - 1).bit_length()
    size = 1 << (count // run * room - 1).bit_length()
    wires: list[int | None] = [None] * size
    for value in range(count):
        wires[value // run * room + value % run] = value
    pairs = []
    for i, j in _odd_even_merges(room, size):
        first, second = wires[i], wires[j]
        if first is None:
            wires[i], wires[j] = second, None
        elif second is not None:
            pairs.append((first, second))
    places = tuple(place for rank in ranks if (place := wires[rank]) is not None)
    wanted, kept = set(places), []
    for first, second in reversed(pairs):
        if wanted & {first, second}:
            kept.append(Comparison(first, second, first in wanted, second in wanted))
            wanted |= {first, second}
    return tuple(reversed(kept)), places


def _odd_even_merges(sorted_already: int, size: int) -> list[tuple[int, int]]:
    """Return Batcher's comparisons for ``size`` wires (a power of two) of which runs of a power of two are sorted."""
    pairs = []
    half = sorted_already
    while half < size:
        step = half
        while step >= 1:
            for start in range(step % half, size - step, 2 * step):
                for i in range(start, min(start + step, size - step)):
                    if i // (2 * half) == (i + step) // (2 * half):
                        pairs.append((i, i + step))
            step //= 2
        half *= 2
    return pairs


def map_blocks(function: Callable[[Tensor], Tensor], batch: Tensor, size: int) -> Tensor:
    """Apply ``function`` to ``size`` images at a time; the result has the shape, dtype and device of ``batch``.

    On a CPU, blocks run side by side in as many threads as torch may use, each block on one of them. Single operations
    on maps of a few hundred kilobytes gain little from several cores and wait for all of them after every step.
    """
    result = torch.empty_like(batch, memory_format=torch.contiguous_format)
    threads = torch.get_num_threads() if batch.device.type == "cpu" else 1

    def work(source: Tensor, target: Tensor) -> None:
        with torch.inference_mode():  # grad and inference mode belong to a thread
            target.copy_(function(source))

    if threads == 1:
        for source, target in zip(torch.split(batch, size), torch.split(result, size), strict=True):
            work(source, target)
        return result
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(work, torch.split(batch, size), torch.split(result, size)):
                pass  # raises what a block raised
    finally:
        torch.set_num_threads(threads)
    return result


def susceptibility_scores(original: Tensor, denoised: Sequence[Tensor]) -> Tensor:
    r"""Sum of L1 distances between the output on an image and on its denoised versions; larger is more suspicious.

    .. math:: s_i = \sum_v \lVert F(x_i) - F(v(x_i)) \rVert_1

    Susceptibility of UltraClean (`Zhao and Lao, 2023 <https://arxiv.org/abs/2312.10657>`_), with local median and
    non-local means as the two versions. Logits rank poisons better than softmax outputs, which saturate.

    Args:
        original: Outputs on the images as they are, float, shape ``(N, K)``.
        denoised: Outputs on each denoised version, each of shape ``(N, K)``.

    Returns:
        One score per image, float, shape ``(N,)``, at least zero.

    Raises:
        ArgumentError: If the shapes disagree or no denoised output is given.

    Example:
        >>> import torch
        >>> susceptibility_scores(torch.tensor([[2.0, 0.0]]), [torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 3.0]])])
        tensor([4.])
    """
    if not denoised:
        raise ArgumentError("`denoised` must hold at least one output of shape (N, K), got an empty sequence.")
    for output in denoised:
        if output.shape != original.shape or original.ndim != 2:
            raise ArgumentError(
                f"`original` and every entry of `denoised` must share one shape (N, K), "
                f"got {tuple(original.shape)} and {tuple(output.shape)}."
            )
    return torch.stack([(original - output).abs().sum(dim=1) for output in denoised]).sum(dim=0)
