"""Metrics class by class: their arguments and averages, named as in torchmetrics."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_backdoor.errors import ArgumentError

__all__ = ["Average", "averaged", "classes_of", "require_classes"]

Average = Literal["micro", "macro"] | None


def require_classes(average: Average, num_classes: int | None) -> int | None:
    """Return ``num_classes`` if ``average`` needs it, else ``None``."""
    if average not in ("micro", "macro", None):
        raise ArgumentError(f"`average` must be 'micro', 'macro' or None, got {average!r}.")
    if average == "micro":
        return None
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ArgumentError(
            f"`num_classes` must be a whole number of at least 1 with `average={average!r}`, got {num_classes!r}."
        )
    return num_classes


def classes_of(classes: Tensor, samples: Tensor, num_classes: int) -> Tensor:
    """The class that each sample counts for, long ``(N,)``, if there is one for each and none is too large."""
    classes = classes.squeeze(1) if classes.shape[1:] == (1,) else classes
    if classes.shape != samples.shape:
        raise ArgumentError(
            f"`classes` must have shape {tuple(samples.shape)}, one for each sample, got {tuple(classes.shape)}."
        )
    if classes.numel() and (int(classes.min()) < 0 or int(classes.max()) >= num_classes):
        raise ArgumentError(
            f"`num_classes` must be larger than every class, got {num_classes} with classes from "
            f"{int(classes.min())} to {int(classes.max())}."
        )
    return classes.long()


def averaged(values: Tensor, average: Average) -> Tensor:
    """The values as they are, or with ``"macro"`` the mean of those that are defined."""
    return torch.nanmean(values) if average == "macro" else values
