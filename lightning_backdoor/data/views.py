"""The training data in index order, the same on every reading, whatever wraps the loader or names its samples."""

from __future__ import annotations

import copy
import operator
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from lightning_backdoor.data.batches import holds_images
from lightning_backdoor.data.loaded import LoadedBatches
from lightning_backdoor.data.nesting import leaves_of
from lightning_backdoor.data.random_state import isolated_rng, seed_all
from lightning_backdoor.errors import DataError

__all__ = [
    "BY_POSITION",
    "Finish",
    "IndexedView",
    "Key",
    "Keyed",
    "ScanLoader",
    "batch_size_of",
    "check_dataset",
    "deep_twin",
    "find_key",
    "finish_of",
    "is_ordinary",
    "key_of",
    "read_items",
    "scan_batch_size",
    "scan_loader",
    "unrepeated",
    "unwrapped",
]

BY_POSITION = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)
"""Torch's own samplers, of these types exactly, which yield positions alone."""

_DRAWN = 100_000  # keys, at most, by which the position is found among the rest

_MASK = 2**64 - 1
_DEFAULT_BATCH_SIZE = 128
TIMES_ON_CUDA = 4  # the loader's batch: no activations are kept for a backward pass, and small ones wait for launches
MOST_ON_CUDA = 512  # images, by multiplication: so many fill a GPU, and workers hold several batches in shared memory
NOTICE = 0.5  # seconds between the end of a process and the signal of it, at most


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


def check_dataset(dataset: Any) -> int:
    """Return the length of a map-style dataset.

    Raises:
        DataError: It is iterable-style, has no length or no random access, or is empty.
    """
    name = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"the training dataset must be map-style (`__getitem__` and `__len__`), got {name}: samples are kept or "
            "dropped by their index. Load it into a map-style dataset first."
        )
    try:
        length = len(dataset)
    except (TypeError, NotImplementedError) as error:
        raise DataError(f"the training dataset must have a length, {name} has none. Give it a `__len__`.") from error
    if length == 0:
        raise DataError(f"the training dataset is empty: {name} has length 0. Check its path, split or filter.")
    return length


def _mix(seed: int, index: int) -> int:
    """Return 64 well-mixed bits for one index (the finaliser of splitmix64, Steele et al., 2014)."""
    z = (seed * 0xD1342543DE82EF95 + index * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class IndexedView(Dataset[tuple[int, Any]]):
    """Some positions of a dataset as ``(index, item)``, each item read under its own seed.

    torch, NumPy and ``random`` are seeded from ``(seed, index)`` for each item and put back afterwards, so a random
    transform gives the same item whatever the order, batch size, number of workers or rank. Generators that the dataset
    holds itself, and CUDA generators, are not seeded.

    Args:
        dataset: Map-style dataset, not necessarily a torch ``Dataset``.
        indices: Dataset positions to read.
        seed: Any integer.
    """

    def __init__(self, dataset: Any, indices: Sequence[int] | Tensor, seed: int) -> None:
        self.dataset = dataset
        self.indices = torch.as_tensor(indices, dtype=torch.long).reshape(-1)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[tuple[int, Any]]:
        """Read one batch; the random state is saved once for all of it."""
        indices = self.indices[list(positions)].tolist()
        items = []
        with isolated_rng():
            for index in indices:
                seed_all(_mix(self.seed, index))
                items.append((index, self.dataset[index]))
        return items


class Keyed(Dataset[Any]):
    """A dataset that is read by tuples, such as (position, size), to be read by positions.

    Args:
        dataset: The dataset.
        key: Makes the tuple of a position.
    """

    def __init__(self, dataset: Any, key: Callable[[int], Any]) -> None:
        self.dataset, self.key = dataset, key

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.key(index)]


class _Collate:
    """The user's ``collate_fn`` between taking the indices off and putting them beside the batch."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any], seed: int) -> None:
        self.collate_fn = collate_fn
        self.seed = seed

    def __call__(self, pairs: list[tuple[int, Any]]) -> tuple[Tensor, Any, bool]:
        indices = torch.tensor([index for index, _ in pairs])
        items = [item for _, item in pairs]
        if self.collate_fn is default_collate:
            return indices, default_collate(items), False
        with isolated_rng():
            batch = self._collated(items, indices)
            sizes = holds_images(batch)
            if batch is None or (sizes and len(items) not in sizes):
                places = [place for place, item in enumerate(items) if self._stays(item, indices)]
                if len(places) != (0 if batch is None else sizes[0]):
                    returned = "None" if batch is None else f"{sizes[0]} images"
                    raise DataError(
                        f"`collate_fn` returned {returned} for {len(items)} samples (items {indices[:8].tolist()}…), "
                        "and one by one it drops others, so images cannot be told apart by index. Let it keep a sample "
                        "or drop it whatever else is in the batch, or leave bad samples out of the dataset."
                    )
                indices, items = indices[places], [items[place] for place in places]
        plain = _unmixed(batch, items)
        return indices, batch if plain is None else plain, plain is not None

    def _collated(self, items: list[Any], indices: Tensor) -> Any:
        """The user's ``collate_fn`` applied to a batch, under a seed of the batch; ``None`` if no sample is left."""
        seed_all(_mix(self.seed, int(indices[0])))
        try:
            return self.collate_fn(items)
        except Exception:
            if all(map(_is_nothing, items)):
                return None  # most functions that drop such items cannot do without any other
            raise

    def _stays(self, item: Any, indices: Tensor) -> bool:
        """Whether the user's function keeps a sample that is alone in its batch."""
        try:
            batch = self._collated([item], indices)
        except Exception:
            return False
        return batch is not None and 1 in holds_images(batch)


def _is_nothing(item: Any) -> bool:
    """Whether an item is what datasets give for a file that cannot be read."""
    parts = item if isinstance(item, tuple | list) else item.values() if isinstance(item, dict) else [item]
    return any(part is None for part in parts)


def _soft_labels(batch: Any, size: int) -> int:
    """Count the floating ``(B, K)`` tensors of a batch; a column of whole numbers is none of them."""
    found = [leaf.tensor for leaf in leaves_of(batch) if leaf.tensor.ndim == 2 and leaf.tensor.is_floating_point()]
    return sum(len(values) == size and (values.shape[1] > 1 or not values.equal(values.round())) for values in found)


def _unmixed(batch: Any, items: list[Any]) -> Any | None:
    """Return the default batch of ``items`` if the user's ``batch`` has mixed labels (CutMix, MixUp), else None."""
    if not _soft_labels(batch, len(items)):
        return None
    try:
        plain = default_collate(items)
    except (TypeError, RuntimeError, ValueError):
        return None
    return plain if _soft_labels(plain, len(items)) < _soft_labels(batch, len(items)) else None


class _WorkerInit:
    """Sets ``get_worker_info().dataset`` to the user's dataset, for ``worker_init_fn`` and for the dataset itself."""

    def __init__(self, worker_init_fn: Callable[[int], None] | None) -> None:
        self.worker_init_fn = worker_init_fn

    def __call__(self, worker_id: int) -> None:
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, IndexedView):
            dataset = info.dataset.dataset
            object.__setattr__(info, "dataset", dataset.dataset if isinstance(dataset, Keyed) else dataset)
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)


class ScanLoader(DataLoader[Any]):
    """A DataLoader over an :class:`IndexedView`: yields ``(indices, batch)``, int64 ``(B,)`` and the user's batch.

    Samples that the user's ``collate_fn`` drops are in neither.

    Attributes:
        finish: What is done to each batch in this process; ``None`` for nothing.
        loaded: Batches that were read before and are kept; ``None``: every iteration reads the dataset.
        whole: Whether it reads all samples of this process, so that its batches may be kept.
    """

    finish: Callable[[Any], Any] | None = None
    loaded: LoadedBatches | None = None
    whole: bool = False

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:  # type: ignore[override]
        return self.read() if self.loaded is None else self.loaded.batches(self)

    @property
    def stacks(self) -> bool:
        """Whether batches are what torch's own ``default_collate`` makes of the samples, and nothing else."""
        plain = isinstance(self.collate_fn, _Collate) and self.collate_fn.collate_fn is default_collate
        return plain and self.finish is None

    def read(self) -> Iterator[tuple[Tensor, Any]]:
        """Read the dataset."""
        told = False
        for indices, batch, unmixed in self.collated():
            if not len(indices):  # the user's function has dropped all
                continue
            if unmixed and not told:
                told = True
                warnings.warn(
                    "the training loader's `collate_fn` mixes labels (CutMix or MixUp); the scan reads the images with "
                    "torch's default_collate instead. Training is not affected.",
                    stacklevel=2,
                )
            yield indices, batch if self.finish is None else self.finish(batch)

    def collated(self) -> Iterator[tuple[Tensor, Any, bool]]:
        """Indices, batches, and whether these are torch's default instead of the user's mixed ones."""
        try:
            yield from super().__iter__()
        except (EOFError, ConnectionError, FileNotFoundError, RuntimeError) as error:
            said = str(error)
            if said.startswith("Caught ") or not (self.num_workers and _is_of_dead_worker(error)):
                raise  # the user's own, perhaps handed on by a worker
            with suppress(RuntimeError):  # torch raises wherever its notice of a death arrives: here, not in a clean-up
                time.sleep(NOTICE * ("killed by signal" not in said))
            raise DataError(
                f"A worker process that reads the training images died ({type(error).__name__}: {said}), most often "
                "for want of memory. Pass a smaller `num_workers` (0: none) or `batch_size`."
            ) from error


def _is_of_dead_worker(error: Exception) -> bool:
    """Whether torch raises an error for a dead worker, or for a tensor that is read from one."""
    return not isinstance(error, RuntimeError) or str(error).startswith("DataLoader worker (pid")


def batch_size_of(loader: Any) -> int:
    """Samples per batch of a loader, by itself or its samplers; 128 where none of them has a batch size."""
    holders = (loader, getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None))
    sizes = [getattr(holder, "batch_size", None) for holder in holders]
    return next((size for size in sizes if isinstance(size, int) and size > 0), _DEFAULT_BATCH_SIZE)


def scan_batch_size(loader: Any, device_type: str) -> int:
    """Samples per batch of a scan, where the user gives no number.

    Args:
        loader: The training loader.
        device_type: Where the network runs, such as ``"cuda"``.

    Returns:
        The batch size of the loader; for CUDA four times as many, but not more than 512 unless the loader has more.
    """
    size = batch_size_of(loader)
    return size if device_type != "cuda" else max(size, min(TIMES_ON_CUDA * size, MOST_ON_CUDA))


def scan_loader(
    loader: DataLoader[Any],
    indices: Sequence[int] | Tensor,
    *,
    seed: int,
    batch_size: int | None = None,
    num_workers: int | None = None,
    finish: Callable[[Any], Any] | None = None,
) -> ScanLoader:
    """Return a loader that reads ``loader.dataset`` at ``indices``, in order and without randomness.

    The user's ``collate_fn``, ``worker_init_fn``, ``timeout``, pinning and multiprocessing context are taken over; a
    loader without batches (``batch_size=None``) is collated by torch's default. Iterating draws nothing from the global
    random streams. A ``collate_fn`` that draws random numbers does so from a seed of its batch; one that mixes labels
    (floating ``(B, K)`` where the samples have none) is replaced by torch's default, with one warning per pass.

    Args:
        loader: The user's training loader; it is only read.
        indices: Dataset positions; may be empty (a rank without work).
        seed: Seed of random transforms, see :class:`IndexedView`.
        batch_size: Images per batch; the loader's, or its batch sampler's, or 128 by default.
        num_workers: Worker processes; the loader's by default.
        finish: What is done to each batch in this process, see :func:`~lightning_backdoor.data.views.finish_of`.

    Raises:
        DataError: The dataset is empty or not map-style; while iterating: it cannot be told which samples the
            ``collate_fn`` drops.
    """
    check_dataset(loader.dataset)
    workers = loader.num_workers if num_workers is None else num_workers
    unbatched = loader.batch_size is None and loader.batch_sampler is None
    collate_fn = default_collate if unbatched or loader.collate_fn is None else loader.collate_fn
    view = ScanLoader(
        IndexedView(loader.dataset, indices, seed),
        batch_size=batch_size_of(loader) if batch_size is None else batch_size,
        shuffle=False,
        collate_fn=_Collate(collate_fn, seed),
        pin_memory=loader.pin_memory and torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed & 0x7FFFFFFF),
        **_worker_settings(loader, workers),
    )
    view.finish = finish
    return view


def _worker_settings(loader: DataLoader[Any], workers: int) -> dict[str, Any]:
    if workers == 0:
        return {"num_workers": 0}
    return {
        "num_workers": workers,
        "timeout": loader.timeout,
        "prefetch_factor": loader.prefetch_factor,
        "worker_init_fn": _WorkerInit(loader.worker_init_fn),
        "multiprocessing_context": loader.multiprocessing_context,
    }


def _as_is(items: list[Any]) -> list[Any]:
    return items


def read_items(source: Any, indices: Sequence[int], *, seed: int = 0) -> list[Any]:
    """Return the items of a dataset, or of a loader's dataset, uncollated and read as the scan reads them.

    A loader with workers reads them in one worker: a dataset that opens its files there is not opened here.
    """
    if not isinstance(source, DataLoader):
        return [item for _, item in IndexedView(source, indices, seed).__getitems__(range(len(indices)))]
    items = DataLoader(
        IndexedView(source.dataset, indices, seed),
        batch_size=len(indices),
        collate_fn=_as_is,
        generator=torch.Generator().manual_seed(0),
        **_worker_settings(source, min(source.num_workers, 1)),
    )
    return [item for pairs in items for _, item in pairs]
