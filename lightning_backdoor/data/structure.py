"""Tensors inside nested batches: find them, read them, replace them."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import UserDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_backdoor.functional.kinds import plain

__all__ = ["Leaf", "as_kind_of", "copied", "get_at", "leaves_of", "put_at", "spelled"]


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


def copied(batch: Any) -> Any:
    """Return a deep copy of a batch; tensors of derived classes need no ``__deepcopy__``."""
    derived = [leaf.tensor for leaf in leaves_of(batch) if type(leaf.tensor) is not Tensor]
    return copy.deepcopy(batch, {id(tensor): as_kind_of(plain(tensor).clone(), tensor) for tensor in derived})


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
