"""Some epochs with a learning rate of their own."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_backdoor._lightning import limited
from lightning_backdoor.responses.limits import (
    beyond_plan,
    hold_open,
    plan_is_over,
    planned_epochs,
    release,
    stops_within_epoch,
)
from lightning_backdoor.responses.weight_copies import put_weights, restart_averages

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["FineTuning", "conclude", "enough_epochs", "is_finite"]

LR_SHARE = 0.05  # of the largest learning rate that a parameter group has had
EPOCH_SHARE = 0.1  # of the planned epochs
LEAST_STEPS = 100
_NEVER = 2**62


class FineTuning:
    """A phase of fine-tuning inside a fit: asked for at the end of an epoch, it takes the epochs that follow.

    An ordinary phase trains as ever: it only counts epochs, and keeps the fit from ending before. Any other one has a
    learning rate of its own, which falls in a straight line to zero, or stays constant. It is in the optimizers during
    their steps alone (Lightning calls ``training_step`` within them), so schedulers and monitors see their own one.

    Batch norms may keep their statistics, and train their scale and shift alone. That is for batches that are unlike
    what the model will see, such as samples to be unlearned. After units were reset, statistics must go on: those of
    the units that were drawn anew are unknown, and without these units, those of all later layers have changed.

    Schedulers wait where they could not go on: beyond the plan of the user, and in an epoch for the steps by which it
    is longer than an ordinary one.

    Attributes:
        left: Epochs of the phase that are not over; 0 outside of it.
        share: What the rate of the next step is multiplied with.
    """

    def __init__(self) -> None:
        self.left = 0
        self.share = 1.0
        self._ordinary = self._constant = self._frozen_norms = False
        self._batches = 0  # of an ordinary epoch
        self._epochs = 0
        self._until = 0  # epochs that the fit has had at the end of the phase
        self._beyond = False
        self._lr: float | None = None
        self._factor = 1.0
        self._given_back, self._waiting = ExitStack(), ExitStack()
        self._took_over = False
        self._held: Any = None
        self._fresh = False

    def begin(
        self,
        trainer: Trainer,
        epochs: int,
        lr: float | None,
        *,
        ordinary: bool = False,
        constant: bool = False,
        frozen_norms: bool = False,
        beyond: bool = False,
        done: int | None = None,
    ) -> None:
        """Start the phase with the next epoch; call in ``on_train_epoch_end``, or with ``done`` elsewhere.

        Args:
            trainer: The running Trainer.
            epochs: Length of the phase, at least 1.
            lr: Learning rate of its first step; ``None``: 5 % of the largest that each parameter group has had.
            ordinary: Leave the learning rate, its schedule and batch norms alone.
            constant: Keep this rate to the end.
            frozen_norms: Let batch norms keep their statistics.
            beyond: The phase may exceed the user's ``max_steps`` and ``max_time``.
            done: Epochs that the fit has had; ``None``: with the one that ends.
        """
        self.left = self._epochs = epochs
        self._until = (trainer.current_epoch + 1 if done is None else done) + epochs
        self._lr, self._ordinary, self._constant, self._frozen_norms = lr, ordinary, constant, frozen_norms
        self._batches, self._beyond = int(trainer.num_training_batches), beyond
        self._factor = self.share = 1.0
        self._fresh = True
        self._hold(trainer)

    def begins_now(self) -> bool:
        """Whether this is the first epoch of the phase; true once, call in ``on_train_epoch_start``."""
        fresh, self._fresh = self._fresh, False
        return fresh and self.left > 0

    def keep_open(self, trainer: Trainer) -> None:
        """Continue a phase that was interrupted, also where the checkpoint was written after the planned last epoch."""
        if self._until:
            self._hold(trainer)

    def end_if_over(self) -> None:
        """A phase that was over when the checkpoint was written needs no more epochs."""
        if not self.left:
            self.release()

    def prepare_step(self, trainer: Trainer, pl_module: nn.Module, batch_idx: int) -> None:
        """Take the learning rate over, freeze what is to be frozen; call in ``on_train_batch_start``.

        Not earlier: a run that is resumed within an epoch does not begin one.
        """
        if not self.left or self._ordinary:
            return
        self._take_over(trainer)
        self._let_schedulers_wait(trainer, batch_idx)
        for module in pl_module.modules() if self._frozen_norms else ():
            if module.training and "BatchNorm" in type(module).__name__:
                self._given_back.callback(setattr, module, "training", True)
                module.training = False
        if self._constant:
            return
        done = self._epochs - self.left + batch_idx / max(trainer.num_training_batches, 1)
        self._factor = max(1 - done / self._epochs, 0.0)

    def prolong(self, trainer: Trainer, epochs: int) -> None:
        """Let so many epochs more follow; call in ``on_train_batch_end``, with the last batch of the phase."""
        self.left += epochs
        self._epochs += epochs
        self._until += epochs
        self._hold(trainer)

    @property
    def length(self) -> int:
        """Epochs of the phase from its beginning to its end."""
        return self._epochs

    def ends_now(self, trainer: Trainer) -> bool:
        """Whether the phase ends with this batch, by its length or with the plan; call in ``on_train_batch_end``.

        What changes the weights then is done before validation, and before anything is saved or monitored.
        """
        if self.left and not self._beyond and plan_is_over(trainer):
            self.left = 1
            self.release()  # a Trainer that is kept open would go on with the epoch
            return stops_within_epoch(trainer) or bool(trainer.is_last_batch)
        return self.left == 1 and bool(trainer.is_last_batch)

    def count_epoch(self) -> bool:
        """Count an epoch of the phase, and say whether it was the last one; call in ``on_train_epoch_end``."""
        if not self.left:
            return False
        self.left -= 1
        if self.left:
            return False
        self.release()
        return True

    def allowed_batches(self, trainer: Trainer, wanted: int) -> int:
        """Batches that the next epoch may have, where ``wanted`` would be drawn.

        Within the user's plan as many as an ordinary epoch has; beyond it what ``limit_train_batches`` leaves of them.
        """
        return int(limited(wanted, trainer.limit_train_batches)) if beyond_plan(trainer) else self._batches

    def stop(self) -> None:
        """End the phase before its time."""
        self.left, self._fresh = 0, False
        self.release()

    def leave(self) -> None:
        """Give everything back that belongs to the user; the fit is over."""
        self.release()
        self._waiting.close()

    def release(self) -> None:
        """Give everything back but schedulers that are at their end; the fit may go on without the phase."""
        self._given_back.close()
        if self._held is None or not beyond_plan(self._held):
            self._waiting.close()
        self._took_over = False
        if self._held is not None:
            release(self._held, self)
            self._held = None

    def rate(self, group: dict[str, Any], default: float = 0.0) -> float:
        """Learning rate of a parameter group for the step that comes; ``default`` is that of its optimizer."""
        largest = max(float(group.get(key, 0.0)) for key in ("max_lr", "initial_lr", "lr"))
        return self.share * self._factor * (LR_SHARE * max(largest, default) if self._lr is None else self._lr)

    def _hold(self, trainer: Trainer) -> None:
        hold_open(trainer, self, self._until, beyond=self._beyond)
        self._held = trainer

    def _take_over(self, trainer: Trainer) -> None:
        for optimizer in () if self._took_over else trainer.optimizers:
            rates = _Rates(self)
            self._given_back.callback(rates.give_all_back, optimizer)
            self._given_back.callback(optimizer.register_step_pre_hook(rates.lend).remove)
            self._given_back.callback(optimizer.register_step_post_hook(rates.give_back).remove)
        self._took_over = True

    def _let_schedulers_wait(self, trainer: Trainer, batch_idx: int) -> None:
        if batch_idx == 0:
            self._waiting.close()
        longer, beyond = batch_idx >= self._batches, beyond_plan(trainer)
        for config in trainer.lr_scheduler_configs:
            if config.frequency != _NEVER and (beyond or (longer and config.interval == "step")):
                self._waiting.callback(setattr, config, "frequency", config.frequency)
                config.frequency = _NEVER

    def state_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return {
            "left": self.left,
            "epochs": self._epochs,
            "until": self._until,
            "beyond": self._beyond,
            "lr": self._lr,
            "ordinary": self._ordinary,
            "constant": self._constant,
            "frozen_norms": self._frozen_norms,
            "batches": self._batches,
            "fresh": self._fresh,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""
        self.left, self._epochs = state_dict["left"], state_dict["epochs"]
        self._until, self._beyond, self._lr = state_dict["until"], state_dict["beyond"], state_dict["lr"]
        self._ordinary, self._frozen_norms = state_dict["ordinary"], state_dict["frozen_norms"]
        self._constant, self._batches = state_dict["constant"], state_dict["batches"]
        self._fresh = state_dict["fresh"]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running Trainer."""
        running = {"_given_back": ExitStack(), "_waiting": ExitStack(), "_took_over": False, "_held": None}
        return {**self.__dict__, **running}


class _Rates:
    """Puts the rates of the phase into one optimizer for the moment of a step."""

    def __init__(self, phase: FineTuning) -> None:
        self._phase = phase
        self._own: list[list[float]] = []  # a stack: an optimizer whose step calls that of its base runs hooks twice

    def lend(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._own.append([float(group["lr"]) for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            _set_rate(group, self._phase.rate(group, float(optimizer.defaults.get("lr", 0.0))))

    def give_all_back(self, optimizer: torch.optim.Optimizer) -> None:
        while self._own:  # a step that failed gave nothing back
            self.give_back(optimizer)

    def give_back(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group, own in zip(optimizer.param_groups, self._own.pop(), strict=True):
            _set_rate(group, own)


def _set_rate(group: dict[str, Any], value: float) -> None:
    if isinstance(group["lr"], Tensor):  # of a capturable or fused optimizer, which holds on to it
        group["lr"].fill_(value)
    else:
        group["lr"] = value


def enough_epochs(trainer: Trainer) -> int:
    """Epochs for a fine-tuning: a tenth of the planned ones, more of them where they are very short."""
    planned = planned_epochs(trainer)
    least: int = math.ceil(LEAST_STEPS / max(trainer.num_training_batches, 1))
    return max(1, round(EPOCH_SHARE * planned), min(least, planned))


def is_finite(module: nn.Module) -> bool:
    """Whether all parameters are finite numbers."""
    return all(bool(parameter.isfinite().all()) for parameter in module.parameters())


def conclude(trainer: Trainer, pl_module: LightningModule, before: dict[str, Any] | None) -> None:
    """Go back to the weights ``before`` a phase; without any, stand by what has come of it.

    Then averages start again: what was judged is what the user gets, and not a mean with what was only on the way.
    """
    if before is None:
        restart_averages(trainer, pl_module)
    else:
        put_weights(trainer, pl_module, before, groups=False)
