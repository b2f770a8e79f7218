"""The training loader of one Trainer, and which samples are drawn from it."""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_backdoor.errors import DataError
from lightning_backdoor.trainer.compat import call_limits, rank_zero_warn, restart_fetcher
from lightning_backdoor.trainer.samplers import Keep, KeptBatches, wrap_sampler

__all__ = ["Curation", "curation_of"]

_CONTROLLERS: WeakKeyDictionary[Any, Curation] = WeakKeyDictionary()


def curation_of(trainer: Any) -> Curation:
    """The one controller of a Trainer, shared by all defences on it."""
    if trainer not in _CONTROLLERS:
        _CONTROLLERS[trainer] = Curation(trainer)
    controller = _CONTROLLERS[trainer]
    controller.trainer = trainer
    return controller


class Curation:
    """Decides which samples the training loader draws, without touching the user's loader.

    While somebody is joined, Lightning prepares the training loader through a wrapper that returns a shallow clone of it
    with filtering samplers. They pass everything through until a mask is set. Masks of several defences are AND-ed.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.loader: DataLoader[Any] | None = None
        self._clone: DataLoader[Any] | None = None
        self._masks: dict[str, Tensor] = {}
        self._users: set[str] = set()
        self._shared = Keep()
        self._preparing = False
        self._seen = 0

    @property
    def keep(self) -> Tensor | None:
        """Samples that all defences keep, bool ``(N,)``; ``None`` while nobody removed any."""
        return self._shared.mask

    def join(self, key: str) -> None:
        """Begin to look after the training loader on behalf of ``key``; joining twice changes nothing."""
        if not self._users:
            self._install()
        self._users.add(key)

    def leave(self, key: str) -> None:
        """Stop looking after the loader on behalf of ``key``; the last one out puts the Trainer back as it was."""
        self._users.discard(key)
        self._masks.pop(key, None)
        if not self._users:
            for owner, name in ((self.trainer.fit_loop, "setup_data"), (self.trainer.strategy, "process_dataloader")):
                vars(owner).pop(name, None)
            self.loader = self._clone = None
            self._masks.clear()
            self._shared.set(None)

    def set_keep(self, key: str, keep: Tensor | None) -> None:
        """Set the mask of one defence; it is in force from the next epoch on (call :meth:`refresh` in between).

        Args:
            key: Who removes.
            keep: Samples that stay, bool ``(N,)``, or ``None`` for all.

        Raises:
            DataError: If the length is not that of the dataset, or less than one batch would be left.
        """
        masks = {**self._masks}
        masks.pop(key, None)
        if keep is not None and not bool(keep.all()):
            masks[key] = keep
        combined = torch.stack(list(masks.values())).all(dim=0) if len(_lengths(masks)) == 1 else None
        if masks and combined is None:
            raise DataError(f"Masks of several defences must have one length, got {sorted(_lengths(masks))}.")
        if combined is not None and self.loader is not None:
            self._check(self.loader, combined)
        self._masks = masks
        self._shared.set(combined)

    def refresh(self) -> None:
        """Tell Lightning the new number of batches; call after :meth:`set_keep` in ``on_train_epoch_end``."""
        if self._clone is None:
            return
        trainer, loop = self.trainer, self.trainer.fit_loop
        limits = call_limits(trainer, [len(self._clone)])
        combined = getattr(loop, "_combined_loader", None)
        if combined is not None:
            combined.limits = limits
            if getattr(combined, "_iterator", None) is not None:
                combined._iterator.limits = limits
        loop.max_batches = limits[0]
        interval = trainer.val_check_interval
        if isinstance(interval, float):
            trainer.val_check_batch = max(1, int(loop.max_batches * interval))
        elif isinstance(interval, int) and trainer.check_val_every_n_epoch is not None:
            if interval > loop.max_batches:
                rank_zero_warn(
                    f"`val_check_interval={interval}` is longer than an epoch after pruning ({loop.max_batches} batches): "
                    "validation now runs once per epoch."
                )
            trainer.val_check_batch = min(interval, loop.max_batches)

    def restart_iterator(self) -> None:
        """Throw prefetched batches away; for a mask that changed when an epoch's iterator already existed."""
        combined = getattr(self.trainer.fit_loop, "_combined_loader", None)
        for loader in combined.flattened if combined is not None else []:
            for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
                if hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)
        restart_fetcher(self.trainer)

    def _install(self) -> None:
        loop, strategy = self.trainer.fit_loop, self.trainer.strategy
        setup_data, process = loop.setup_data, strategy.process_dataloader

        def setup_train_data() -> None:
            self._preparing, self._seen = True, 0
            try:
                setup_data()
            finally:
                self._preparing = False

        def process_dataloader(loader: Any) -> Any:
            processed = process(loader)
            return self._prepare(processed) if self._preparing else processed

        loop.setup_data, strategy.process_dataloader = setup_train_data, process_dataloader

    def _prepare(self, loader: Any) -> Any:
        """Return the filtering clone of a training loader."""
        self._seen += 1
        if self._seen > 1:
            raise DataError("Curation needs exactly one training loader, got several. Pass one map-style DataLoader to `fit`.")
        if getattr(loader, "_lightning_backdoor_origin", None) is not None:
            loader = loader._lightning_backdoor_origin
        _require_map_style(loader)
        if self._shared.mask is not None:
            self._check(loader, self._shared.mask)
        self.loader, self._clone = loader, _clone(loader, self._shared)
        return self._clone

    def _check(self, loader: DataLoader[Any], keep: Tensor) -> None:
        size = len(loader.dataset)  # type: ignore[arg-type]
        if len(keep) != size:
            raise DataError(
                f"The removed samples were found in a training dataset of {len(keep)} samples, but this one has {size}. "
                "Resume with the same dataset, or start without the old verdict."
            )
        kept, world = int(keep.sum()), self.trainer.world_size
        batch = getattr(loader.batch_sampler, "batch_size", None) or 1
        needed = batch * world if getattr(loader.batch_sampler, "drop_last", False) else world
        if kept < needed:
            raise DataError(
                f"Removing {size - kept} of {size} samples would leave {kept}, less than one batch ({needed}). "
                "Lower `max_removed` or the batch size."
            )


def _lengths(masks: dict[str, Tensor]) -> set[int]:
    return {len(mask) for mask in masks.values()}


def _require_map_style(loader: Any) -> None:
    if not isinstance(loader, DataLoader):
        raise DataError(
            f"The training loader must be a torch DataLoader, got {type(loader).__name__}: samples are kept or dropped by "
            "their index. Wrap the data in a map-style Dataset and a DataLoader."
        )
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise DataError(
            f"The training dataset must be map-style (`__getitem__` and `__len__`), got {type(loader.dataset).__name__}: an "
            "IterableDataset has no positions to remove. Load it into a map-style dataset."
        )


def _clone(loader: DataLoader[Any], keep: Keep) -> DataLoader[Any]:
    """A shallow copy of a loader with filtering samplers; no constructor runs, so every subclass works."""
    clone = copy.copy(loader)
    inner = getattr(loader.batch_sampler, "sampler", None)
    if loader.batch_sampler is None:
        changes: dict[str, Any] = {"sampler": wrap_sampler(loader.sampler, keep, None)}
    elif type(loader.batch_sampler).__iter__ is BatchSampler.__iter__ and inner is not None:
        size = None if loader.batch_sampler.drop_last else loader.batch_sampler.batch_size
        batches = copy.copy(loader.batch_sampler)
        batches.sampler = wrap_sampler(inner, keep, size)
        changes = {"sampler": batches.sampler, "batch_sampler": batches}
    else:
        changes = {"batch_sampler": KeptBatches(loader.batch_sampler, keep)}
    clone.__dict__.update(changes, _iterator=None, _lightning_backdoor_origin=loader)
    return clone
