"""ABL: isolate the images that are learned too easily, and unlearn them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from lightning_backdoor.baselines.repair import REPAIR_DEFAULTS, RepairArguments
from lightning_backdoor.baselines.scored import decision_of
from lightning_backdoor.callbacks.arguments import require_count, require_fraction, require_positive, require_rate
from lightning_backdoor.callbacks.base import Defense
from lightning_backdoor.callbacks.detector import Detector
from lightning_backdoor.detection.decision import add_removed, select_fraction
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.events import Event
from lightning_backdoor.responses.ascent import loss_scale
from lightning_backdoor.responses.base import Continue, Detection, Report, Response, Session
from lightning_backdoor.responses.by_name import chosen_response
from lightning_backdoor.responses.limits import about_to_end, planned_max_epochs
from lightning_backdoor.responses.restart import Restart
from lightning_backdoor.responses.unlearn import Unlearn
from lightning_backdoor.verdict import Verdict

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["ABL", "easiness_scores"]

UNPLANNED = 10  # epochs before the isolation where `max_epochs` is not set
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


class LowestLoss(Detector):
    """Flag the samples with the lowest loss.

    Args:
        isolate: Share of all samples, in ``(0, 1)``.
        max_removed: Largest share of all samples that may be flagged.
    """

    meaning = "It is minus the loss of the image after a few epochs: poisoned images are learned fastest."

    def __init__(self, isolate: float, max_removed: float) -> None:
        self._isolate, self._max_removed = isolate, max_removed

    def require(self, session: Session) -> None:
        """Raise an ArgumentError if the share is less than one sample."""
        if self._isolate * len(session.scanner) < 1:
            raise ArgumentError(
                f"`isolate` must be one image at least, got {self._isolate} of {len(session.scanner)}. Pass more."
            )

    def detect(self, session: Session) -> Detection:
        """Measure the loss of every sample, and flag the lowest."""
        scanner, old, trainer = session.scanner, session.case.verdict, session.trainer

        def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
            labels = scanner.labels(batch).clone()  # transfer hooks may change a batch in place
            logits, _ = scanner.outputs(trainer, session.module, batch)
            return {"labels": labels, "scores": easiness_scores(logits, labels.to(logits.device))}

        found = scanner.scan(trainer, session.module, step, description="ABL scan")
        scores, rule, most = found["scores"], f"lowest_loss({self._isolate:g})", self._max_removed
        if session.case.approved is not None:
            scores = scores.masked_fill(session.case.approved, -math.inf)  # select_fraction leaves these
        order = scores if old is None else scores.masked_fill(~old.keep, math.inf)  # what was isolated stays isolated
        decided = decision_of(scores, select_fraction(order, self._isolate)[0], rule, max_removed=most)
        if old is not None:
            decided = add_removed(decided, old.scores, old.keep, threshold=old.threshold, max_removed=most)
        decision = trainer.strategy.broadcast(decided, src=0)  # float ties must not tell ranks apart
        keep = decision.keep
        verdict = Verdict(
            decision.scores, keep, decision.threshold, decision.rule, found["labels"], trusted=keep, suspect=~keep
        )
        return Detection(verdict, decision.num_flagged_before_cap)


class IsolateThenUnlearn(Unlearn):
    """Before the detection, climb where the loss is low already; after it train on the rest, and unlearn at the end.

    Args:
        gamma: Loss below which a batch is climbed on.
        epochs: Of the unlearning, in the loop of the authors.
        extra_epochs: Epochs that it may have beyond the user's plan.
        lr: Learning rate of the unlearning.
        seed: Seed of the shuffles.
    """

    def __init__(self, *, gamma: float, epochs: int, extra_epochs: int, lr: float | None, seed: int) -> None:
        super().__init__(epochs=epochs, extra_epochs=extra_epochs, lr=lr, paper_loop=True, seed=seed)
        self._gamma = gamma

    def on_before_backward(self, session: Session, loss: Tensor) -> None:
        """Climb where the loss is low already, until samples are isolated; later, on these samples."""
        if self._detected:
            super().on_before_backward(session, loss)
        elif float(loss.detach()) / loss_scale(session.trainer) < self._gamma:
            loss.mul_(-1.0)  # recorded: gradients turn, too

    def on_train_epoch_end(self, session: Session) -> bool:
        """Judge an epoch of unlearning, or begin with it when it is time."""
        if self._tuning.left:
            return super().on_train_epoch_end(session)
        history = session.case.history
        if self._detected and not self._accuracies and self._begins(session):
            history[-1] = self.begin(session, history[-1], session.epochs_done)
            if history[-1].no_room:
                session.case.tell()
        return self._detected

    def awaits_detection(self, session: Session) -> bool:
        """Whether no sample is isolated yet."""
        return not self._detected

    def respond(self, session: Session, detection: Detection, event: Event) -> Event:
        """Isolate the samples; unlearn them at once if it is time for that already."""
        self._detected = True
        keep = session.verdict.keep
        event = replace(event, suspects=int((~keep).sum()), trusted=int(keep.sum()))
        return self.begin(session, event, session.epochs_done) if self._begins(session) else event

    def _begins(self, session: Session) -> bool:
        return about_to_end(session.trainer) or session.epochs_done >= self.latest_detection(session.trainer)


class ABL(Defense):
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
        response: ``"unlearn"``; ``"restart"`` trains anew without the isolated images, ``"continue"`` trains on without
            them, ``"report"`` changes nothing.
        **common: See :class:`~lightning_backdoor.baselines.RepairArguments`.

    Example:
        >>> ABL(isolate=0.05, epochs=5)
        ABL(isolate=0.05, epochs=5)
    """

    method: ClassVar[str] = "ABL"
    title: ClassVar[str] = "ABL"
    shared = RepairArguments
    shared_defaults: ClassVar[dict[str, Any]] = {**REPAIR_DEFAULTS, "lr": 5e-4}

    def __init__(
        self,
        *,
        warmup_epochs: int | None = None,
        isolate: float = 0.01,
        gamma: float = 0.5,
        response: Literal["unlearn", "restart", "continue", "report"] | Response = "unlearn",
        **common: Unpack[RepairArguments],
    ) -> None:
        self.isolate = require_fraction("isolate", isolate)
        if gamma < 0:
            raise ArgumentError(f"`gamma` must be a loss of at least 0, got {gamma}. Pass 0 to never climb.")
        self.gamma, self.response = gamma, response
        self.arguments: dict[str, Any] = {**self.shared_defaults, **common}
        given = dict(self.arguments)
        self.epochs = require_positive("epochs", given.pop("epochs")) or 1
        self.extra_epochs = require_count("extra_epochs", given.pop("extra_epochs"))
        self.lr = require_rate("lr", given.pop("lr"))
        unlearn = IsolateThenUnlearn(
            gamma=gamma,
            epochs=self.epochs,
            extra_epochs=self.extra_epochs,
            lr=self.lr,
            seed=given["seed"],
        )
        detector = LowestLoss(isolate, require_fraction("max_removed", given["max_removed"]))
        own = {"unlearn": unlearn, "restart": Restart(last_detection=False), "continue": Continue(), "report": Report()}
        super().__init__(
            detector=detector,
            response=chosen_response(response, own, others=False),
            warmup_epochs=require_positive("warmup_epochs", warmup_epochs),
            **given,
        )

    def _first_detection(self, trainer: Trainer) -> int:
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        planned = planned_max_epochs(trainer)
        return UNPLANNED if planned is None or planned < 1 else math.ceil(ISOLATION * planned)
