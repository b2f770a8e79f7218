"""Datasets inside datasets, with the image transforms on the way to the raw data; tensors inside nested batches."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from lightning_backdoor._lightning import plain

__all__ = [
    "Chain",
    "Leaf",
    "as_kind_of",
    "attributes_of",
    "chains_of",
    "copied",
    "get_at",
    "image_transform",
    "is_standard",
    "leaves_of",
    "positions_in",
    "put_at",
    "spelled",
    "transforms_of",
]

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


@dataclass(frozen=True)
class Leaf:
    """One tensor of a batch: the keys that lead to it and the name closest to it."""

    path: tuple[Any, ...]
    name: str
    tensor: Tensor

    def __str__(self) -> str:
        where = "".join(f"[{key!r}]" for key in self.path) or "batch"
        return f"{where}: {str(self.tensor.dtype).removeprefix('torch.')} {tuple(self.tensor.shape)}"


def _children(node: Any) -> Iterator[tuple[Any, str, Any]]:
    """Yield (key, name or "", child) of a mapping, a sequence or a dataclass instance."""
    if isinstance(node, Mapping):
        yield from ((key, str(key).lower(), child) for key, child in node.items())
    elif isinstance(node, tuple | list):
        names = getattr(node, "_fields", None) or [""] * len(node)
        yield from ((i, str(name).lower(), child) for i, (name, child) in enumerate(zip(names, node, strict=False)))
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        for field in dataclasses.fields(node):
            yield field.name, field.name.lower(), getattr(node, field.name, None)


def leaves_of(node: Any, path: tuple[Any, ...] = (), name: str = "") -> Iterator[Leaf]:
    """Yield every tensor of tuples, lists, named tuples, mappings and dataclasses, in order, at any depth."""
    if isinstance(node, Tensor):
        yield Leaf(path, name, node)
        return
    for key, child_name, child in _children(node):
        yield from leaves_of(child, (*path, key), child_name or name)


def as_kind_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a plain tensor as one of the class of ``like``, with its attributes, if both hold as many samples.

    A class that does not allow it leaves the tensor plain.
    """
    if type(like) is Tensor or isinstance(like, nn.Parameter) or tensor.shape[:1] != like.shape[:1]:
        return tensor
    try:
        typed = tensor.as_subclass(type(like))
        vars(typed).update(vars(like))
    except Exception:  # a class of the user's may refuse either
        return tensor
    return typed


def copied(batch: Any, clone: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Return a deep copy of a batch; tensors of derived classes need no ``__deepcopy__``.

    Args:
        batch: Any nested structure.
        clone: Copies one plain tensor of it; ``None``: as ``copy.deepcopy``, to ordinary memory.
    """
    tensors = [leaf.tensor for leaf in leaves_of(batch) if clone is not None or type(leaf.tensor) is not Tensor]
    clones = [torch.clone(plain(tensor)) if clone is None else clone(plain(tensor)) for tensor in tensors]
    known = {id(old): as_kind_of(new, old) for old, new in zip(tensors, clones, strict=True)}
    return copy.deepcopy(batch, known)


def spelled(batch: Any, path: tuple[Any, ...]) -> str:
    """Return the expression by which ``path`` is reached from the variable ``batch``."""
    expression = "batch"
    for key in path:
        indexed = isinstance(batch, Mapping | tuple | list)
        expression += f"[{json.dumps(key) if isinstance(key, str) else repr(key)}]" if indexed else f".{key}"
        batch = get_at(batch, (key,))
    return expression


def get_at(batch: Any, path: tuple[Any, ...]) -> Any:
    """Return what ``path`` leads to."""
    for key in path:
        batch = batch[key] if isinstance(batch, Mapping | tuple | list) else getattr(batch, key)
    return batch


def put_at(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return ``node`` with the leaf at ``path`` replaced; containers on the way are copied, not changed."""
    if not path:
        return value
    key, child = path[0], put_at(get_at(node, path[:1]), path[1:], value)
    if isinstance(node, tuple):
        items = [child if i == key else item for i, item in enumerate(node)]
        return type(node)(*items) if hasattr(node, "_fields") else type(node)(items)
    if isinstance(node, Mapping) and not isinstance(node, dict | UserDict):
        items_by_key = {**node, key: child}
        try:
            return type(node)(items_by_key)  # type: ignore[call-arg]
        except Exception:
            return items_by_key
    fresh = copy.copy(node)
    if isinstance(node, list | dict | UserDict):
        fresh[key] = child
    else:
        object.__setattr__(fresh, key, child)  # also right for frozen dataclasses
    return fresh
