"""Batches of training images that stay in memory while they are read several times in a row."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from lightning_backdoor.data.memory import free_memory
from lightning_backdoor.data.nesting import copied

if TYPE_CHECKING:
    from lightning_backdoor.data.views import ScanLoader

__all__ = ["SHARE", "LoadedBatches", "bytes_of", "room_for_batches"]

SHARE = 0.25  # of the free memory, at most, for all processes of a machine together


def room_for_batches(processes: int) -> int:
    """Bytes that each of so many processes of this machine may keep: a share of the memory that is free now."""
    return int(SHARE * free_memory() / processes)


class LoadedBatches:
    """Keeps the batches of one pass over all samples of a process.

    Batches are counted in bytes. Where they need more than there is room for, none is kept, and every pass reads the
    dataset. What is handed out is a copy, unless it is said that none is needed: transfer hooks and forward passes may
    change a batch in place.

    Args:
        room: Largest size in bytes; see :func:`room_for_batches`.
        pin: Keep them in page-locked memory, from which a GPU copies without waiting. It is handed out in powers of
            two, and counted so.
        copies: Hand out copies. ``False`` where every tensor is copied to another device before anything may change it.

    Attributes:
        kept_bytes: Size of what is kept.
        pin: As given.
    """

    def __init__(self, room: int, *, pin: bool = False, copies: bool = True) -> None:
        self._room, self.pin, self._copies = room, pin, copies
        self.kept_bytes = 0
        self._filling = False
        self._batches: list[tuple[Tensor, Any]] | None = None
        self._indices = torch.zeros(0, dtype=torch.long)
        self._batch_size: int | None = None
        self._has_rows = False

    @property
    def may_keep(self) -> bool:
        """Whether batches of the pass that is going on, or of the next one, may be kept."""
        return self._room > 0 and self._batches is None

    @property
    def serves(self) -> bool:
        """Whether batches are kept or may still be; ``False`` once they have turned out to be too large."""
        return self._room > 0

    def some(self, count: int) -> tuple[Tensor, Any] | None:
        """A copy of a batch of so many kept samples from all over the pass, in rising order of their places.

        The last one as it was read where samples cannot be taken out of their batches; ``None`` where none is kept.
        """
        if not self._batches:
            return None
        if not self._has_rows:
            indices, batch = self._batches[-1]
            return indices.clone(), self._copied(batch)
        kept = len(self._indices)
        places = torch.arange(min(kept, count)) * kept // min(kept, count)
        return self._indices[places], default_collate([self._row(place) for place in places.tolist()])

    def batches(self, loader: ScanLoader) -> Iterator[tuple[Tensor, Any]]:
        """What ``loader`` yields, from memory where it can be.

        Other samples than those of the kept pass are put together from it if torch's own ``default_collate`` has
        stacked them, which gives the same batches bit by bit.

        Args:
            loader: Reads the dataset.
        """
        wanted = loader.dataset.indices  # type: ignore[attr-defined]
        if self._batches is not None:
            if loader.batch_size == self._batch_size and torch.equal(wanted, self._indices):
                copies = self._copies or not self._has_rows  # other containers may be handed on as they are
                for indices, batch in self._batches:
                    yield indices.clone(), self._copied(batch) if copies else batch
                return
            places = self._places(wanted)
            if places is not None:
                for part in torch.split(places, int(loader.batch_size or 1)) if len(places) else ():
                    yield self._indices[part], default_collate([self._row(place) for place in part.tolist()])
                return
        if loader.whole and self.may_keep and not self._filling:
            yield from self._fill(loader)
        else:
            yield from loader.read()

    def _fill(self, loader: ScanLoader) -> Iterator[tuple[Tensor, Any]]:
        """Read the dataset, and keep all batches or none."""
        wanted = loader.dataset.indices  # type: ignore[attr-defined]
        kept: list[tuple[Tensor, Any]] = []
        self._filling = True
        try:
            for indices, batch in loader.read():
                if self._room:
                    size = bytes_of(batch)
                    if size is not None and self.pin:
                        size = 1 << (size - 1).bit_length()
                    left = len(wanted) - len(indices) if not kept else 0  # as large as the first ones, it is assumed
                    if size is None or self.kept_bytes + size + size * left // len(indices) > self._room:
                        self._room = self.kept_bytes = 0  # also for the passes that follow: they read the same
                        kept.clear()
                    else:
                        kept.append((indices.clone(), self._copied(batch)))
                        self.kept_bytes += size
                yield indices, batch
            if self._room:
                self._batches, self._indices, self._batch_size = kept, wanted.clone(), loader.batch_size
                self._has_rows = loader.stacks and all(_is_stacked(batch, len(indices)) for indices, batch in kept)
        finally:
            self._filling = False
            if self._batches is None:
                self.kept_bytes = 0

    def _copied(self, batch: Any) -> Any:
        return copied(batch, _pinned) if self.pin else copied(batch)

    def _places(self, wanted: Tensor) -> Tensor | None:
        """Where samples are in the kept pass, long ``(M,)``; ``None`` if some are not, or cannot be taken out."""
        if not self._has_rows:
            return None
        size = 1 + int(max((part.max() for part in (self._indices, wanted) if len(part)), default=0))
        known = torch.full((size,), -1)
        known[self._indices] = torch.arange(len(self._indices))
        places = known[wanted]
        return None if bool((places < 0).any()) else places

    def _row(self, place: int) -> Any:
        """One sample of the kept pass, as an item of a dataset."""
        batch, row = divmod(place, int(self._batch_size or 1))
        return _row(self._batches[batch][1], row)  # type: ignore[index]


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.clone().pin_memory()  # which returns a tensor itself that is page-locked already


def _is_stacked(node: Any, rows: int) -> bool:
    """Whether a batch is made of nothing but tensors of so many rows."""
    if isinstance(node, Mapping):
        return all(_is_stacked(child, rows) for child in node.values())
    if isinstance(node, list | tuple):
        return all(_is_stacked(child, rows) for child in node)
    return type(node) is Tensor and node.ndim > 0 and len(node) == rows


def _row(node: Any, row: int) -> Any:
    if isinstance(node, Tensor):
        return node[row]
    if isinstance(node, Mapping):
        return {key: _row(child, row) for key, child in node.items()}
    parts = [_row(child, row) for child in node]
    return type(node)(*parts) if hasattr(node, "_fields") else parts


def bytes_of(batch: Any) -> int | None:
    """Bytes that a copy of a batch takes.

    Args:
        batch: What a ``collate_fn`` makes: tensors, arrays, numbers and strings in containers or attributes.

    Returns:
        The sum; ``None`` where the batch holds something whose size cannot be told.
    """
    try:
        return _bytes(batch, set())
    except (TypeError, RuntimeError):
        return None


def _bytes(node: Any, counted: set[int]) -> int:
    """The same for a part of it; memory that was counted before is not counted again."""
    identity, size = id(node), sys.getsizeof(node)
    if isinstance(node, Tensor):
        if node.device.type != "cpu":
            raise TypeError("it is in another memory")
        storage = node.untyped_storage()  # sparse and nested tensors have none
        identity, size, node = storage.data_ptr(), storage.nbytes(), None
    if identity in counted:
        return 0
    counted.add(identity)
    return size + sum(_bytes(part, counted) for part in _parts(node))


def _parts(node: Any) -> list[Any]:
    if isinstance(node, Mapping):
        return [*node.keys(), *node.values()]
    if isinstance(node, list | tuple | set | frozenset):
        return list(node)
    if isinstance(node, np.ndarray) and node.dtype != object:
        return [] if node.base is None else [node.base]
    if node is None or isinstance(node, str | bytes | int | float | np.generic | torch.dtype):
        return []
    if isinstance(node, type) or not hasattr(node, "__dict__"):
        raise TypeError(f"the size of {type(node).__name__} is not known")
    return list(vars(node).values())
