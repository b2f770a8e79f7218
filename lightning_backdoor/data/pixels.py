"""From the images that a model sees to 8-bit pixels and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor.data.normalisation import Affine, configured, normalise_of
from lightning_backdoor.errors import ArgumentError, DataError

__all__ = ["PixelSpace", "check_finite", "infer_pixel_space"]

_MARGIN = 0.02  # of the pixel range: what float resizing overshoots
_OUTSIDE = 0.05  # share of values that may lie further out: random erasing fills with noise
_GRID = 0.02  # grey levels: mean distance to whole numbers of images that were 8-bit files


@dataclass(frozen=True)
class PixelSpace:
    """The map between model space and 8-bit pixels, ``model = (pixel / 255 - mean) / std`` for each channel.

    Attributes:
        mean: One number per channel, or one for all, as a fraction of the pixel range.
        std: The same; positive. Images in 0..255 floats have mean 0 and std 1/255.
        identity: The dataset gives uint8: the images are the pixels, and mean and std are not used.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    identity: bool = False

    def to_pixels(self, images: Tensor) -> Tensor:
        """Return the nearest 8-bit images.

        Args:
            images: ``(B, C, H, W)`` or ``(B, H, W)``, as the model sees them.

        Returns:
            uint8 ``(B, C, H, W)``, values outside the pixel range clamped; grey images have one channel.

        Raises:
            ArgumentError: ``mean`` has neither one entry nor one per channel.
        """
        images = images.detach()
        images = images.unsqueeze(1) if images.ndim == 3 else images
        if images.dtype == torch.uint8:
            return images
        if self.identity:
            raise DataError(f"the dataset gave uint8 images before and {images.dtype} now. Give all of them one dtype.")
        exact = torch.promote_types(images.dtype, torch.float32)
        mean, std = self._constants(images.shape[1], exact, images.device)
        return images.to(exact).mul(std).add_(mean).mul_(255).round_().clamp_(0, 255).to(torch.uint8)

    def to_model(self, pixels: Tensor, like: Tensor) -> Tensor:
        """Return 8-bit images as the model sees them; in float32 with the arithmetic of torchvision, step by step.

        Args:
            pixels: uint8 ``(B, C, H, W)``; B need not be that of ``like``.
            like: Images of the user, for dtype, device, memory format and whether grey images have a channel axis.

        Returns:
            ``(B, C, H, W)``, or ``(B, H, W)`` if ``like`` is so.
        """
        pixels = pixels.to(like.device)
        if not self.identity and like.dtype != torch.uint8:
            exact = torch.promote_types(like.dtype, torch.float32)
            mean, std = self._constants(pixels.shape[1], exact, like.device)
            pixels = pixels.to(exact).div_(255).sub_(mean).div_(std)
        images = pixels.to(like.dtype)
        if like.ndim == 3:
            return images.squeeze(1)
        last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
        return images.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def _constants(self, channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise ArgumentError(
                    f"`{name}` must have one number or one per channel: {channels} channels, got {len(values)} numbers."
                )
        mean, std = (torch.tensor(v, dtype=dtype, device=device) for v in (self.mean, self.std))
        return mean.view(-1, 1, 1), std.view(-1, 1, 1)


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
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> PixelSpace:
    """Find out how the images of a dataset were made from 8-bit pixels.

    uint8 images are pixels. Else, in this order: ``mean`` and ``std``; the ``Normalize`` steps of ``transform``
    (torchvision v1 and v2, kornia, or any object with ``mean`` and ``std``, nested); those inside ``model`` or its timm
    configuration, if the images are normalised so; floats in 0..1; floats in 0..255. The result is checked: undone,
    the images must lie within the pixel range.

    Args:
        images: Images ``(B, C, H, W)`` or ``(B, H, W)`` as the dataset gives them; a whole batch is better than one.
        transform: The dataset's transform, or the list of its transforms in the order of application.
        model: The user's module.
        mean: Per channel or one for all, in 0..1 units; together with ``std``.
        std: The same; positive.

    Raises:
        ArgumentError: Nothing fits; the message names ``mean`` and ``std`` and gives the range seen.
        DataError: No image has a finite value.
    """
    explicit = _explicit(mean, std)
    if images.dtype == torch.uint8:
        return PixelSpace(identity=True)
    images = (images.unsqueeze(1) if images.ndim == 3 else images).detach().float()
    values = images.isfinite()
    if not bool(values.any()):
        raise DataError("the images have no finite value: pixel space cannot be inferred. Look at the transform.")
    given = explicit or normalise_of(transform)
    if given is not None:
        space = PixelSpace(*given)
        if _fits(space, images):
            return space
        origin = "`mean` and `std`" if explicit else "the transform's Normalize"
        raise _cannot_infer(images, f"undoing {origin} ({space.mean}, {space.std}) leaves the pixel range")
    return _from_range(images, values, model, slack=0.1 if transform else 1e-3)


def _from_range(images: Tensor, finite: Tensor, model: Any, *, slack: float) -> PixelSpace:
    """Decide by the values; ``slack`` is how far float resizing in a known transform may overshoot 0..1."""
    low, high = float(images[finite].min()), float(images[finite].max())
    if low >= -slack and high <= 1 + slack and _fits(PixelSpace(), images):
        return PixelSpace()
    if low >= -1e-3 and 64 < high < 256:
        return PixelSpace(std=(1 / 255,))
    for affine in configured(model):
        space = PixelSpace(*affine)
        if low < 0 and _fits(space, images) and (_on_grid(space, images) or _fills(space, images)):
            return space
    raise _cannot_infer(images, "that is neither 0..1 nor 0..255, and no Normalize was found in the transform")


def _explicit(mean: float | Sequence[float] | None, std: float | Sequence[float] | None) -> Affine | None:
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ArgumentError("`mean` and `std` belong together: pass both, in 0..1 units, or neither.")
    means, stds = (tuple(float(v) for v in ([x] if isinstance(x, int | float) else x)) for x in (mean, std))
    if not means or max(map(abs, means)) > 1:
        raise ArgumentError(f"`mean` must be a fraction of the pixel range (0..1), got {means}. Divide by 255.")
    if not stds or min(stds) <= 0:
        raise ArgumentError(f"`std` must be positive, got {stds}.")
    return means, stds


def _undone(space: PixelSpace, images: Tensor) -> Tensor:
    mean, std = space._constants(images.shape[1], images.dtype, images.device)
    return images.mul(std).add(mean)


def _fits(space: PixelSpace, images: Tensor) -> bool:
    values = _undone(space, images)
    values = values[values.isfinite()]
    outside = (values < -_MARGIN) | (values > 1 + _MARGIN)
    return float(outside.float().mean()) <= _OUTSIDE


def _on_grid(space: PixelSpace, images: Tensor) -> bool:
    levels = _undone(space, images).mul(255)
    levels = levels[levels.isfinite()]
    return float((levels - levels.round()).abs().mean()) < _GRID


def _fills(space: PixelSpace, images: Tensor) -> bool:
    values = _undone(space, images).nan_to_num(0.5).transpose(0, 1).flatten(1)
    return bool((values.amin(1) < _MARGIN).all() and (values.amax(1) > 1 - _MARGIN).all())


def _cannot_infer(images: Tensor, why: str) -> ArgumentError:
    finite = images[images.isfinite()]
    channels = images.shape[1]
    return ArgumentError(
        f"pixel space cannot be inferred: images of {channels} channels with values from {float(finite.min()):.3g} to "
        f"{float(finite.max()):.3g}; {why}. Pass `mean` and `std`, the numbers by which the images were normalised, as "
        "fractions of the pixel range for each channel, e.g. mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)."
    )
