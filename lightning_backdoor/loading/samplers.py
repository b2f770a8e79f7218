"""Samplers that leave removed samples out; until a sample is removed, they draw what the user's samplers draw."""

from __future__ import annotations

import copy
import operator
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_backdoor._lightning import wrapped_sampler
from lightning_backdoor.data.random_state import isolated_rng
from lightning_backdoor.data.views import Key, deep_twin, is_ordinary
from lightning_backdoor.errors import DataError
from lightning_backdoor.loading.batch_schedule import Phases

__all__ = [
    "RULES",
    "Draws",
    "KeepState",
    "Kept",
    "KeptDistributedSampler",
    "KeptSampler",
    "PhasedBatches",
    "dry_count",
    "filtered",
    "restricted",
]


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

    Batches from a sampler of an unknown kind get smaller, they are not packed again: such a sampler chooses their
    composition (balanced classes, similar lengths). Empty batches are left out.

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


class Draws(Protocol):
    """Yields the items of one epoch, as many as its length."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


class Kept:
    """The kept dataset positions.

    Args:
        mask: Samples that stay, bool ``(N,)``.
        slot: Where samples are named by tuples, the place of the position in them.

    Attributes:
        mask: The same, on the CPU.
        positions: The kept positions in rising order.
    """

    def __init__(self, mask: Tensor, slot: int | None = None) -> None:
        self.slot = slot
        self.mask = mask.detach().to("cpu", torch.bool, copy=True)
        # some ten bytes for each sample, where lists of Python's numbers take 44
        self.positions = array("q", self.mask.nonzero().squeeze(1).numpy().tobytes())
        self._flags = self.mask.numpy().tobytes()

    def __len__(self) -> int:
        return len(self.positions)

    def below(self, end: int) -> Sequence[int]:
        """The kept positions below ``end``, in rising order."""
        return self.positions if len(self.mask) <= end else self.positions[: bisect_left(self.positions, end)]

    def allows(self, index: Any) -> bool:
        """Whether a dataset position, or a tuple that holds one, stays."""
        if self.slot is not None and isinstance(index, tuple | list):
            index = index[self.slot]
        try:
            return bool(self._flags[operator.index(index)])
        except (TypeError, IndexError) as error:
            raise DataError(
                f"The samplers of the training loader must yield dataset positions below {len(self._flags)}, got "
                f"{index!r}. Make the sampler yield plain integers, and let the dataset look up the rest."
            ) from error

    def part(self, batch: Any) -> Any:
        """The kept part of a batch of positions, in its own order and type where that is a list, tuple or tensor."""
        flags = [self.allows(index) for index in batch]
        if all(flags):
            return batch
        if isinstance(batch, Tensor):
            return batch[torch.tensor(flags)]
        left = [index for index, stays in zip(batch, flags, strict=True) if stays]
        return tuple(left) if type(batch) is tuple else left


def restricted(
    sampler: Any, kept: Kept, part: Callable[[Any], Any], count: Callable[[Any, Callable[[Any], Any]], int]
) -> Draws:
    """A sampler that draws from the kept samples what ``sampler`` draws from all.

    Samplers that visit every sample once still do; samplers with replacement draw the kept share of their epoch with
    unchanged relative weights; distributed samplers share the kept samples out equally. Any other sampler is filtered.

    Args:
        sampler: Yields dataset positions, or batches of them.
        kept: The samples that stay.
        part: The kept part of an item of a sampler of an unknown kind, ``None`` if nothing of it is left.
        count: Epoch length of a sampler of an unknown kind, see :func:`dry_count`.
    """
    rule = RULES.get(type(sampler))
    if rule is not None:
        return rule(sampler, kept)
    inner = wrapped_sampler(sampler) if isinstance(sampler, DistributedSampler) else None
    if inner is not None:
        return _Shard(sampler, restricted(inner, kept, part, count))
    return Repeated(sampler, part, count(sampler, part))


def _sequential(sampler: SequentialSampler, kept: Kept) -> Draws:
    return kept.below(len(sampler))


def _subset(sampler: SubsetRandomSampler, kept: Kept) -> Draws:
    return _Anew(partial(_of_subset, sampler, kept))


def _of_subset(sampler: SubsetRandomSampler, kept: Kept) -> Draws:
    return SubsetRandomSampler([index for index in sampler.indices if kept.allows(index)], sampler.generator)


def _distributed(sampler: DistributedSampler[Any], kept: Kept) -> Draws:
    return _Shard(sampler, kept.below(len(sampler.dataset)))  # type: ignore[arg-type]


def _random(sampler: RandomSampler, kept: Kept) -> Draws:
    total = len(sampler.data_source)
    population = kept.below(total)
    if not population:
        return []
    samples = _share(sampler.num_samples, len(population) / total)
    return _Looked(population, RandomSampler(population, sampler.replacement, samples, sampler.generator))


def _weighted(sampler: WeightedRandomSampler, kept: Kept) -> Draws:
    weights = _kept_weights(sampler, kept)
    possible = int((weights > 0).sum())
    if not possible:
        return []
    samples = _share(sampler.num_samples, float(weights.sum() / sampler.weights.sum()))
    if not sampler.replacement:
        samples = min(samples, possible) if sampler.num_samples < int((sampler.weights > 0).sum()) else possible
    return _Anew(partial(_by_weight, sampler, kept, samples))


def _kept_weights(sampler: WeightedRandomSampler, kept: Kept) -> Tensor:
    weights = sampler.weights
    return weights * kept.mask[: len(weights)].to(weights.device)


def _by_weight(sampler: WeightedRandomSampler, kept: Kept, samples: int) -> Draws:
    twin = copy.copy(sampler)
    twin.weights = _kept_weights(sampler, kept)
    possible = int((twin.weights > 0).sum())
    if not possible:
        return []
    twin.num_samples = samples if sampler.replacement else min(samples, possible)
    return twin


RULES: dict[type, Callable[[Any, Kept], Draws]] = {
    SequentialSampler: _sequential,
    RandomSampler: _random,
    SubsetRandomSampler: _subset,
    WeightedRandomSampler: _weighted,
    DistributedSampler: _distributed,
}


def _share(samples: int, share: float) -> int:
    return max(1, round(samples * share))


class _Anew:
    """Draws by what the user's sampler holds at the start of each epoch; the length is that of the first one.

    Args:
        twin: Returns a sampler of kept samples, made from the user's own.
    """

    def __init__(self, twin: Callable[[], Draws]) -> None:
        self._twin, self._length = twin, len(twin())

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return iter(self._twin())


class _Looked:
    """A sampler over a list of positions, turned back into positions."""

    def __init__(self, positions: Sequence[int], sampler: RandomSampler) -> None:
        self._positions, self._sampler = positions, sampler

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        return (self._positions[place] for place in self._sampler)


class _Shard:
    """This process's share of some draws: torch's own rule over the draws instead of the dataset.

    Filtering comes before sharding: the other way round, processes would count differently and wait for each other.
    """

    def __init__(self, like: DistributedSampler[Any], draws: Draws) -> None:
        self._like, self._draws = like, draws

    def __len__(self) -> int:
        return max(0, self._places(len(self._draws)).num_samples) if len(self._draws) else 0

    def __iter__(self) -> Iterator[int]:
        drawn = list(self._draws)
        return (drawn[place] for place in self._places(len(drawn)))

    def _places(self, total: int) -> DistributedSampler[Any]:
        like = self._like
        places: DistributedSampler[Any] = DistributedSampler(
            range(total),  # type: ignore[arg-type]
            num_replicas=like.num_replicas,
            rank=like.rank,
            shuffle=like.shuffle,
            seed=like.seed,
            drop_last=like.drop_last,
        )
        places.set_epoch(like.epoch)
        return places


class Repeated:
    """The kept part of a sampler of an unknown kind, with a fixed number of items per epoch.

    A pass that falls short (draws with replacement, or a process that has fewer kept samples than another one) is
    followed by another pass.

    Args:
        sampler: Yields positions or batches of positions.
        part: The kept part of an item, ``None`` if nothing of it is left.
        length: Items per epoch.
    """

    def __init__(self, sampler: Any, part: Callable[[Any], Any], length: int) -> None:
        self._sampler, self._part, self._length = sampler, part, length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Any]:
        left = self._length
        while left > 0:
            drawn = False
            for item in self._sampler:
                drawn = True
                kept = self._part(item)
                if kept is not None:
                    yield kept
                    left -= 1
                if left == 0:
                    return
            if not drawn:
                raise DataError(
                    f"{type(self._sampler).__name__} yields nothing when it is iterated a second time. A sampler must "
                    "start afresh at each `__iter__`: return a new generator instead of a stored one."
                )


def dry_count(sampler: Any, part: Callable[[Any], Any], dataset: Any) -> int:
    """Count the items of one epoch of which something is left, without moving the sampler or any random stream.

    Args:
        sampler: Yields positions or batches of positions.
        part: The kept part of an item, ``None`` if nothing of it is left.
        dataset: Not copied with the sampler.

    Raises:
        DataError: If the sampler goes on after twice its length.
    """
    limit = 2 * len(sampler) + 1000
    count = 0
    with isolated_rng(0):
        for drawn, item in enumerate(_twin(sampler, dataset)):
            if drawn >= limit:
                raise DataError(
                    f"{type(sampler).__name__} says that it has {len(sampler)} items but went on after {limit}. The "
                    "training loader needs samplers that end: make `__iter__` stop after `len(sampler)` items."
                )
            count += part(item) is not None
    return count


def _twin(sampler: Any, dataset: Any) -> Any:
    """A copy that shares the dataset, deep if possible, so that iterating it leaves the sampler's own state alone."""
    try:
        return deep_twin(sampler, dataset)
    except Exception:  # holds something that cannot be copied, an open file perhaps
        return copy.copy(sampler)
