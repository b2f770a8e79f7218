"""Some epochs that unlearn suspects and learn trusted samples anew, watched, and undone where they do harm."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor.data.views import batch_size_of
from lightning_backdoor.trainer.ascent import Ascent
from lightning_backdoor.trainer.copies import restart_averages, weights
from lightning_backdoor.trainer.curation import Curation
from lightning_backdoor.trainer.finetuning import FineTuning, conclude, is_finite
from lightning_backdoor.trainer.limits import hold_open, release
from lightning_backdoor.trainer.phases import Phases
from lightning_backdoor.trainer.training_set import TrainingSet

__all__ = ["Split", "Unlearning"]

MAX_LOSS = 0.05  # of accuracy on watched samples, beyond which an epoch is undone
LEAST_STEPS = 10  # of ascent in an epoch
TOLERANCE = 0.005  # of accuracy, within which the model is as good as before


@dataclass(frozen=True)
class Split:
    """What is to become of N training samples.

    Attributes:
        labels: Labels as given, long ``(N,)``.
        suspect: Samples to unlearn, bool ``(N,)``.
        trusted: Samples to learn anew, bool ``(N,)``.
        watched: Samples on which accuracy is watched, bool ``(N,)``.
    """

    labels: Tensor
    suspect: Tensor
    trusted: Tensor
    watched: Tensor


class Unlearning:
    """Epochs of D-BR inside a fit: asked for at the end of an epoch (or before the first one), they are the next ones.

    Batches of suspects, with the loss turned around, alternate with batches of trusted samples, so that what is
    unlearned is the trigger rather than the class. An epoch that costs more than five points of accuracy is undone with
    its last batch, before validation, and the next one has half its rate. The repair is over when suspects get their
    label no more often than by mistake and accuracy is back.

    Args:
        lr: Learning rate; see :class:`~lightning_backdoor.trainer.finetuning.FineTuning`.
        reference: The authors' loop instead: all epochs, each of which goes through the suspects first and the trusted
            samples next, a constant rate, no bound but that weights stay finite.
        seed: Seed of the shuffles.
        method: Name of the defence, for readers.

    Attributes:
        accuracy: Share of the watched samples that got their label, before and after every epoch.
        obeyed: Share of the suspects that got theirs, before and after every epoch.
        undone: For every epoch whether it was undone.
    """

    def __init__(self, *, lr: float | None, reference: bool, seed: int, method: str) -> None:
        self._lr, self._reference, self._seed = lr, reference, seed
        self._method = method
        self.accuracy: list[float] = []
        self.obeyed: list[float] = []
        self.undone: list[bool] = []
        self._tuning = FineTuning()
        self._rate = 1.0
        self._judged = False
        self._before: dict[str, Any] | None = None
        self._data: TrainingSet | None = None
        self._curation: Curation | None = None
        self._split: Split | None = None
        self._phases: Phases | None = None
        self._held: Any = None
        self._ascent = Ascent(None, bounded=False)

    @property
    def left(self) -> int:
        """Epochs that may still come, with the present one; 0 outside of a repair."""
        return self._tuning.left

    @property
    def before(self) -> dict[str, Any] | None:
        """Weights that an epoch which does harm goes back to; ``None`` outside of a repair."""
        return self._before

    def attach(self, data: TrainingSet, curation: Curation, split: Split) -> None:
        """Say which samples it is about; call before :meth:`begin` or :meth:`resume`."""
        self._data, self._curation, self._split = data, curation, split
        self._ascent = Ascent(data.head.module if data.head.certain else None, bounded=not self._reference)

    def begin(self, trainer: Any, pl_module: Any, done: int, epochs: int, *, beyond: bool) -> None:
        """Start with the next epoch, after ``done`` ones; call in ``on_train_epoch_end`` or ``on_train_start``.

        Args:
            trainer: The running Trainer.
            pl_module: The LightningModule under training.
            done: Epochs that the fit has had.
            epochs: Largest number of epochs of the repair.
            beyond: Whether so many epochs go beyond the user's plan.
        """
        self._measure(trainer, pl_module)
        self._before = weights(trainer, pl_module)
        self._tuning.begin(trainer, epochs, self._lr, steady=self._reference, beyond=beyond, done=done)
        self.resume(trainer)

    def hold(self, trainer: Any, *, expected: bool) -> None:
        """Keep the fit open for a repair that was interrupted or is expected to begin; call in ``on_fit_start``."""
        self._tuning.at_fit_start(trainer)
        if expected:
            hold_open(trainer, self)
            self._held = trainer

    def let_go(self) -> None:
        """Keep the fit open no longer for a repair that was expected, or over before; call in ``on_train_start``."""
        self._tuning.at_train_start()
        if self._held is not None:
            release(self._held, self)
            self._held = None

    def resume(self, trainer: Any) -> None:
        """Draw the phases from the next epoch on."""
        assert self._data is not None
        assert self._curation is not None
        assert self._split is not None
        keep, trusted = self._curation.keep, self._split.trusted
        parts = (self._split.suspect, trusted if keep is None else trusted & keep)
        draw = partial(
            Phases,
            [part.nonzero().squeeze(1) for part in parts],
            size=batch_size_of(self._data.loader),
            least=(0, 0) if self._reference else (LEAST_STEPS, 2 * LEAST_STEPS),
            mixed=not self._reference,
            seed=self._seed,
            rank=trainer.global_rank,
            world=trainer.world_size,
            epoch=lambda: trainer.fit_loop.epoch_progress.current.processed,
        )
        self._phases = draw(most=self._tuning.allowed_batches(trainer, len(draw())))
        self._curation.set_phases(self._phases)
        self._curation.refresh()

    def at_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Let averages start again with the first epoch; call in ``on_train_epoch_start``."""
        if self._tuning.begins_now():
            restart_averages(trainer, pl_module)
        self.count_batches()

    def count_batches(self) -> None:
        """Count batches from here; call in ``on_train_start``, too: an epoch may be resumed in its middle."""
        self._ascent.at_epoch_start()

    def at_batch_start(self, trainer: Any, pl_module: Any, batch_idx: int) -> None:
        """Know what a batch holds, and set the rate of its step; call in ``on_train_batch_start``."""
        self._tuning.at_batch_start(trainer, pl_module, batch_idx)
        if self._phases is not None and self._split is not None:
            self._ascent.at_batch_start(trainer, self._phases, self._split.labels, batch_idx)
            self._tuning.share = self._rate

    def at_backward(self, trainer: Any, loss: Tensor) -> None:
        """Turn the loss of suspects around; call in ``on_before_backward``."""
        if self._phases is not None:
            self._ascent.at_backward(trainer, loss)

    def at_step(self, trainer: Any, optimizer: torch.optim.Optimizer) -> None:
        """Limit the ascent; call in ``on_before_optimizer_step``."""
        if self._phases is not None:
            self._ascent.at_step(trainer, optimizer)

    def at_batch_end(self, trainer: Any, pl_module: Any) -> bool:
        """Judge an epoch with its last batch, and say whether it was; call in ``on_train_batch_end``."""
        if self._phases is None or self._judged or not (self._tuning.ends_now(trainer) or trainer.is_last_batch):
            return False
        self._judge(trainer, pl_module)
        return True

    def at_epoch_end(self, trainer: Any, pl_module: Any) -> bool:
        """Say whether the epoch was the last one; call in ``on_train_epoch_end``."""
        if not self._judged:  # a callback that came later has ended the epoch
            self._judge(trainer, pl_module)
        self._judged = False
        lost = self.accuracy[0] - self.accuracy[-1]
        forgotten = lost <= TOLERANCE and self.obeyed[-1] <= self._by_mistake(self.accuracy[-1])
        if self._tuning.at_epoch_end() or (forgotten and not self._reference):
            self.stop()
            return True
        self.resume(trainer)
        return False

    def _judge(self, trainer: Any, pl_module: Any) -> None:
        """Measure what an epoch has led to, and undo it if it costs too much or the weights are no numbers any more."""
        self._ascent.release()
        accuracy, _ = self._measure(trainer, pl_module)
        harmful = not is_finite(pl_module) or (not self._reference and self.accuracy[0] - accuracy > MAX_LOSS)
        self.undone.append(harmful)
        conclude(trainer, pl_module, self._before if harmful else None)
        if harmful:
            self._rate /= 2
        elif not self._reference:
            self._before = weights(trainer, pl_module)
        self._judged = True

    def stop(self) -> None:
        """End the repair, if there is one, and draw as before."""
        self._tuning.stop()
        self._ascent.release()
        self._before = None
        if self._phases is not None and self._curation is not None:
            self._curation.set_phases(None)
            self._curation.refresh()
        self._phases = None

    def release(self) -> None:
        """Give everything back that belongs to the user; a repair that is not over can be resumed."""
        self._tuning.leave()
        self._ascent.release()
        self.let_go()
        if self._phases is not None and self._curation is not None:
            self._curation.set_phases(None)
        self._data = self._curation = self._split = self._phases = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only; while a repair lasts, with the weights to go back to."""
        return {
            "accuracy": list(self.accuracy),
            "obeyed": list(self.obeyed),
            "undone": list(self.undone),
            "tuning": self._tuning.state_dict(),
            "rate": self._rate,
            "judged": self._judged,
            "before": self._before,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""
        self.accuracy, self.obeyed = list(state_dict["accuracy"]), list(state_dict["obeyed"])
        self.undone, self._rate = list(state_dict["undone"]), state_dict["rate"]
        self._before, self._judged = state_dict["before"], state_dict["judged"]
        self._tuning.load_state_dict(state_dict["tuning"])

    def _measure(self, trainer: Any, pl_module: Any) -> tuple[float, float]:
        """Note and return the shares of the watched samples and of the suspects that get their label."""
        assert self._data is not None
        assert self._split is not None
        looked_at = (self._split.watched | self._split.suspect).nonzero().squeeze(1)
        predicted = self._data.predict(trainer, pl_module, description=f"{self._method} check", positions=looked_at)
        right = (predicted == self._split.labels[looked_at]).float()
        self.accuracy.append(float(right[self._split.watched[looked_at]].mean()))
        self.obeyed.append(float(right[self._split.suspect[looked_at]].sum()) / max(int(self._split.suspect.sum()), 1))
        return self.accuracy[-1], self.obeyed[-1]

    def _by_mistake(self, accuracy: float) -> float:
        """Twice the share of images that get some wrong label by mistake: forgotten suspects are no more."""
        assert self._data is not None
        return 2 * (1 - accuracy) / (self._data.num_classes - 1)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running Trainer."""
        running = ("_data", "_curation", "_split", "_phases", "_held")
        return {**self.__dict__, **dict.fromkeys(running)}
