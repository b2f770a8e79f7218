"""Strong random views of images, which a contrastive loss compares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_backdoor.data.random_state import isolated_rng, seed_all

__all__ = ["strong_view"]

CROP = (0.2, 1.0)  # share of the area
JITTER = 0.4  # of brightness, contrast and saturation
HUE = 0.1  # of the circle
JITTERED, GREY = 0.8, 0.2  # shares of the images


def strong_view(pixels: Tensor, *, seed: int) -> Tensor:
    """Crop, mirror and recolour every image at random, on its device (the augmentation of SupCon and D-ST).

    A crop of a fifth to all of the area is stretched to full size; half of the images are mirrored; brightness,
    contrast, saturation and hue change in four of five; one of five loses its colours. Images that are not of three
    channels change brightness and contrast alone.

    Args:
        pixels: uint8 ``(B, C, H, W)``.
        seed: Any integer; the same one gives the same views.

    Returns:
        uint8 ``(B, C, H, W)``.
    """
    with isolated_rng():
        seed_all(seed)
        views = _augmentation(*pixels.shape[1:])(pixels.float() / 255)
    strong: Tensor = views.mul(255).round().clamp(0, 255).to(torch.uint8)
    return strong


def _augmentation(channels: int, height: int, width: int) -> Any:
    import kornia.augmentation as K  # noqa: PLC0415  (slow to import)

    geometry = [K.RandomResizedCrop((height, width), CROP, cropping_mode="resample"), K.RandomHorizontalFlip()]
    if channels == 3:
        colors = [K.ColorJitter(JITTER, JITTER, JITTER, HUE, p=JITTERED), K.RandomGrayscale(p=GREY)]
    else:
        around = (1 - JITTER, 1 + JITTER)
        colors = [K.RandomBrightness(around, p=JITTERED), K.RandomContrast(around, p=JITTERED)]
    return K.AugmentationSequential(*geometry, *colors, data_keys=["input"])
