"""A dataset in which some samples have other labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_backdoor.errors import ArgumentError, DataError

__all__ = ["RelabeledSubset", "checked_dataset"]

_KEYS = ("label", "labels", "target", "targets", "y")


def checked_dataset(dataset: Any, size: int) -> Dataset[Any]:
    """Return a dataset if it is map-style and holds as many samples as a verdict.

    Raises:
        ArgumentError: It is something else.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or isinstance(dataset, type | str):
        raise ArgumentError(
            "`dataset` must be a map-style dataset (`__getitem__` and `__len__`), got "
            f"{type(dataset).__name__}. Pass the dataset of the training loader."
        )
    if len(dataset) != size:
        raise ArgumentError(
            f"`dataset` must be the one that the verdict is on, which has {size} samples, got one of {len(dataset)}. "
            "Pass the dataset that the training loader had."
        )
    return dataset  # type: ignore[no-any-return]


class RelabeledSubset(Subset[Any]):
    """Some samples of a dataset, part of them with other labels.

    Items are ``(image, label, ...)`` as tuples, named tuples or lists, or mappings with the label under ``label``,
    ``labels``, ``target``, ``targets`` or ``y``. A new label is of the type of the old one: int, NumPy integer, or
    tensor of one integer.

    Args:
        dataset: The dataset; map-style, not changed.
        indices: Positions in it.
        new_labels: Position to new label.
        labels: Label of every sample of the dataset as it is known, long ``(N,)``: a sample that is to get a new label
            must have this one; ``None``: not known.
    """

    def __init__(
        self, dataset: Dataset[Any], indices: Sequence[int], new_labels: Mapping[int, int], labels: Tensor | None
    ) -> None:
        super().__init__(dataset, indices)
        self.new_labels, self.labels = dict(new_labels), labels

    def __getitem__(self, index: Any) -> Any:
        """Return an item with its new label, if it has one.

        Raises:
            DataError: An item that is to get a new label has no label, or another one than is known.
        """
        position = int(self.indices[index])
        item = self.dataset[position]
        return self._relabeled(item, position) if position in self.new_labels else item

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Return the items of a batch."""
        return [self[index] for index in indices]

    def _relabeled(self, item: Any, position: int) -> Any:
        key = _label_key(item)
        if key is None:
            raise DataError(
                "`dataset` must give (image, label) or a dict with the label under one of "
                f"{', '.join(_KEYS)}, got {_described(item)} at position {position}. Wrap it in a dataset that does."
            )
        old = item[key]
        if _number(old) is None:
            raise DataError(
                f"`dataset` must give whole numbers as labels, got {_described(old)} at position {position}. Wrap it "
                "in a dataset that gives class indices."
            )
        if self.labels is not None and _number(old) != int(self.labels[position]):
            raise DataError(
                f"`dataset` must be the one that the verdict is on: the label at position {position} was "
                f"{int(self.labels[position])}, got {_number(old)}. Pass the dataset that the training loader had."
            )
        label = self.new_labels[position]
        new = old.new_full(old.shape, label) if isinstance(old, Tensor) else type(old)(label)
        if isinstance(item, Mapping):
            return {**item, key: new}
        items = [new if place == key else part for place, part in enumerate(item)]
        return items if isinstance(item, list) else type(item)(*items) if hasattr(item, "_fields") else tuple(items)


def _label_key(item: Any) -> Any:
    """Where the label of an item is; ``None`` if that is not clear."""
    if isinstance(item, Mapping):
        found = [key for key in _KEYS if key in item]
        return found[0] if len(found) == 1 else None
    return 1 if isinstance(item, tuple | list) and len(item) >= 2 else None


def _number(label: Any) -> int | None:
    """A label as a number; ``None`` if it is not one whole number."""
    if isinstance(label, Tensor):
        return int(label) if label.numel() == 1 and not (label.is_floating_point() or label.is_complex()) else None
    return int(label) if isinstance(label, int | np.integer) and not isinstance(label, bool) else None


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, Tensor):
        return f"a tensor {value.dtype} {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list) else "")
