"""Plain fine-tuning on trusted images: what does anything else add to it?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from typing_extensions import Unpack

from lightning_backdoor._lightning import rank_zero_warn
from lightning_backdoor.baselines.repair import REPAIR_DEFAULTS, RepairArguments
from lightning_backdoor.callbacks.arguments import require_count, require_fraction, require_positive, require_rate
from lightning_backdoor.callbacks.base import Defense
from lightning_backdoor.callbacks.consistency import from_verdict
from lightning_backdoor.callbacks.detector import Detector
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.events import Event
from lightning_backdoor.responses.base import Continue, Detection, Report, Response, Session, labels_of
from lightning_backdoor.responses.by_name import chosen_response
from lightning_backdoor.responses.restart import Restart
from lightning_backdoor.responses.unlearn import Unlearn, masks_of
from lightning_backdoor.verdict import Verdict

__all__ = ["FineTuneTrusted"]


class TrustedByVerdict(Detector):
    """No measurement: the trusted samples of another defense's verdict, and no suspects.

    Args:
        verdict: That verdict.
        trusted: Share of the samples of every class that counts as trusted, where it has no mask of its own.
    """

    meaning = "It is the score of the verdict that was handed in."

    def __init__(self, verdict: Verdict, trusted: float) -> None:
        self._verdict, self._trusted = verdict, trusted

    def require(self, session: Session) -> None:
        """Raise a DataError if the verdict is on other data."""
        session.require_same_data(self._verdict)

    def detect(self, session: Session) -> Detection:
        """Read the labels, and take the verdict over."""
        labels = session.scanner.read_labels(session.trainer, session.module)
        found = from_verdict(self._verdict, labels, trusted=self._trusted)
        verdict = replace(found.verdict, suspect=torch.zeros_like(found.verdict.keep))  # nothing is unlearned
        return Detection(verdict, int((~verdict.keep).sum()))


class LearnTrusted(Unlearn):
    """Epochs on the trusted samples alone."""

    name = "finetune"
    diagnoses = False

    def awaits_detection(self, session: Session) -> bool:
        """Whether they have not begun."""
        return not self._detected

    def on_train_epoch_end(self, session: Session) -> bool:
        """Count the epochs."""
        return super().on_train_epoch_end(session) or self._detected

    def respond(self, session: Session, detection: Detection, event: Event) -> Event:
        """Begin with the next epoch."""
        self._detected = True
        labels, _, trusted = masks_of(session.verdict)
        lacking = sorted(set(torch.unique(labels_of(session.verdict)).tolist()) - set(labels[trusted].tolist()) - {-1})
        if lacking:
            rank_zero_warn(f"Fine-tuning: no image of the classes {lacking} is trusted; the model may forget them.")
        return self.begin(session, replace(event, trusted=int(trusted.sum())), event.epochs)


class FineTuneTrusted(Defense):
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
        response: ``"finetune"``; ``"restart"`` trains anew without the removed images, ``"continue"`` trains on without
            them, ``"report"`` changes nothing.
        **common: See :class:`~lightning_backdoor.baselines.RepairArguments`.

    Example:
        >>> found = Verdict(torch.tensor([0.1, 3.0]), torch.tensor([True, False]), 1.0, "mine")
        >>> FineTuneTrusted(verdict=found, epochs=10).arguments["epochs"]
        10
    """

    method: ClassVar[str] = "FineTuneTrusted"
    title: ClassVar[str] = "Fine-tuning"
    shared = RepairArguments
    shared_defaults = REPAIR_DEFAULTS

    def __init__(
        self,
        *,
        verdict: Verdict,
        trusted: float = 0.2,
        warmup_epochs: int | None = None,
        response: Literal["finetune", "restart", "continue", "report"] | Response = "finetune",
        **common: Unpack[RepairArguments],
    ) -> None:
        if verdict.trusted is not None and not bool(verdict.trusted.any()):
            raise ArgumentError("`verdict` must trust one sample at least, its mask `trusted` is empty. Leave it out.")
        if warmup_epochs not in (None, 0):
            raise ArgumentError(f"`warmup_epochs` must be 0 (now) or None (at the end), got {warmup_epochs}.")
        self.trusted = require_fraction("trusted", trusted)
        self.arguments: dict[str, Any] = {**self.shared_defaults, **common, "verdict": verdict}
        given = {**self.shared_defaults, **common}
        self.external_verdict = verdict
        self.epochs = require_positive("epochs", given.pop("epochs")) or 1
        self.extra_epochs = require_count("extra_epochs", given.pop("extra_epochs"))
        self.lr = require_rate("lr", given.pop("lr"))
        self.response = response
        learn = LearnTrusted(
            epochs=self.epochs,
            extra_epochs=self.extra_epochs,
            lr=self.lr,
            at_once=warmup_epochs == 0,
            paper_loop=True,
            seed=given["seed"],
        )
        detector = TrustedByVerdict(verdict, trusted)
        at_once = warmup_epochs == 0
        own = {
            "finetune": learn,
            "restart": Restart(last_detection=False),
            "continue": Continue(at_once=at_once),
            "report": Report(at_once=at_once),
        }
        chosen = chosen_response(response, own, others=False)
        super().__init__(detector=detector, response=chosen, warmup_epochs=warmup_epochs, **given)
