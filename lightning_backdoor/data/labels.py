"""Which column of a batch are the labels, and which class each of them means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor.data.structure import Leaf, spelled
from lightning_backdoor.errors import ArgumentError, DataError
from lightning_backdoor.functional.kinds import plain

__all__ = ["class_indices", "find_labels"]

_LABEL_NAMES = {
    "label",
    "labels",
    "target",
    "targets",
    "y",
    "class",
    "classes",
    "cls",
    "gt",
    "ground_truth",
    "category",
}
_LABEL_NAMES |= {"class_id", "class_idx", "class_label", "fine_label", "fine_labels", "coarse_label", "coarse_labels"}
_POSITION_NAMES = {"index", "indices", "idx", "idxs", "id", "ids", "i", "position", "positions"}
_POSITION_NAMES |= {"image_id", "image_index", "sample_id", "sample_index"}
_FEWEST = 4  # samples by which a column of dataset positions is known: fewer may be numbered so by chance
_SHOWN = 5  # values of a candidate that a message shows


def _is_whole(values: Tensor) -> bool:
    if values.is_complex():
        return False
    return not values.is_floating_point() or bool((values == values.round()).all() and values.isfinite().all())


def _is_column(values: Tensor) -> bool:
    """Whether there is one number for each sample: ``(B,)`` or ``(B, 1)``."""
    return values.ndim == 1 or (values.ndim == 2 and values.shape[1] == 1)


def _is_integer(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def find_labels(batch: Any, leaves: list[Leaf], images: Leaf, positions: Sequence[Tensor] = ()) -> Leaf | None:
    """Return what is given as the labels, even if it is not class indices (:func:`class_indices` then explains).

    Of several columns, one that holds the dataset positions of the samples is not the label.

    Args:
        batch: The batch.
        leaves: Its tensors.
        images: The one that holds the images.
        positions: Dataset positions of the samples, long ``(B,)``; several where datasets are nested.

    Returns:
        The labels; ``None`` if nothing in the batch could be.

    Raises:
        ArgumentError: Several columns could be; the message lists them.
    """
    size = images.tensor.shape[0]
    beside = [leaf for leaf in leaves if leaf.path != images.path and 1 <= leaf.tensor.ndim <= 2]
    beside = [leaf for leaf in beside if leaf.tensor.shape[0] == size]
    named = [leaf for leaf in beside if leaf.name in _LABEL_NAMES]
    found = named or [leaf for leaf in beside if leaf.name not in _POSITION_NAMES]
    found = [leaf for leaf in found if not _holds(leaf.tensor, positions)] or found
    found = [leaf for leaf in found if leaf.tensor.dtype != torch.bool] or found  # flags stand beside labels
    if len(found) <= 1:
        return found[0] if found else None
    columns = [leaf for leaf in found if _is_column(leaf.tensor)]
    integers = [leaf for leaf in columns if _is_integer(leaf.tensor)]
    flat = [leaf for leaf in integers if leaf.tensor.ndim == 1]
    classes = flat or integers or [leaf for leaf in columns if _is_whole(plain(leaf.tensor))]
    if len(classes) == 1 and (named or found[0] is classes[0]):
        return classes[0]
    candidates = "; ".join(_described(batch, leaf) for leaf in found)
    pick = f"({spelled(batch, images.path)}, {spelled(batch, found[0].path)})"
    raise ArgumentError(
        f"{len(found)} tensors could be the labels: {candidates}. Pass `batch_fn`, a function from the batch to "
        f"(images, labels); for the first of them: batch_fn=lambda batch: {pick}."
    )


def _holds(values: Tensor, positions: Sequence[Tensor]) -> bool:
    if not _is_column(values):
        return False
    column = plain(values).flatten().cpu()
    return any(len(known) >= _FEWEST and torch.equal(column, known.to(column.dtype)) for known in positions)


def _described(batch: Any, leaf: Leaf) -> str:
    values = plain(leaf.tensor).detach()
    dtype, shape = str(values.dtype).removeprefix("torch."), tuple(values.shape)
    first = values.flatten()[:_SHOWN].tolist()
    shown = ", ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in first)
    more = ", ..." if values.numel() > _SHOWN else ""
    different = len(torch.unique(values, dim=0))
    return f"{spelled(batch, leaf.path)}: {dtype} {shape}, values {shown}{more} ({different} different)"


def class_indices(labels: Any, known: tuple[str, str] | None = None) -> Tensor:
    """Return the class of every sample, long ``(B,)``.

    Classes are integers, floats without a fraction, or bools, one for each sample: ``(B,)`` or ``(B, 1)``.

    Args:
        labels: The labels of a batch.
        known: How images and labels are spelled in terms of ``batch``; ``None``: they come from ``batch_fn``.

    Raises:
        DataError: They are something else; the message describes them and gives a remedy.
    """
    if isinstance(labels, Tensor):
        values = plain(labels)
        if _is_column(values) and _is_whole(values):
            if values.numel() and int(values.min()) < 0:
                raise DataError(
                    f"labels that are not class indices: the smallest is {int(values.min())}. "
                    "Remove unlabelled samples from the training dataset or number the classes from 0."
                )
            return values.flatten().long()
        kind = f"{values.dtype} {tuple(values.shape)}"
    else:
        kind = type(labels).__name__
    raise DataError(
        f"labels that are not class indices: wanted one whole number for each image, (B,) or (B, 1), got {kind}. "
        + _remedy(labels, known)
    )


def _remedy(labels: Any, known: tuple[str, str] | None) -> str:
    """What kind of labels these are, and the remedy."""
    integers = "Let the dataset return the number of the class as an integer"
    if not isinstance(labels, Tensor) or labels.ndim == 0 or labels.is_complex():
        return f"{integers}."
    values = plain(labels)
    if _is_column(values):
        return f"They have fractions, as mixed or continuous targets do. {integers}, and mix in training_step."
    if values.ndim > 2:
        return f"{integers}; a class for every pixel is another task."
    totals = values.double().sum(dim=1)
    flags, one = bool(((values == 0) | (values == 1)).all()), bool(((totals - 1).abs() < 1e-3).all())
    if flags and not one:
        return (
            f"They look multi-label: an image has {int(totals.min())} to {int(totals.max())} classes, and a defence "
            "needs exactly one. Train without it."
        )
    if flags or one or values.is_floating_point():
        look = "one-hot" if flags else "mixed or smoothed" if one else "like scores of the classes"
        return f"They look {look}. {_change(known, '{}.argmax(1)')}, or let the dataset return integer labels."
    return f"They have {values.shape[1]} columns. {_change(known, '{}[:, 0]')}, if the first one is the label."


def _change(known: tuple[str, str] | None, how: str) -> str:
    if known is None:
        return f"Let `batch_fn` return (images, {how.format('labels')})"
    images, labels = known
    return f"Pass `batch_fn`, e.g. batch_fn=lambda batch: ({images}, {how.format(labels)})"
