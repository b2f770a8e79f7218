"""A repair, and a restart from the start of the fit where the repair leaves the backdoor in the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_backdoor._lightning import rank_zero_warn
from lightning_backdoor.errors import TrainerError
from lightning_backdoor.events import Event
from lightning_backdoor.report.of_events import last_word
from lightning_backdoor.responses.base import Detection, Response, Session
from lightning_backdoor.responses.limits import about_to_end
from lightning_backdoor.responses.restart import Restart, measure_removed

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["WithFallback"]


class WithFallback(Response):
    """Repair the model; where that fails, train anew without the flagged samples.

    A repair has failed when it is over and over a tenth of the flagged samples still get their label, be it that it was
    undone, that no epoch was left for it, or that nothing could be treated. Then training starts again, once, from the
    weights at the start of the fit; no detection follows. Costs one copy of the model and of its optimizer state on the
    CPU and in checkpoints.

    Rounds of :class:`~lightning_backdoor.responses.ResetUnits` that a restart can follow have to leave accuracy as it
    was, within a point, since training anew costs none. :class:`~lightning_backdoor.responses.Unlearn` keeps its bound
    of five points.

    Where a restart is ruled out (``max_time``, a callback that changes parameter groups, weights that are treated as
    they are before the first epoch), the repair has the last word, and the reason is in a warning.

    Args:
        repair: The response that is tried first.
    """

    def __init__(self, repair: Response) -> None:
        self.repair, self.name = repair, repair.name
        self.drops, self.at_once = repair.drops, repair.at_once
        self.alone, self.features, self.starts_over = repair.alone, repair.features, repair.starts_over
        self.rereads, self.copies, self.explains_at_end = repair.rereads, repair.copies, repair.explains_at_end
        self._forget()

    def _forget(self) -> None:
        self._restart = Restart(last_detection=False, at_most=1)
        self._fell_back = False
        self._since = 0  # events of the present run, since another defense's restart
        self._measured_at = 0  # epochs of the second training when it was measured last
        self._ruled_out = ""

    @property
    def written_as(self) -> str:
        """The repair, and that a restart may follow it."""
        return f"{self.name} with a fallback"

    def setup(self, trainer: Trainer, pl_module: LightningModule, title: str) -> None:
        """Prepare both."""
        self.repair.setup(trainer, pl_module, title)
        self._forget()
        if self.at_once:
            self._ruled_out = "the fit starts from the model that is to be repaired."
            return
        try:
            self._restart.setup(trainer, pl_module, title)
        except TrainerError as error:
            self._ruled_out = str(error)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue what was interrupted."""
        self.repair.on_fit_start(trainer, pl_module)
        if self._ruled_out:
            return
        try:
            self._restart.on_fit_start(trainer, pl_module)
        except TrainerError as error:
            self._ruled_out = str(error)

    def on_train_start(self, session: Session) -> None:
        """Check what the repair needs, and note where a restart returns to."""
        self.repair.on_train_start(session)
        if not self._ruled_out:
            self._restart.on_train_start(session)
        self.repair.replaceable = not self._ruled_out and self._restart.can_return

    def after_first_detection(self, session: Session) -> None:
        """Let the repair begin."""
        self.repair.after_first_detection(session)

    def on_other_restart(self, session: Session) -> None:
        """Begin with the repair again; what was found before is no reason for a restart any more."""
        self.repair.on_other_restart(session)
        self._restart.release()
        self._restart.is_due = self._fell_back = False
        self._since, self._measured_at = len(session.case.history), 0
        self.repair.replaceable = not self._ruled_out and self._restart.can_return

    def on_train_epoch_start(self, session: Session) -> None:
        """Go back to the start if that was decided, or let the repair begin its epoch."""
        if self._fell_back:
            self._restart.on_train_epoch_start(session)
        else:
            self.repair.on_train_epoch_start(session)

    def on_train_batch_start(self, session: Session, batch_idx: int) -> None:
        """Prepare a step of the repair."""
        if not self._fell_back:
            self.repair.on_train_batch_start(session, batch_idx)

    def on_before_backward(self, session: Session, loss: Tensor) -> None:
        """Let the repair change the loss."""
        if not self._fell_back:
            self.repair.on_before_backward(session, loss)

    def on_after_backward(self, session: Session) -> None:
        """Let the repair change gradients."""
        if not self._fell_back:
            self.repair.on_after_backward(session)

    def on_before_optimizer_step(self, session: Session, optimizer: torch.optim.Optimizer) -> None:
        """Let the repair change gradients before a step."""
        if not self._fell_back:
            self.repair.on_before_optimizer_step(session, optimizer)

    def on_train_batch_end(self, session: Session) -> None:
        """Let the repair measure what an epoch has led to with its last batch."""
        if not self._fell_back:
            self.repair.on_train_batch_end(session)

    def on_train_epoch_end(self, session: Session) -> bool:
        """Decide on a restart when the repair is over; after one, measure at the end of training what came of it."""
        if self._fell_back:
            measured = session.epochs_done <= self._measured_at
            if not self._restart.is_due and not measured and about_to_end(session.trainer):
                self._measured_at = session.epochs_done
                measure_removed(session, run=2, response="fallback")
            return True
        treated = self.repair.on_train_epoch_end(session)
        if self._fall_back(session):
            session.case.tell()
        return treated or self._fell_back

    def on_train_end(self, session: Session) -> None:
        """Say what the fit ends with."""
        history = session.case.history
        if not self._fell_back:
            self.repair.on_train_end(session)
            if history[self._since :] and history[-1].failed and self._ruled_out:
                rank_zero_warn(
                    f"{session.case.title} could not train anew without the flagged images: {self._ruled_out}"
                )
        elif warning := last_word(history[-1], session.verdict):
            rank_zero_warn(f"{session.case.title} {warning}")

    def why_not(self, session: Session) -> str:
        """Why a fit ended without a verdict, and what to do."""
        return self.repair.why_not(session)

    def metrics(self, session: Session) -> dict[str, float]:
        """Those of the repair."""
        return self.repair.metrics(session)

    def revise(self, session: Session, detection: Detection) -> Detection:
        """As the repair does."""
        return self.repair.revise(session, detection)

    def respond(self, session: Session, detection: Detection, event: Event) -> Event:
        """Begin with the repair; where nothing can be repaired, decide on a restart."""
        event = self.repair.respond(session, detection, event)
        session.case.history[-1] = event
        self._fall_back(session)
        return session.case.history[-1]

    def awaits_detection(self, session: Session) -> bool:
        """Whether the repair does; none follows a restart."""
        return not self._fell_back and self.repair.awaits_detection(session)

    def ready(self, session: Session) -> bool:
        """Whether the repair is."""
        return self.repair.ready(session)

    def latest_detection(self, trainer: Trainer) -> int:
        """Epochs after which the repair has to begin."""
        return self.repair.latest_detection(trainer)

    @property
    def busy(self) -> bool:  # type: ignore[override]
        """Whether a repair or a restart is going on or about to."""
        return self._restart.is_due if self._fell_back else self.repair.busy

    @property
    def repeats(self) -> bool:  # type: ignore[override]
        """Whether another detection is due when training is about to end."""
        return not self._fell_back and self.repair.repeats

    @property
    def weights_before(self) -> dict[str, Any] | None:
        """While a repair lasts, the weights that it began with."""
        return self.repair.weights_before

    @property
    def unseen(self) -> Tensor | None:
        """After a restart, what it was trained without."""
        return self._restart.unseen if self._fell_back else None

    @property
    def repaired_without(self) -> Tensor | None:
        """Before a restart, what the repair was fine-tuned without."""
        return None if self._fell_back else self.repair.repaired_without

    @property
    def keeps_start(self) -> bool:  # type: ignore[override]
        """Whether a restart may come, which goes back to it."""
        return not self._ruled_out and not self._restart.count

    @property
    def start(self) -> dict[str, Any] | None:
        """Where a restart goes back to."""
        return self._restart.start

    def _fall_back(self, session: Session) -> bool:
        """Decide on a restart if the repair is over and has failed; returns whether it was decided."""
        history = session.case.history
        if session.case.verdict is None or self.repair.busy or self._ruled_out or not self._restart.can_return:
            return False
        if not history[self._since :] or not history[-1].failed:
            return False
        before = history[-1]
        self.repair.on_other_restart(session)
        self._fell_back = True
        self._restart.decide(session)
        history.append(
            Event(
                session.epochs_done,
                0,
                before.num_flagged_before_cap,
                response="fallback",
                restarts=True,
                accuracies=before.accuracies[-1:],
                flagged_label_rates=() if before.remaining is None else (before.remaining,),
            )
        )
        return True

    def release(self) -> None:
        """Give back what belongs to the user."""
        self.repair.release()
        self._restart.release()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values of both; while a restart may come, with the start that it goes back to."""
        return {
            "repair": self.repair.state_dict(),
            "restart": self._restart.state_dict(),
            "fell_back": self._fell_back,
            "since": self._since,
            "measured_at": self._measured_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""
        self.repair.load_state_dict(state_dict["repair"])
        self._restart.load_state_dict(state_dict["restart"])
        self._fell_back, self._since = state_dict["fell_back"], state_dict["since"]
        self._measured_at = state_dict["measured_at"]
