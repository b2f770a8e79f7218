"""Unlearn suspects and learn trusted samples anew, in epochs that are undone where they do harm: D-BR's response."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lightning_backdoor._lightning import epochs_processed, rank_zero_warn
from lightning_backdoor.data.views import batch_size_of
from lightning_backdoor.events import Event
from lightning_backdoor.loading.batch_schedule import Phases, require_batches
from lightning_backdoor.responses.ascent import Ascent
from lightning_backdoor.responses.base import Detection, Response, Session, labels_of
from lightning_backdoor.responses.checkpointing import warn_of_treated_files
from lightning_backdoor.responses.explaining import diagnosed_by_copy
from lightning_backdoor.responses.extra_epochs import FineTuning, conclude, is_finite
from lightning_backdoor.responses.harm import LEAST, Harm, drawn_by_label, harmed_class
from lightning_backdoor.responses.limits import (
    about_to_end,
    epochs_left,
    hold_open,
    planned_end,
    release,
    repair_begins,
    require_extendable,
)
from lightning_backdoor.responses.weight_copies import on_cpu, restart_averages, start_of_fit, weights
from lightning_backdoor.scanning.isolation import require_automatic
from lightning_backdoor.verdict import Verdict

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Split", "Unlearn", "masks_of", "split_of"]

MAX_LOSS = 0.05  # of accuracy on watched samples, beyond which an epoch is undone
LEAST_STEPS = 10  # of ascent in an epoch
TOLERANCE = 0.005  # of accuracy, within which the model is as good as before
WATCHED = 1024
OF_CLASS, OF_CLASSES = 100, 10_000  # samples of a class on which its own accuracy is watched, and of all, at most


@dataclass(frozen=True)
class Split:
    """What is to become of N training samples.

    Attributes:
        labels: Labels as given, long ``(N,)``.
        suspect: Samples to unlearn, bool ``(N,)``.
        trusted: Samples to learn anew, bool ``(N,)``.
        watched: Samples on which accuracy is watched, bool ``(N,)``.
        by_class: Samples on which that of every class is watched, bool ``(N,)``.
    """

    labels: Tensor
    suspect: Tensor
    trusted: Tensor
    watched: Tensor
    by_class: Tensor


class Unlearn(Response):
    """Epochs that alternate batches of suspects, with the loss turned around, and batches of trusted samples.

    So what is unlearned is the trigger rather than the class. An epoch that costs more than five points of accuracy, or
    one class more than ten beyond chance, is undone with its last batch, before validation, and the next one has half
    its rate. The treatment is over when suspects get their label no more often than by mistake and accuracy is back.

    A finding is unlearned if its labels look wrong to a copy of the network that is trained without it, in 200 to 1,000
    steps from the weights at the start of the fit; from new ones with ``at_once``, where these are under repair, and
    where a checkpoint was loaded into layers that ``configure_model`` made.
    Other findings are left out of training. Suspects in no finding, by a quota or of another verdict, are unlearned in
    any case. Costs a copy of the weights, also in checkpoints, until something is found.

    Args:
        epochs: Largest number of epochs.
        extra_epochs: Epochs that it may have beyond the user's plan.
        lr: Learning rate; see :class:`~lightning_backdoor.DBRCallback`.
        at_once: Treat the weights as they are at the start of the fit, which ends with the treatment.
        repeats: Whether a detection that found no suspects is followed by another when training is about to end.
        relearn: Whether epochs have batches of trusted samples. ``False``: of suspects alone, for comparison.
        paper_loop: The authors' loop: all epochs, each of which goes through the suspects first and the trusted samples
            next, a constant rate, no bound but that weights stay finite.
        seed: Seed of the shuffles.
    """

    name = "unlearn"
    starts_over = features = rereads = True
    diagnoses: ClassVar[bool] = True
    """Whether it matters if the labels of findings are right."""

    def __init__(
        self,
        *,
        epochs: int = 10,
        extra_epochs: int = 0,
        lr: float | None = None,
        at_once: bool = False,
        repeats: bool = False,
        relearn: bool = True,
        paper_loop: bool = False,
        seed: int = 0,
    ) -> None:
        self._epochs, self._extra_epochs, self._lr = epochs, extra_epochs, lr
        self.at_once, self._paper_loop, self._seed, self.repeats = at_once, paper_loop, seed, repeats
        self._relearn = relearn
        self._forget()

    def _forget(self) -> None:
        self._accuracies: list[float] = []
        self._rates: list[float] = []
        self._undone: list[bool] = []
        self._correct: Tensor | None = None  # samples of `Split.by_class` that got their label before the first epoch
        self._harmed: Harm | None = None  # class because of which an epoch was undone
        self._tuning = FineTuning()
        self._rate = 1.0  # share of the learning rate
        self._judged = self._detected = False
        self._initial: dict[str, Any] | None = None  # weights at the start of the fit, until the detection
        self._before: dict[str, Any] | None = None
        self._phases: Phases | None = None
        self._split: Split | None = None
        self._held: Any = None
        self._loader_filter: Any = None
        self._ascent = Ascent(None, bounded=False)
        self.changed_at = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, title: str) -> None:
        """Forget an earlier fit.

        Raises:
            TrainerError: The module optimizes by hand, or a callback rules further epochs out.
        """
        require_automatic(pl_module, f"{title} unlearns")
        require_extendable(trainer, title)
        self._forget()
        if self.diagnoses and not (self.at_once or self._paper_loop):
            self._initial = on_cpu(pl_module.state_dict())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the fit open for a treatment that was interrupted, or that begins at once."""
        self._tuning.keep_open(trainer)
        if self.at_once and not self._detected:
            hold_open(trainer, self)
            self._held = trainer

    def on_train_start(self, session: Session) -> None:
        """Continue a treatment that was interrupted; check that the samples can be put into batches anew."""
        require_batches(session.scanner.loader)
        if self._initial is not None:
            self._initial = start_of_fit(session.trainer, session.module, self._initial)
        if self._tuning.left:
            self._draw(session)

    def after_first_detection(self, session: Session) -> None:
        """Keep the fit open no longer if no treatment follows, else begin with its first batch."""
        trainer = session.trainer
        if self.at_once and not self._tuning.left:
            trainer.should_stop = True
        self._tuning.end_if_over()
        if self._held is not None:
            release(self._held, self)
            self._held = None
        if self._tuning.left:
            session.loader_filter.restart_iterator()
            self._ascent.count_from_zero()

    def on_other_restart(self, session: Session) -> None:
        """Stop, and forget what was done."""
        initial, detected = self._initial, self._detected
        self._stop(session)
        self._forget()
        if detected and initial is None and self.diagnoses and not (self.at_once or self._paper_loop):
            initial = on_cpu(session.module.state_dict())  # the module is at the start of the fit again
        self._initial = initial

    def on_train_epoch_start(self, session: Session) -> None:
        """Let averages start again with the first epoch; count batches from here."""
        if self._tuning.begins_now():
            restart_averages(session.trainer, session.module)
        self._ascent.count_from_zero()

    def on_train_batch_start(self, session: Session, batch_idx: int) -> None:
        """Find out what the batch holds, and set the rate of its step."""
        self._tuning.prepare_step(session.trainer, session.module, batch_idx)
        if self._phases is not None and self._split is not None:
            self._ascent.prepare_batch(session.trainer, self._phases, self._split.labels, batch_idx)
            self._tuning.share = self._rate

    def on_before_backward(self, session: Session, loss: Tensor) -> None:
        """Turn the loss of suspects around."""
        if self._phases is not None:
            self._ascent.turn_loss(session.trainer, loss)

    def on_before_optimizer_step(self, session: Session, optimizer: torch.optim.Optimizer) -> None:
        """Limit the ascent."""
        if self._phases is not None:
            self._ascent.limit_step(session.trainer, optimizer)

    def on_train_batch_end(self, session: Session) -> None:
        """Measure what an epoch has led to with its last batch."""
        trainer = session.trainer
        if self._phases is not None and not self._judged and (self._tuning.ends_now(trainer) or trainer.is_last_batch):
            self._judge(session)

    def on_train_epoch_end(self, session: Session) -> bool:
        """Draw the next epoch of the treatment, or end it; at the end of training measure once more."""
        history = session.case.history
        if not self._tuning.left:
            self._measure_at_end(session)
            return self._acted(history)
        if not self._judged:  # a callback after this one has ended the epoch
            self._judge(session)
        self._judged = False
        lost = self._accuracies[0] - self._accuracies[-1]
        kept = not self._undone[-1]  # the figures of an epoch that was undone are of weights that are gone
        forgotten = kept and lost <= TOLERANCE and self._rates[-1] <= self._by_mistake(session)
        if not (self._tuning.count_epoch() or (forgotten and not self._paper_loop)):
            self._draw(session)
            return True
        self._stop(session)
        history[-1] = replace(
            history[-1],
            accuracies=(*self._accuracies,),
            flagged_label_rates=(*self._rates,),
            undone_steps=(*self._undone,),
            harmed=self._harmed,
        )
        session.case.tell()
        session.trainer.should_stop = session.trainer.should_stop or self.at_once
        return True

    def on_train_end(self, session: Session) -> None:
        """Say so if training ends with a model that is not repaired."""
        case = session.case
        latest = case.history[-1] if case.history and not self._paper_loop else None
        if latest is not None and latest.suspects and latest.treated and latest.remains:
            rank_zero_warn(
                f"{case.title} ends with a model that gives {latest.remaining:.1%} of the suspect images their label: "
                "part of a backdoor may still be there, or their labels are true (clean-label attack). Look at the "
                "report; to be sure, train anew without them."
            )
        if latest is not None and latest.left_out:
            rank_zero_warn(
                f"{case.title} ends with a model that was trained on {latest.left_out:,} suspect images and has not "
                "unlearned them, since their labels may be right. If they are a trigger's (clean-label attack), the "
                "backdoor is there: train anew without `verdict.removed`."
            )
        warn_of_treated_files(session.trainer, case.title, session.began, self.changed_at)

    def why_not(self, session: Session) -> str:
        """Nothing: a detection comes at the end at the latest."""
        return ""

    def metrics(self, session: Session) -> dict[str, float]:
        """Removed samples, and epochs of the latest treatment."""
        history = session.case.history
        return {
            "removed": float(sum(event.removed for event in history)),
            "epochs": float(len(history[-1].undone_steps)),
        }

    @property
    def busy(self) -> bool:  # type: ignore[override]
        """Whether a treatment is going on or about to begin."""
        return self._tuning.left > 0

    def awaits_detection(self, session: Session) -> bool:
        """Whether no treatment is going on or has been done."""
        return not self._tuning.left and not self._acted(session.case.history)

    def latest_detection(self, trainer: Trainer) -> int:
        """Epochs after which the treatment has to begin, so that it fits into the plan."""
        return repair_begins(planned_end(trainer), self._epochs, self._extra_epochs)

    def respond(self, session: Session, detection: Detection, event: Event) -> Event:
        """Let a treatment by the verdict follow, or note that no epoch is left for one."""
        self._detected = True
        self._diagnose(session)
        labels, suspect, trusted = masks_of(session.verdict)
        unlearned = self._split_of(session).suspect
        left_out = int((suspect & ~unlearned).sum())
        event = replace(event, suspects=int(unlearned.sum()), left_out=left_out, trusted=int(trusted.sum()))
        present = torch.unique(labels[labels >= 0]).tolist()
        lacking = sorted(set(present) - set(labels[trusted].tolist()))
        if lacking:
            change, argument = ("Raise", "trusted") if session.takes("trusted") else ("Lower", "max_removed")
            rank_zero_warn(
                f"{session.case.title}: no repair, since no image of the classes {lacking} can be trusted. {change} "
                f"`{argument}`."
            )
            return event
        return self.begin(session, event, event.epochs) if event.suspects else event

    def begin(self, session: Session, event: Event, done: int) -> Event:
        """Start with the next epoch, if one is left; ``done`` epochs are over."""
        trainer, end = session.trainer, planned_end(session.trainer)
        left = epochs_left(trainer, end, self._extra_epochs)
        most = self._epochs
        epochs = most if left is None or (self.at_once and not left) else min(most, left)
        if not epochs:
            return replace(event, no_room=True)
        self._split = self._split_of(session)
        self._correct = self._measure(session)
        self._before = weights(trainer, session.module)
        beyond = end is not None and done + epochs > end
        as_authors = self._paper_loop
        self._tuning.begin(
            trainer, epochs, self._lr, constant=as_authors, frozen_norms=not as_authors, beyond=beyond, done=done
        )
        self._draw(session)
        return event

    def _acted(self, history: list[Event]) -> bool:
        """Whether the latest detection of this run found suspects."""
        return self._detected and bool(history) and bool(history[-1].suspects or history[-1].left_out)

    def _split_of(self, session: Session) -> Split:
        """What is to become of the samples; suspects in a finding are unlearned if its labels are wrong."""
        split = split_of(session.verdict, self._seed)
        if self._paper_loop:
            return split
        spared = torch.zeros_like(split.suspect)
        for finding in session.verdict.findings:
            spared[finding.positions] = finding.diagnosis != "wrong labels"
        return replace(split, suspect=split.suspect & ~spared)

    def _diagnose(self, session: Session) -> None:
        """Have findings diagnosed by a copy of the model that is trained without them and some other samples."""
        verdict = session.verdict
        suspect = masks_of(verdict)[1]
        found = [finding for finding in verdict.findings if bool(suspect[finding.positions].any())]
        if found and not self._paper_loop:
            spared = sum(int(suspect[finding.positions].sum()) for finding in found if finding.suggested_labels is None)
            told = diagnosed_by_copy(
                session.trainer,
                session.module,
                session.scanner,
                verdict,
                title=session.case.title,
                initial=self._initial,
                seed=self._seed,
                left_out=suspect,
                consequence=f"unlearns none of {spared:,} suspect images, since it ",
            )
            session.case.adopt(told)
        if found or not self.repeats:
            self._initial = None

    def _draw(self, session: Session) -> None:
        """Draw suspects and trusted samples from the next epoch on."""
        if self._split is None:
            self._split = self._split_of(session)
        trainer, head = session.trainer, session.scanner.head
        if self._phases is None:
            self._ascent = Ascent(head.module if head.certain else None, bounded=not self._paper_loop)
        keep, trusted = session.loader_filter.keep, self._split.trusted & self._relearn
        parts = (self._split.suspect, trusted if keep is None else trusted & keep)
        draw = partial(
            Phases,
            [part.nonzero().squeeze(1) for part in parts],
            size=batch_size_of(session.scanner.loader),
            least=(0, 0) if self._paper_loop else (LEAST_STEPS, 2 * LEAST_STEPS),
            mixed=not self._paper_loop,
            seed=self._seed,
            rank=trainer.global_rank,
            world=trainer.world_size,
            epoch=lambda: epochs_processed(trainer),
        )
        self._phases = draw(most=self._tuning.allowed_batches(trainer, len(draw())))
        self._loader_filter = session.loader_filter
        session.loader_filter.set_phases(self._phases)
        session.loader_filter.refresh()

    def _judge(self, session: Session) -> None:
        """Measure what an epoch has led to, and undo it if it costs too much or the weights are not finite."""
        trainer, module = session.trainer, session.module
        self._ascent.release()
        harmed = self._harmed_by(self._measure(session), session)
        costly = self._accuracies[0] - self._accuracies[-1] > MAX_LOSS or harmed is not None
        harmful = not is_finite(module) or (not self._paper_loop and costly)
        self._undone.append(harmful)
        conclude(trainer, module, self._before if harmful else None)
        if harmful:
            self._rate /= 2
            self._harmed = None if self._paper_loop else harmed or self._harmed
        elif not self._paper_loop:
            self._before = weights(trainer, module)
        self._judged = True
        self.changed_at = time.time()

    def _harmed_by(self, correct: Tensor, session: Session) -> Harm | None:
        """The class that has lost too much of its accuracy since the start, if any; that of the suspects first."""
        split = self._split if self._split is not None else self._split_of(session)
        before = correct if self._correct is None else self._correct
        affected = torch.unique(split.labels[split.suspect]).tolist()
        return harmed_class(before, correct, split.labels[split.by_class], affected)

    def _measure(self, session: Session) -> Tensor:
        """Note the shares of the watched samples and of the suspects that get their label.

        Returns:
            The samples of every class that do, bool, one value for each sample of ``Split.by_class``.
        """
        split = self._split if self._split is not None else self._split_of(session)
        measured = (split.watched | split.suspect | split.by_class).nonzero().squeeze(1)
        description = f"{session.case.title} check"
        predicted = session.scanner.predict(
            session.trainer, session.module, description=description, positions=measured
        )
        correct = (predicted == split.labels[measured]).float()
        self._accuracies.append(float(correct[split.watched[measured]].mean()))
        self._rates.append(float(correct[split.suspect[measured]].sum()) / max(int(split.suspect.sum()), 1))
        return correct[split.by_class[measured]] > 0

    def _by_mistake(self, session: Session) -> float:
        """Twice the share of images that get some wrong label by mistake: forgotten suspects get theirs as seldom."""
        labels = (self._split if self._split is not None else self._split_of(session)).labels
        return 2 * (1 - self._accuracies[-1]) / max(len(torch.unique(labels[labels >= 0])) - 1, 1)

    def _measure_at_end(self, session: Session) -> None:
        """At the end of training, measure what the model makes of suspects that were unlearned epochs ago."""
        history, trainer = session.case.history, session.trainer
        latest = history[-1] if history else None
        if latest is None or not (latest.suspects and latest.treated) or self._paper_loop or not self._acted(history):
            return
        if not about_to_end(trainer):
            return
        description = f"{session.case.title} check"
        predicted = session.scanner.predict(trainer, session.module, description=description)
        correct = predicted == labels_of(session.verdict)
        at_end, of_labels = session.label_rates(correct), session.rates_of_labels(correct)
        history[-1] = replace(latest, at_end=at_end, of_labels=of_labels)
        session.case.tell()

    def _stop(self, session: Session) -> None:
        """End the treatment, if there is one, and draw as before."""
        self._tuning.stop()
        self._ascent.release()
        self._before = None
        if self._phases is not None:
            session.loader_filter.set_phases(None)
            session.loader_filter.refresh()
        self._phases = None

    def release(self) -> None:
        """Give everything back that belongs to the user; a treatment that is not over can be resumed."""
        self._tuning.leave()
        self._ascent.release()
        if self._held is not None:
            release(self._held, self)
            self._held = None
        if self._phases is not None:
            self._loader_filter.set_phases(None)
        self._loader_filter = self._split = self._phases = None

    @property
    def weights_before(self) -> dict[str, Any] | None:
        """The weights that an epoch which does harm goes back to."""
        return self._before

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; while a treatment lasts, with the weights to go back to."""
        return {
            "accuracies": list(self._accuracies),
            "rates": list(self._rates),
            "undone": list(self._undone),
            "correct": self._correct,
            "harmed": self._harmed,
            "tuning": self._tuning.state_dict(),
            "rate": self._rate,
            "judged": self._judged,
            "detected": self._detected,
            "before": self._before,
            "initial": self._initial,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""
        self._accuracies, self._rates = list(state_dict["accuracies"]), list(state_dict["rates"])
        self._undone, self._rate = list(state_dict["undone"]), state_dict["rate"]
        self._correct, self._harmed = state_dict["correct"], state_dict["harmed"]
        self._before, self._judged = state_dict["before"], state_dict["judged"]
        self._initial = state_dict["initial"]
        self._detected = state_dict["detected"]
        self._tuning.load_state_dict(state_dict["tuning"])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running Trainer."""
        return {**self.__dict__, **dict.fromkeys(("_loader_filter", "_split", "_phases", "_held"))}


def split_of(verdict: Verdict, seed: int) -> Split:
    """What a verdict means for a treatment, and up to 1024 samples outside of it on which accuracy is watched.

    And up to 100 of each class (10,000 of all, 20 of each in any case). Where there are none of these, trusted ones.
    """
    labels, suspect, trusted = masks_of(verdict)
    pool = verdict.keep & ~trusted & (labels >= 0)
    positions = (pool if bool(pool.any()) else trusted).nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(seed)
    watched = torch.zeros_like(trusted)
    watched[positions[torch.randperm(len(positions), generator=generator)[:WATCHED]]] = True
    classes = torch.unique(labels[labels >= 0])
    most = min(OF_CLASS, max(OF_CLASSES // max(len(classes), 1), LEAST))
    counts = torch.bincount(labels[pool], minlength=int(labels.max()) + 1)
    few = (labels >= 0) & (counts[labels] < LEAST)  # of classes that are nearly all trusted, these
    by_class = drawn_by_label(pool | (trusted & few), labels, most, generator)
    return Split(labels, suspect, trusted, watched, by_class)


def masks_of(verdict: Verdict) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, suspects and trusted samples of a verdict; without masks the removed and the kept ones."""
    suspect = ~verdict.keep if verdict.suspect is None else verdict.suspect
    labels = labels_of(verdict)
    trusted = verdict.keep & (labels >= 0) if verdict.trusted is None else verdict.trusted
    return labels, suspect, trusted
