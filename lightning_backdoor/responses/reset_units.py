"""Reset the units that flagged samples drive, and fine-tune without these samples: the response of NONE."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_backdoor._lightning import callbacks_of, rank_zero_info, rank_zero_warn
from lightning_backdoor.errors import ModelError
from lightning_backdoor.events import STILL_LABELED, Event, own_label
from lightning_backdoor.functional.hyperplane import select_units
from lightning_backdoor.report.of_events import last_word
from lightning_backdoor.report.of_events import reset_units as reset_units_of
from lightning_backdoor.responses.base import WARMUP, Detection, Response, Session, labels_of
from lightning_backdoor.responses.checkpointing import warn_of_treated_files
from lightning_backdoor.responses.extra_epochs import FineTuning, conclude, enough_epochs, is_finite
from lightning_backdoor.responses.harm import harmed_class
from lightning_backdoor.responses.limits import (
    about_to_end,
    epochs_left,
    plan_is_over,
    planned_end,
    repair_begins,
    require_extendable,
)
from lightning_backdoor.responses.weight_copies import restart_averages, weights
from lightning_backdoor.scanning.isolation import require_automatic
from lightning_backdoor.scanning.measure_units import Measured, UnitScan, find_layers
from lightning_backdoor.surgery.graph import ResidualMode
from lightning_backdoor.surgery.reset import reset_units
from lightning_backdoor.surgery.units import UnitLayer

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Chosen", "ResetMode", "ResetUnits", "choose_units", "frozen_layers"]

MAX_LOSS = 0.05  # of accuracy on the training images, by all rounds, beyond which the last one is undone
REPLACEABLE = 0.2  # of that, where training anew follows, which costs no accuracy
MOST_KEPT = 0.75  # of the flagged label rate before a round: beyond that another round would not help
KNOWN = 0.75  # of the accuracy: a group of all labels is put back if so large a share of it gets its labels
ROUNDS = 3
MIN_SHIFT = 1.0  # distance of two means over the sum of both standard deviations

ResetMode = Literal["reinit", "prune"]
Chosen = tuple[int, int, int, float]
"""Place of the layer, unit, class that drives it furthest, and score."""


class ResetUnits(Response):
    """Rounds of: reset units, fine-tune for some epochs, judge, and go back where accuracy has suffered.

    Units are reset at the start of an epoch, and a round is judged and undone with the last batch of its last epoch,
    before validation. Another round follows while something new is found, or flagged samples still get their label.

    Units are drawn anew, and the statistics of batch norms go on while the network is fine-tuned: those of the units
    themselves are unknown, and all later layers have lost what these units gave them. With statistics that stand still,
    as in the authors' loop, accuracy does not come back and the round is undone.

    Whether accuracy comes back depends on the epochs that are left. ``python -m benchmarks.treatments`` compares what
    can be done in the second half of a plan (test accuracy / attack success rate in per cent). On 1,400 digits, with
    five of ten epochs left, redrawn units give 98.7 / 6.3, units with their weights from the start of the fit
    98.7 / 20.7, :class:`~lightning_backdoor.responses.Unlearn` 98.7 / 29.2, ordinary training on the rest 98.7 / 100.
    With two of five epochs left for EfficientNet-Lite0 with ImageNet weights, none of them holds: redrawn units
    60.0 / 4.6, units with their pretrained weights 64.4 / 68.4, ``Unlearn`` 61.1 / 89.9, ordinary training 64.1 / 99.9.
    Training anew without the removed images gives 98.7 / 0.0 and 63.7 / 1.9. So a round that a restart can follow must
    not cost more than a point of accuracy on the training images (here 4.1), and any other one not more than five.

    Nothing of this depends on whether the labels of what was found are right. So this is found out at the end of a fit
    (``explains_at_end``): by the model that a fallback has trained anew, or by the repaired one, if it takes the images
    for other classes. Only what neither of them settles needs a copy that is trained without the images.

    Args:
        rounds: Most rounds; ``None``: 3, or 1 with ``by_quota``.
        finetune_epochs: Epochs after a reset; ``None``: a tenth of all, and 100 steps at least.
        extra_epochs: Epochs that fine-tuning may have beyond the user's plan.
        lr: Learning rate of fine-tuning; see :class:`~lightning_backdoor.NONECallback`.
        reset_fraction: Largest share of the units of a layer that a round resets, in ``(0, 1)``.
        reset: ``"reinit"`` draws units anew, ``"prune"`` zeroes them.
        by_quota: Reset the most compromised units of each layer, whatever was found.
        drop: Whether flagged samples leave the training set.
        residual_mode: What belongs to a unit that enters a sum.
        paper_loop: Constant rate, batch norms and optimizer keep their state, and only weights that are no numbers are
            undone.
        seed: Seed of the redrawn units.
    """

    name = "reset"
    rereads = copies = True
    starts_over = True
    repeats = True

    def __init__(
        self,
        *,
        rounds: int | None = None,
        finetune_epochs: int | None = None,
        extra_epochs: int = 0,
        lr: float | None = None,
        reset_fraction: float = 0.05,
        reset: ResetMode = "reinit",
        by_quota: bool = False,
        drop: bool = True,
        residual_mode: ResidualMode = "branch_only",
        paper_loop: bool = False,
        seed: int = 0,
    ) -> None:
        self._rounds, self._most_rounds = rounds, rounds or (1 if by_quota else ROUNDS)
        self._finetune_epochs, self._extra_epochs, self._lr = finetune_epochs, extra_epochs, lr
        self._reset_fraction, self._reset = reset_fraction, reset
        self._by_quota, self._residual_mode, self._paper_loop, self._seed = by_quota, residual_mode, paper_loop, seed
        self._drop = self.drops = drop
        self.explains_at_end = not by_quota
        self._forget()

    def _forget(self) -> None:
        self._rounds_done = 0  # in a row that reset units, since the start or since one that was undone
        self._judged: int | None = None  # epochs trained when a round was judged last
        self._correct: Tensor | None = None  # samples that got their label before the first of these rounds
        self._keep: Tensor | None = None  # samples that were kept before the last round
        self._due = False  # whether units are to be reset at the start of the next epoch
        self._before: dict[str, Any] | None = None  # until a round is judged, the weights to go back to
        self._left_out: Tensor | None = None  # of training when the last round began, unless that was undone
        self.changed_at = 0.0
        self._tuning = FineTuning()
        self._layers: list[UnitLayer] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, title: str) -> None:
        """Forget an earlier fit.

        Raises:
            TrainerError: The module optimizes by hand, or a callback rules further epochs out.
        """
        require_automatic(pl_module, f"{title} fine-tunes")
        require_extendable(trainer, title)
        self._forget()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue a fine-tuning that was interrupted."""
        self._tuning.keep_open(trainer)

    def on_train_start(self, session: Session) -> None:
        """Find the units, and check that some can be reset."""
        self._layers = find_layers(session.trainer, session.module, session.scanner, self._residual_mode)
        check_resettable(session.trainer, self._layers, session.case.title, needed=self._by_quota)
        self._tuning.end_if_over()

    def on_other_restart(self, session: Session) -> None:
        """Begin with the first round again."""
        self._tuning.leave()
        layers = self._layers
        self._forget()
        self._layers = layers

    def on_train_epoch_start(self, session: Session) -> None:
        """Reset the units that the last detection chose; what monitors or saves has seen the epoch before."""
        if not self._due:
            return
        self._due = False
        places = {layer.name: place for place, layer in enumerate(self._layers)}
        history, trainer = session.case.history, session.trainer
        chosen = [(places[name], unit, label, score) for name, unit, label, score in history[-1].units]
        seed = self._seed + len(history) * len(self._layers)
        optimizers = () if self._paper_loop else trainer.optimizers
        reset_chosen(self._layers, chosen, mode=self._reset, optimizers=optimizers, seed=seed)
        restart_averages(trainer, session.module)

    def on_train_batch_start(self, session: Session, batch_idx: int) -> None:
        """Prepare a step of fine-tuning."""
        self._tuning.prepare_step(session.trainer, session.module, batch_idx)

    def on_train_batch_end(self, session: Session) -> None:
        """Measure what a round has led to with the last batch of its fine-tuning."""
        if self._before is not None and self._tuning.ends_now(session.trainer):
            self._judge(session, left=self._epochs_after(session.trainer))

    def on_train_epoch_end(self, session: Session) -> bool:
        """End a round when its fine-tuning is over; detect again while rounds and epochs are left."""
        trainer = session.trainer
        if not self._tuning.left:
            recheck = self._rounds_done > 0 and not self._by_quota and session.epochs_done > (self._judged or 0)
            if recheck and about_to_end(trainer):
                self._recheck(session)
            return False
        if self._tuning.count_epoch():
            if self._before is not None:  # a callback after this one has ended the epoch
                self._judge(session)
            self._reassign(session)
            left = epochs_left(trainer, planned_end(trainer), self._extra_epochs)
            again = 0 < self._rounds_done < self._most_rounds and left != 0 and self.ready(session)
            if not again:
                self._explain(session)
            session.case.tell()
            if again:
                session.case.detect()
        return True

    def on_train_end(self, session: Session) -> None:
        """Say what the fit ends with, and name the files that were saved before the treatment was over."""
        history = session.case.history
        if history and not self._by_quota and (warning := last_word(history[-1], session.verdict)):
            rank_zero_warn(f"{session.case.title} {warning}")
        warn_of_treated_files(session.trainer, session.case.title, session.began, self.changed_at)

    def why_not(self, session: Session) -> str:
        """Why a fit ended without a verdict, and what to do."""
        if self._by_quota and not any(layer.trainable for layer in self._layers):
            return (
                "no layer could learn when it was time to look. Thaw layers before the end, or use UltraCleanCallback."
            )
        remedy = f"Pass `{WARMUP}`, a number of epochs." if session.takes(WARMUP) else "Train longer."
        return f"training ended before it could look. {remedy}"

    def metrics(self, session: Session) -> dict[str, float]:
        """Removed samples and reset units so far."""
        units = reset_units_of(session.case.history)
        return {**super().metrics(session), "units_reset": float(len(units))}

    @property
    def busy(self) -> bool:  # type: ignore[override]
        """Whether a round is going on or about to begin."""
        return self._due or self._tuning.left > 0

    def awaits_detection(self, session: Session) -> bool:
        """Whether no round is going on, and none that was kept has been done."""
        return not self._rounds_done

    def ready(self, session: Session) -> bool:
        """Whether a detection may lead to anything: with a quota there must be units that can be reset."""
        self._layers = find_layers(session.trainer, session.module, session.scanner, self._residual_mode)
        return not (self._by_quota and not any(layer.trainable for layer in self._layers))

    def latest_detection(self, trainer: Trainer) -> int:
        """Epochs after which the first round has to begin, so that all of them fit into the plan."""
        needed = self._most_rounds * (self._finetune_epochs or enough_epochs(trainer))
        return repair_begins(planned_end(trainer), needed, self._extra_epochs)

    def revise(self, session: Session, detection: Detection) -> Detection:
        """Withdraw what gives no reason to act.

        That is the case after a round whose removed samples get their label, although the model had not trained on
        them: these may be a clean kind of image. Or if all of the new ones have left the training set by another
        defense, and the model does not give them their label.
        """
        verdict, earlier, correct = detection.verdict, session.case.verdict, detection.correct
        before = torch.ones_like(verdict.keep) if earlier is None else earlier.keep
        if self.drops and bool((verdict.keep & ~before).any()):  # what was removed stays removed, whatever the detector
            verdict = replace(verdict, keep=verdict.keep & before)
            detection = replace(detection, verdict=verdict)
        new, training, treated = before & ~verdict.keep, session.in_training, self._treated(session)
        own_labels = bool(treated) and own_label(treated[-1])
        gone = training is not None and bool(new.any()) and not bool((new & training).any())
        unlearned = gone and correct is not None and float(correct[new].float().mean()) <= STILL_LABELED
        withdrawn = not self._by_quota and (own_labels or unlearned)
        if self.drops and not withdrawn:
            if earlier is None or bool(new.any()):
                return detection
            return replace(detection, verdict=replace(verdict, rule=earlier.rule))
        threshold = verdict.threshold
        if not torch.equal(before, verdict.keep):
            threshold = math.inf if bool(before.all()) else float(verdict.scores[before].max())
        rule = verdict.rule if earlier is None else earlier.rule
        findings = verdict.findings if not withdrawn else () if earlier is None else earlier.findings
        suspect = None if verdict.suspect is None else verdict.suspect & ~before
        kept = replace(verdict, keep=before, threshold=threshold, rule=rule, findings=findings, suspect=suspect)
        return replace(detection, verdict=kept, num_flagged_before_cap=int((~before).sum()))

    def respond(self, session: Session, detection: Detection, event: Event) -> Event:
        """Choose the units that are reset when the next epoch begins, and plan their fine-tuning."""
        trainer, verdict, treated = session.trainer, session.verdict, self._treated(session)
        units, correct = self._measured(session, detection)
        accuracy, rate = session.label_rates(correct)
        chosen: list[Chosen] = []
        anew = not treated and self.drops and (rate or 0.0) > STILL_LABELED  # after a round that was undone
        if self._by_quota or event.removed or unfinished(treated) or anew:
            shift = None if self._by_quota else self._scan(session).unit_shift(trainer, session.module, ~verdict.keep)
            if shift is not None and (frozen := frozen_layers(self._layers, shift)):
                rank_zero_warn(
                    f"{session.case.title}: the removed images drive units of {', '.join(frozen)}, which do not learn "
                    "(frozen, or in no optimizer) and are not reset. If the backdoor stays, unfreeze them, or pass "
                    '`response="restart"`, which trains all other weights anew without these images.'
                )
            found = choose_units(self._layers, units.activation_excess, shift, reset_fraction=self._reset_fraction)
            chosen = trainer.strategy.broadcast(found, src=0)
        end = planned_end(trainer)
        left = epochs_left(trainer, end, self._extra_epochs)
        reset = tuple((self._layers[i].name, unit, label, score) for i, unit, label, score in chosen if left != 0)
        if reset:
            self._rounds_done, self._due, self._keep = self._rounds_done + 1, True, detection.kept_before
            self._before = weights(trainer, session.module)
            self._left_out = None if session.in_training is None else ~session.in_training
            self._correct = correct if self._correct is None else self._correct
            wanted = self._finetune_epochs or enough_epochs(trainer)
            epochs = wanted if left is None else min(wanted, left)
            beyond = end is not None and event.epochs + epochs > end
            ordinary = self._lr is None and end is not None and not beyond
            as_authors = self._paper_loop
            self._tuning.begin(
                trainer,
                epochs,
                self._lr,
                ordinary=ordinary,
                constant=as_authors,
                frozen_norms=as_authors,
                beyond=beyond,
            )
        return replace(
            event,
            units=reset,
            unconfident=units.unconfident,
            accuracies=(accuracy,),
            flagged_label_rates=(rate,),
            no_room=bool(chosen) and left == 0,
        )

    def _measured(self, session: Session, detection: Detection) -> tuple[Measured, Tensor]:
        """What was measured of the units, and the samples that get their label; measured now if it was not before."""
        units, correct = detection.units, detection.correct
        same = units is not None and len(units.activation_excess) == sum(layer.size for layer in self._layers)
        if units is None or correct is None or not same:
            units = self._scan(session).measure(session.trainer, session.module)
            correct = units.predicted == units.labels
        return units, correct

    def _scan(self, session: Session) -> UnitScan:
        return UnitScan(session.scanner, self._layers)

    def _treated(self, session: Session) -> list[Event]:
        """The latest rounds in a row that reset units."""
        return [past for past in session.case.history if past.units][-self._rounds_done :] if self._rounds_done else []

    def _epochs_after(self, trainer: Trainer) -> int:
        """Epochs that are left after the one that ends with the present batch; 0 where nothing limits them."""
        left = epochs_left(trainer, planned_end(trainer), self._extra_epochs)
        return 0 if left is None or plan_is_over(trainer) else max(left - 1, 0)

    def _judge(self, session: Session, left: int = 0) -> None:
        """Compare with the model before the reset, and go back to it if this one is much worse.

        Not while epochs are ``left`` that were meant for all rounds: a network that is fine-tuned may need them, and
        going back means to train anew, or to keep the backdoor.
        """
        trainer, history = session.trainer, session.case.history
        predicted = session.scanner.predict(trainer, session.module, description=f"{session.case.title} check")
        judged = self._judged_event(session, history[-1], predicted)
        epochs = self._finetune_epochs or enough_epochs(trainer)
        more = min(epochs, left, self._most_rounds * epochs - self._tuning.length)
        if judged.undone and more > 0 and not judged.reassigned and is_finite(session.module):
            self._tuning.prolong(trainer, more)
            return
        history[-1] = judged
        conclude(trainer, session.module, self._before if judged.undone else None)
        self._judged, self._before = session.epochs_done, None
        self._rounds_done = 0 if judged.undone else self._rounds_done
        self._left_out = None if judged.undone else self._left_out
        self.changed_at = time.time()

    def _judged_event(self, session: Session, event: Event, predicted: Tensor) -> Event:
        """The event of a round after its fine-tuning; it is undone if all rounds together cost too much accuracy.

        That of all images, or that of one class (:func:`~lightning_backdoor.responses.harm.harmed_class`).

        Samples of an all-to-all subpopulation come back if the model, which has not trained on them, gives most of
        them their label: an all-to-all attack changes labels.
        """
        verdict, training = session.verdict, session.in_training
        labels = labels_of(verdict)
        after, rate = session.label_rates(predicted == labels)
        new = (torch.ones_like(verdict.keep) if self._keep is None else self._keep) & ~verdict.keep
        own_label = bool(new.any()) and float((predicted == labels)[new].float().mean()) > KNOWN * after
        before = torch.ones_like(verdict.keep) if self._correct is None else self._correct
        lost = float(before[verdict.keep if training is None else training].float().mean()) - after
        allowed = MAX_LOSS * (REPLACEABLE if self.replaceable else 1)
        reassigned, undone = event.all_to_all and own_label, lost > allowed
        kept = (verdict.keep if training is None else training) & (labels >= 0)
        affected = torch.unique(labels[~verdict.keep]).tolist()
        harmed = harmed_class(before[kept], (predicted == labels)[kept], labels[kept], affected)
        undone = undone or harmed is not None
        if self._paper_loop:
            reassigned, undone, harmed = False, not is_finite(session.module), None
        return replace(
            event,
            accuracies=(*event.accuracies, after),
            flagged_label_rates=(*event.flagged_label_rates, rate),
            undone_steps=(reassigned or undone,),
            reassigned=reassigned,
            harmed=None if reassigned else harmed,
            of_labels=session.rates_of_labels(predicted == labels),
        )

    def _reassign(self, session: Session) -> None:
        """Take samples of the last round back if it says so; not before the epoch ends, which has its validation yet.

        The number of batches of an epoch decides when Lightning validates.
        """
        if session.case.history[-1].reassigned and self._keep is not None:
            verdict, keep = session.verdict, self._keep
            threshold = math.inf if bool(keep.all()) else verdict.threshold
            rule = f"{verdict.rule}, reassigned"
            back = keep & ~verdict.keep
            findings = tuple(
                one for one in verdict.findings if not bool(back[one.positions].any() & keep[one.positions].all())
            )
            suspect = None if verdict.suspect is None else verdict.suspect & ~keep
            changed = replace(verdict, keep=keep, threshold=threshold, rule=rule, findings=findings, suspect=suspect)
            session.case.adopt(changed)

    def _recheck(self, session: Session) -> None:
        """At the end of training, measure what the model makes of the samples that earlier rounds removed."""
        history, verdict = session.case.history, session.verdict
        description = f"{session.case.title} check"
        predicted = session.scanner.predict(session.trainer, session.module, description=description)
        correct = predicted == labels_of(verdict)
        accuracy, rate = session.label_rates(correct)
        self._judged = session.epochs_done
        history.append(
            Event(
                session.epochs_done,
                0,
                history[-1].num_flagged_before_cap,
                response=self.name,
                rechecked=int((~verdict.keep).sum()),
                accuracies=(accuracy,),
                flagged_label_rates=(rate,),
                of_labels=session.rates_of_labels(correct),
            )
        )
        self._explain(session)
        session.case.tell()

    def _explain(self, session: Session) -> None:
        """Have findings diagnosed if training ends with these weights, which no restart follows."""
        anew = self.replaceable and session.case.history[-1].failed
        if not anew and self.is_over(session):
            session.case.explain_at_end()

    def release(self) -> None:
        """Give the optimizers and the limits of the Trainer back."""
        self._tuning.leave()

    @property
    def weights_before(self) -> dict[str, Any] | None:
        """Until a round is judged, the weights that it began with."""
        return self._before

    @property
    def repaired_without(self) -> Tensor | None:
        """After a round that was kept, what it was fine-tuned without."""
        return self._left_out if self._before is None else None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; while a round lasts, with the weights to go back to."""
        return {
            "rounds": self._rounds_done,
            "judged": self._judged,
            "correct": self._correct,
            "keep": self._keep,
            "due": self._due,
            "before": self._before,
            "left_out": self._left_out,
            "tuning": self._tuning.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""
        self._rounds_done, self._judged = state_dict["rounds"], state_dict["judged"]
        self._correct, self._keep = state_dict["correct"], state_dict["keep"]
        self._due, self._before, self._left_out = (state_dict[name] for name in ("due", "before", "left_out"))
        self._tuning.load_state_dict(state_dict["tuning"])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running Trainer."""
        return {**self.__dict__, "_layers": []}


def unfinished(treated: list[Event]) -> bool:
    """Whether over a tenth of the removed samples still get their label, and the last of several rounds has helped.

    The first one may have met too few of the units that the trigger drives. Where labels are right, as under a
    clean-label attack, the samples get them whatever is reset.

    Args:
        treated: Rounds that reset units, one after the other.
    """
    if not treated or len(treated[-1].flagged_label_rates) < 2:
        return False
    before, after = treated[-1].flagged_label_rates
    if before is None or after is None:
        return False
    return (len(treated) == 1 or after < MOST_KEPT * before) and after > STILL_LABELED


def choose_units(
    layers: Sequence[UnitLayer], activation_excess: Tensor, unit_shift: Tensor | None, *, reset_fraction: float
) -> list[Chosen]:
    """Choose the units of every layer that are reset; those of layers that do not learn are left alone.

    Args:
        layers: The layers, with U units in all.
        activation_excess: How far each class drives each unit out of its usual range, float ``(U, K)``.
        unit_shift: How far the suspicious samples drive each unit, float ``(U,)``: those are chosen that they drive
            more than one spread away or, where none is, the ones that they drive furthest. ``None``: the most
            compromised units of each layer, whatever their score.
        reset_fraction: Largest share of the units of a layer.
    """
    strongest, of_class = activation_excess.max(dim=1)
    if unit_shift is None:
        return _top(layers, strongest, of_class, reset_fraction, -math.inf)
    return _top(layers, unit_shift, of_class, reset_fraction, MIN_SHIFT) or _top(
        layers, unit_shift, of_class, reset_fraction, 0.0
    )


def _top(
    layers: Sequence[UnitLayer], scores: Tensor, of_class: Tensor, reset_fraction: float, least: float
) -> list[Chosen]:
    chosen = []
    for place, (layer, rows) in enumerate(_rows(layers)):
        part = scores[rows]
        for unit in select_units(part, reset_fraction, least=least).tolist() if layer.trainable else ():
            chosen.append((place, unit, int(of_class[rows][unit]), float(part[unit])))
    return chosen


def frozen_layers(layers: Sequence[UnitLayer], unit_shift: Tensor) -> list[str]:
    """Names of the layers that do not learn, but have units that the suspicious samples drive.

    Args:
        layers: The layers, with U units in all.
        unit_shift: How far the suspicious samples drive each unit, float ``(U,)``.
    """
    frozen = [(layer.name, unit_shift[rows]) for layer, rows in _rows(layers) if not layer.trainable]
    return [name for name, part in frozen if bool((part > MIN_SHIFT).any())]


def _rows(layers: Sequence[UnitLayer]) -> list[tuple[UnitLayer, slice]]:
    """Each layer and its place among the units of all."""
    ends = list(accumulate(layer.size for layer in layers))
    return [(layer, slice(end - layer.size, end)) for layer, end in zip(layers, ends, strict=True)]


def check_resettable(trainer: Trainer, layers: Sequence[UnitLayer], title: str, *, needed: bool) -> None:
    """Say at the start of a fit how many of the layers can be reset.

    There may be none as long as a callback is there that thaws layers later.

    Args:
        trainer: The running Trainer.
        layers: From :func:`find_layers`.
        title: Name of the defense for readers.
        needed: Whether the defence does nothing without resets.

    Raises:
        ModelError: There is none, no callback thaws layers later, and resets are needed.
    """
    able = sum(layer.trainable for layer in layers)
    classes = {cls.__name__ for callback in callbacks_of(trainer) for cls in type(callback).__mro__}
    thaws = "BaseFinetuning" in classes
    why = "all weights that they need are frozen (requires_grad=False) or in no optimizer"
    if not able and not thaws and needed:
        raise ModelError(
            f"Units must be able to learn to be reset, but {why}. Unfreeze some layers, or use UltraCleanCallback."
        )
    if not able and not thaws:
        rank_zero_warn(
            f"{title} looks at the units of {len(layers)} layers and drops images, but can reset no unit: {why}. "
            "Unfreeze some layers, or use UltraCleanCallback, which trains anew without these images."
        )
    elif able < len(layers):
        rank_zero_info(f"{title} looks at {len(layers)} layers; {len(layers) - able} do not learn and are not reset.")


def reset_chosen(
    layers: Sequence[UnitLayer],
    chosen: Sequence[Chosen],
    *,
    mode: ResetMode,
    optimizers: Iterable[torch.optim.Optimizer],
    seed: int,
) -> None:
    """Reset the chosen units; see :func:`~lightning_backdoor.surgery.reset_units`."""
    for i, layer in enumerate(layers):
        units = torch.tensor([unit for place, unit, *_ in chosen if place == i], dtype=torch.long)
        if len(units) == 0:  # reset_units refuses layers that do not learn
            continue
        reset_units(layer, units, mode=mode, optimizers=optimizers, seed=seed + i)
