"""The training loader of one Trainer, and which samples are drawn from it: by a clone with filtering samplers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, proxy

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_backdoor._lightning import (
    combined_length,
    combined_loader,
    epochs_processed,
    forget_iterator,
    has_batch_norm,
    limited,
    rank_zero_warn,
    restart_fetcher,
    running_iterators,
    set_limits,
    validates_by_time,
)
from lightning_backdoor.data.views import key_of, unrepeated, unwrapped
from lightning_backdoor.errors import ArgumentError, DataError, TrainerError
from lightning_backdoor.loading.batch_schedule import Phases
from lightning_backdoor.loading.samplers import KeepState, Kept, PhasedBatches, filtered

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["LoaderFilter", "batch_count", "clone", "loader_filter_of"]

_ORIGIN = "_lightning_backdoor_origin"

_FILTERS: WeakKeyDictionary[Any, LoaderFilter] = WeakKeyDictionary()


def loader_filter_of(trainer: Trainer) -> LoaderFilter:
    """The one filter of a Trainer's training loader, shared by all defences on it."""
    if trainer not in _FILTERS:
        _FILTERS[trainer] = LoaderFilter(trainer)
    return _FILTERS[trainer]


class LoaderFilter:
    """Which samples the training loader draws; the user's loader object stays unchanged.

    While a defence has joined, Lightning prepares the training loader through a wrapper that hands it a shallow clone
    with filtering samplers. They pass everything through until a mask is set: until then training is bit-identical to a
    run without them. Masks of several defences are AND-ed.

    Order of calls: :meth:`join` in ``setup(stage="fit")``; :meth:`set_keep` there or in ``load_state_dict`` (a known
    mask is in force from the first batch), or in ``on_train_epoch_end`` followed by :meth:`refresh`; in
    ``on_train_start`` follow it by :meth:`refresh` and :meth:`restart_iterator`; :meth:`leave` in ``teardown`` and
    ``on_exception``. With several processes, all of them call :meth:`set_keep` with the same mask.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Trainer = proxy(trainer)  # the table above must not keep a Trainer alive
        self._users: set[str] = set()
        self._masks: dict[str, Tensor] = {}
        self._state = KeepState(agree=self._agree)
        self._loader: DataLoader[Any] | None = None
        self._clone: DataLoader[Any] | None = None
        self._unhook: list[Callable[[Any], None]] = []
        self._prepared: list[Any] | None = None  # what one pass of `setup_data` went through; None outside of it

    @property
    def keep(self) -> Tensor | None:
        """Samples that all defences keep, bool ``(N,)``; ``None`` while nothing is removed."""
        return None if self._state.kept is None else self._state.kept.mask.clone()

    @property
    def loader(self) -> DataLoader[Any] | None:
        """The training loader as Lightning prepared it, with all samples; ``None`` before and after the fit."""
        return self._loader

    def join(self, key: str) -> None:
        """Filter the training loader for the defence ``key``; joining twice changes nothing.

        A mask that ``key`` left behind in an earlier fit of this Trainer is in force again.
        """
        if not self._users:
            self._hook()
        self._users.add(key)
        self._apply(self._combined(self._masks))

    def leave(self, key: str) -> None:
        """Stop filtering for the defence ``key``; the last one to leave restores the Trainer.

        The masks stay for a second fit.
        """
        self._users.discard(key)
        if self._users:
            return
        combined = combined_loader(self._trainer)
        if combined is not None:
            combined.flattened = [origin(loader) for loader in combined.flattened]
        while self._unhook:
            self._unhook.pop()(self._trainer)
        self._loader = self._clone = None

    def set_keep(self, key: str, keep: Tensor | None) -> None:
        """Set the mask of one defence. It is in force from the next iterator of the loader on.

        Args:
            key: Whose mask it is.
            keep: Samples that stay, bool ``(N,)``, indexed by dataset position; ``None`` lifts the mask.

        Raises:
            ArgumentError: If ``keep`` is not a boolean vector.
            DataError: If its length is not that of the dataset, or less than one batch would be left.
            TrainerError: If ``limit_train_batches`` would round what is left down to nothing.
                After an error the masks are as they were.
        """
        masks = {other: mask for other, mask in self._masks.items() if other != key}
        if keep is not None:
            if keep.dtype != torch.bool or keep.ndim != 1:
                raise ArgumentError(
                    f"`keep` must be a bool tensor of shape (N,), got {keep.dtype} {tuple(keep.shape)}."
                )
            masks[key] = keep.detach().cpu().clone()
        self._apply(self._combined(masks, key))
        self._masks = masks

    def set_phases(self, phases: Phases | None) -> None:
        """Draw these batches instead of the user's, from the next epoch on; ``None``: the user's; then refresh."""
        self._state.phases = phases

    def refresh(self) -> None:
        """Set the new number of batches in Lightning, after :meth:`set_keep` during a fit."""
        trainer, combined = self._trainer, combined_loader(self._trainer)
        if self._clone is None:
            return
        batches = self._limited(batch_count(self._clone), self._clone)
        if combined is not None:
            set_limits(combined, [self._limit(loader) for loader in combined.flattened])
            batches = combined_length(combined, batches)
        trainer.fit_loop.max_batches = batches
        if validates_by_time(trainer) or batches == float("inf"):
            return
        interval = trainer.val_check_interval
        if isinstance(interval, float):
            trainer.val_check_batch = max(1, int(batches * interval))
        elif isinstance(interval, int):
            trainer.val_check_batch = self._clamped(interval, batches)

    def restart_iterator(self) -> None:
        """Start the epoch's iterator anew, for a mask or an epoch number that changed after it was made.

        Between epochs Lightning does so by itself; ``on_train_start`` and the epoch after a rewind are too late for
        that, and workers have fetched removed samples by then.
        """
        combined = combined_loader(self._trainer)
        if combined is None:
            return
        for loader in combined.flattened:
            start_afresh(loader)
            batches = getattr(loader, "batch_sampler", None)
            for sampler in (getattr(loader, "sampler", None), getattr(batches, "sampler", None)):
                set_epoch = getattr(sampler, "set_epoch", None)
                if callable(set_epoch):
                    set_epoch(epochs_processed(self._trainer))
        restart_fetcher(self._trainer)

    def _hook(self) -> None:
        fit_loop, strategy = self._trainer.fit_loop, self._trainer.strategy
        setup_data, process = fit_loop.setup_data, strategy.process_dataloader

        def process_dataloader(loader: Any) -> Any:
            processed = process(loader)
            return processed if self._prepared is None else self._prepare(processed, self._prepared)

        self._replace(lambda trainer: trainer.fit_loop, "setup_data", lambda: self._setup_data(setup_data))
        self._replace(lambda trainer: trainer.strategy, "process_dataloader", process_dataloader)

    def _replace(self, owner_of: Callable[[Any], Any], name: str, method: Callable[..., Any]) -> None:
        before = {name: vars(owner_of(self._trainer))[name]} if name in vars(owner_of(self._trainer)) else {}
        setattr(owner_of(self._trainer), name, method)

        def undo(trainer: Trainer) -> None:
            vars(owner_of(trainer)).pop(name, None)
            vars(owner_of(trainer)).update(before)

        self._unhook.append(undo)

    def _setup_data(self, original: Callable[[], None]) -> None:
        """Lightning's preparation of the training loaders, which returns at once if they are prepared already."""
        trainer, combined = self._trainer, combined_loader(self._trainer)
        clones = None if combined is None else combined.flattened
        if combined is not None and clones is not None:  # Lightning reloads from the loaders that it made itself
            combined.flattened = [origin(loader) for loader in clones]
        interval, self._prepared = trainer.val_check_interval, []
        try:
            original()
            prepared = self._prepared
        finally:
            trainer.val_check_interval, self._prepared = interval, None
        if not prepared and combined is not None:
            combined.flattened = clones
        if prepared and not any(is_map_style(loader) for loader in prepared):
            raise DataError(
                "The training loader must be a torch DataLoader over a map-style dataset (it has a length), got "
                f"{', '.join(map(describe, prepared))}: samples are kept or removed by their position. Load the data "
                "into a map-style Dataset behind a torch DataLoader."
            )

    def _prepare(self, loader: Any, prepared: list[Any]) -> Any:
        """The clone of a map-style training loader; any other loader as it is. ``prepared`` gets the loader itself."""
        another = any(is_map_style(before) for before in prepared)
        prepared.append(loader)
        if not is_map_style(loader):
            return loader
        if another:
            raise DataError(
                "The training data comes from several map-style DataLoaders, so positions are ambiguous. Pass one: "
                "join the datasets by torch.utils.data.ConcatDataset."
            )
        loader = origin(loader)
        require_curable(loader)
        module = self._trainer.lightning_module
        self._state.drop_single = module is not None and has_batch_norm(module)
        self._state.key = key_of(loader)
        if self._state.kept is not None:
            self._state.kept.slot = self._slot
        twin = clone(loader, self._state)
        keep = self._combined(self._masks)
        if keep is not None:
            self._check(keep, loader, twin)
        if self._state.kept is not None:
            interval = self._trainer.val_check_interval
            if isinstance(interval, int):  # put back by `_setup_data`; Lightning refuses more than the epoch has
                self._trainer.val_check_interval = self._clamped(interval, self._limit(twin))
        self._loader, self._clone = loader, twin
        return twin

    @property
    def _slot(self) -> int | None:
        return None if self._state.key is None else self._state.key.slot

    def _combined(self, masks: dict[str, Tensor], key: str | None = None) -> Tensor | None:
        active = [mask for user, mask in masks.items() if user in self._users or user == key]
        lengths = {len(mask) for mask in active}
        if len(lengths) > 1:
            raise DataError(
                f"Masks of one Trainer must be about one training dataset, got lengths {sorted(lengths)}. Resume with "
                "the dataset of the interrupted run, or use a new Trainer for another one."
            )
        return torch.stack(active).all(dim=0) if active else None

    def _apply(self, keep: Tensor | None) -> None:
        """Put a mask in force, or leave all as it was if it cannot be."""
        before = self._state.kept
        self._state.kept = None if keep is None or bool(keep.all()) else Kept(keep, self._slot)
        if keep is None or self._loader is None or self._clone is None:
            return
        try:
            self._check(keep, self._loader, self._clone)
        except Exception:
            self._state.kept = before
            raise

    def _check(self, keep: Tensor, loader: DataLoader[Any], twin: DataLoader[Any]) -> None:
        require_same_size(keep, loader)
        if self._state.kept is not None:
            require_enough(keep, loader, twin, self._trainer.limit_train_batches)

    def _limit(self, loader: Any) -> int | float:
        length: int | float
        try:
            length = len(loader) if origin(loader) is loader else batch_count(loader)
        except (TypeError, NotImplementedError):
            length = float("inf")
        return self._limited(length, loader)

    def _limited(self, length: int | float, loader: Any) -> int | float:
        """Batches of a loader after ``limit_train_batches``, which phases with a limit of their own hold already."""
        phases = self._state.phases
        if loader is self._clone and phases is not None and phases.most is not None:
            return length
        return limited(length, self._trainer.limit_train_batches)

    def _clamped(self, interval: int, batches: int | float) -> int | float:
        trainer = self._trainer
        if trainer.check_val_every_n_epoch is None or interval <= batches:
            return interval
        if trainer.enable_validation:
            rank_zero_warn(
                f"`val_check_interval={interval}` is more than the {batches} batches of an epoch without removed "
                "samples: validation now runs at the end of each epoch."
            )
        return max(1, batches)

    def _agree(self, count: int) -> int:
        """The largest count of all processes, so that they draw equally often; zero if one of them has nothing."""
        trainer = self._trainer
        if trainer.world_size == 1:
            return count
        counts = trainer.strategy.all_gather(torch.tensor(count, device=trainer.strategy.root_device))
        return int(counts.max()) if int(counts.min()) else 0


def is_map_style(loader: Any) -> bool:
    """Whether a loader is a torch DataLoader over a dataset with positions, or timm's PrefetchLoader around one."""
    inner = unwrapped(loader)
    return isinstance(inner, DataLoader) and not isinstance(inner.dataset, IterableDataset)


class RepeatingLoader(DataLoader[Any]):
    """In the place of timm's MultiEpochsDataLoader: one iterator for all epochs that draw from the same samples.

    Attributes:
        iterator: Goes over the samples again and again; before the first epoch ``None``, or that of the user's loader,
            which some versions of timm start in the constructor: training goes on with it until samples are removed.
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
        DataError: If the dataset has no length or is empty, or the loader keeps an iterator of its own and is not one
            that a :class:`RepeatingLoader` stands in for.
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
    for name in () if _repeats(inner) else running_iterators(inner):
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
            f"it to at least {math.ceil(1000 / batches) / 1000:g}, or pass a number of batches (an int)."
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
    drawn, repeats = _drawn(loader), _repeats(loader)
    twin: DataLoader[Any] = object.__new__(RepeatingLoader if repeats else type(loader))
    twin.__dict__.update(vars(loader))
    changes: dict[str, Any] = {_ORIGIN: loader}
    if repeats:
        changes.update(iterator=vars(loader).get("iterator"), state=state, drawn_for=(None, None))
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


def _drawn(loader: DataLoader[Any]) -> Any:
    """What a loader draws with."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def _repeats(loader: DataLoader[Any]) -> bool:
    """Whether it goes over its samples for ever, as timm's MultiEpochsDataLoader does."""
    return unrepeated(_drawn(loader)) is not _drawn(loader)


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
    return len(unrepeated(_drawn(unwrapped(loader))))


def describe(loader: Any) -> str:
    """Name a loader in a message."""
    inner = unwrapped(loader)
    if not isinstance(inner, DataLoader):
        return type(loader).__name__
    return f"{type(loader).__name__} over the {type(inner.dataset).__name__}"
