"""Going back to the start of fit: weights, optimizer, schedulers, averages and the Trainer's own counters."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from lightning_backdoor._lightning import forget_saved_step, load_again
from lightning_backdoor.errors import TrainerError
from lightning_backdoor.responses.counters import counters, defines, put_counters, reset_metrics
from lightning_backdoor.responses.limits import hold_open, release
from lightning_backdoor.responses.weight_copies import averages, foreign, on_cpu, put_weights, weights

__all__ = ["Rewind", "require_rewindable", "restore", "snapshot"]

_NOT_REWINDABLE = {
    "Timer": (
        "`Trainer(max_time=...)` must be left out when `rewind=True`: the warm-up would use up the time of the run "
        "that follows it.",
        "Limit the run by `max_epochs` or `max_steps`",
    ),
    "BaseFinetuning": (
        "Callbacks that add parameter groups while training (BackboneFinetuning) cannot go back to the start.",
        "Give all parameters to the optimizer and vary `requires_grad` or the learning rate",
    ),
    "StochasticWeightAveraging": (
        "StochasticWeightAveraging replaces the scheduler and cannot go back to the start.",
        "Use Lightning's WeightAveraging",
    ),
}


def snapshot(trainer: Any, pl_module: Any) -> dict[str, Any]:
    """Copy everything that training changes, as tensors and plain values that load with ``weights_only=True``.

    Holds the module's state, optimizers, averages, schedulers, the precision plugin, the state of every other
    callback, and the counters of module and callbacks (:func:`~.counters.counters`). Costs one copy of the model and of
    its optimizer state on the CPU.

    Args:
        trainer: The running Trainer, with optimizers already set up.
        pl_module: The LightningModule under training.
    """
    return {
        **weights(trainer, pl_module),
        "schedulers": [on_cpu(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs],
        "precision": on_cpu(trainer.precision_plugin.state_dict()),
        **_of_owners(trainer, pl_module),
    }


def restore(trainer: Any, pl_module: Any, state: dict[str, Any]) -> None:
    """Put a :func:`snapshot` back and let the Trainer count epochs and steps from zero again.

    Call in ``on_train_epoch_start``. The logger's step axis goes on, so that curves do not overlap. Random streams go
    on, too: the second run draws fresh batches. Metrics inside the module are reset. Last ``on_backdoor_restart()`` of
    the module is called, and ``on_backdoor_restart(trainer, pl_module)`` of callbacks, where there is such a method: it
    puts back what else the training has changed.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
        state: What :func:`snapshot` returned, perhaps read back from a checkpoint.
    """
    own = copy.deepcopy({name: state[name] for name in ("schedulers", "precision", "callbacks")})
    for config, saved in zip(trainer.lr_scheduler_configs, own["schedulers"], strict=True):
        config.scheduler.load_state_dict(saved)
    trainer.precision_plugin.load_state_dict(own["precision"])
    for key, callback in foreign(trainer):
        if own["callbacks"].get(key):
            callback.load_state_dict(_where_it_saves_now(callback, own["callbacks"][key]))
        forget_saved_step(callback)
        put_counters(callback, state["counters"]["callbacks"].get(key, {}))
    put_weights(trainer, pl_module, state)
    put_counters(pl_module, state["counters"]["module"])
    reset_metrics(pl_module)
    _count_from_zero(trainer)
    _call_restart_hooks(trainer, pl_module)


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
        self._before_checkpoint: dict[str, Any] | None = None

    def before_checkpoint(self, trainer: Any, pl_module: Any) -> None:
        """Keep weights and callbacks as the user made them; call in ``setup``.

        A checkpoint may replace them next. Lightning does not tell yet whether there is one.
        """
        self._before_checkpoint = {
            "module": on_cpu(pl_module.state_dict()),
            "averages": averages(trainer),
            **_of_owners(trainer, pl_module),
        }

    def at_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Continue a run that was interrupted between asking and returning; call in ``on_fit_start``.

        If the checkpoint knows nothing of this defence, the start is put together here, where optimizers and schedulers
        are still new.

        Raises:
            TrainerError: The weights that the run started from cannot be known.
        """
        if self.is_due:
            hold_open(trainer, self)
        before, self._before_checkpoint = self._before_checkpoint, None
        if before is None or self._start is not None or trainer.ckpt_path is None:
            return
        if before["module"].keys() != pl_module.state_dict().keys():
            raise TrainerError(
                "`rewind=True` needs the weights that training started from, but the checkpoint was written without "
                "this callback and the model is built in `configure_model`. Build it in `__init__`, or pass "
                "`rewind=False`."
            )
        before["module"] = trainer.strategy.broadcast(before["module"])  # a checkpoint was what made ranks agree
        now = snapshot(trainer, pl_module)
        self._start = {**now, **before, "counters": _of_setup(trainer, pl_module, now["counters"], before["counters"])}

    def at_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Note where to return to, unless it is known already; call in ``on_train_start``."""
        if self._start is None:
            self._start = snapshot(trainer, pl_module)

    def ask(self, trainer: Any) -> None:
        """Ask for the return; call in ``on_train_epoch_end``."""
        self.is_due = True
        hold_open(trainer, self)

    def carry_out(self, trainer: Any, pl_module: Any) -> bool:
        """Return if asked to, and say whether; call in ``on_train_epoch_start``, then draw new batches.

        With ``reload_dataloaders_every_n_epochs`` the data are loaded as for a first epoch: a loader may depend on it.
        """
        if not self.is_due or self._start is None:
            return False
        restore(trainer, pl_module, self._start)
        self.release(trainer)
        trainer.should_stop = False  # a stop that was asked for during the warm-up
        load_again(trainer)
        self.is_due = False
        self.count += 1
        _announce_again(trainer, self)
        return True

    def release(self, trainer: Any) -> None:
        """Put the user's limits on epochs and steps back, once no other defence waits for its return."""
        release(trainer, self)

    def forget(self) -> None:
        """Drop the snapshot: no further return will be asked for."""
        self._start = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {"is_due": self.is_due, "count": self.count, "start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""
        self.is_due, self.count, self._start = state_dict["is_due"], state_dict["count"], state_dict["start"]


def require_rewindable(trainer: Any) -> None:
    """Raise if a callback rules a return to the start out.

    Raises:
        TrainerError: ``max_time`` is set, or a callback changes parameter groups or schedulers on its way.
    """
    classes = {cls.__name__ for callback in trainer.callbacks for cls in type(callback).__mro__}
    for name, (what, remedy) in _NOT_REWINDABLE.items():
        if name in classes:
            raise TrainerError(f"{what} {remedy}, or pass `rewind=False`.")


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


def _announce_again(trainer: Any, rewind: Rewind) -> None:
    """Tell callbacks that came before in the list that the epoch is another one than they were told."""
    for callback in trainer.callbacks:
        if any(value is rewind for value in vars(callback).values()):
            return
        callback.on_train_epoch_start(trainer, trainer.lightning_module)


def _call_restart_hooks(trainer: Any, pl_module: Any) -> None:
    for _, callback in foreign(trainer):
        if hasattr(callback, "on_backdoor_restart"):
            callback.on_backdoor_restart(trainer, pl_module)
    if hasattr(pl_module, "on_backdoor_restart"):
        pl_module.on_backdoor_restart()


def _of_owners(trainer: Any, pl_module: Any) -> dict[str, Any]:
    """State of all callbacks, and counters of them and of the module."""
    callbacks = foreign(trainer)
    return {
        "callbacks": {key: on_cpu(callback.state_dict()) for key, callback in callbacks},
        "counters": {
            "module": counters(pl_module),
            "callbacks": {key: counters(callback) for key, callback in callbacks},
        },
    }


def _of_setup(trainer: Any, pl_module: Any, now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Counters as ``setup`` left them: those of now, but where ``on_load_checkpoint`` may have changed them since."""
    return {
        "module": before["module"] if defines(pl_module, "on_load_checkpoint") else now["module"],
        "callbacks": {
            key: before["callbacks"].get(key, {}) if defines(owner, "on_load_checkpoint") else now["callbacks"][key]
            for key, owner in foreign(trainer)
        },
    }


def _where_it_saves_now(callback: Any, state: dict[str, Any]) -> dict[str, Any]:
    """State of a ModelCheckpoint for the folder that it writes to, where ``last.ckpt`` is to be overwritten."""
    now = {name: getattr(callback, name) for name in ("dirpath", "last_model_path") if hasattr(callback, name)}
    return {**state, **now} if "dirpath" in state else state
