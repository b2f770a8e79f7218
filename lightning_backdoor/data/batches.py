"""Where the images and the labels are in somebody else's batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor.data.structure import Leaf, get_at, leaves_of, put_at
from lightning_backdoor.errors import ArgumentError, DataError

__all__ = ["BatchFn", "BatchLayout", "find_layout", "holds_images"]

BatchFn = Callable[[Any], tuple[Tensor, Tensor]]

_IMAGE_NAMES = {"image", "images", "img", "imgs", "x", "input", "inputs", "pixel_values", "data", "picture", "pictures"}
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
_REMEDY = "Pass `batch_fn`, a function from the batch to (images, labels), e.g. batch_fn=lambda batch: ({x}, {y})."


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


def _is_class_index(tensor: Tensor) -> bool:
    integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return integer and tensor.ndim == 1


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


def _find_labels(leaves: list[Leaf], images: Leaf) -> Leaf | None:
    """Return what is given as the labels, even if it is not class indices (``labels`` then explains), or None."""
    size = images.tensor.shape[0]
    beside = [leaf for leaf in leaves if leaf.path != images.path and 1 <= leaf.tensor.ndim <= 2]
    beside = [leaf for leaf in beside if leaf.tensor.shape[0] == size and leaf.tensor.dtype != torch.bool]
    named = [leaf for leaf in beside if leaf.name in _LABEL_NAMES]
    found = named or [leaf for leaf in beside if leaf.name not in _POSITION_NAMES]
    if len(found) <= 1:
        return found[0] if found else None
    indices = [leaf for leaf in found if _is_class_index(leaf.tensor)]
    if len(indices) == 1 and (named or found[0] is indices[0]):
        return indices[0]
    raise ArgumentError(f"{len(found)} tensors could be the labels: {_listing(found)}. " + _example(leaves))


@dataclass(frozen=True)
class BatchLayout:
    """Reads the images and the labels of a batch, and puts other images in their place.

    Made by :func:`find_layout` from one batch and valid for every batch of the same structure, on any device.

    Attributes:
        image_path: Keys, positions or attribute names that lead to the images; unused with ``batch_fn``.
        label_path: The same for the labels; None when the batch has none.
        batch_fn: The user's function from a batch to ``(images, labels)``.
    """

    image_path: tuple[Any, ...] = ()
    label_path: tuple[Any, ...] | None = None
    batch_fn: BatchFn | None = None

    def images(self, batch: Any) -> Tensor:
        """Return the images, ``(B, C, H, W)`` or ``(B, H, W)``, as they are in the batch."""
        images: Tensor = _call(self.batch_fn, batch)[0] if self.batch_fn else get_at(batch, self.image_path)
        return images

    def labels(self, batch: Any) -> Tensor:
        """Return the class indices, ``(B,)`` int64.

        Raises:
            ArgumentError: The batch has no labels.
            DataError: The labels are not class indices: floating, one-hot, mixed, multi-label or negative.
        """
        if self.batch_fn is None and self.label_path is None:
            leaves = list(leaves_of(batch))
            raise ArgumentError(f"no labels in the batch ({_listing(leaves)}). " + _example(leaves))
        labels = _call(self.batch_fn, batch)[1] if self.batch_fn else get_at(batch, self.label_path or ())
        if not isinstance(labels, Tensor) or not _is_class_index(labels):
            kind = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise DataError(
                f"labels that are not class indices: wanted an integer tensor (B,), got {kind}. Let the dataset return "
                "integer labels (mix or smooth them in training_step), or pass `batch_fn`, e.g. "
                "batch_fn=lambda batch: (batch[0], batch[1].argmax(1)) for one-hot labels."
            )
        if labels.numel() and int(labels.min()) < 0:
            raise DataError(
                f"labels that are not class indices: the smallest is {int(labels.min())}. "
                "Remove unlabelled samples from the training dataset or number the classes from 0."
            )
        return labels.long()

    def with_images(self, batch: Any, images: Tensor) -> Any:
        """Return a batch of the same structure with ``images`` in place of its own; the batch given is not changed.

        Raises:
            ArgumentError: ``batch_fn`` computes its images instead of taking them from the batch.
        """
        if self.batch_fn is None:
            return put_at(batch, self.image_path, images)
        old = self.images(batch)
        for leaf in leaves_of(batch):
            if _same_view(leaf.tensor, old):
                return put_at(batch, leaf.path, images)
        for leaf in leaves_of(batch):
            fresh = leaf.tensor.detach().clone()
            if _shares_storage(leaf.tensor, old) and fresh.stride() == leaf.tensor.stride():
                offset = old.storage_offset() - leaf.tensor.storage_offset()
                fresh.as_strided(old.shape, old.stride(), offset).copy_(images)
                return put_at(batch, leaf.path, fresh)
        raise ArgumentError(
            "`batch_fn` must return images that are a tensor of the batch, or a view of one, so that others can be put "
            "in their place; it returned a computed tensor. Move the computation into the model or the dataset."
        )


def _same_view(a: Tensor, b: Tensor) -> bool:
    same = a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    return a is b or (same and a.device == b.device and a.data_ptr() == b.data_ptr())


def _shares_storage(a: Tensor, b: Tensor) -> bool:
    same = a.dtype == b.dtype and a.device == b.device
    return same and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _call(batch_fn: BatchFn, batch: Any) -> tuple[Tensor, Any]:
    pair = batch_fn(batch)
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], Tensor):
        raise ArgumentError(f"`batch_fn` must return a pair (images, labels) of tensors, got {type(pair).__name__}.")
    if not any(_is_image(pair[0], dims) for dims in (3, 4)):
        kind = f"{pair[0].dtype} {tuple(pair[0].shape)}"
        raise ArgumentError(f"`batch_fn` must return (images, labels) with images (B, C, H, W) of numbers, got {kind}.")
    return pair[0], pair[1]


def find_layout(batch: Any, batch_fn: BatchFn | None = None) -> BatchLayout:
    """Find the images and the labels of ``batch`` by shape and dtype.

    Images are the floating or uint8 tensor ``(B, C, H, W)``, else ``(B, H, W)``, else one of other integers. Labels are
    the integer ``(B,)``.
    Tuples, lists, named tuples, mappings and dataclasses are searched at any depth. Well-known names (``image``,
    ``pixel_values``; ``label``, ``target``, ``y``) decide between several; names of sample positions (``index``,
    ``id``) are never labels.

    Args:
        batch: One batch of the user's loader.
        batch_fn: Function from a batch to ``(images, labels)``; nothing is searched when it is given.

    Raises:
        ArgumentError: Images or labels are missing or ambiguous; the message names ``batch_fn``.
    """
    if batch_fn is not None:
        _call(batch_fn, batch)
        return BatchLayout(batch_fn=batch_fn)
    leaves = list(leaves_of(batch))
    images = _find_images(leaves)
    labels = _find_labels(leaves, images)
    return BatchLayout(images.path, labels.path if labels else None)
