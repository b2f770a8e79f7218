"""Going back to the start of fit: weights, optimizer, schedulers, averages and the Trainer's own counters."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from lightning_backdoor.errors import TrainerError

__all__ = ["Rewind", "about_to_end", "require_no_time_limit", "restore", "snapshot"]

_UNREACHABLE = 10**9
_HELD: WeakKeyDictionary[Any, tuple[tuple[int | None, int | None, int], set[int]]] = WeakKeyDictionary()
"""Trainers kept from ending: their own limits, and which :class:`Rewind` objects still want them open."""


def snapshot(trainer: Any, pl_module: Any) -> dict[str, Any]:
    """Copy everything that training changes, as tensors and plain values that load with ``weights_only=True``.

    Holds the module's state, optimizers, schedulers, the precision plugin, and of every other callback its own state
    and its modules (averaged weights). Costs one copy of the model and of its optimizer state on the CPU.

    Args:
        trainer: The running Trainer, with optimizers already set up.
        pl_module: The LightningModule under training.
    """
    return {
        "module": _cpu(pl_module.state_dict()),
        "optimizers": [_cpu(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "schedulers": [_cpu(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        "precision": _cpu(trainer.precision_plugin.state_dict()),
        "callbacks": {callback.state_key: _cpu(callback.state_dict()) for callback in _others(trainer)},
        "averages": {
            callback.state_key: {name: _cpu(module.state_dict()) for name, module in _modules(callback).items()}
            for callback in _others(trainer)
        },
    }


def restore(trainer: Any, pl_module: Any, state: dict[str, Any]) -> None:
    """Put a :func:`snapshot` back and let the Trainer count epochs and steps from zero again.

    Call in ``on_train_epoch_start``. The logger's step axis goes on, so that curves do not overlap. Random streams go
    on, too: the second run draws fresh batches.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
        state: What :func:`snapshot` returned, perhaps read back from a checkpoint.
    """
    state = copy.deepcopy(state)
    pl_module.load_state_dict(state["module"])
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    for config, saved in zip(trainer.lr_scheduler_configs, state["schedulers"], strict=True):
        config.scheduler.load_state_dict(saved)
    trainer.precision_plugin.load_state_dict(state["precision"])
    for callback in _others(trainer):
        callback.load_state_dict(state["callbacks"].get(callback.state_key, {}))
        for name, module in _modules(callback).items():
            if name in state["averages"].get(callback.state_key, {}):
                module.load_state_dict(state["averages"][callback.state_key][name])
        if hasattr(callback, "_last_global_step_saved"):  # ModelCheckpoint skips a step number that it has seen
            callback._last_global_step_saved = 0
    _count_from_zero(trainer)


class Rewind:
    """A return to the start of fit: asked for at the end of an epoch, carried out at the start of the next.

    In between, the fit loop is kept from ending, and a checkpoint holds all that is needed to carry it out later.

    Attributes:
        is_due: Whether a return was asked for and is not yet carried out.
        count: Returns carried out so far.
    """

    def __init__(self) -> None:
        self.is_due = False
        self.count = 0
        self._start: dict[str, Any] | None = None
        self._weights_before_checkpoint: dict[str, Any] | None = None

    def before_checkpoint(self, pl_module: Any) -> None:
        """Keep the weights that the user started from; call in ``setup``, before a checkpoint replaces them."""
        self._weights_before_checkpoint = _cpu(pl_module.state_dict())

    def at_fit_start(self, trainer: Any) -> None:
        """Continue a run that was interrupted between asking and returning; call in ``on_fit_start``."""
        if self.is_due:
            self._hold_open(trainer)

    def at_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note where to return to, unless a checkpoint has brought it; call in ``on_train_start``."""
        if self._start is None:
            self._start = snapshot(trainer, pl_module)
            if self._weights_before_checkpoint is not None:
                self._start["module"] = self._weights_before_checkpoint
        self._weights_before_checkpoint = None

    def ask(self, trainer: Any) -> None:
        """Ask for the return; call in ``on_train_epoch_end``."""
        self.is_due = True
        self._hold_open(trainer)

    def carry_out(self, trainer: Any, pl_module: Any) -> bool:
        """Return if asked to, and say whether; call in ``on_train_epoch_start``, then draw new batches."""
        if not self.is_due or self._start is None:
            return False
        restore(trainer, pl_module, self._start)
        self.release(trainer)
        trainer.should_stop = False  # a stop that was asked for during the warm-up
        self.is_due = False
        self.count += 1
        return True

    def release(self, trainer: Any) -> None:
        """Put the user's limits on epochs and steps back, once no other defence waits for its return."""
        if trainer not in _HELD:
            return
        limits, holders = _HELD[trainer]
        holders.discard(id(self))
        if not holders:
            loop = trainer.fit_loop
            loop.min_epochs, loop.max_epochs, loop.epoch_loop.max_steps = limits
            del _HELD[trainer]

    def forget(self) -> None:
        """Drop the snapshot: no further return will be asked for."""
        self._start = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {"is_due": self.is_due, "count": self.count, "start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""
        self.is_due, self.count, self._start = state_dict["is_due"], state_dict["count"], state_dict["start"]

    def _hold_open(self, trainer: Any) -> None:
        loop = trainer.fit_loop
        if trainer not in _HELD:
            _HELD[trainer] = (loop.min_epochs, loop.max_epochs, loop.epoch_loop.max_steps), set()
            loop.min_epochs, loop.max_epochs, loop.epoch_loop.max_steps = _UNREACHABLE, -1, -1
        _HELD[trainer][1].add(id(self))


def require_no_time_limit(trainer: Any) -> None:
    """Raise if the Trainer stops by the clock.

    Raises:
        TrainerError: ``max_time`` is set.
    """
    if any(type(callback).__name__ == "Timer" for callback in trainer.callbacks):
        raise TrainerError(
            "`Trainer(max_time=...)` must be left out when `rewind=True`: the warm-up would use up the time of the run "
            "that follows it. Limit the run by `max_epochs` or `max_steps`, or pass `rewind=False`."
        )


def about_to_end(trainer: Any) -> bool:
    """Whether the fit loop would stop after the epoch that is just ending."""
    loop = trainer.fit_loop
    epochs_done = loop.max_epochs not in (None, -1) and loop.epoch_progress.current.processed >= loop.max_epochs
    steps_done = loop.epoch_loop.max_steps != -1 and trainer.global_step >= loop.epoch_loop.max_steps
    return bool(epochs_done or steps_done or trainer.should_stop)


def _count_from_zero(trainer: Any) -> None:
    """Reset the Trainer's progress to that of a first epoch that has just been announced."""
    loop = trainer.fit_loop
    for tracker in (loop.epoch_progress.current, loop.epoch_progress.total):
        done = tracker.processed
        for field in dataclasses.fields(tracker):
            setattr(tracker, field.name, getattr(tracker, field.name) - done)
    epoch_loop = loop.epoch_loop
    for progress in (
        epoch_loop.batch_progress,
        epoch_loop.scheduler_progress,
        epoch_loop.automatic_optimization.optim_progress,
        epoch_loop.manual_optimization.optim_step_progress,
    ):
        _zero(progress)


def _zero(progress: Any) -> None:
    for field in dataclasses.fields(progress):
        value = getattr(progress, field.name)
        if dataclasses.is_dataclass(value):
            _zero(value)
        else:
            setattr(progress, field.name, type(value)(0))


def _others(trainer: Any) -> list[Any]:
    """Callbacks that do not belong to this library: a rewind of one defence must not undo another."""
    return [c for c in trainer.callbacks if not type(c).__module__.startswith("lightning_backdoor.")]


def _modules(callback: Any) -> dict[str, nn.Module]:
    """Averaged models that a callback keeps beside the trained one."""
    return {name: value for name, value in vars(callback).items() if isinstance(value, nn.Module)}


def _cpu(value: Any) -> Any:
    """Copy nested containers with every tensor cloned to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cpu(item) for item in value)
    return copy.deepcopy(value)
