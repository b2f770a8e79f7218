"""Going back to the start of fit: weights, optimizer, schedulers, averages and the Trainer's own counters."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_backdoor._lightning import callbacks_of, forget_saved_step, load_again
from lightning_backdoor.errors import TrainerError
from lightning_backdoor.events import Event
from lightning_backdoor.responses.base import Detection, Response, Session, labels_of
from lightning_backdoor.responses.checkpointing import tell_earlier_files
from lightning_backdoor.responses.counters import counters, defines, put_counters, reset_metrics
from lightning_backdoor.responses.limits import about_to_end, hold_open, release
from lightning_backdoor.responses.weight_copies import averages, foreign, on_cpu, put_weights, weights

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Restart", "require_rewindable", "restore", "snapshot"]

MAX_RESTARTS = 2

_NOT_REWINDABLE = {
    "Timer": (
        '`Trainer(max_time=...)` must be left out when response="restart": the warm-up would use up the time of the '
        "run that follows it.",
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


def snapshot(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
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


def restore(trainer: Trainer, pl_module: LightningModule, state: dict[str, Any]) -> None:
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


class Restart(Response):
    """Go back to the start of the fit, and train the full number of epochs on the samples that are kept.

    Decided at the end of an epoch, carried out at the start of the next. In between, the fit loop is kept from ending,
    and a checkpoint holds all that is needed to carry it out later.

    Args:
        at_most: Restarts in a fit.
        last_detection: Whether a run that began anew is scanned once more when it is about to end.
        every: Epochs between periodic detections; ``None``: there are none.

    Attributes:
        is_due: Whether a restart was decided and is not yet carried out.
        count: Restarts carried out so far.
    """

    name = "restart"

    def __init__(self, *, last_detection: bool, every: int | None = None, at_most: int = MAX_RESTARTS) -> None:
        self._last_detection, self._every, self._at_most = last_detection, every, at_most
        self._forget()

    def _forget(self) -> None:
        self.is_due = False
        self.count = 0
        self._detected = False
        self._unseen: Tensor | None = None
        self._measured_at = 0  # epochs of the present run when it was measured last
        self._start: dict[str, Any] | None = None
        self._before_checkpoint: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, title: str) -> None:
        """Keep weights and callbacks as the user made them: a checkpoint may replace them next.

        Lightning does not say yet whether there is one.
        """
        detected = self._detected
        self._forget()
        self._detected = detected
        require_rewindable(trainer)
        self._before_checkpoint = {
            "module": on_cpu(pl_module.state_dict()),
            "averages": averages(trainer),
            **_of_owners(trainer, pl_module),
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue a run that was interrupted between decision and restart.

        If the checkpoint was written without this defense, the start is put together here, where optimizers and
        schedulers are still new.

        Raises:
            TrainerError: The weights that the run started from cannot be known.
        """
        if self.is_due:
            hold_open(trainer, self)
            self._held = trainer
        before, self._before_checkpoint = self._before_checkpoint, None
        if before is None or self._start is not None or trainer.ckpt_path is None:
            return
        if before["module"].keys() != pl_module.state_dict().keys():
            raise TrainerError(
                'response="restart" needs the weights that training started from, but the checkpoint was written '
                "without this callback and the model is built in `configure_model`. Build it in `__init__`, or pass "
                'response="continue".'
            )
        before["module"] = trainer.strategy.broadcast(before["module"])  # loading one made ranks equal
        now = snapshot(trainer, pl_module)
        self._start = {**now, **before, "counters": _of_setup(trainer, pl_module, now["counters"], before["counters"])}

    def on_train_start(self, session: Session) -> None:
        """Note where to return to, unless it is known already."""
        if self._start is None and self.detects_again:
            self._start = snapshot(session.trainer, session.module)

    def respond(self, session: Session, detection: Detection, event: Event) -> Event:
        """Decide on a restart if samples were removed."""
        self._detected = True
        restarts = bool(event.removed) and self.can_return
        if restarts:
            self.decide(session)
        return replace(event, run=self.count + 1, restarts=restarts)

    @property
    def can_return(self) -> bool:
        """Whether a restart is left, and the start is known."""
        return self.count < self._at_most and self._start is not None

    def decide(self, session: Session) -> None:
        """Go back at the start of the next epoch, and keep the fit from ending before."""
        self.is_due = True
        self._detected = True
        self._held = session.trainer
        hold_open(session.trainer, self)

    def on_train_epoch_start(self, session: Session) -> None:
        """Go back if that was decided, then draw new batches.

        With ``reload_dataloaders_every_n_epochs`` the data are loaded as for a first epoch: a loader may depend on it.
        """
        trainer = session.trainer
        if not self.is_due or self._start is None:
            return
        tell_earlier_files(trainer, session.case.title, session.began)
        restore(trainer, session.module, self._start)
        self.release()
        trainer.should_stop = False  # a stop that was decided during the warm-up
        load_again(trainer)
        self.is_due = False
        self.count += 1
        self._measured_at = 0
        self._unseen = None if session.in_training is None else ~session.in_training
        _announce_again(trainer, session.case.defense)
        session.loader_filter.restart_iterator()
        session.case.count_from_zero()
        if not self.detects_again:
            self._start = None

    def on_train_epoch_end(self, session: Session) -> bool:
        """Measure what a run that began anew makes of the removed samples, where no detection will."""
        found = session.case.verdict is not None and bool(session.case.verdict.findings)
        last = found and self._unseen is not None and not self.is_due and not self.repeats
        if last and session.epochs_done > self._measured_at and about_to_end(session.trainer):
            self._measured_at = session.epochs_done
            measure_removed(session, run=self.count + 1)
        return False

    def awaits_detection(self, session: Session) -> bool:
        """Whether no restart is about to be carried out."""
        return not self.is_due

    @property
    def unseen(self) -> Tensor | None:
        """Samples that were out of the training set when the present run began; none comes back."""
        return self._unseen

    @property
    def start(self) -> dict[str, Any] | None:
        """Where it goes back to."""
        return None if self._start is None else self._start["module"]

    @property
    def detects_again(self) -> bool:
        """Whether another detection may follow (the first one, a periodic one, or the last one at the end)."""
        return not self._detected or self.repeats

    @property
    def repeats(self) -> bool:  # type: ignore[override]
        """Whether another detection is due when training is about to end."""
        return self._every is not None or (self._last_detection and self.count < self._at_most)

    def release(self) -> None:
        """Put the user's limits on epochs and steps back."""
        if self._held is not None:
            release(self._held, self)
            self._held = None

    _held: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; while a restart may come, the start that it goes back to."""
        return {
            "is_due": self.is_due,
            "count": self.count,
            "start": self._start,
            "detected": self._detected,
            "unseen": self._unseen,
            "measured_at": self._measured_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""
        self.is_due, self.count, self._start = state_dict["is_due"], state_dict["count"], state_dict["start"]
        self._detected, self._unseen = state_dict["detected"], state_dict["unseen"]
        self._measured_at = state_dict["measured_at"]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running Trainer."""
        return {**self.__dict__, "_held": None}


def measure_removed(session: Session, *, run: int, response: str = "restart") -> None:
    """At the end of a run that began anew, say what its model makes of the samples that it was trained without.

    Args:
        session: The fit.
        run: Number of the run.
        response: Name of the response in the event.
    """
    history = session.case.history
    predicted = session.scanner.predict(session.trainer, session.module, description=f"{session.case.title} check")
    correct = predicted == labels_of(session.verdict)
    accuracy, rate = session.label_rates(correct)
    history.append(
        Event(
            session.epochs_done,
            0,
            history[-1].num_flagged_before_cap,
            response=response,
            run=run,
            rechecked=int((~session.verdict.keep).sum()),
            accuracies=(accuracy,),
            flagged_label_rates=(rate,),
            of_labels=session.rates_of_labels(correct),
        )
    )
    session.case.explain()
    session.case.tell()


def require_rewindable(trainer: Trainer) -> None:
    """Raise if a callback rules a return to the start out.

    Raises:
        TrainerError: ``max_time`` is set, or a callback changes parameter groups or schedulers on its way.
    """
    classes = {cls.__name__ for callback in callbacks_of(trainer) for cls in type(callback).__mro__}
    for name, (what, remedy) in _NOT_REWINDABLE.items():
        if name in classes:
            raise TrainerError(f'{what} {remedy}, or pass response="continue".')


def _count_from_zero(trainer: Trainer) -> None:
    """Reset the Trainer's progress to that of a first epoch that has just been announced."""
    loop: Any = trainer.fit_loop
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


def _announce_again(trainer: Trainer, defense: object) -> None:
    """Call ``on_train_epoch_start`` again on the callbacks before the defense: the epoch has another number now."""
    for callback in callbacks_of(trainer):
        if callback is defense:
            return
        callback.on_train_epoch_start(trainer, trainer.lightning_module)


def _call_restart_hooks(trainer: Trainer, pl_module: LightningModule) -> None:
    for _, callback in foreign(trainer):
        if hasattr(callback, "on_backdoor_restart"):
            callback.on_backdoor_restart(trainer, pl_module)
    restart: Any = getattr(pl_module, "on_backdoor_restart", None)
    if restart is not None:
        restart()


def _of_owners(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """State of all callbacks, and counters of them and of the module."""
    callbacks = foreign(trainer)
    return {
        "callbacks": {key: on_cpu(callback.state_dict()) for key, callback in callbacks},
        "counters": {
            "module": counters(pl_module),
            "callbacks": {key: counters(callback) for key, callback in callbacks},
        },
    }


def _of_setup(
    trainer: Trainer, pl_module: LightningModule, now: dict[str, Any], before: dict[str, Any]
) -> dict[str, Any]:
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
