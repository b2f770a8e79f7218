"""Samplers that leave removed samples out, and do nothing at all while no sample is removed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from lightning_backdoor.errors import DataError

__all__ = ["Keep", "KeptBatches", "KeptDistributedSampler", "KeptSampler", "wrap_sampler"]


class Keep:
    """The mask that all samplers of one Trainer read; live iterators see a change at their next epoch."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.version = 0

    def set(self, mask: Tensor | None) -> None:
        """Replace the mask, bool ``(N,)``."""
        self.mask = mask
        self.version += 1

    def allows(self, index: Any) -> bool:
        """Whether a dataset position stays."""
        return self.mask is None or bool(self.mask[int(index)])


class KeptSampler(Sampler[Any]):
    """Draws what another sampler draws, without removed samples.

    An epoch has as many samples as one pass of the inner sampler has kept ones. Permutation samplers give each kept
    sample once; samplers with replacement are drawn on until the epoch is full.

    Args:
        sampler: The user's sampler, of finite length.
        keep: The shared mask.
        batch_size: To leave out a last batch of a single sample that pruning made (batch norm cannot take it); ``None``
            where batches are not formed from single samples.
    """

    def __init__(self, sampler: Any, keep: Keep, batch_size: int | None = None) -> None:
        require_length(sampler)
        self.sampler, self.keep, self.batch_size = sampler, keep, batch_size
        self._counted: tuple[int, int] | None = None

    def __len__(self) -> int:
        if self.keep.mask is None:
            return len(self.sampler)
        if self._counted is None or self._counted[0] != self.keep.version:
            self._counted = (self.keep.version, self._without_lone_last(self._count()))
        return self._counted[1]

    def __iter__(self) -> Iterator[Any]:
        if self.keep.mask is None:
            yield from self.sampler
            return
        left = len(self)
        while left > 0:
            for index in self.sampler:
                if left == 0:
                    return
                allowed = self._allowed(index)
                if allowed is not None:
                    left -= 1
                    yield allowed

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "sampler":
            raise AttributeError(name)
        return getattr(self.sampler, name)

    def _allowed(self, index: Any) -> Any:
        """The index if it stays; of a list of indices (``batch_size=None`` loaders) those that stay."""
        if isinstance(index, (list, tuple)):
            return [i for i in index if self.keep.allows(i)] or None
        return index if self.keep.allows(index) else None

    def _count(self) -> int:
        assert self.keep.mask is not None
        kind, sampler = type(self.sampler), self.sampler
        if kind is SequentialSampler or (kind is RandomSampler and not sampler.replacement and len(sampler) == len(self.keep.mask)):
            return int(self.keep.mask.sum())
        if kind is SubsetRandomSampler:
            return int(self.keep.mask[torch.as_tensor(sampler.indices)].sum())
        return sum(self._allowed(index) is not None for index in dry_run(sampler))

    def _without_lone_last(self, count: int) -> int:
        size = self.batch_size
        lone = size is not None and size > 1 and count % size == 1 and len(self.sampler) % size != 1 and count > 1
        return count - 1 if lone else count


class KeptBatches(BatchSampler):
    """Batches of somebody's own batch sampler without removed samples; empty batches are left out."""

    def __init__(self, batch_sampler: Any, keep: Keep) -> None:
        require_length(batch_sampler)
        self.inner, self.keep = batch_sampler, keep
        self._counted: tuple[int, int] | None = None

    def __len__(self) -> int:
        if self.keep.mask is None:
            return len(self.inner)
        if self._counted is None or self._counted[0] != self.keep.version:
            kept = sum(any(self.keep.allows(i) for i in batch) for batch in dry_run(self.inner))
            self._counted = (self.keep.version, kept)
        return self._counted[1]

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in self.inner:
            kept = batch if self.keep.mask is None else [i for i in batch if self.keep.allows(i)]
            if kept:
                yield kept

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


class KeptDistributedSampler(DistributedSampler[Any]):
    """Shards the kept samples over the processes; every process gets the same number.

    Filtering comes before sharding: the other way round the processes would count differently and wait for each other.

    Args:
        sampler: The distributed sampler that Lightning or the user made.
        keep: The shared mask.
        batch_size: As for :class:`KeptSampler`, per process.
    """

    def __init__(self, sampler: DistributedSampler[Any], keep: Keep, batch_size: int | None = None) -> None:
        self.inner, self.keep, self.batch_size = sampler, keep, batch_size
        self.__dict__.update({k: v for k, v in vars(sampler).items() if k not in self.__dict__})

    def set_epoch(self, epoch: int) -> None:
        """Seed the shuffle of the next epoch."""
        self.epoch = epoch
        self.inner.set_epoch(epoch)

    def __len__(self) -> int:
        if self.keep.mask is None:
            return len(self.inner)
        return self._share(int(self.keep.mask.sum()))

    def __iter__(self) -> Iterator[Any]:
        if self.keep.mask is None:
            yield from self.inner
            return
        kept = self.keep.mask.nonzero().squeeze(1)
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            kept = kept[torch.randperm(len(kept), generator=generator)]
        total = self._share(len(kept)) * self.num_replicas
        repeats = -(-total // len(kept))
        yield from kept.repeat(repeats)[:total][self.rank :: self.num_replicas].tolist()

    def _share(self, count: int) -> int:
        share = count // self.num_replicas if self.drop_last else -(-count // self.num_replicas)
        size = self.batch_size
        lone = size is not None and size > 1 and share % size == 1 and len(self.inner) % size != 1 and share > 1
        return share - 1 if lone else share


def wrap_sampler(sampler: Any, keep: Keep, batch_size: int | None) -> Any:
    """The right wrapper for a sampler of single indices.

    Raises:
        DataError: For a sampler whose kept part cannot be known: no length, or an unknown way of sharding.
    """
    if type(sampler) is DistributedSampler:
        return KeptDistributedSampler(sampler, keep, batch_size)
    if isinstance(sampler, DistributedSampler):
        return _unwrapped(sampler, keep, batch_size)
    return KeptSampler(sampler, keep, batch_size)


def _unwrapped(sampler: Any, keep: Keep, batch_size: int | None) -> KeptSampler:
    """Lightning's wrapper around a user's sampler on several processes: filter the user's sampler inside it."""
    inner = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    if type(sampler).__name__ not in ("DistributedSamplerWrapper", "UnrepeatedDistributedSamplerWrapper") or inner is None:
        raise DataError(
            f"{type(sampler).__name__} shards the training set in its own way, so removed samples cannot be left out of "
            "it. Use torch's DistributedSampler, or leave the sampler to Lightning (`use_distributed_sampler=True`)."
        )
    return _KeptWrapped(sampler, keep, batch_size)


class _KeptWrapped(KeptDistributedSampler):
    """A user's sampler sharded by Lightning; all processes agree on the largest length that one of them drew."""

    def __len__(self) -> int:
        return len(self.inner) if self.keep.mask is None else self._share(len(self._drawn()))

    def __iter__(self) -> Iterator[Any]:
        if self.keep.mask is None:
            yield from self.inner
            return
        drawn = self._drawn()
        total = self._share(len(drawn)) * self.num_replicas
        yield from (drawn * -(-total // len(drawn)))[:total][self.rank :: self.num_replicas]

    def _drawn(self) -> list[Any]:
        drawn = [index for index in dry_run(self.inner.dataset._sampler) if self.keep.allows(index)]  # type: ignore[attr-defined]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            longest = torch.tensor([len(drawn)])
            torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX)
            drawn = (drawn * -(-int(longest) // max(len(drawn), 1)))[: int(longest)]
        return drawn


def require_length(sampler: Any) -> None:
    """Raise unless the sampler is finite and knows its length."""
    try:
        endless = len(sampler) == 0 and False
    except (TypeError, NotImplementedError, AttributeError):
        endless = True
    if endless or type(sampler).__name__ == "_RepeatSampler":
        raise DataError(
            f"The sampler of the training loader must have a length (`__len__`) and end after each epoch, got "
            f"{type(sampler).__name__}. Use an ordinary DataLoader, or give the sampler a length."
        )


def dry_run(sampler: Any) -> Iterator[Any]:
    """Iterate a copy of a sampler without moving any random stream."""
    memo = {id(value): value for value in vars(sampler).values() if hasattr(value, "__getitem__") and not isinstance(value, Tensor)}
    twin = copy.deepcopy(sampler, memo)
    with torch.random.fork_rng(devices=[]):
        yield from list(twin)
