"""What defences share that repair a model: epochs of unlearning and relearning within a fit."""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor._lightning import rank_zero_info, rank_zero_warn
from lightning_backdoor.callbacks.base import Defense, require_count, require_positive, require_rate
from lightning_backdoor.callbacks.repairs import Repair, evidence, sentence
from lightning_backdoor.callbacks.rounds import STILL_OBEYED, shares
from lightning_backdoor.callbacks.schedule import repair_begins
from lightning_backdoor.callbacks.suspects import split_of
from lightning_backdoor.loading.batch_schedule import require_batches
from lightning_backdoor.responses.checkpointing import warn_of_treated_files
from lightning_backdoor.responses.limits import about_to_end, epochs_left, planned_end, require_extendable
from lightning_backdoor.responses.unlearn import Unlearning
from lightning_backdoor.scanning.isolation import require_automatic
from lightning_backdoor.scanning.scanner import ScanOptions

__all__ = ["RepairCallback"]


class RepairCallback(Defense):
    """Base of the defences that unlearn some samples and learn others anew.

    It lends Lightning's hooks to the epochs of repair, and resumes them. Subclasses decide when to look, adopt a
    verdict with ``trusted`` and ``suspect`` samples, note it in the history, and call :meth:`_begin`.

    Attributes:
        history: What each look found and what came out of its repair.
    """

    def __init__(
        self,
        *,
        epochs: int,
        extra_epochs: int,
        lr: float | None,
        paper_loop: bool,
        max_removed: float,
        options: ScanOptions,
        report_dir: str | Path | None,
        name: str | None,
    ) -> None:
        super().__init__(max_removed=max_removed, options=options, report_dir=report_dir, name=name)
        self.epochs = require_positive("epochs", epochs) or 1
        self.extra_epochs = require_count("extra_epochs", extra_epochs)
        self.lr = require_rate("lr", lr)
        self.paper_loop = paper_loop
        self.history: list[Repair] = []
        self._last_look: int | None = None
        self._run = self._new_run()

    @abstractmethod
    def _look(self, trainer: Any, pl_module: Any, done: int) -> None:
        """Adopt a verdict after ``done`` epochs of the fit, and begin a repair if there is something to repair."""

    @abstractmethod
    def _meaning(self) -> str:
        """Where the score is from; see :func:`~lightning_backdoor.callbacks.repairs.evidence`."""

    def _require(self, trainer: Any, pl_module: Any) -> None:
        """Say what cannot work with this training set."""

    def _at_once(self) -> bool:
        """Whether to repair the weights as they are at the start of the fit, which ends with the repair."""
        return False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the curation of the training loader."""
        if stage == "fit":
            require_automatic(pl_module, f"{self.title} unlearns")
            require_extendable(trainer, self.title)
            self._run, self.history, self._last_look = self._new_run(), [], None
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Continue a repair that was interrupted, or keep a finished training open for one."""
        self._run.hold(trainer, expected=self._at_once() and not self.history)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the training set can be read and repaired with; resume a repair, or begin one that comes first."""
        super().on_train_start(trainer, pl_module)
        assert self._training_set is not None
        require_batches(self._training_set.loader)
        self._require(trainer, pl_module)
        if self._run.left:
            self._attach()
            self._run.resume(trainer)
        elif self._at_once():
            if not self.history and not trainer.fast_dev_run:
                with self._acting():
                    self._look(trainer, pl_module, trainer.current_epoch)
            trainer.should_stop = trainer.should_stop or not self._run.left
        self._run.let_go()
        if self._run.left and self._loader_filter is not None:
            self._loader_filter.restart_iterator()
            self._run.count_batches()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin an epoch of repair, if there is one."""
        if self._last_look is not None and trainer.current_epoch < self._last_look:  # another defence went back
            self._run.stop()
            self._run, self._last_look = self._new_run(), None
        self._run.at_epoch_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Know what the batch holds, and set the rate of its step."""
        self._run.at_batch_start(trainer, pl_module, batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Judge an epoch of repair with its last batch, before validation."""
        with self._acting():
            if self._run.at_batch_end(trainer, pl_module):
                self._treated_until = time.time()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Turn the loss of suspects around."""
        self._run.at_backward(trainer, loss)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Limit the ascent."""
        self._run.at_step(trainer, optimizer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if training ends with a model that is not repaired."""
        remaining = self.history[-1].remaining if self.history and not self.paper_loop else None
        if remaining is not None and remaining > STILL_OBEYED:
            rank_zero_warn(
                f"{self.title} ends with a model that gives {remaining:.1%} of the suspect images their label: part of "
                "a backdoor may still be there, or their labels are true (clean-label attack). Look at the report; to "
                "be sure, train anew without them."
            )
        warn_of_treated_files(trainer, self.title, self._began, self._treated_until)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only; while a repair lasts, with the weights to go back to."""
        return {
            **super().state_dict(),
            "done": [done.state_dict() for done in self.history],
            "last_look": self._last_look,
            "run": self._run.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue an interrupted run."""
        super().load_state_dict(state_dict)
        if state_dict:
            self.history = [Repair(**done) for done in state_dict["done"]]
            self._last_look = state_dict["last_look"]
            self._run.load_state_dict(state_dict["run"])

    def _leave(self) -> None:
        self._run.release()
        super()._leave()

    def _new_run(self) -> Unlearning:
        return Unlearning(lr=self.lr, paper_loop=self.paper_loop, seed=self.options.seed, method=self.title)

    @property
    def _before_repair(self) -> dict[str, Any] | None:
        return self._run.before

    def _repair_begins(self, trainer: Any) -> int:
        """Epochs after which the repair has to begin, as the plan is now."""
        return repair_begins(planned_end(trainer), self.epochs, self.extra_epochs)

    def _attach(self) -> None:
        assert self.verdict is not None
        assert self._training_set is not None
        assert self._loader_filter is not None
        self._run.attach(self._training_set, self._loader_filter, split_of(self.verdict, self.options.seed))

    def _begin(self, trainer: Any, pl_module: Any, done: int) -> None:
        """Let a repair by the verdict follow, or say that no epoch is left for one."""
        end = planned_end(trainer)
        left = epochs_left(trainer, end, self.extra_epochs)
        epochs = self.epochs if left is None or (self._at_once() and not left) else min(self.epochs, left)
        if not epochs:
            self.history[-1] = replace(self.history[-1], no_room=True)
            return
        self._attach()
        self._run.begin(trainer, pl_module, done, epochs, beyond=end is not None and done + epochs > end)

    def _repaired(self, trainer: Any, pl_module: Any) -> bool:
        """Judge an epoch of repair, and say whether there was one; call in ``on_train_epoch_end``."""
        if not self._run.left:
            return False
        began, run = time.monotonic(), self._run
        with self._acting():
            over = run.at_epoch_end(trainer, pl_module)
        if over:
            self.history[-1] = replace(
                self.history[-1],
                accuracy=(*run.accuracy,),
                flagged_label_rate=(*run.flagged_label_rate,),
                undone=(*run.undone,),
            )
            self._tell(trainer, pl_module, time.monotonic() - began)
            trainer.should_stop = trainer.should_stop or self._at_once()
        return True

    def _look_at_suspects(self, trainer: Any, pl_module: Any) -> None:
        """At the end of training, see what the model makes of suspects that were unlearned epochs ago."""
        last = self.history[-1] if self.history else None
        if last is None or not last.suspects or not last.undone or self.paper_loop or not about_to_end(trainer):
            return
        began, data = time.monotonic(), self._training_set
        assert data is not None
        with self._acting():
            predicted = data.predict(trainer, pl_module, description=f"{self.title} check")
            self.history[-1] = replace(last, at_end=shares(predicted, self.verdict, self._in_training))
            self._tell(trainer, pl_module, time.monotonic() - began)

    def _tell(self, trainer: Any, pl_module: Any, seconds: float) -> None:
        """Log, print one sentence, and write the report."""
        data, repairs = self._training_set, self.history
        assert data is not None
        counts = {"removed": sum(past.removed for past in repairs), "epochs": len(repairs[-1].undone)}
        pl_module.log_dict({f"backdoor/{self.method.lower()}/{name}": float(n) for name, n in counts.items()})
        (rank_zero_warn if repairs[-1].no_room else rank_zero_info)(f"{self.title} {sentence(repairs[-1], len(data))}")
        shown = evidence(repairs, data, meaning=self._meaning(), seconds=seconds, max_removed=self.max_removed)
        self._write_report(trainer, shown)
