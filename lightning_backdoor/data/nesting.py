"""Datasets inside datasets, and the image transforms on the way to the raw data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

__all__ = ["Chain", "attributes_of", "chains_of", "image_transform", "is_standard", "positions_in", "transforms_of"]

_NO_DATASETS = {"builtins", "collections", "numpy", "pandas", "pyarrow", "h5py", "PIL", "torch"}
_MAX_DEPTH = 12


def attributes_of(node: Any) -> dict[str, Any]:
    """Return the instance dictionary itself; empty for objects without one."""
    return getattr(node, "__dict__", {})


def _is_dataset(value: Any) -> bool:
    if isinstance(value, Dataset):
        return True
    if isinstance(value, type | nn.Module | str | bytes | list | tuple | Mapping) or callable(value):
        return False  # what is called is a transform; albumentations' compositions have items and a length
    library = type(value).__module__.partition(".")[0]
    return library not in _NO_DATASETS and hasattr(value, "__getitem__") and hasattr(value, "__len__")


def _hugging_face_function(node: Any) -> Callable[..., Any] | None:
    """Return what a Hugging Face dataset was given by ``set_transform`` or ``with_transform``."""
    settings = attributes_of(node).get("_format_kwargs")
    function = settings.get("transform") if isinstance(settings, Mapping) else None
    return function if callable(function) else None


def _inner_datasets(node: Any) -> list[Any]:
    found: list[Any] = []
    if _hugging_face_function(node) is not None:
        return found  # a table, not a dataset that is indexed
    for value in attributes_of(node).values():
        if _is_dataset(value):
            found.append(value)
        elif isinstance(value, list | tuple | dict):
            several = value.values() if isinstance(value, dict) else value
            if _is_dataset(next(iter(several), None)):  # one look: a list of a million file names is not searched
                found += [item for item in several if _is_dataset(item)]
    return found


def random_streams_in(node: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[Any, str]]:
    """Yield (node, attribute) for what draws from a stream of its own, as albumentations does; datasets as above."""
    path = (*path, id(node))
    for name, value in attributes_of(node).items():
        if callable(value) and hasattr(value, "set_random_seed"):
            yield node, name
    for child in _inner_datasets(node) if len(path) < _MAX_DEPTH else ():
        if id(child) not in path:
            yield from random_streams_in(child, path)


def image_transform(node: Any) -> Callable[..., Any] | None:
    """Return what turns the node's raw image into its item, or None if it returns images unchanged."""
    transform = attributes_of(node).get("transform")
    joint = attributes_of(node).get("transforms")
    if callable(transform):
        return transform  # type: ignore[no-any-return]
    if is_standard(joint):
        return joint.transform  # type: ignore[no-any-return, union-attr]
    return joint if callable(joint) else None


def is_standard(value: Any) -> bool:
    """Whether ``value`` is torchvision's pair of an image and a target transform, as one callable."""
    return callable(value) and hasattr(value, "transform") and hasattr(value, "target_transform")


@dataclass(frozen=True)
class Chain:
    """The nodes with an image transform on the way to one leaf, outermost first, and the raw dataset itself."""

    leaf: type
    nodes: tuple[Any, ...]
    raw: Any


def chains_of(node: Any, above: tuple[Any, ...] = (), path: tuple[int, ...] = ()) -> Iterator[Chain]:
    """Yield the chain of every leaf under ``node``; datasets are attributes, or lists or dicts of datasets."""
    nodes = (*above, node) if image_transform(node) is not None else above
    path = (*path, id(node))
    inner = [child for child in _inner_datasets(node) if id(child) not in path] if len(path) < _MAX_DEPTH else []
    if not inner:
        yield Chain(type(node), nodes, node)
    for child in inner:
        yield from chains_of(child, nodes, path)


def transforms_of(dataset: Any) -> list[Callable[..., Any]]:
    """Return the image transforms of a dataset as they stand, in the order in which they are applied to an image.

    Wrappers (``Subset``, ``ConcatDataset``, the user's own) are followed; of several leaves the first counts. The
    function that a Hugging Face dataset was given by ``set_transform`` or ``with_transform`` comes first.
    """
    chain = next(chains_of(dataset))
    found = [image_transform(node) for node in reversed(chain.nodes)]
    return [transform for transform in (_hugging_face_function(chain.raw), *found) if transform is not None]


def positions_in(dataset: Any, indices: Tensor) -> list[Tensor]:
    """Return the positions of some samples in a dataset, and in each one that ``Subset`` and wrappers lead to.

    Args:
        dataset: The outermost dataset.
        indices: Positions in it, long ``(B,)``.
    """
    found = [indices]
    while len(found) < _MAX_DEPTH:
        if isinstance(dataset, Subset):
            found.append(torch.as_tensor(dataset.indices)[found[-1]])
            dataset = dataset.dataset
            continue
        inner = _inner_datasets(dataset)
        if len(inner) != 1 or len(inner[0]) != len(dataset):
            break
        dataset = inner[0]
        found.append(found[-1])
    return found
