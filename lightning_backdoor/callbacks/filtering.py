"""What defences share that act on the samples alone: measure, take samples out, go back to the start of fit."""

from __future__ import annotations

import time
from abc import abstractmethod
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_backdoor._lightning import rank_zero_info, rank_zero_warn
from lightning_backdoor.callbacks.base import Defense, require_positive
from lightning_backdoor.callbacks.looks import Look
from lightning_backdoor.callbacks.schedule import is_due
from lightning_backdoor.detection.decision import Decision, findings_of
from lightning_backdoor.responses.checkpointing import tell_earlier_files
from lightning_backdoor.responses.limits import about_to_end
from lightning_backdoor.responses.restart import Rewind, require_rewindable
from lightning_backdoor.scanning.scanner import ScanOptions
from lightning_backdoor.verdict import Verdict

__all__ = ["FilterCallback"]

MAX_REWINDS = 2


class FilterCallback(Defense):
    """Base of the defences that scan, remove samples, and train on what is left.

    It knows when to scan, prunes, goes back to the start of fit, and resumes. Subclasses say what is measured
    (:meth:`_scan`), what follows from it (:meth:`_decide`), and tell the user (:meth:`_tell`).
    """

    def __init__(
        self,
        *,
        warmup_epochs: int | None,
        max_removed: float,
        rewind: bool,
        rescore_every: int | None,
        options: ScanOptions,
        report_dir: str | Path | None,
        name: str | None,
    ) -> None:
        super().__init__(max_removed=max_removed, options=options, report_dir=report_dir, name=name)
        self.warmup_epochs = require_positive("warmup_epochs", warmup_epochs)
        self.rewind = rewind
        self.rescore_every = require_positive("rescore_every", rescore_every)
        self._last_scan: int | None = None  # epochs before it, counted from the last rewind
        self._looks: list[Look] = []
        self._rewind = Rewind()

    @abstractmethod
    def _scan(self, trainer: Any, pl_module: Any) -> dict[str, Tensor]:
        """Measure every training sample; ``labels``, long ``(N,)``, is among what comes back."""

    @abstractmethod
    def _decide(self, found: dict[str, Tensor]) -> Decision:
        """Judge every training sample."""

    @abstractmethod
    def _tell(self, trainer: Any, pl_module: Any, seconds: float) -> None:
        """Log, print one sentence, and write the report of all looks so far."""

    @abstractmethod
    def _first_scan(self, trainer: Any) -> int:
        """Epochs of ordinary training before the first scan, unless training ends before."""

    def _last_look(self) -> bool:
        """Whether a run that began anew is looked at once more when it is about to end."""
        return False

    def _forget_images(self) -> None:
        """Drop what is kept between scans; no further one will come."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the curation; before a checkpoint is loaded, keep the weights that the user started from."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._rewind = Rewind()  # the start of an earlier fit is none of this one
        self._last_scan = None if self.verdict is None else trainer.current_epoch
        if self.rewind:
            require_rewindable(trainer)
            self._rewind.before_checkpoint(trainer, pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Continue a run that was interrupted between the decision and the rewind."""
        self._rewind.at_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the training set can be read, and note where a rewind goes back to."""
        super().on_train_start(trainer, pl_module)
        if self.rewind and self._looks_again():
            self._rewind.at_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Go back to the start of fit if the epoch before removed samples."""
        if self._last_scan is not None and trainer.current_epoch < self._last_scan:
            self._last_scan = 0  # another defence went back
        if self._rewind.is_due:
            tell_earlier_files(trainer, self.title or self.method, self._began)
        if self._rewind.carry_out(trainer, pl_module) and self._loader_filter is not None:
            self._loader_filter.restart_iterator()
            self._last_scan = 0
            if not self._looks_again():
                self._rewind.forget()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Scan, decide and prune when it is time."""
        if self._rewind.is_due or not self._is_due(trainer):
            return
        if trainer.fast_dev_run:
            rank_zero_info(f"{self.method}: fast_dev_run trains too little for a verdict; no scan.")
            return
        with self._acting():
            self._scan_and_prune(trainer, pl_module)

    def _scan_and_prune(self, trainer: Any, pl_module: Any) -> None:
        began = time.monotonic()
        found = self._scan(trainer, pl_module)
        decision = trainer.strategy.broadcast(self._decide(found), src=0)  # float ties must not tell ranks apart
        findings = findings_of(decision, found["labels"], self.verdict)
        cut = decision.scores, decision.keep, decision.threshold, decision.rule
        removed = self._adopt(Verdict(*cut, found["labels"], findings=findings))
        self._last_scan = trainer.current_epoch + 1
        if removed and self.rewind and self._rewind.count < MAX_REWINDS:
            self._rewind.ask(trainer)
        modes = tuple((mode.label, mode.standardized_gap) for mode in decision.subpopulations)
        run, rewinds = self._rewind.count + 1, self._rewind.is_due
        accuracy = float(found["right"].float().mean()) if "right" in found else None
        self._looks.append(
            Look(self._last_scan, run, removed, decision.num_flagged_before_cap, rewinds, modes, accuracy)
        )
        self._tell(trainer, pl_module, time.monotonic() - began)
        if not self._looks_again():
            self._forget_images()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if training ended before the scan."""
        if self.verdict is None and not trainer.fast_dev_run:
            rank_zero_warn(
                f"{self.method}: training ended before the scan. Train longer, or with a smaller `warmup_epochs`."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only; while a rewind may come, they include what it goes back to."""
        looks = [look.state_dict() for look in self._looks]
        return {
            **super().state_dict(),
            "last_scan": self._last_scan,
            "looks": looks,
            "rewind": self._rewind.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue an interrupted run."""
        super().load_state_dict(state_dict)
        if state_dict:
            self._last_scan = state_dict["last_scan"]
            self._looks = [Look(**look) for look in state_dict["looks"]]
            self._rewind.load_state_dict(state_dict["rewind"])

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the loader and the Trainer's limits back."""
        self._rewind.release(trainer)
        super().on_exception(trainer, pl_module, exception)

    def _leave(self) -> None:
        super()._leave()
        self._forget_images()

    def _is_due(self, trainer: Any) -> bool:
        wanted = self._last_scan is None or (self.rewind and self._looks_again())
        return is_due(
            trainer.current_epoch + 1,
            last_scan=self._last_scan,
            warmup=self._first_scan(trainer),
            every=self.rescore_every,
            ends=wanted and about_to_end(trainer),
        )

    def _looks_again(self) -> bool:
        """Whether another scan may follow: the first one, a periodic one, or the last look at the end."""
        last_look = self.rewind and self._last_look() and self._rewind.count < MAX_REWINDS
        return self._last_scan is None or self.rescore_every is not None or last_look
