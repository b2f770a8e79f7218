"""Datasets inside datasets, with the transforms and the files of their images; tensors inside nested batches."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from lightning_backdoor._lightning import plain
from lightning_backdoor.data.random_state import isolated_rng

__all__ = [
    "Chain",
    "Leaf",
    "as_kind_of",
    "attributes_of",
    "chains_of",
    "class_names",
    "copied",
    "get_at",
    "image_transform",
    "is_standard",
    "leaves_of",
    "paths_of",
    "positions_in",
    "put_at",
    "spelled",
    "transforms_of",
]

_NO_DATASETS = {"builtins", "collections", "numpy", "pandas", "pyarrow", "h5py", "PIL", "torch"}
_MAX_DEPTH = 12

_FILES = {"samples", "imgs", "images", "paths", "path", "files", "file", "filenames", "filename", "filepaths"}
_FILES |= {"image_paths", "image_path", "img_paths", "img_path", "image_files", "file_names", "file_name", "file_paths"}
_FILES |= {"filepath", "data", "df", "dataframe"}
_FOLDERS = ("root", "root_dir", "img_dir", "image_dir", "data_dir", "folder", "directory")
_PICTURES = ("image", "img")
_LONGEST = 4096  # characters of a path
_PROBES = 64  # samples by which a wrapper is known to read the dataset inside in its order


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


def paths_of(dataset: Any) -> tuple[str, ...] | None:
    """Return the file of every sample as the dataset names it, empty where it names none; no image is opened.

    Files are named by attributes (``samples``, ``imgs``, ``paths``, ``image_paths``, ``files`` and the like) that hold
    a path, a tuple that starts with one, or a mapping or table with one, for every sample, below the folder that
    ``root`` or ``img_dir`` names; and by image columns of Hugging Face datasets. ``Subset`` and ``ConcatDataset`` are
    followed, and so are other wrappers, by the positions that they read from the datasets inside.

    Returns:
        ``None`` where no sample has one, and for anything that is not understood.
    """
    try:
        with isolated_rng():
            found = _paths(dataset)
    except Exception:  # of a class of the user's: a fit without paths is better than none
        return None
    return tuple(found) if found is not None and any(found) else None


def class_names(dataset: Any) -> Sequence[str] | None:
    """Return the names in ``dataset.classes``, indexed by label, empty where one is missing.

    Other datasets use this attribute for other things: a count, a method, a dict. ``None`` where it is no sequence.
    """
    names: Any = getattr(dataset, "classes", None)
    names = names.tolist() if hasattr(names, "tolist") else names  # of numpy, pandas or torch
    if not isinstance(names, Sequence) or isinstance(names, str | bytes):
        return None
    return ["" if name is None else str(name) for name in names]


def _paths(node: Any, depth: int = 0) -> Sequence[str] | None:
    if depth > _MAX_DEPTH:
        return None
    if isinstance(node, Subset):
        inside = _paths(node.dataset, depth + 1)
        return None if inside is None else [inside[int(index)] for index in node.indices]
    own = _own_paths(node)
    if own is not None:
        return own
    inner = _inner_datasets(node)
    parts = [_paths(child, depth + 1) for child in inner]
    if not any(parts):
        return None
    read = _positions_read(node, inner)
    if read is None:
        return None
    return [(parts[child] or [""] * len(inner[child]))[index] for child, index in read]


def _own_paths(node: Any) -> list[str] | None:
    """Paths that a dataset holds itself."""
    if type(node).__module__.partition(".")[0] == "datasets":
        return _table_paths(node)
    attributes = attributes_of(node)
    for name, value in attributes.items():
        found = _texts(value, node) if name.strip("_").lower() in _FILES else None
        if found is not None:
            folder = next(
                (attributes[key] for key in _FOLDERS if isinstance(attributes.get(key), str | os.PathLike)), ""
            )
            return [_below(path, os.fspath(folder)) for path in found]
    if isinstance(attributes.get("samples"), list) and callable(getattr(node, "filename", None)):
        return [str(node.filename(index)) for index in range(len(node))]  # timm's readers of archives
    return None


def _below(path: str, folder: str) -> str:
    inside = not path or path.startswith(folder) or os.path.isabs(path)
    return path if inside else os.path.join(folder, path)


def _texts(value: Any, node: Any) -> list[str] | None:
    """One path for each sample of a dataset, from a value that may hold them."""
    for name in map(str, getattr(value, "columns", ())):  # a data frame
        if name.lower() in _FILES:
            return _texts(value[name], node)
    if isinstance(value, np.ndarray) or (hasattr(value, "tolist") and not isinstance(value, Tensor)):
        value = value.tolist() if value.ndim == 1 else None
    if not isinstance(value, list | tuple) or not value or len(value) != len(node):
        return None
    first, key = value[0], None
    if isinstance(first, Mapping):
        key = next((name for name in first if name in (*_FILES, *_PICTURES) and _is_path(first[name])), None)
    elif isinstance(first, list | tuple) and first:
        key = 0
    if not _is_path(first if key is None else first[key]):
        return None
    entries = value if key is None else [entry[key] for entry in value]
    return [os.fspath(entry) if _is_path(entry) else "" for entry in entries]


def _is_path(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) < _LONGEST and "\n" not in value
    return isinstance(value, os.PathLike)


def _table_paths(node: Any) -> list[str] | None:
    """Paths in a Hugging Face dataset: of a column of images, which stay encoded, else of a column that names files."""
    kinds = {name: type(feature).__name__ for name, feature in node.features.items()}
    columns = [name for name, kind in kinds.items() if kind == "Image"]
    columns += [name for name in kinds if name.lower() in _FILES]
    order = attributes_of(node).get("_indices")
    for name in columns:
        column = node.data.column(name)
        if kinds[name] == "Image":
            column = [path for part in column.chunks for path in part.field("path").to_pylist()]
        else:
            column = column.to_pylist()
        if any(map(_is_path, column)):
            rows = range(len(column)) if order is None else order.column(0).to_pylist()
            return [column[row] if _is_path(column[row]) else "" for row in rows]
    return None


class _ReadAt(BaseException):
    """What a wrapper reads from a dataset inside; it passes by ``except Exception``."""


class _Stand:
    """In the place of a dataset inside of a wrapper: raises what is read from it."""

    def __init__(self, dataset: Any, number: int) -> None:
        self._dataset, self._number = dataset, number

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        raise _ReadAt(self._number, index)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)


def _positions_read(node: Any, inner: list[Any]) -> Iterable[tuple[int, int]] | None:
    """Which of the datasets inside, and which position of it, a wrapper reads for each of its samples.

    ``None`` if it reads nothing from them. The wrapper itself is not changed.
    """
    stands = {id(child): _Stand(child, number) for number, child in enumerate(inner)}

    def replaced(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [stands.get(id(item), item) for item in value] if value and id(value[0]) in stands else value
        if isinstance(value, dict):
            return {key: stands.get(id(item), item) for key, item in value.items()}
        return stands.get(id(value), value)

    twin = object.__new__(type(node))
    twin.__dict__.update({name: replaced(value) for name, value in vars(node).items()})

    def read(index: int) -> tuple[int, int] | None:
        try:
            twin[index]
        except _ReadAt as asked:
            number, position = asked.args
            return number, int(position) % len(inner[number])
        return None

    size = len(node)
    probes = [index * size // min(size, _PROBES) for index in range(min(size, _PROBES))]
    seen = [read(index) for index in probes]
    if None in seen:
        return None
    if size == len(inner[0]) and seen == [(0, index) for index in probes]:
        return zip(repeat(0), range(size))
    everywhere = [read(index) for index in range(size)]
    return None if None in everywhere else everywhere  # type: ignore[return-value]


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
