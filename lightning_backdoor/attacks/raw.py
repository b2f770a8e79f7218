"""Read the images of the user's dataset before its transform, and write them back in their own kind."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from lightning_backdoor.errors import DataError

__all__ = ["RawSource", "from_pixels", "label_like", "to_pixels"]

_LABEL_KEYS = ("label", "labels", "target", "targets", "y")
_CHANNELS = (1, 3, 4)
_LOOKED_AT = 4  # items by which a column of positions is known


class RawSource:
    """Untransformed items of a dataset. Not itself a dataset, so tools that walk through datasets pass it by.

    ``Subset`` layers become a list of positions; the dataset below them is copied shallowly, and the copy's transform
    is switched off. The user's objects stay as they are.

    Args:
        dataset: Map-style dataset whose items are tuples, lists or dicts with one image (PIL, numpy or tensor) and a
            label: a whole number, or an array of one. A ``transform`` attribute, if present, must be a function of the
            image alone.

    Attributes:
        transform: The user's transform, ``None`` if the dataset has none.
        labels: Label of each item, long, shape ``(N,)``.
        classes: Names of the classes, ``None`` if the dataset has none.

    Raises:
        DataError: If the dataset is empty, iterable, or its items cannot be understood.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        if isinstance(dataset, IterableDataset) or not (
            hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        ):
            raise DataError(
                f"`dataset` must be map-style, with `__getitem__` and `__len__`, got {type(dataset).__name__}. "
                "Load the images into a list or a TensorDataset first."
            )
        positions = torch.arange(len(dataset))
        while isinstance(dataset, Subset):
            positions = torch.as_tensor(dataset.indices)[positions]
            dataset = dataset.dataset
        if not len(positions):
            raise DataError("`dataset` is empty: there is nothing to attack. Check its path or its indices.")
        self.positions: list[int] = positions.tolist()
        self.transform = getattr(dataset, "transform", None)
        self.classes = getattr(dataset, "classes", None)
        self._leaf = _without_transform(dataset)
        self._image_key, self._label_key = self._find_keys()
        self.labels = self._read_labels()

    def __call__(self, position: int) -> tuple[Any, Any, Any]:
        """Return the whole item, its image and its label, untransformed."""
        item = self._leaf[self.positions[position]]
        return item, item[self._image_key], item[self._label_key]

    def targets(self, labels: Tensor) -> Any:
        """Return ``labels`` as the dataset keeps its own ``targets``: a list, a numpy array or else a tensor."""
        kind = getattr(self._leaf, "targets", None)
        if isinstance(kind, list):
            return labels.tolist()
        return labels.numpy() if isinstance(kind, np.ndarray) else labels

    def rebuilt(self, item: Any, image: Any, label: Any) -> Any:
        """Return ``item`` with another image and label, in the same container."""
        if isinstance(item, Mapping):
            return {**item, self._image_key: image, self._label_key: label}
        values = list(item)
        values[self._image_key], values[self._label_key] = image, label
        return type(item)(*values) if hasattr(item, "_fields") else type(item)(values)

    def _find_keys(self) -> tuple[Any, Any]:
        name = type(self._leaf).__name__
        try:
            item = self._leaf[self.positions[0]]
        except TypeError as error:
            raise DataError(
                f"{name} does not call its `transform` with the image alone ({error}). Attack a dataset "
                "that does, or one without a transform."
            ) from error
        if not isinstance(item, (tuple, list, Mapping)):
            raise DataError(f"Items of {name} must be a tuple, list or dict of image and label, got {type(item)}.")
        keys = list(item) if isinstance(item, Mapping) else list(range(len(item)))
        images = [key for key in keys if _is_image(item[key])]
        labels = [key for key in keys if _is_label(item[key])]
        labels = self._without_positions(labels) if len(labels) > 1 else labels
        labels = [key for key in labels if not _is_float(item[key])] or labels
        if isinstance(item, Mapping) and len(labels) > 1:
            labels = [key for key in labels if str(key).lower() in _LABEL_KEYS] or labels
        if len(images) != 1 or not labels or (isinstance(item, Mapping) and len(labels) > 1):
            kinds = {key: type(item[key]).__name__ for key in keys}
            raise DataError(
                f"Items of {name} must hold one image and one label, a whole number, got {kinds} with images at "
                f"{images} and labels at {labels}. Wrap the dataset so that it returns (image, label)."
            )
        to_pixels(item[images[0]])  # a wrong kind of image fails here, not in a worker process
        return images[0], labels[0]

    def _without_positions(self, keys: list[Any]) -> list[Any]:
        """Return those of ``keys`` whose values are not the positions of the items, if there are any."""
        size = len(self.positions)
        if size < _LOOKED_AT:  # few may be numbered so by chance
            return keys
        some = [self.positions[i * size // _LOOKED_AT] for i in range(_LOOKED_AT)]
        items = [self._leaf[position] for position in some]

        def numbers(key: Any) -> list[Any]:
            return [_class_of(item[key]) if _is_label(item[key]) else None for item in items]

        return [key for key in keys if numbers(key) != some] or keys

    def _read_labels(self) -> Tensor:
        """Return the labels from ``targets`` or ``labels`` where they agree with the first item, else item by item."""
        leaf, first = self._leaf, _class_of(self(0)[2])
        tensors = leaf.tensors if isinstance(leaf, TensorDataset) else ()
        known = tensors[self._label_key] if self._label_key in range(len(tensors)) else None
        for values in (known, getattr(leaf, "targets", None), getattr(leaf, "labels", None)):
            if values is None or len(values) != len(leaf):
                continue
            chosen = [values[position] for position in self.positions]
            target_transform = getattr(leaf, "target_transform", None)
            if target_transform is not None:
                chosen = [target_transform(value) for value in chosen]
            if all(_is_label(value) for value in chosen) and _class_of(chosen[0]) == first:
                return torch.tensor([_class_of(value) for value in chosen])
        return torch.tensor([_class_of(self(position)[2]) for position in range(len(self.positions))])


def to_pixels(image: Any) -> Tensor:
    """Convert one image to uint8 ``(C, H, W)``.

    Args:
        image: PIL image in mode L or RGB; numpy array ``(H, W)``, ``(H, W, C)`` or ``(C, H, W)``; or tensor ``(H, W)``
            or ``(C, H, W)``. Arrays and tensors are uint8 or floats in ``[0, 1]``, which are rounded to 8 bits.

    Raises:
        DataError: If the image is of another kind or its values are out of range.
    """
    if hasattr(image, "convert"):
        if image.mode not in ("L", "RGB"):
            raise DataError(f"PIL images must have mode L or RGB, got {image.mode}. Load with `.convert('RGB')`.")
        image = np.array(image)
    if isinstance(image, np.ndarray):
        last = _array_is_channels_last(image)
        image = torch.from_numpy(np.ascontiguousarray(image))
        image = image.movedim(-1, 0) if last else image
    elif image.ndim == 3 and image.shape[-1] in _CHANNELS and image.shape[0] not in _CHANNELS:
        raise DataError(
            f"Tensor images must be (C, H, W), got {tuple(image.shape)}. Move the channels first with `.permute`."
        )
    image = image.unsqueeze(0) if image.ndim == 2 else image
    if image.dtype == torch.uint8:
        return image.contiguous()  # type: ignore[no-any-return]
    if not image.is_floating_point() or not (image.min() >= 0 and image.max() <= 1):
        values = f"{image.dtype} between {image.min().item():.4g} and {image.max().item():.4g}"
        raise DataError(
            f"Images must be uint8 or floats in [0, 1] before the transform, got {values}. Triggers live in pixel "
            "space: attack the dataset before it is normalised, and normalise in its `transform`."
        )
    return (image.double() * 255).round().to(torch.uint8).contiguous()  # type: ignore[no-any-return]


def from_pixels(pixels: Tensor, like: Any) -> Any:
    """Convert uint8 pixels ``(C, H, W)`` back to the kind, layout and dtype of the image ``like``."""
    if isinstance(like, Tensor):
        values = pixels if like.dtype == torch.uint8 else pixels.to(like.dtype) / 255
        return values.reshape(like.shape)
    array = pixels.movedim(0, -1).numpy()
    if isinstance(like, np.ndarray):
        array = array if _array_is_channels_last(like) else pixels.numpy()
        return (array if like.dtype == np.uint8 else array.astype(like.dtype) / 255).reshape(like.shape)
    from PIL import Image  # noqa: PLC0415  (only for datasets that already use it)

    return Image.fromarray(np.ascontiguousarray(array[..., 0] if like.mode == "L" else array))


def label_like(value: int, like: Any) -> Any:
    """Return the label ``value`` in the kind of ``like``: a number of Python or numpy, an array or a tensor."""
    if isinstance(like, Tensor):
        return torch.full_like(like, value)
    return np.full_like(like, value) if isinstance(like, np.ndarray) else type(like)(value)


def _without_transform(dataset: Any) -> Any:
    """Return a shallow copy whose transform returns the image unchanged."""
    clone = copy.copy(dataset)
    if getattr(dataset, "transform", None) is not None:
        clone.transform = _unchanged
    joint = getattr(dataset, "transforms", None)
    if joint is not None:
        if not hasattr(joint, "transform"):
            raise DataError(
                f"{type(dataset).__name__} has `transforms`, which change image and label together. "
                "Pass `transform` for the image and `target_transform` for the label instead."
            )
        clone.transforms = copy.copy(joint)
        clone.transforms.transform = _unchanged
    return clone


def _unchanged(image: Any, /) -> Any:
    return image


def _array_is_channels_last(image: np.ndarray[Any, Any]) -> bool:
    return image.ndim == 3 and image.shape[-1] in _CHANNELS


def _is_image(value: Any) -> bool:
    return hasattr(value, "convert") or (isinstance(value, (Tensor, np.ndarray)) and value.ndim in (2, 3))


def _is_label(value: Any) -> bool:
    """Whether this is one whole number, perhaps in an array of its own."""
    if not isinstance(value, (int, float, np.integer, np.floating, np.bool_, np.ndarray, Tensor)):
        return False
    if isinstance(value, np.ndarray) and value.dtype.kind not in "iufb":
        return False
    number = torch.as_tensor(value)
    return number.shape in ((), (1,)) and not number.is_complex() and bool((number.double() % 1 == 0).all())


def _is_float(value: Any) -> bool:
    return torch.as_tensor(value).is_floating_point()


def _class_of(value: Any) -> int:
    return int(value.item() if isinstance(value, (np.ndarray, Tensor)) else value)
