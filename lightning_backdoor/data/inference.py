"""Finding out how the images that a model sees were made from 8-bit pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_backdoor.data.normalisation import (
    Affine,
    configured,
    has_own_units,
    in_levels,
    mentioned,
    normalise_of,
)
from lightning_backdoor.data.pixels import PixelSpace, four_dimensions, space_of
from lightning_backdoor.errors import ArgumentError, DataError

__all__ = ["infer_pixel_space"]

_MARGIN = 0.02  # of the pixel range: what float resizing overshoots
_OUTSIDE = 0.05  # share of values that may lie further out: random erasing fills with noise
_GRID = 0.02  # grey levels: mean distance to whole numbers of images that were 8-bit files
_REACH = 0.95  # of either side of -1..1 that images must reach to be taken for it
_LEVELS = 2  # grey levels that images in 0..1 must span at least to be taken for fractions of the pixel range
_TAIL = 0.1  # of the images may reach beyond either end of a range that follows from the data


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
        beside: The dataset, its ``collate_fn``, or whatever else may name a normalisation.
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
    given = normalise_of(transform)
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
    mean, std = space._constants(images)
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
