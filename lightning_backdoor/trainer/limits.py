"""Where a fit ends: whether it is about to, and how to keep it going for a while."""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["about_to_end", "beyond_plan", "hold_open", "release"]

_UNREACHABLE = 10**9
_HELD: WeakKeyDictionary[Any, tuple[tuple[int | None, int | None, int], set[int]]] = WeakKeyDictionary()
"""Trainers kept from ending: their own limits, and which holders still want them open."""


def hold_open(trainer: Any, holder: object) -> None:
    """Keep the fit loop from ending until ``holder`` calls :func:`release`."""
    loop = trainer.fit_loop
    if trainer not in _HELD:
        _HELD[trainer] = (loop.min_epochs, loop.max_epochs, loop.epoch_loop.max_steps), set()
        loop.min_epochs, loop.max_epochs, loop.epoch_loop.max_steps = _UNREACHABLE, -1, -1
    _HELD[trainer][1].add(id(holder))


def release(trainer: Any, holder: object) -> None:
    """Put the user's limits on epochs and steps back, once nobody else holds the loop open."""
    if trainer not in _HELD:
        return
    limits, holders = _HELD[trainer]
    holders.discard(id(holder))
    if not holders:
        loop = trainer.fit_loop
        loop.min_epochs, loop.max_epochs, loop.epoch_loop.max_steps = limits
        del _HELD[trainer]


def beyond_plan(trainer: Any) -> bool:
    """Whether the epochs or steps that the user planned are used up, whoever holds the loop open."""
    loop = trainer.fit_loop
    limits, _ = _HELD.get(trainer, ((loop.min_epochs, loop.max_epochs, loop.epoch_loop.max_steps), set()))
    _, max_epochs, max_steps = limits
    epochs_done = max_epochs not in (None, -1) and loop.epoch_progress.current.processed >= max_epochs
    return bool(epochs_done or (max_steps != -1 and trainer.global_step >= max_steps))


def about_to_end(trainer: Any) -> bool:
    """Whether the fit loop would stop after the epoch that is just ending; call in ``on_train_epoch_end``.

    It would not while somebody holds it open.
    """
    if trainer in _HELD:
        return False
    can_stop = getattr(trainer.fit_loop, "_can_stop_early", True)
    return beyond_plan(trainer) or bool(can_stop and (trainer.should_stop or _early_stopping_will_ask(trainer)))


def _early_stopping_will_ask(trainer: Any) -> bool:
    """Whether an EarlyStopping callback will ask for the end: its turn comes after all others, so ask a copy of it."""
    should_stop = trainer.should_stop
    try:
        for callback in trainer.callbacks:
            if hasattr(callback, "_run_early_stopping_check"):
                twin = copy.copy(callback)
                twin.verbose = False
                twin.on_train_epoch_end(trainer, trainer.lightning_module)
        return bool(trainer.should_stop)
    except RuntimeError:  # its metric is logged later; the callback itself will say so if it is not
        return bool(should_stop)
    finally:
        trainer.should_stop = should_stop
