"""NONE: find the units that a backdoor works through, reset them, and train on without the images that drive them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from typing_extensions import Unpack

from lightning_backdoor.callbacks.arguments import (
    require_count,
    require_fraction,
    require_one_of,
    require_positive,
    require_rate,
)
from lightning_backdoor.callbacks.base import Defense
from lightning_backdoor.callbacks.detector import Detector
from lightning_backdoor.callbacks.options import DECISION_DEFAULTS, DecisionArguments, scan_arguments
from lightning_backdoor.callbacks.unit_decision import decide_by_units
from lightning_backdoor.detection.decision import verdict_of
from lightning_backdoor.detection.majorities import MAX_REMOVED_OF_CLASS
from lightning_backdoor.detection.subpopulations import FALSE_ALARM_RATE
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.responses.base import Continue, Detection, Response, Session
from lightning_backdoor.responses.by_name import ResponseName, chosen_response
from lightning_backdoor.responses.reset_units import ResetUnits
from lightning_backdoor.responses.restart import Restart
from lightning_backdoor.responses.unlearn import Unlearn
from lightning_backdoor.scanning.measure_units import UnitScan, find_layers
from lightning_backdoor.surgery.graph import ResidualMode

__all__ = ["NONECallback", "UnitActivations"]

PAPER_EPOCHS = 20  # of the authors' fine-tuning
NO_LIMIT = 0.999999  # of removed images: the natural break leaves one at least
MEANINGS = {
    "auto": "It measures how far the image drives the most compromised units of the model out of the range that they "
    "have on other images; above 0.5 it belongs to a second population inside its class.",
    "paper": "It adds up how strongly the image drives the most compromised unit of every layer.",
}


class UnitActivations(Detector):
    """The largest activation of every unit on every image.

    Args:
        rule: ``"auto"`` looks for subpopulations, ``"paper"`` cuts the authors' score at its natural break.
        max_removed: Largest share of all samples that may be flagged.
        false_alarm_rate: Chance at most that noise is taken for a subpopulation in a training.
        joins: Whether what an earlier verdict removed stays removed.
        residual_mode: What belongs to a unit that enters a sum.
    """

    features = False
    rereads = True

    def __init__(
        self,
        *,
        rule: str = "auto",
        max_removed: float = 0.3,
        false_alarm_rate: float = FALSE_ALARM_RATE,
        joins: bool = True,
        residual_mode: ResidualMode = "branch_only",
    ) -> None:
        self._false_alarm_rate = false_alarm_rate
        self._rule, self._max_removed, self._joins, self._residual_mode = rule, max_removed, joins, residual_mode
        self.meaning, self.by_subpopulations = MEANINGS[rule], rule == "auto"

    def require(self, session: Session) -> None:
        """Raise if the model has no units that could be measured."""
        find_layers(session.trainer, session.module, session.scanner, self._residual_mode)

    def detect(self, session: Session) -> Detection:
        """Measure all units on all images, and decide."""
        trainer, module = session.trainer, session.module
        layers = find_layers(trainer, module, session.scanner, self._residual_mode)
        measured = UnitScan(session.scanner, layers).measure(trainer, module)
        earlier = session.case.verdict if self._joins else None
        decided = decide_by_units(
            measured,
            earlier,
            rule=self._rule,
            max_removed=self._max_removed,
            approved=session.case.approved,
            false_alarm_rate=self._false_alarm_rate,
        )
        decision = trainer.strategy.broadcast(decided, src=0)  # float ties must not tell ranks apart
        return Detection(
            verdict_of(decision, measured.labels, session.case.verdict),
            decision.num_flagged_before_cap,
            tuple((found.label, found.standardized_gap) for found in decision.subpopulations),
            all_to_all=decision.all_to_all,
            correct=measured.predicted == measured.labels,
            units=measured,
        )


class NONECallback(Defense):
    """Reset the units that a backdoor works through, drop the images that drive them, and fine-tune.

    Implements NONE (*Training with More Confidence*, `Wang et al., 2022 <https://arxiv.org/abs/2202.06382>`_) inside a
    Trainer. When as many epochs are left as its rounds need (or after ``warmup_epochs``), it measures the largest
    activation of every unit on every training image. A direction over units that splits one label into two populations
    and no other label is the sign of a backdoor. So is one that splits most labels, if their second populations look
    like images of other labels. If there is one, its samples leave the training set, the units that they drive are
    drawn anew, and fine-tuning follows. Otherwise nothing changes.

    Assumes nothing: no clean data, no poison rate, no target class. Costs one forward pass per detection, another if a
    class has no confident sample; for each round two more; if something is found, a pass over a few thousand images at
    the end, by which the repaired model, or the one that was trained anew, says whether labels are right; only where
    the repaired model cannot say it, and for a group that is most of its label, a copy of the model that is trained
    without what was found, as many steps as the fit has had, 200 to 1,000; for that the weights at the start of the
    fit, in memory and in checkpoints; two bytes per image and unit (of up to 512 units where all together take over 256
    MiB, and one more pass then); a copy of weights and optimizer, to which training returns if a round brings what all
    have cost to over 1 point of accuracy on the training images (5 where no restart can follow), or over 10 of that of
    one class. Fine-tuning takes epochs of the plan (``max_epochs``, ``max_steps``, ``max_time``), unless
    ``extra_epochs`` are allowed.

    Units are reset at the start of an epoch, and rounds are judged and undone with the last batch of one, before
    validation: what monitors a score, saves a checkpoint or averages weights sees both of one state.

    Differs from the paper: units and samples are chosen by evidence instead of by quota and a natural break, which
    fires on clean data, too (``rule="paper"`` keeps both); reset units may learn again (``reset="prune"``: never).

    Args:
        warmup_epochs: Epochs of ordinary training before the first detection. ``None``: as late as the plan leaves
            time for all rounds, which take half of it at most. With ``response="reset"`` there is a second detection
            at the end if the first one found nothing (or, with ``fallback=None``, was undone); what is found then is
            removed and reported, and reset if ``extra_epochs`` are left. With another response there is one
            detection: after half of the plan (``"continue"``), when training is about to end (``"restart"``, which
            scans the new run once more, and ``"report"``), or as late as the plan leaves time for the repair
            (``"unlearn"``).
        extra_epochs: Epochs that fine-tuning may have beyond the plan. If they are as many as all rounds need, the
            first detection comes when training is about to end.
        rounds: Most detections in a row, each followed by its fine-tuning, as long as they find something, or the model
            still gives over 10 % of the removed samples their label (after the second one: and it made them a quarter
            fewer). ``None``: 3; 1 where units are reset by quota.
        finetune_epochs: Epochs of fine-tuning after a reset. ``None``: a tenth of
            ``max_epochs``; more, up to ``max_epochs``, where this is less than 100 steps. At most what is left. A round
            that would be undone for its loss of accuracy goes on in the place of the rounds after it.
        lr: Learning rate at the start of fine-tuning, from where it falls to zero.
            ``None``: within the plan that of the user's schedule, and ordinary training; beyond it 5 % of the largest
            so far.
        reset_fraction: Largest share of the units of a layer that one round resets, in ``(0, 1)``.
        reset: ``"reinit"`` draws units anew and lets them learn; ``"prune"`` zeroes them.
        rule: ``"auto"`` acts on second populations that pass the no-poison gate; ``"paper"`` always resets
            ``reset_fraction`` of the units of each layer, and drops the samples above the natural break.
        samples: ``"drop"`` takes the samples out, ``"keep"`` leaves the data as they are and always resets the most
            compromised units, against backdoors that nobody planted (natural backdoors). ``"auto"`` is ``"drop"``.
        residual_mode: What belongs to a unit that enters a sum; see :func:`~lightning_backdoor.surgery.find_units`.
        paper_loop: Fine-tune as the authors: at a constant rate, with frozen batch-norm statistics and the optimizer
            state of the reset weights, and without going back where it costs accuracy.
        max_removed: Largest share of the training set that may be removed, in ``(0, 1)``.
        response: ``"reset"``; ``"restart"`` trains anew on the rest, ``"continue"`` trains on without the removed
            images, ``"unlearn"`` unlearns them, ``"report"`` changes nothing. Or a
            :class:`~lightning_backdoor.responses.Response` with settings of its own.
        fallback: What follows a repair that leaves the backdoor in the model, because it was undone, had no epoch, or
            over a tenth of the removed images still get their label: ``"restart"`` trains all epochs anew from the
            weights at the start of the fit, without these images. This takes a copy of the first weights and
            optimizer, in checkpoints too. ``None``: a warning. A quota of images is flagged whether or not there is a
            backdoor, and never leads to a restart.
        **scan: See :class:`~lightning_backdoor.callbacks.options.DecisionArguments`.

    Attributes:
        history: What each round found and did.

    Raises:
        ArgumentError: If an argument is out of range.
        DataError: At the start of fit, if the training data cannot be scanned.
        ModelError: At the start of fit, if no unit of the model can be reset.
        TrainerError: At the start of fit, if the module optimizes by hand, or the strategy shards the model.

    Example:
        >>> NONECallback(rounds=4, reset="prune")
        NONECallback(rounds=4, reset='prune')
    """

    method: ClassVar[str] = "NONE"
    title: ClassVar[str] = "NONE"
    shared = DecisionArguments
    shared_defaults = DECISION_DEFAULTS

    def __init__(
        self,
        *,
        warmup_epochs: int | None = None,
        extra_epochs: int = 0,
        rounds: int | None = None,
        finetune_epochs: int | None = None,
        lr: float | None = None,
        reset_fraction: float = 0.05,
        reset: Literal["reinit", "prune"] = "reinit",
        rule: Literal["auto", "paper"] = "auto",
        samples: Literal["auto", "drop", "keep"] = "auto",
        residual_mode: Literal["branch_only", "reference", "full_group"] = "branch_only",
        paper_loop: bool = False,
        max_removed: float = 0.3,
        response: ResponseName | Response = "reset",
        fallback: Literal["restart"] | None = "restart",
        **scan: Unpack[DecisionArguments],
    ) -> None:
        self.extra_epochs = require_count("extra_epochs", extra_epochs)
        self.rounds = require_positive("rounds", rounds)
        self.finetune_epochs = require_positive("finetune_epochs", finetune_epochs)
        self.lr = require_rate("lr", lr)
        self.reset_fraction = require_fraction("reset_fraction", reset_fraction)
        self.reset = require_one_of("reset", reset, ("reinit", "prune"))
        self.rule = require_one_of("rule", rule, ("auto", "paper"))
        self.samples = require_one_of("samples", samples, ("auto", "drop", "keep"))
        self.residual_mode = require_one_of("residual_mode", residual_mode, ("branch_only", "reference", "full_group"))
        rate = require_fraction("false_alarm_rate", scan.get("false_alarm_rate", FALSE_ALARM_RATE))
        self.false_alarm_rate = rate
        self.max_removed_of_class = scan.get("max_removed_of_class", MAX_REMOVED_OF_CLASS)
        self.paper_loop, self.response = paper_loop, response
        self.fallback = require_one_of("fallback", fallback, ("restart", None))
        seed, drop = scan.get("seed", 0), samples != "keep"
        quota = rule == "paper" or not drop
        if not drop and response in ("restart", "continue", "unlearn"):
            raise ArgumentError(
                f'`samples="keep"` leaves the data as they are, which does not go with response={response!r}. Pass '
                'response="reset" or "report", or leave `samples` out.'
            )
        own: dict[str, Response] = {
            "continue": Continue(halfway=True),
            "restart": Restart(last_detection=rule == "auto"),
            "reset": ResetUnits(
                rounds=rounds,
                finetune_epochs=finetune_epochs,
                extra_epochs=extra_epochs,
                lr=lr,
                reset_fraction=reset_fraction,
                reset=reset,
                by_quota=quota,
                drop=drop,
                residual_mode=residual_mode,
                paper_loop=paper_loop,
                seed=seed,
            ),
            "unlearn": Unlearn(extra_epochs=extra_epochs, lr=lr, seed=seed),
        }
        super().__init__(
            detector=UnitActivations(
                rule=rule,
                max_removed=require_fraction("max_removed", max_removed),
                false_alarm_rate=rate,
                joins=drop,
                residual_mode=residual_mode,
            ),
            response=chosen_response(response, own, fallback=None if quota or paper_loop else self.fallback),
            warmup_epochs=require_positive("warmup_epochs", warmup_epochs),
            max_removed=max_removed,
            max_removed_of_class=self.max_removed_of_class,
            **scan_arguments(scan, DECISION_DEFAULTS),
        )

    @classmethod
    def from_paper(cls, **overrides: Any) -> NONECallback:
        """Use the authors' quotas, natural break, zeroing and fine-tuning, without bounds; this always removes images.

        The model is fine-tuned for 20 epochs beyond the plan at a constant rate of 1e-4 (meant for SGD with momentum),
        and keeps what has come of it. Nothing limits how many images are removed.

        What is left of the differences: all units that can be reset are measured, those of a ResNet's stem and first
        stage, too, and those of a projection shortcut before its batch norm (the authors: after it), and the weights
        that read a sum through a projection are reset with the others; images at the natural break stay, only those
        above it leave; a class that the model is never sure of gets a threshold of its own
        (:func:`~lightning_backdoor.functional.strong_thresholds`) instead of no units; when the network is trained, and
        how, is up to the Trainer.
        """
        paper: dict[str, Any] = {
            "rule": "paper",
            "reset": "prune",
            "residual_mode": "reference",
            "paper_loop": True,
            "lr": 1e-4,
            "finetune_epochs": PAPER_EPOCHS,
            "extra_epochs": PAPER_EPOCHS,
            "max_removed": NO_LIMIT,
        }
        return cls(**{**paper, **overrides})
