"""Samplers that leave removed samples out, and do nothing at all while no sample is removed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler, Sampler

from lightning_backdoor.errors import DataError
from lightning_backdoor.loading.batch_schedule import Phases
from lightning_backdoor.loading.draws import Draws, Kept, dry_count, restricted
from lightning_backdoor.loading.keys import Key

__all__ = ["KeepState", "KeptDistributedSampler", "KeptSampler", "PhasedBatches", "filtered", "is_ordinary"]


def _same(count: int) -> int:
    return count


@dataclass
class KeepState:
    """What all samplers of one Trainer read; a change is in force from their next ``__iter__`` on.

    Attributes:
        kept: The samples that stay, ``None`` for all.
        phases: Batches of some samples, then of others, instead of whatever the user's samplers draw; ``None``: theirs.
        key: How samples are named where that is not by their position alone.
        drop_single: Leave out a batch of one sample that pruning made: batch norm cannot take it.
        agree: The common epoch length of all processes, given the length that this one counted.
    """

    kept: Kept | None = None
    phases: Phases | None = None
    key: Key | None = None
    drop_single: bool = False
    agree: Callable[[int], int] = _same


class KeptSampler(Sampler[Any]):
    """Draws what another sampler draws, without removed samples.

    Batches from a sampler of an unknown kind get smaller, they are not packed again: their composition (balanced
    classes, similar lengths) is the point of such a sampler. Empty batches are left out.

    Args:
        inner: The sampler of the loader.
        state: The shared state.
        dataset: The dataset of the loader.
        batch_size: Set if the positions are put into batches of this size, the last one possibly smaller.
        batches: Whether ``inner`` may yield batches of positions.
    """

    def __init__(
        self, inner: Any, state: KeepState, dataset: Any, *, batch_size: int | None = None, batches: bool = False
    ) -> None:
        _require_length(inner)
        self._inner, self._state, self._dataset, self._batch_size = inner, state, dataset, batch_size
        self._batches = batches
        self._draws: Draws | None = None
        self._length = 0
        self._planned_for: Kept | None = None

    def __len__(self) -> int:
        if self._state.kept is None:
            return len(self._inner)
        self._plan(self._state.kept)
        return self._length

    def __iter__(self) -> Iterator[Any]:
        if self._state.kept is None:
            return iter(self._inner)
        return islice(self._plan(self._state.kept), self._length)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._inner, name)

    def _plan(self, kept: Kept) -> Draws:
        """Count the epoch once per mask; with several processes all of them get here together."""
        if self._draws is None or self._planned_for is not kept:
            self._draws = restricted(self._inner, kept, lambda item: self._part(kept, item), self._count)
            self._length = len(self._draws) - self._lone(len(self._draws))
            self._planned_for = kept
        return self._draws

    def _part(self, kept: Kept, item: Any) -> Any:
        """What stays of an item, ``None`` for nothing."""
        if not (self._batches and _is_batch(item)):
            return item if kept.allows(item) else None
        left = kept.part(item)
        lone = self._state.drop_single and len(left) == 1 < len(item)
        return left if len(left) and not lone else None

    def _count(self, sampler: Any, part: Callable[[Any], Any]) -> int:
        return self._state.agree(dry_count(sampler, part, self._dataset))

    def _lone(self, length: int) -> bool:
        """Whether the last batch would hold one sample where it held more before pruning."""
        size = self._batch_size
        return (
            self._state.drop_single and size is not None and size > 1 and length % size == 1 != len(self._inner) % size
        )


class PhasedBatches(BatchSampler):
    """The batches of the loader, or of the phases while there are any.

    Args:
        inner: The (filtering) batch sampler of the loader.
        state: The shared state.
    """

    def __init__(self, inner: Any, state: KeepState) -> None:
        self._inner, self._state = inner, state

    def __len__(self) -> int:
        return len(self._inner) if self._state.phases is None else len(self._state.phases)

    def __iter__(self) -> Iterator[Any]:
        phases, key = self._state.phases, self._state.key
        if phases is None or key is None:
            return iter(self._inner if phases is None else phases)
        return ([key(index) for index in batch] for batch in phases)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._inner, name)


class KeptDistributedSampler(KeptSampler, DistributedSampler[Any]):
    """A :class:`KeptSampler` around a distributed sampler, which Lightning therefore does not shard again."""

    def set_epoch(self, epoch: int) -> None:
        """Seed the shuffle of the next epoch."""
        self._inner.set_epoch(epoch)


def filtered(sampler: Any, state: KeepState, dataset: Any) -> Any:
    """Wrap what a loader draws with: its batch sampler, or the sampler of a ``batch_size=None`` loader.

    Torch's own batch sampler goes on forming full batches, of kept samples.

    Args:
        sampler: Yields dataset positions or batches of them.
        state: The shared state.
        dataset: The dataset of the loader.

    Raises:
        DataError: If a sampler has no length.
    """
    if not is_ordinary(type(sampler)):
        return _kind(sampler)(sampler, state, dataset, batches=True)
    batches = copy.copy(sampler)
    size = None if sampler.drop_last else sampler.batch_size
    batches.sampler = _kind(sampler.sampler)(sampler.sampler, state, dataset, batch_size=size)
    return batches


def _kind(sampler: Any) -> type[KeptSampler]:
    return KeptDistributedSampler if isinstance(sampler, DistributedSampler) else KeptSampler


def is_ordinary(kind: type) -> bool:
    """Whether batches are formed as torch's own batch sampler forms them."""
    return issubclass(kind, BatchSampler) and (
        kind.__iter__ is BatchSampler.__iter__ and kind.__len__ is BatchSampler.__len__
    )


def _is_batch(item: Any) -> bool:
    return item.ndim > 0 if isinstance(item, Tensor) else hasattr(item, "__iter__")


def _require_length(sampler: Any) -> None:
    try:
        finite = len(sampler) != float("inf")
    except (TypeError, NotImplementedError, AttributeError, OverflowError):
        finite = False
    if not finite:
        raise DataError(
            f"The samplers of the training loader must be finite and have a length, got {type(sampler).__name__}. Give "
            "it `__len__`; in place of a sampler that repeats for ever, use DataLoader(..., persistent_workers=True)."
        )
