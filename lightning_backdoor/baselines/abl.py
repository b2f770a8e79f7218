"""ABL: isolate the images that are learned too easily, and unlearn them."""

from __future__ import annotations

import math
import time
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from lightning_backdoor._lightning import rank_zero_info
from lightning_backdoor.baselines.baseline import decision_of
from lightning_backdoor.baselines.repair import RepairBaseline
from lightning_backdoor.callbacks.base import require_fraction, require_positive
from lightning_backdoor.callbacks.repairs import Repair
from lightning_backdoor.detection.decision import add_removed, select_fraction
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.responses.ascent import loss_scale
from lightning_backdoor.responses.limits import about_to_end, planned_max_epochs
from lightning_backdoor.verdict import Verdict

__all__ = ["ABL", "easiness_scores"]

ISOLATION = 0.2  # of the epochs, as in the paper: 20 of 100


def easiness_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the cross-entropy of each sample: what is learned first is suspicious.

    From *Anti-Backdoor Learning* (`Li et al., 2021 <https://arxiv.org/abs/2110.11571>`_).

    Args:
        logits: Float ``(N, K)``.
        labels: Labels as given, long ``(N,)``.

    Returns:
        Float ``(N,)``, at most 0; larger is more suspicious.

    Example:
        >>> import torch
        >>> easiness_scores(torch.tensor([[0.0, 0.0], [0.0, 99.0]]), torch.tensor([0, 1]))
        tensor([-0.6931,  0.0000])
    """
    return -F.cross_entropy(logits, labels, reduction="none")


class ABL(RepairBaseline):
    """Isolate the images with the lowest loss in early epochs, train on the rest, and unlearn them at the end.

    Implements *Anti-Backdoor Learning* (`Li et al., 2021 <https://arxiv.org/abs/2110.11571>`_). In the first
    ``warmup_epochs`` a batch whose loss is below ``gamma`` is climbed on (local gradient ascent), which keeps ordinary
    images from being learned as well as poisoned ones. Then the ``isolate`` share of all images with the lowest loss
    leaves the training set. At the end of the plan ``epochs`` of repair climb on the isolated images and
    descend on all others (global gradient ascent). Assumes that poisons are learned fastest. A baseline: **it changes
    the training from the first step on, and unlearns images whatever the data look like**, without any bound.

    Differs from the paper, not from the authors' code: losses are compared with ``gamma`` batch by batch, since a
    training step gives no others; between isolation and unlearning there is ordinary training on the rest.

    Args:
        warmup_epochs: Epochs before the isolation. ``None``: a fifth of ``max_epochs`` (10 if that is not set).
        isolate: Share of the training set that is isolated, in ``(0, 1)``.
        gamma: Loss below which a batch is climbed on, at least 0; 0 never climbs.
        lr: Learning rate of the repair; the default is the authors' for SGD.
        **common: Arguments of :class:`~lightning_backdoor.baselines.RepairBaseline`.

    Example:
        >>> ABL(isolate=0.05, epochs=5)
        ABL(isolate=0.05, epochs=5)
    """

    method: ClassVar[str] = "ABL"
    title: ClassVar[str] = "ABL"

    def __init__(
        self,
        *,
        warmup_epochs: int | None = None,
        isolate: float = 0.01,
        gamma: float = 0.5,
        lr: float | None = 5e-4,
        **common: Any,
    ) -> None:
        super().__init__(lr=lr, **common)
        self.warmup_epochs = require_positive("warmup_epochs", warmup_epochs)
        self.isolate = require_fraction("isolate", isolate)
        if gamma < 0:
            raise ArgumentError(f"`gamma` must be a loss of at least 0, got {gamma}. Pass 0 to never climb.")
        self.gamma = gamma

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Climb where the loss is low already, until samples are isolated; later, on these samples."""
        if self._last_look is not None:
            super().on_before_backward(trainer, pl_module, loss)
            return
        if float(loss.detach()) / loss_scale(trainer) < self.gamma:
            loss.mul_(-1.0)  # recorded: gradients turn, too

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Isolate, or begin to unlearn, when it is time; judge an epoch of repair when it is over."""
        if self._repaired(trainer, pl_module):
            return
        done, ends = trainer.current_epoch + 1, about_to_end(trainer)
        if trainer.fast_dev_run:
            rank_zero_info("ABL: fast_dev_run trains too little for a verdict; no look.")
            return
        if self._last_look is None and (ends or done >= self._isolation(planned_max_epochs(trainer))):
            with self._acting():
                self._look(trainer, pl_module, done)
        if (ends or done >= self._repair_begins(trainer)) and self.history and not self._run.accuracy:
            self._begin(trainer, pl_module, done)
            if self.history[-1].no_room:
                self._tell(trainer, pl_module, 0.0)

    def _isolation(self, max_epochs: int | None) -> int:
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        return 10 if max_epochs is None or max_epochs < 1 else math.ceil(ISOLATION * max_epochs)

    def _require(self, trainer: Any, pl_module: Any) -> None:
        assert self._training_set is not None
        if self.isolate * len(self._training_set) < 1:
            raise ArgumentError(
                f"`isolate` must be one image at least, got {self.isolate} of {len(self._training_set)}. Pass more."
            )

    def _look(self, trainer: Any, pl_module: Any, done: int) -> None:
        """Isolate the samples with the lowest loss."""
        began, data = time.monotonic(), self._training_set
        assert data is not None

        def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
            labels = data.labels(batch).clone()  # transfer hooks may change a batch in place
            logits, _ = data.outputs(trainer, pl_module, batch)
            return {"labels": labels, "scores": easiness_scores(logits, labels.to(logits.device))}

        found = data.scan(trainer, pl_module, step, description="ABL scan")
        scores, rule, old = found["scores"], f"lowest_loss({self.isolate:g})", self.verdict
        order = scores if old is None else scores.masked_fill(~old.keep, math.inf)  # what was isolated stays isolated
        judged = decision_of(scores, select_fraction(order, self.isolate)[0], rule, max_removed=self.max_removed)
        if old is not None:
            judged = add_removed(judged, old.scores, old.keep, threshold=old.threshold, max_removed=self.max_removed)
        decision = trainer.strategy.broadcast(judged, src=0)  # float ties must not tell ranks apart
        keep = decision.keep
        removed = self._adopt(
            Verdict(
                decision.scores, keep, decision.threshold, decision.rule, found["labels"], trusted=keep, suspect=~keep
            )
        )
        self._last_look = done
        self.history.append(
            Repair(done, removed, decision.num_flagged_before_cap, (), int((~keep).sum()), int(keep.sum()))
        )
        self._tell(trainer, pl_module, time.monotonic() - began)

    def _meaning(self) -> str:
        return "loss"
