"""What wraps the user's loader, and how its samplers name samples: by position, or by a tuple with one."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_backdoor.data.random_state import isolated_rng
from lightning_backdoor.errors import DataError

__all__ = [
    "BY_POSITION",
    "Finish",
    "Key",
    "deep_twin",
    "find_key",
    "finish_of",
    "is_ordinary",
    "key_of",
    "unrepeated",
    "unwrapped",
]

BY_POSITION = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)
"""Torch's own samplers, of these types exactly, which yield positions alone."""

_DRAWN = 100_000  # keys, at most, by which the position is found among the rest


@dataclass(frozen=True)
class Key:
    """A tuple that names a sample.

    Attributes:
        slot: Place of the position within it.
        like: The tuple with the most common rest.
    """

    slot: int
    like: tuple[Any, ...]

    def __call__(self, index: int) -> tuple[Any, ...]:
        """The name of a sample, as most are named."""
        return (*self.like[: self.slot], index, *self.like[self.slot + 1 :])


def key_of(loader: Any) -> Key | None:
    """How the samplers of a map-style loader name samples, where that is not by their position alone."""
    inner = unwrapped(loader)
    drawn = unrepeated(inner.batch_sampler)
    if drawn is None or (is_ordinary(type(drawn)) and type(drawn.sampler) in BY_POSITION):
        return None
    return find_key(drawn, inner.dataset)


def find_key(batch_sampler: Any, dataset: Any) -> Key | None:
    """Determine the keys that a batch sampler draws, from a copy of it; ``None`` if these are positions alone.

    Args:
        batch_sampler: Yields batches of positions, or of tuples that hold one.
        dataset: Of N samples; not copied with the sampler.

    Raises:
        DataError: It cannot be told which part of the tuples is the position.
    """
    with isolated_rng(0):
        try:
            keys = chain.from_iterable(deep_twin(batch_sampler, dataset))
            first = next(keys, None)
        except Exception:  # holds something that cannot be copied, or fails: it will do so again
            return None
        if not isinstance(first, tuple | list):
            return None
        drawn = [tuple(first), *(tuple(key) for key in islice(keys, _DRAWN))]
    size = len(dataset)
    spread = {slot: len(set(parts)) for slot, parts in enumerate(zip(*drawn, strict=False)) if _positions(parts, size)}
    best = max(spread, key=lambda slot: spread[slot], default=None)
    if best is None or list(spread.values()).count(spread[best]) > 1 or len({len(key) for key in drawn}) > 1:
        raise DataError(
            f"The samplers of the training loader must yield dataset positions, or tuples with one, got {first!r} from "
            f"{type(batch_sampler).__name__}, where no part is clearly a position below {size}. Make the sampler yield "
            "(position, whatever else)."
        )
    rest = [(*key[:best], None, *key[best + 1 :]) for key in drawn]
    return Key(best, _most_common(rest))


def _positions(values: tuple[Any, ...], size: int) -> bool:
    try:
        return all(not isinstance(value, bool) and 0 <= operator.index(value) < size for value in values)
    except TypeError:
        return False


def _most_common(rest: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    try:
        return Counter(rest).most_common(1)[0][0]
    except TypeError:  # something that cannot be counted
        return rest[0]


def is_ordinary(kind: type) -> bool:
    """Whether batches are formed as torch's own batch sampler forms them."""
    return issubclass(kind, BatchSampler) and (
        kind.__iter__ is BatchSampler.__iter__ and kind.__len__ is BatchSampler.__len__
    )


def deep_twin(sampler: Any, dataset: Any) -> Any:
    """A deep copy that shares the dataset; raises whatever copying raises."""
    memo: dict[int, Any] = {id(dataset): dataset}
    for value in getattr(sampler, "__dict__", {}).values():
        if isinstance(value, torch.Generator):
            memo[id(value)] = torch.Generator(value.device).set_state(value.get_state())
    return copy.deepcopy(sampler, memo)


class Finish:
    """What a PrefetchLoader does to the batches of the loader inside: on the CPU, without random erasing.

    Args:
        wrapper: The PrefetchLoader; it is only read.

    Attributes:
        mean: Of its normalisation, one number per channel, in 0..1 units.
        std: The same.
    """

    def __init__(self, wrapper: Any) -> None:
        mean, std = wrapper.mean.cpu(), wrapper.std.cpu()
        self.mean, self.std = (tuple((part.double().flatten() / 255).tolist()) for part in (mean, std))
        self._wrapper = copy.copy(wrapper)  # does the arithmetic, so that a scan shows what the training shows
        on_cpu = {"device": torch.device("cpu"), "is_cuda": False, "is_npu": False, "mean": mean, "std": std}
        vars(self._wrapper).update(on_cpu, loader=(), stream=None, random_erasing=None)

    def __call__(self, batch: Any) -> Any:
        """Return the batch as the training gets it."""
        self._wrapper.loader = (batch,)
        (finished,) = self._wrapper
        self._wrapper.loader = ()
        return finished


def unwrapped(loader: Any) -> Any:
    """Return the loader inside a PrefetchLoader; any other as it is."""
    return loader.loader if _is_prefetching(loader) else loader


def unrepeated(sampler: Any) -> Any:
    """The sampler that timm's MultiEpochsDataLoader repeats for ever; any other as it is."""
    return sampler.sampler if type(sampler).__name__.endswith("RepeatSampler") else sampler


def finish_of(loader: Any) -> Finish | None:
    """Return what a PrefetchLoader does to the batches of the loader inside; ``None`` for any other loader."""
    return Finish(loader) if _is_prefetching(loader) else None


def _is_prefetching(loader: Any) -> bool:
    return any(
        (kind.__module__, kind.__name__) == ("timm.data.loader", "PrefetchLoader") for kind in type(loader).__mro__
    )
