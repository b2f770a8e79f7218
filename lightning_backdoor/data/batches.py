"""Where the images and the labels are in the user's batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor.data.labels import class_indices, find_labels
from lightning_backdoor.data.origins import Origin, Replaced, find_origin
from lightning_backdoor.data.structure import Leaf, as_kind_of, get_at, leaves_of, put_at, spelled
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional.kinds import plain

__all__ = ["BatchFn", "BatchLayout", "find_layout", "holds_images"]

BatchFn = Callable[[Any], tuple[Tensor, Tensor]]

_IMAGE_NAMES = {"image", "images", "img", "imgs", "x", "input", "inputs", "pixel_values", "data", "picture", "pictures"}
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
        """Return the class indices, ``(B,)`` int64; see :func:`~lightning_backdoor.data.labels.class_indices`.

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
