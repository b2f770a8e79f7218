"""Pictures of reverse-engineered triggers as PNG. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.files import atomic_file
from lightning_backdoor.functional.inversion import InvertedTrigger, stamp
from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.report.figures import blank_figure, own_style, png_bytes
from lightning_backdoor.report.sentences import count, percent
from lightning_backdoor.report.tiles import three_channels

__all__ = ["trigger_sheet", "write_trigger_sheet"]

_NAMES = ("trigger", "mask", "image", "with trigger")
_TILE, _GAP, _TEXT, _HEADER, _EDGE = 1.5, 0.1, 0.32, 0.3, 0.15  # inches


def trigger_sheet(
    triggers: Mapping[float, InvertedTrigger], images: Tensor, labels: Tensor, *, classes: Sequence[str] | None = None
) -> bytes:
    """Draw the best trigger of each budget: its pattern, its mask, an image and the same image with the trigger.

    Args:
        triggers: Budgets, as shares of the pixels, and their triggers: ``REASR.triggers`` after ``compute``.
        images: Clean pixels, uint8 or floats in ``[0, 1]``, shape ``(N, C, H, W)``. Each row shows the first one whose
            label is not the target.
        labels: True labels, shape ``(N,)``.
        classes: Class names, indexed by label.

    Returns:
        A PNG picture, fit for ``Evidence(figures={"...": picture})``; small images are enlarged without smoothing.

    Raises:
        ArgumentError: There is no trigger, or no image of another class than a target.
    """
    if not triggers:
        raise ArgumentError("`triggers` must hold at least one trigger, got none. Call `compute()` of REASR first.")
    names = Evidence(classes=classes)
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    step = _TILE * min(max(pixels.shape[2] / pixels.shape[3], 0.25), 3.0) + _TEXT
    width, height = len(_NAMES) * (_TILE + _GAP) + 2 * _EDGE, len(triggers) * step + _HEADER + _EDGE
    with own_style():
        figure = blank_figure(width, height)
        style: dict[str, Any] = {"va": "top", "fontsize": 9, "parse_math": False}
        for row, (budget, trigger) in enumerate(sorted(triggers.items())):
            top = height - _HEADER - row * step
            size, target = int(trigger.mask.sum()), names.class_name(trigger.target)
            told = f"{percent(budget)} ({count(size, 'pixel')}) to {target}: {percent(trigger.success)} of other images"
            figure.text(_EDGE / width, top / height, " ".join(told.split()), **style)
            for column, tile in enumerate(_tiles(trigger, pixels, labels)):
                left = _EDGE + column * (_TILE + _GAP)
                box = (left / width, (top - step + 0.1) / height, _TILE / width, (step - _TEXT) / height)
                axes = figure.add_axes(box)
                axes.imshow(tile.numpy(), interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                if row == 0:
                    figure.text((left + _TILE / 2) / width, 1 - 0.07 / height, _NAMES[column], ha="center", **style)
        return png_bytes(figure)


def write_trigger_sheet(
    path: str | PathLike[str],
    triggers: Mapping[float, InvertedTrigger],
    images: Tensor,
    labels: Tensor,
    *,
    classes: Sequence[str] | None = None,
) -> Path:
    """Write :func:`trigger_sheet` to a file, which is complete or absent, and return its path."""
    picture, path = trigger_sheet(triggers, images, labels, classes=classes), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(picture)
    return path


def _tiles(trigger: InvertedTrigger, pixels: Tensor, labels: Tensor) -> Tensor:
    """Return pattern, mask, image and stamped image, uint8, shape ``(4, H, W, 3)``."""
    others = pixels[labels.to(pixels.device) != trigger.target]
    if len(others) == 0:
        raise ArgumentError(f"`images` must hold one of another class than the target {trigger.target}, got none.")
    image = others[:1]
    mask = trigger.mask.to(image).expand_as(image)
    shown = torch.cat([trigger.pattern.to(image) * mask, mask, image, stamp(image, trigger)])
    return three_channels((shown * 255).round().to("cpu", torch.uint8)).permute(0, 2, 3, 1)
