"""From a model's input images to 8-bit pixels and back, and how these images were computed from 8-bit pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_backdoor.data.normalization import (
    Affine,
    configured,
    has_own_units,
    in_levels,
    mentioned,
    normalize_of,
    numbers,
)
from lightning_backdoor.errors import ArgumentError, DataError

__all__ = ["PixelSpace", "check_finite", "exact_dtype", "four_dimensions", "infer_pixel_space", "space_of"]

_MARGIN = 0.02  # of the pixel range: what float resizing overshoots
_OUTSIDE = 0.05  # share of values that may lie further out: random erasing fills with noise
_GRID = 0.02  # grey levels: mean distance to whole numbers of images that were 8-bit files
_REACH = 0.95  # of either side of -1..1 that images must reach to be taken for it
_LEVELS = 2  # grey levels that images in 0..1 must span at least to be taken for fractions of the pixel range
_TAIL = 0.1  # of the images may reach beyond either end of a range that follows from the data


@dataclass(frozen=True)
class PixelSpace:
    """The map between model space and 8-bit pixels, ``model = (pixel / 255 - mean) / std`` for each channel.

    Attributes:
        mean: One number per channel, or one for all, as a fraction of the pixel range.
        std: The same; positive. Images in 0..255 floats have mean 0 and std 1/255; integers from ``low`` to ``high``
            have std 1 / (high - low) and mean -low / (high - low).
        identity: The dataset gives uint8: the images are the pixels, and mean and std are not used.
        per_image: Pixels 0 and 255 are the smallest and the largest value of each image, over all its channels; mean
            and std are not used.
        note: Message for the user about a range that follows from the data.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    identity: bool = False
    per_image: bool = False
    note: str = field(default="", compare=False)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Return the nearest 8-bit images.

        Args:
            images: ``(B, C, H, W)`` or ``(B, H, W)``, as the model receives them: floats or integers.

        Returns:
            uint8 ``(B, C, H, W)``, values outside the pixel range clamped; grey images have one channel.

        Raises:
            ArgumentError: ``mean`` has neither one entry nor one per channel.
        """
        images = four_dimensions(images.detach())
        if images.dtype == torch.uint8:
            return images
        if self.identity:
            raise DataError(f"the dataset gave uint8 images before and {images.dtype} now. Give all of them one dtype.")
        values = images.to(exact_dtype(images.dtype))
        mean, std = self.constants(values)
        return values.mul(std).add_(mean).mul_(255).round_().clamp_(0, 255).to(torch.uint8)

    def to_model(self, pixels: Tensor, like: Tensor) -> Tensor:
        """Return 8-bit images as the model receives them; in float32 with the arithmetic of torchvision, step by step.

        Args:
            pixels: uint8 ``(B, C, H, W)``; B need not be that of ``like``, except with ``per_image``.
            like: Images of the user, for dtype, device, memory format and whether grey images have a channel axis;
                with ``per_image`` those that the pixels were made from, for their ranges.

        Returns:
            ``(B, C, H, W)``, or ``(B, H, W)`` if ``like`` is so; integers are rounded.
        """
        pixels = pixels.to(like.device)
        if not self.identity and like.dtype != torch.uint8:
            mean, std = self.constants(four_dimensions(like.detach()).to(exact_dtype(like.dtype)))
            pixels = pixels.to(mean.dtype).div_(255).sub_(mean).div_(std)
            if not like.is_floating_point():
                limits = torch.iinfo(like.dtype)
                pixels = pixels.round_().clamp_(limits.min, limits.max)
        images = pixels.to(like.dtype)
        if like.ndim == 3:
            return images.squeeze(1)
        last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
        return images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def constants(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std for images ``(B, C, H, W)``, in their dtype and on their device, ready to be broadcast."""
        if self.per_image:
            low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
            std = (high - low).where(high > low, 1).reciprocal()
            return -low * std, std
        channels = images.shape[1]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ArgumentError(
                    f"`{name}` must have one number or one per channel: {channels} channels, got {len(values)} numbers."
                )
        mean, std = (torch.tensor(v, dtype=images.dtype, device=images.device) for v in (self.mean, self.std))
        return mean.view(-1, 1, 1), std.view(-1, 1, 1)


def four_dimensions(images: Tensor) -> Tensor:
    """Give grey images without a channel axis one."""
    return images.unsqueeze(1) if images.ndim == 3 else images


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return a floating dtype for the arithmetic, in which values of ``dtype`` up to 2**53 are exact."""
    wide = dtype in (torch.int32, torch.int64, torch.uint32, torch.uint64)
    return torch.float64 if wide else torch.promote_types(dtype, torch.float32)


def space_of(
    mean: float | Sequence[float] | Literal["per_image"] | None, std: float | Sequence[float] | None
) -> PixelSpace | None:
    """The space that a user's ``mean`` and ``std`` describe; None if neither is given.

    Raises:
        ArgumentError: They contradict each other, or are in other units.
    """
    if isinstance(mean, str):
        if mean != "per_image" or std is not None:
            raise ArgumentError(
                f'`mean` must be numbers, or "per_image" without `std`, got {mean!r} with `std` {std!r}. For images '
                'that are standardised one by one pass mean="per_image" alone.'
            )
        return PixelSpace(per_image=True)
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ArgumentError("`mean` and `std` belong together: pass both, in 0..1 units, or neither.")
    means, stds = numbers(mean), numbers(std)
    if not means or max(means) > 1:
        raise ArgumentError(f"`mean` must be a fraction of the pixel range (0..1), got {means}. Divide by 255.")
    if not stds or min(stds) <= 0:
        raise ArgumentError(f"`std` must be positive, got {stds}.")
    return PixelSpace(means, stds)


def check_finite(images: Tensor, indices: Tensor) -> None:
    """Raise if an image holds NaN or infinite values.

    Args:
        images: ``(B, ...)`` of any dtype.
        indices: Dataset positions ``(B,)``, named in the message.

    Raises:
        DataError: Names the dataset items.
    """
    if not images.is_floating_point():
        return
    bad = ~images.detach().flatten(1).isfinite().all(dim=1)
    if bool(bad.any()):
        items = indices.to("cpu")[bad.to("cpu")].tolist()
        more = f" and {len(items) - 10} more" if len(items) > 10 else ""
        raise DataError(
            f"images with NaN or infinite values: dataset items {', '.join(map(str, items[:10]))}{more}. "
            "Repair or remove them, or look for a division by zero in the transform."
        )


def infer_pixel_space(
    images: Tensor,
    *,
    transform: Any = None,
    model: Any = None,
    beside: Sequence[Any] = (),
    mean: float | Sequence[float] | Literal["per_image"] | None = None,
    std: float | Sequence[float] | None = None,
) -> PixelSpace:
    """Find out how the images of a dataset were made from 8-bit pixels.

    uint8 images are pixels. Else, in this order: ``mean`` and ``std``; the ``Normalize`` steps of ``transform``
    (torchvision v1 and v2, kornia, MONAI, or any object with ``mean`` and ``std``, nested); floats in 0..1; floats in
    0..255; those inside ``model`` or its timm configuration, and those that functions of ``transform`` or ``beside``
    mention, if the images are normalised so; floats from -1 to 1. The result is checked: undone, the images must lie
    within the pixel range.

    Integers from 0 to 255 are pixels in another dtype. Pixels 0 and 255 of all other integers, of floats that are
    whole numbers from 0 to at most 65535 (16-bit files), of floats within 0..1 that would fill less than two grey
    levels, and of images that a ``Normalize`` in units of their own was applied to, are the tenth percentile of the
    images' smallest values and the ninetieth of their largest ones, for each channel (three channels together, so that
    colours stay), for integers at least 255 apart. What lies beyond is clamped in denoised images and other versions;
    the originals stay as they are.

    Args:
        images: Images ``(B, C, H, W)`` or ``(B, H, W)`` as the dataset gives them; a whole batch is better than one.
        transform: The dataset's transform, or the list of its transforms in the order of application.
        model: The user's module.
        beside: The dataset, its ``collate_fn``, or another object that may name a normalisation.
        mean: Per channel or one for all, in 0..1 units; together with ``std``. ``"per_image"``: every image is
            stretched from its smallest to its largest value.
        std: The same; positive.

    Raises:
        ArgumentError: Nothing fits; the message names ``mean`` and ``std`` and gives the range seen.
        DataError: No image has a finite value.
    """
    explicit = space_of(mean, std)
    if images.dtype == torch.uint8:
        return PixelSpace(identity=True)
    whole = not images.is_floating_point()
    images = four_dimensions(images).detach()
    images = images.double() if whole else images.float()
    values = images.isfinite()
    if not bool(values.any()):
        raise DataError("the images have no finite value: pixel space cannot be inferred. Look at the transform.")
    if explicit is not None:
        if explicit.per_image or _fits(explicit, images):
            return explicit
        undone = f"undoing `mean` and `std` ({explicit.mean}, {explicit.std})"
        raise _cannot_infer(images, f"{undone} leaves the pixel range")
    if whole:
        return _of_integers(images)
    given = normalize_of(transform)
    if given is not None:
        return _as_given(transform, given, images)
    return _from_range(images, values, transform, model, beside)


def _as_given(transform: Any, given: Affine, images: Tensor) -> PixelSpace:
    """The space of a ``Normalize`` that is known to be applied: to 0..1, to 0..255, or to units of its own."""
    space, levels = PixelSpace(*given), PixelSpace(*in_levels(given))
    if _fits(space, images):
        return space
    if _fits(levels, images) and _is_certain(levels, images):
        return levels
    if has_own_units(transform):
        return _stretched(images)
    raise _cannot_infer(images, f"undoing the transform's Normalize ({space.mean}, {space.std}) leaves the pixel range")


def _from_range(images: Tensor, finite: Tensor, transform: Any, model: Any, beside: Sequence[Any]) -> PixelSpace:
    """Decide by the values, and by normalisations that are mentioned somewhere but need not be those applied."""
    slack = 0.1 if transform else 1e-3  # how far float resizing in a known transform may overshoot 0..1
    low, high = float(images[finite].min()), float(images[finite].max())
    if low >= -slack and high <= 1 + slack and _fits(PixelSpace(), images):
        return _stretched(images) if 0 < 255 * (high - low) < _LEVELS else PixelSpace()
    if low >= -1e-3 and 64 < high < 256:
        return PixelSpace(std=(1 / 255,))
    if low >= 0 and 256 <= high < 2**16 and torch.equal(images[finite], images[finite].round()):
        return _of_integers(images)
    for affine in _told(transform, model, beside) if low < 0 else ():
        space = PixelSpace(*affine)
        if _fits(space, images) and _is_certain(space, images):
            return space
    signed = PixelSpace((0.5,), (0.5,))
    if -1 - 2 * slack <= low < -_REACH and _REACH < high <= 1 + 2 * slack and _fits(signed, images):
        return signed
    raise _cannot_infer(images, "that is neither 0..1 nor 0..255 nor -1..1, and no Normalize was found that fits")


def _told(transform: Any, model: Any, beside: Sequence[Any]) -> Iterator[Affine]:
    """Normalisations that may be those applied, one by one: the search through functions comes last."""
    yield from configured(model)
    yield from mentioned([transform, *beside])


def _of_integers(images: Tensor) -> PixelSpace:
    if float(images.min()) >= 0 and float(images.max()) <= 255:
        return PixelSpace(std=(1 / 255,))
    return _stretched(images, least=255.0)


def _stretched(images: Tensor, least: float = 0.0) -> PixelSpace:
    """The range that most images stay within, of each channel, or of three together; ``least`` is its least width."""
    finite = images.isfinite()
    lows = images.where(finite, torch.inf).amin((2, 3))
    highs = images.where(finite, -torch.inf).amax((2, 3))
    if images.shape[1] == 3:
        lows, highs = lows.amin(1, keepdim=True), highs.amax(1, keepdim=True)
    low = lows.quantile(_TAIL, dim=0, interpolation="nearest")
    width = (highs.quantile(1 - _TAIL, dim=0, interpolation="nearest") - low).clamp(min=least)
    std = width.where(width > 0, 1).reciprocal()
    ends = (", ".join(_number(end, 4) for end in column) for column in (low, low + width))
    note = (
        "Images are denoised and shown as 8-bit pixels. Pixels 0 and 255 stand for the values {} and {} of the images, "
        "within which nine of ten stay. For another range, from low to high, pass mean=[-low / (high - low)] and "
        "std=[1 / (high - low)]."
    )
    return PixelSpace(tuple((-low * std).tolist()), tuple(std.tolist()), note=note.format(*ends))


def _number(value: Tensor, digits: int) -> str:
    """A number for a reader: large ones without an exponent."""
    number = float(value)
    return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.{digits}g}"


def _undone(space: PixelSpace, images: Tensor) -> Tensor:
    mean, std = space.constants(images)
    return images.mul(std).add(mean)


def _fits(space: PixelSpace, images: Tensor) -> bool:
    values = _undone(space, images)
    values = values[values.isfinite()]
    outside = (values < -_MARGIN) | (values > 1 + _MARGIN)
    return float(outside.float().mean()) <= _OUTSIDE


def _is_certain(space: PixelSpace, images: Tensor) -> bool:
    """Whether the images, undone, lie on the grid of 8-bit files or reach both ends of the pixel range."""
    return _on_grid(space, images) or _fills(space, images)


def _on_grid(space: PixelSpace, images: Tensor) -> bool:
    levels = _undone(space, images).mul(255)
    levels = levels[levels.isfinite()]
    return float((levels - levels.round()).abs().mean()) < _GRID


def _fills(space: PixelSpace, images: Tensor) -> bool:
    values = _undone(space, images).nan_to_num(0.5).transpose(0, 1).flatten(1)
    return bool((values.amin(1) < _MARGIN).all() and (values.amax(1) > 1 - _MARGIN).all())


def _cannot_infer(images: Tensor, why: str) -> ArgumentError:
    finite = images[images.isfinite()]
    channels, low, high = images.shape[1], _number(finite.min(), 3), _number(finite.max(), 3)
    return ArgumentError(
        f"pixel space cannot be inferred: images of {channels} channels with values from {low} to {high}; {why}. "
        "Pass `mean` and `std`, the numbers by which the images were normalised, as fractions of the pixel range "
        "for each channel, e.g. mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225); "
        'for values from low to high mean=[-low / (high - low)], std=[1 / (high - low)]; or mean="per_image" alone if '
        "every image was standardised by itself."
    )
