"""Where a fit ends: whether it is about to, and how to keep it going for a while."""

from __future__ import annotations

import copy
import math
import sys
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lightning_backdoor._lightning import (
    callbacks_of,
    epochs_processed,
    is_early_stopping,
    may_stop_early,
    timer_lets_epoch_end,
)
from lightning_backdoor.errors import TrainerError

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = [
    "about_to_end",
    "beyond_plan",
    "epochs_left",
    "hold_open",
    "plan_is_over",
    "planned_end",
    "planned_epochs",
    "planned_max_epochs",
    "release",
    "repair_begins",
    "require_extendable",
    "require_planned",
    "stops_within_epoch",
]

_UNREACHABLE = 10**9
_NOT_EXTENDABLE = {"StochasticWeightAveraging": "Use Lightning's WeightAveraging."}
_NOT_PLANNED = {
    "BaseFinetuning": "Vary `requires_grad` before the fit.",
    "StochasticWeightAveraging": "Use Lightning's WeightAveraging.",
}
_HELD: WeakKeyDictionary[Any, tuple[tuple[int | None, int | None, int], dict[int, tuple[int | None, bool]]]] = (
    WeakKeyDictionary()
)
"""Trainers kept from ending: their own limits, and of each holder the last epoch that it wants (``None`` without end),
and whether that lies beyond the plan."""


def hold_open(trainer: Trainer, holder: object, until: int | None = None, *, beyond: bool = False) -> None:
    """Keep the fit loop from ending until ``holder`` calls :func:`release`.

    Args:
        trainer: The running Trainer.
        holder: Who wants it open.
        until: Epochs that the fit will have had by then, if that is known; progress displays show it, or the plan
            where that is longer.
        beyond: Whether these epochs go beyond the plan, so that the user's ``max_steps`` are not in force.
    """
    loop = trainer.fit_loop
    if trainer not in _HELD:
        _HELD[trainer] = (loop.min_epochs, loop.max_epochs, loop.epoch_loop.max_steps), {}
    (*_, max_steps), holders = _HELD[trainer]
    holders[id(holder)] = until, beyond
    known = [last for last, _ in holders.values() if last is not None]
    if len(known) < len(holders):
        loop.min_epochs, loop.max_epochs, loop.epoch_loop.max_steps = _UNREACHABLE, -1, -1
        return
    last, planned, farther = max(known), planned_max_epochs(trainer), any(farther for _, farther in holders.values())
    loop.min_epochs = last
    loop.max_epochs = -1 if planned is None and not farther else max(last, planned or 0)
    loop.epoch_loop.max_steps = -1 if farther else max_steps


def release(trainer: Trainer, holder: object) -> None:
    """Put the user's limits on epochs and steps back, once nobody else holds the loop open."""
    if trainer not in _HELD:
        return
    limits, holders = _HELD[trainer]
    holders.pop(id(holder), None)
    if not holders:
        loop = trainer.fit_loop
        loop.min_epochs, loop.max_epochs, loop.epoch_loop.max_steps = limits
        del _HELD[trainer]


def beyond_plan(trainer: Trainer) -> bool:
    """Whether the epochs or steps that the user planned are used up, whoever holds the loop open."""
    max_epochs, max_steps = _planned(trainer)
    epochs_done = max_epochs is not None and epochs_processed(trainer) >= max_epochs
    return bool(epochs_done or (max_steps is not None and trainer.global_step >= max_steps))


def planned_max_epochs(trainer: Trainer) -> int | None:
    """The user's own ``max_epochs``, whoever holds the loop open; ``None`` where there is none."""
    return _planned(trainer)[0]


def planned_epochs(trainer: Trainer) -> int:
    """How many epochs the user planned, by epochs or by steps; 1 where there is no plan."""
    max_epochs, max_steps = _planned(trainer)
    by_steps = None if max_steps is None else math.ceil(max_steps / _steps_per_epoch(trainer))
    known = [limit for limit in (max_epochs, by_steps) if limit is not None]
    return max(1, min(known)) if known else 1


def planned_end(trainer: Trainer) -> int | None:
    """Epochs that the fit will have had at the end of the user's plan, whoever holds the loop open.

    ``max_steps`` and ``max_time`` are converted to epochs: the former by the steps that an epoch has now, the latter by
    the mean duration of the epochs so far (none are complete: it counts for nothing). ``None``: nothing limits the fit.
    Every process must call it.
    """
    limits = (planned_max_epochs(trainer), _end_by_steps(trainer), _end_by_time(trainer))
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def epochs_left(trainer: Trainer, end: int | None, extra: int) -> int | None:
    """Epochs that are left until the :func:`planned_end`, and ``extra`` ones beyond it; ``None``: nothing limits them.

    An early stop shortens no plan: what a repair needs then is taken from the epochs that it has saved.
    """
    return None if end is None else max(end + extra - epochs_processed(trainer), 0)


def repair_begins(end: int | None, needed: int, extra_epochs: int) -> int:
    """Epochs after which a repair has to begin, so that it fits into the plan and into ``extra_epochs`` beyond it.

    It takes at most half of the plan. Without a plan it begins when training is about to end.

    Args:
        end: Epochs that the fit will have had at the end of the plan; ``None`` without a plan.
        needed: Largest number of epochs of the repair.
        extra_epochs: Epochs that it may have beyond the plan.
    """
    return sys.maxsize if end is None else end - max(0, min(needed - extra_epochs, end // 2))


def require_extendable(trainer: Trainer, method: str) -> None:
    """Raise if a callback rules further epochs after the planned ones out.

    Args:
        trainer: The Trainer.
        method: Name of the defence that may need them.

    Raises:
        TrainerError: Weights are averaged by StochasticWeightAveraging.
    """
    classes = {cls.__name__ for callback in callbacks_of(trainer) for cls in type(callback).__mro__}
    for name, remedy in _NOT_EXTENDABLE.items():
        if name in classes:
            raise TrainerError(f"{method} may add epochs of its own, which does not go together with {name}. {remedy}")


def require_planned(trainer: Trainer, method: str) -> None:
    """Raise if the number of epochs is not known, or a callback changes the optimizer on its way.

    Args:
        trainer: The Trainer.
        method: Name of the defence that plans by epochs and has an optimizer of its own.

    Raises:
        TrainerError: There is no ``max_epochs``, or ``max_steps`` may come before it, or there is such a callback.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a function of Lightning's
        return
    if trainer.max_epochs in (None, -1) or trainer.max_steps != -1:
        raise TrainerError(
            f"{method} plans its stages by epochs, got max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}. "
            "Pass Trainer(max_epochs=...) alone."
        )
    classes = {cls.__name__ for callback in callbacks_of(trainer) for cls in type(callback).__mro__}
    for name, remedy in _NOT_PLANNED.items():
        if name in classes:
            raise TrainerError(f"{method} trains by an optimizer of its own, which {name} would change. {remedy}")


def _planned(trainer: Trainer) -> tuple[int | None, int | None]:
    loop = trainer.fit_loop
    limits, _ = _HELD.get(trainer, ((loop.min_epochs, loop.max_epochs, loop.epoch_loop.max_steps), {}))
    _, max_epochs, max_steps = limits
    return (None if max_epochs == -1 else max_epochs), (None if max_steps == -1 else max_steps)


def _end_by_steps(trainer: Trainer) -> int | None:
    max_steps = _planned(trainer)[1]
    if max_steps is None:
        return None
    steps_left = max(max_steps - int(trainer.global_step), 0)
    return epochs_processed(trainer) + math.ceil(steps_left / _steps_per_epoch(trainer))


def _end_by_time(trainer: Trainer) -> int | None:
    done, seconds = epochs_processed(trainer), _seconds_left(trainer)
    if seconds is None or done == 0:
        return None
    left, elapsed = seconds
    by_time: int = trainer.strategy.broadcast(done + int(max(left, 0.0) * done / max(elapsed, 1e-9)), src=0)
    return by_time


def _seconds_left(trainer: Trainer) -> tuple[float, float] | None:
    """Seconds that ``max_time`` leaves, and those that have passed; ``None`` without a limit."""
    known = [(timer.time_remaining(), timer.time_elapsed()) for timer in _timers(trainer)]
    return min(((left, elapsed) for left, elapsed in known if left is not None), default=None)


def _timers(trainer: Trainer) -> list[Any]:
    return [callback for callback in callbacks_of(trainer) if hasattr(callback, "time_remaining")]


def _steps_per_epoch(trainer: Trainer) -> int:
    return max(1, math.ceil(float(trainer.num_training_batches) / int(trainer.accumulate_grad_batches)))


def plan_is_over(trainer: Trainer) -> bool:
    """Whether ``max_steps`` or ``max_time`` are used up; call in ``on_train_batch_end``. Every process must call it."""
    if _steps_are_over(trainer):
        return True
    seconds = _seconds_left(trainer)
    return seconds is not None and bool(trainer.strategy.broadcast(seconds[0] <= 0, src=0))


def stops_within_epoch(trainer: Trainer) -> bool:
    """Whether a fit whose plan is over stops with this batch; a ``Timer(interval="epoch")`` lets the epoch end."""
    return _steps_are_over(trainer) or not all(timer_lets_epoch_end(timer) for timer in _timers(trainer))


def _steps_are_over(trainer: Trainer) -> bool:
    max_steps = trainer.fit_loop.epoch_loop.max_steps
    return bool(max_steps != -1 and trainer.global_step >= max_steps)


def about_to_end(trainer: Trainer) -> bool:
    """Whether the fit loop would stop after the epoch that is just ending; call in ``on_train_epoch_end``.

    It would not while somebody holds it open for further epochs.
    """
    _, holders = _HELD.get(trainer, ((), {}))
    if any(until is None or until > epochs_processed(trainer) for until, _ in holders.values()):
        return False
    stops = may_stop_early(trainer) and (trainer.should_stop or _early_stopping_will_ask(trainer))
    return bool(stops or beyond_plan(trainer))


def _early_stopping_will_ask(trainer: Trainer) -> bool:
    """Whether an EarlyStopping callback will ask for the end: its turn comes after all others, so ask a copy of it."""
    should_stop = trainer.should_stop
    try:
        for callback in callbacks_of(trainer):
            if is_early_stopping(callback):
                twin: Any = copy.copy(callback)
                twin.verbose = False
                twin.on_train_epoch_end(trainer, trainer.lightning_module)
        return bool(trainer.should_stop)
    except RuntimeError:  # its metric is logged later; the callback itself will say so if it is not
        return bool(should_stop)
    finally:
        trainer.should_stop = should_stop
