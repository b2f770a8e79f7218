"""A second dataset with the samples of the training set, read in its place because it does not augment them."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from lightning_backdoor._lightning import forget_iterator
from lightning_backdoor.data.views import check_dataset
from lightning_backdoor.errors import ArgumentError, DataError

__all__ = ["is_dataset", "over_sibling"]


def is_dataset(value: Any) -> bool:
    """Whether a value is a dataset rather than a function that makes one."""
    return not isinstance(value, type) and hasattr(value, "__getitem__") and hasattr(value, "__len__")


def over_sibling(loader: DataLoader[Any], eval_dataset: Any) -> DataLoader[Any]:
    """Return a copy of a loader, to be read by position, over another dataset; the loader itself is only read.

    Args:
        loader: The training loader.
        eval_dataset: A dataset, or a function from the training dataset to one.

    Raises:
        ArgumentError: The function fails, or what it gives is no dataset of the same length.
    """
    dataset, made = eval_dataset, ""
    if not is_dataset(eval_dataset):
        made = f" from {type(loader.dataset).__name__}"
        try:
            dataset = eval_dataset(loader.dataset)
        except Exception as error:
            raise ArgumentError(
                f"`eval_dataset` fails on the training dataset: {type(error).__name__}: {error}. It must accept "
                f"{type(loader.dataset).__name__} and return a dataset."
            ) from error
    try:
        size, expected = check_dataset(dataset), check_dataset(loader.dataset)
    except DataError as error:
        raise ArgumentError(
            f"`eval_dataset` must give a map-style dataset, got {type(dataset).__name__}{made}: {error}"
        ) from error
    if size != expected:
        raise ArgumentError(
            f"`eval_dataset` must have the samples of the training dataset in its order, got {size}{made} instead of "
            f"{expected}. Take the same files and the same subset of them, without shuffling."
        )
    twin: DataLoader[Any] = object.__new__(DataLoader)
    twin.__dict__.update(vars(loader), dataset=dataset)
    forget_iterator(twin)
    return twin
