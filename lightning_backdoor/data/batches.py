"""Where the images and the labels are in the user's batch, and which class each label means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor._lightning import plain
from lightning_backdoor.data.nesting import Leaf, as_kind_of, get_at, leaves_of, put_at, spelled
from lightning_backdoor.data.origins import Origin, Replaced, find_origin
from lightning_backdoor.errors import ArgumentError, DataError

__all__ = ["BatchFn", "BatchLayout", "class_indices", "find_labels", "find_layout", "holds_images"]

BatchFn = Callable[[Any], tuple[Tensor, Tensor]]

_IMAGE_NAMES = {"image", "images", "img", "imgs", "x", "input", "inputs", "pixel_values", "data", "picture", "pictures"}
_REMEDY = "Pass `batch_fn`, a function from the batch to (images, labels), e.g. batch_fn=lambda batch: ({x}, {y})."

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


def _is_usual(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.dtype == torch.uint8


def _is_image(tensor: Tensor, dims: int) -> bool:
    number = not tensor.is_complex() and tensor.dtype != torch.bool
    return tensor.ndim == dims and tensor.numel() > 0 and number


def _image_leaves(leaves: list[Leaf]) -> list[Leaf]:
    """Return what may be images: floats and uint8 before other integers, which may be masks or tokens beside them.

    Four dimensions come before three. Integers with four and a well-known name win over floats without one.
    """
    kinds = [(usual, dims) for usual in (True, False) for dims in (4, 3)]
    groups = [
        [leaf for leaf in leaves if _is_image(leaf.tensor, dims) and _is_usual(leaf.tensor) is usual]
        for usual, dims in kinds
    ]
    found = next((group for group in groups if group), [])
    integers = [leaf for leaf in groups[2] if leaf.name in _IMAGE_NAMES]
    return found if not integers or any(leaf.name in _IMAGE_NAMES for leaf in found) else integers


def holds_images(batch: Any) -> list[int]:
    """Return the batch size of every image-like tensor in ``batch``; empty when there is none."""
    return [leaf.tensor.shape[0] for leaf in _image_leaves(list(leaves_of(batch)))]


def _listing(leaves: list[Leaf]) -> str:
    return "; ".join(map(str, leaves)) or "no tensor"


def _example(leaves: list[Leaf]) -> str:
    dicts = bool(leaves) and bool(leaves[0].path) and isinstance(leaves[0].path[0], str)
    x, y = ('batch["image"]', 'batch["label"]') if dicts else ("batch[0]", "batch[1]")
    return _REMEDY.format(x=x, y=y)


def _find_images(leaves: list[Leaf]) -> Leaf:
    found = _image_leaves(leaves)
    named = [leaf for leaf in found if leaf.name in _IMAGE_NAMES]
    if len(found) > 1 and len(named) == 1:
        found = named
    if len(found) != 1:
        problem = f"{len(found)} tensors could be the images" if found else "no tensor of the batch looks like images"
        raise ArgumentError(
            f"{problem}: wanted one tensor of numbers (B, C, H, W), got {_listing(found or leaves)}. "
            + _example(leaves)
        )
    _, *shape = found[0].tensor.shape
    if len(shape) == 3 and shape[2] in (1, 3, 4) and shape[0] > 4 and shape[1] > 4:
        raise ArgumentError(
            f"images must be (B, C, H, W), got {found[0]}, which looks like (B, H, W, C). "
            + _REMEDY.format(x="batch[0].permute(0, 3, 1, 2)", y="batch[1]")
        )
    return found[0]


@dataclass(frozen=True)
class BatchLayout:
    """Reads the images and the labels of a batch, and puts other images in their place.

    Made by :func:`find_layout` from one batch and valid for every batch of the same structure, on any device.

    Attributes:
        image_path: Keys, positions or attribute names that lead to the images; unused with ``batch_fn``.
        label_path: The same for the labels; None when the batch has none.
        batch_fn: The user's function from a batch to ``(images, labels)``.
        origin: Where it computes the images from, if it does, and they can be traced back.
    """

    image_path: tuple[Any, ...] = ()
    label_path: tuple[Any, ...] | None = None
    batch_fn: BatchFn | None = None
    origin: Origin | None = None

    def images(self, batch: Any) -> Tensor:
        """Return the images, ``(B, C, H, W)`` or ``(B, H, W)``: those of the batch, as a plain tensor."""
        return plain(self.given_images(batch))

    def given_images(self, batch: Any) -> Tensor:
        """Return the images as they are in the batch, perhaps of a derived class: what a model is called with."""
        if isinstance(batch, Replaced):
            return batch.images
        images: Tensor = _call(self.batch_fn, batch)[0] if self.batch_fn else get_at(batch, self.image_path)
        return images

    def labels(self, batch: Any) -> Tensor:
        """Return the class indices, ``(B,)`` int64; see :func:`~lightning_backdoor.data.batches.class_indices`.

        Raises:
            ArgumentError: The batch has no labels.
            DataError: The labels are not class indices: fractions, one-hot, mixed, multi-label or negative.
        """
        if self.batch_fn is None and self.label_path is None:
            leaves = list(leaves_of(batch))
            raise ArgumentError(f"no labels in the batch ({_listing(leaves)}). " + _example(leaves))
        if self.batch_fn is not None:
            return class_indices(_call(self.batch_fn, batch)[1])
        path = self.label_path or ()
        return class_indices(get_at(batch, path), (spelled(batch, self.image_path), spelled(batch, path)))

    def with_images(self, batch: Any, images: Tensor) -> Any:
        """Return a batch of the same structure with ``images`` in place of its own; the batch given is not changed.

        They are of the class of its own images (an image of torchvision or MONAI) where that class allows it. Where
        ``batch_fn`` computes the images by a factor and a summand for each channel (and :meth:`traced` has seen it),
        the tensor that it reads is changed so that it computes ``images``. Where it computes them otherwise, the result
        is a :class:`~lightning_backdoor.data.origins.Replaced`, which only this layout can read.
        """
        if self.batch_fn is None:
            return put_at(batch, self.image_path, as_kind_of(images, get_at(batch, self.image_path)))
        if isinstance(batch, Replaced):
            return Replaced(batch.batch, images)
        in_place = _put_in_place(batch, self.images(batch), images)
        if in_place is not None:
            return in_place
        return Replaced(batch, images) if self.origin is None else self.origin.put(batch, images)

    def traced(self, batch: Any) -> BatchLayout:
        """Return the same layout, knowing where ``batch_fn`` computes the images of ``batch`` from, if it does."""
        if self.batch_fn is None or _put_in_place(batch, self.images(batch), self.images(batch)) is not None:
            return self
        return replace(self, origin=find_origin(batch, self.images))


def _put_in_place(batch: Any, old: Tensor, new: Tensor) -> Any | None:
    """Put images in the place of ``old``, a tensor of the batch or a view of one; None if it is neither."""
    for leaf in leaves_of(batch):
        if _same_view(leaf.tensor, old):
            return put_at(batch, leaf.path, as_kind_of(new, leaf.tensor))
    for leaf in leaves_of(batch):
        fresh = plain(leaf.tensor).detach().clone()
        if _shares_storage(leaf.tensor, old) and fresh.stride() == leaf.tensor.stride():
            offset = old.storage_offset() - leaf.tensor.storage_offset()
            fresh.as_strided(old.shape, old.stride(), offset).copy_(new)
            return put_at(batch, leaf.path, as_kind_of(fresh, leaf.tensor))
    return None


def _same_view(a: Tensor, b: Tensor) -> bool:
    same = a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    return a is b or (same and a.device == b.device and a.data_ptr() == b.data_ptr())


def _shares_storage(a: Tensor, b: Tensor) -> bool:
    same = a.dtype == b.dtype and a.device == b.device
    return same and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _call(batch_fn: BatchFn, batch: Any) -> tuple[Tensor, Any]:
    pair = batch_fn(batch.batch if isinstance(batch, Replaced) else batch)
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], Tensor):
        raise ArgumentError(f"`batch_fn` must return a pair (images, labels) of tensors, got {type(pair).__name__}.")
    if not any(_is_image(pair[0], dims) for dims in (3, 4)):
        kind = f"{pair[0].dtype} {tuple(pair[0].shape)}"
        raise ArgumentError(f"`batch_fn` must return (images, labels) with images (B, C, H, W) of numbers, got {kind}.")
    return pair[0], pair[1]


def find_layout(batch: Any, batch_fn: BatchFn | None = None, positions: Sequence[Tensor] = ()) -> BatchLayout:
    """Find the images and the labels of ``batch`` by shape and dtype.

    Images are the floating or uint8 tensor ``(B, C, H, W)``, else ``(B, H, W)``, else one of other integers. Labels are
    the integer ``(B,)`` or ``(B, 1)``, else whole numbers of another dtype. Tuples, lists, named tuples, mappings and
    dataclasses are searched at any depth. Well-known names (``image``, ``pixel_values``; ``label``, ``target``, ``y``)
    decide between several; names of sample positions (``index``, ``id``) are never labels, nor is a column that holds
    the dataset positions where there is another.

    Args:
        batch: One batch of the user's loader.
        batch_fn: Function from a batch to ``(images, labels)``; nothing is searched when it is given.
        positions: Dataset positions of the samples, long ``(B,)``; several where datasets are nested.

    Raises:
        ArgumentError: Images or labels are missing or ambiguous; the message names ``batch_fn``.
    """
    if batch_fn is not None:
        _call(batch_fn, batch)
        return BatchLayout(batch_fn=batch_fn)
    leaves = list(leaves_of(batch))
    images = _find_images(leaves)
    labels = find_labels(batch, leaves, images, positions)
    return BatchLayout(images.path, labels.path if labels else None)


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
