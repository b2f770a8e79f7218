"""From a model's input images to 8-bit pixels and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_backdoor.data.normalization import numbers
from lightning_backdoor.errors import ArgumentError, DataError

__all__ = ["PixelSpace", "check_finite", "exact_dtype", "four_dimensions", "space_of"]


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
