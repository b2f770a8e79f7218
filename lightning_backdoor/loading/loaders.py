"""A training loader's clone with filtering samplers, and which loaders cannot have one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_backdoor._lightning import forget_iterator, limited, running_iterators
from lightning_backdoor.data.views import unrepeated, unwrapped
from lightning_backdoor.errors import DataError, TrainerError
from lightning_backdoor.loading.samplers import KeepState, PhasedBatches, filtered

__all__ = [
    "batch_count",
    "clone",
    "describe",
    "is_map_style",
    "origin",
    "require_curable",
    "require_enough",
    "require_same_size",
    "start_afresh",
]

_ORIGIN = "_lightning_backdoor_origin"


def is_map_style(loader: Any) -> bool:
    """Whether a loader is a torch DataLoader over a dataset with positions, or timm's PrefetchLoader around one."""
    inner = unwrapped(loader)
    return isinstance(inner, DataLoader) and not isinstance(inner.dataset, IterableDataset)


class RepeatingLoader(DataLoader[Any]):
    """In the place of timm's MultiEpochsDataLoader: one iterator for all epochs that draw from the same samples.

    Attributes:
        iterator: Goes over the samples again and again; ``None`` before the first epoch.
        state: What the samplers read.
        drawn_for: The kept samples and phases when the iterator began.
    """

    iterator: Any
    state: KeepState
    drawn_for: tuple[Any, Any]

    def __len__(self) -> int:
        return batch_count(self)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        now = self.state.kept, self.state.phases
        as_before = all(a is b for a, b in zip(now, self.drawn_for, strict=True))
        # batches that workers have fetched for the next epoch are of the samples, and of the epoch, of before
        if self.iterator is None or not as_before or self.state.phases is not None:
            self.iterator, self.drawn_for = super().__iter__(), now
        for _ in range(len(self)):
            yield next(self.iterator)


def start_afresh(loader: Any) -> None:
    """Drop the iterator of a loader that keeps one for all epochs, so that the next epoch gets a new one."""
    inner = unwrapped(loader)
    if isinstance(inner, RepeatingLoader):
        inner.iterator = None


def require_curable(loader: DataLoader[Any]) -> None:
    """Check what can be checked before anything is drawn.

    Raises:
        DataError: If the dataset has no length or is empty, or the loader keeps an iterator of its own.
    """
    try:
        size = len(loader.dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError) as error:
        raise DataError(
            f"The training dataset must have a length, got {type(loader.dataset).__name__} without `__len__`: samples "
            "are kept or removed by their position. Add `__len__`."
        ) from error
    if size == 0:  # Lightning would return from `fit` without a word
        raise DataError(
            f"The training dataset is empty: {type(loader.dataset).__name__} has length 0. Check its path, split or "
            "filter."
        )
    inner = unwrapped(loader)
    for name in running_iterators(inner):
        raise DataError(
            f"{type(inner).__name__} keeps a running iterator in `{name}`, which would go on drawing removed "
            "samples. Pass a loader that was not iterated before, or use DataLoader(..., persistent_workers=True)."
        )


def require_same_size(keep: Tensor, loader: DataLoader[Any]) -> None:
    """Check that a mask is about this dataset.

    Raises:
        DataError: If the lengths differ.
    """
    size = len(loader.dataset)  # type: ignore[arg-type]
    if len(keep) != size:
        raise DataError(
            f"The removed samples were found in a training dataset of {len(keep)} samples, but this one has {size}. "
            "Resume with the dataset of the interrupted run, or start afresh with a new Trainer and no `ckpt_path`."
        )


def require_enough(keep: Tensor, loader: DataLoader[Any], twin: DataLoader[Any], limit: int | float) -> None:
    """Check that a mask leaves something to train on; Lightning would stop training without a word.

    Args:
        keep: Samples that stay, bool ``(N,)``, already in force in ``twin``.
        loader: The loader with all samples.
        twin: Its clone.
        limit: The Trainer's ``limit_train_batches``.

    Raises:
        DataError: If no sample or less than one batch stays.
        TrainerError: If the limit makes less than one batch of what stays.
    """
    kept, size = int(keep.sum()), len(keep)
    if not kept:
        raise DataError(f"All {size} training samples would be removed. Lower `max_removed`.")
    batches = batch_count(twin)
    if batches < 1:
        raise DataError(
            f"{kept} of {size} training samples would be kept, less than one batch on every process. Lower "
            "`max_removed` or the batch size, or use `drop_last=False`."
        )
    if limited(batches, limit) < 1 <= limited(batch_count(loader), limit):
        raise TrainerError(
            f"`limit_train_batches={limit}` of the {batches} batches that would be kept is less than one batch. Raise "
            f"it to at least {1 / batches:.3g}, or pass a number of batches (an int)."
        )


def clone(loader: Any, state: KeepState) -> Any:
    """A shallow copy with filtering samplers over the same dataset; the loader itself stays as it is.

    No constructor runs, so every subclass works, whatever its arguments.

    Args:
        loader: A map-style loader, or one within timm's PrefetchLoader.
        state: Read by the samplers at the start of each epoch.

    Raises:
        DataError: If a sampler has no length.
    """
    inner = unwrapped(loader)
    if inner is not loader:
        outer = copy.copy(loader)
        vars(outer).update({"loader": clone(inner, state), _ORIGIN: loader})
        return outer
    drawn = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    repeats = unrepeated(drawn) is not drawn
    twin: DataLoader[Any] = object.__new__(RepeatingLoader if repeats else type(loader))
    twin.__dict__.update(vars(loader))
    changes: dict[str, Any] = {_ORIGIN: loader}
    if repeats:
        changes.update(iterator=None, state=state, drawn_for=(None, None))
    if loader.batch_sampler is not None:
        batches = filtered(unrepeated(drawn), state, loader.dataset)
        changes["batch_sampler"] = _again(drawn, PhasedBatches(batches, state))
        if getattr(unrepeated(drawn), "sampler", None) is loader.sampler:
            changes["sampler"] = batches.sampler
    else:
        changes["sampler"] = _again(drawn, filtered(unrepeated(drawn), state, loader.dataset))
    twin.__dict__.update(changes)
    forget_iterator(twin)
    return twin


def _again(like: Any, sampler: Any) -> Any:
    """Repeat a sampler for ever if ``like`` does so."""
    if unrepeated(like) is like:
        return sampler
    repeated = copy.copy(like)
    repeated.sampler = sampler
    return repeated


def origin(loader: Any) -> Any:
    """The loader that a clone was made of; anything else is its own origin."""
    return getattr(loader, "__dict__", {}).get(_ORIGIN, loader)


def batch_count(loader: Any) -> int:
    """Batches per epoch, counted by the samplers: a subclass may define another ``__len__``."""
    inner = unwrapped(loader)
    return len(unrepeated(inner.sampler if inner.batch_sampler is None else inner.batch_sampler))


def describe(loader: Any) -> str:
    """Name a loader in a message."""
    inner = unwrapped(loader)
    if not isinstance(inner, DataLoader):
        return type(loader).__name__
    return f"{type(loader).__name__} over the {type(inner.dataset).__name__}"
