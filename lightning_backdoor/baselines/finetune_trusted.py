"""Plain fine-tuning on trusted images: what does anything else add to it?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch

from lightning_backdoor._lightning import rank_zero_info, rank_zero_warn
from lightning_backdoor.baselines.repair import RepairBaseline
from lightning_backdoor.callbacks.base import require_fraction, require_same_data
from lightning_backdoor.callbacks.repairs import Repair
from lightning_backdoor.callbacks.suspects import from_verdict
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.responses.limits import about_to_end
from lightning_backdoor.verdict import Verdict

__all__ = ["FineTuneTrusted"]


class FineTuneTrusted(RepairBaseline):
    """Fine-tune on the images that a verdict trusts, and do nothing else.

    At the end of the plan, and in ``extra_epochs`` beyond it, some epochs go through the trusted images alone, by the
    user's own ``training_step`` and optimizer, at a constant rate. Assumes that the trusted images are clean. A
    baseline (FT in BackdoorBench, `Wu et al., 2022 <https://arxiv.org/abs/2206.12654>`_): **it rarely harms, and often
    leaves the backdoor**.

    Args:
        verdict: Verdict of another defence. Its ``trusted`` samples are taken; without any, its least suspicious ones.
        trusted: Share of the images of every class that counts as least suspicious, in ``(0, 1)``.
        warmup_epochs: 0 fine-tunes the weights as they are (loaded, or of the ``ckpt_path`` given to ``fit``) and ends
            the fit. ``None``: as late as the plan leaves time for it.
        **common: Arguments of :class:`~lightning_backdoor.baselines.RepairBaseline`.

    Example:
        >>> found = Verdict(torch.tensor([0.1, 3.0]), torch.tensor([True, False]), 1.0, "mine")
        >>> FineTuneTrusted(verdict=found, epochs=10).epochs
        10
    """

    method: ClassVar[str] = "FineTuneTrusted"
    title: ClassVar[str] = "Fine-tuning"
    kept_as: ClassVar[dict[str, str]] = {"verdict": "external_verdict"}

    def __init__(
        self, *, verdict: Verdict, trusted: float = 0.2, warmup_epochs: int | None = None, **common: Any
    ) -> None:
        super().__init__(**common)
        if verdict.trusted is not None and not bool(verdict.trusted.any()):
            raise ArgumentError("`verdict` must trust one sample at least, its mask `trusted` is empty. Leave it out.")
        if warmup_epochs not in (None, 0):
            raise ArgumentError(f"`warmup_epochs` must be 0 (now) or None (at the end), got {warmup_epochs}.")
        self.external_verdict = verdict
        self.trusted = require_fraction("trusted", trusted)
        self.warmup_epochs = warmup_epochs

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Begin when it is time; count the epochs that follow."""
        if self._repaired(trainer, pl_module) or self._last_look is not None:
            return
        if trainer.current_epoch + 1 < self._repair_begins(trainer) and not about_to_end(trainer):
            return
        if trainer.fast_dev_run:
            rank_zero_info("Fine-tuning: fast_dev_run trains too little to repair anything.")
            return
        with self._acting():
            self._look(trainer, pl_module, trainer.current_epoch + 1)

    def _at_once(self) -> bool:
        return self.warmup_epochs == 0

    def _require(self, trainer: Any, pl_module: Any) -> None:
        assert self._training_set is not None
        require_same_data(self.external_verdict, self._training_set)

    def _look(self, trainer: Any, pl_module: Any, done: int) -> None:
        data = self._training_set
        assert data is not None
        judgement = from_verdict(self.external_verdict, data.read_labels(trainer, pl_module), trusted=self.trusted)
        found, lacking = judgement.verdict, judgement.counts[2]
        if lacking:
            rank_zero_warn(f"Fine-tuning: no image of the classes {lacking} is trusted; the model may forget them.")
        verdict = replace(found, suspect=torch.zeros_like(found.keep))  # nothing is unlearned
        removed = self._adopt(verdict)
        self._last_look = done
        assert verdict.trusted is not None
        self.history.append(Repair(done, removed, int((~verdict.keep).sum()), (), 0, int(verdict.trusted.sum())))
        self._begin(trainer, pl_module, done)
        if self.history[-1].no_room:
            self._tell(trainer, pl_module, 0.0)
        else:
            rank_zero_info(f"Fine-tuning on {self.history[-1].trusted:,} of {len(data):,} images follows.")

    def _meaning(self) -> str:
        return "given"
