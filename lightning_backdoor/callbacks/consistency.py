"""The detector of D-BR and D-ST: feature consistency towards transformations, and the units of a trained copy."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_backdoor.callbacks.arguments import require_fraction, require_one_of, require_positive
from lightning_backdoor.callbacks.detector import Detector
from lightning_backdoor.callbacks.unit_decision import decide_by_units
from lightning_backdoor.callbacks.unread import spared
from lightning_backdoor.detection.decision import Decision, add_removed, decide, verdict_of
from lightning_backdoor.detection.subpopulations import FALSE_ALARM_RATE
from lightning_backdoor.errors import TrainerError
from lightning_backdoor.functional.consistency import select_trusted
from lightning_backdoor.responses.base import Detection, Session
from lightning_backdoor.responses.weight_copies import on_cpu, start_of_fit
from lightning_backdoor.scanning import measure_fct
from lightning_backdoor.scanning.early_neighbors import EarlyNeighbors, early_neighbors
from lightning_backdoor.scanning.measure_fct import Distinguished, distinguish, require_detector
from lightning_backdoor.verdict import Verdict

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["ConsistencyDetector", "detection_of", "from_verdict"]

MEANINGS = {
    "subpopulations": "It says how suspicious the image looks to a detector that was trained to rely on triggers; "
    "above 0.5 it belongs to a second population inside its class.",
    "fct": "It measures how far the features of a detector move when the image is turned and shifted.",
    "given": "It is the score of the verdict that was handed in.",
}


class ConsistencyDetector(Detector):
    """Trains a copy of the model that relies on triggers, and measures how its features follow transformations.

    Suspects are the subpopulations of single labels on its units, or a share of all samples; trusted are the samples
    whose features move least. With the verdict of another defense there is nothing to train.

    Args:
        arguments: Those of :class:`~lightning_backdoor.callbacks.options.DetectorArguments` that concern the detector.
        max_removed: Largest share of all samples that may be suspect.
        seed: Seed of the copy's batches and of the transformations.

    Raises:
        ArgumentError: An argument is out of range.
    """

    rereads = True

    def __init__(self, arguments: dict[str, Any], max_removed: float, seed: int) -> None:
        self.external_verdict: Verdict | None = arguments["verdict"]
        start = arguments["detector"]
        if not isinstance(start, nn.Module):
            require_one_of("detector", start, ("copy", "fresh"))
        self._initial: dict[str, Tensor] | None = None  # weights that a fresh detector starts from
        self._early: EarlyNeighbors | None = None
        self.trusted = require_fraction("trusted", arguments["trusted"])
        share = arguments["suspect"]
        if isinstance(share, str):
            require_one_of("suspect", share, ("auto",))
        else:
            require_fraction("suspect", share)
        self.suspect: str | float = share
        self.false_alarm_rate = require_fraction("false_alarm_rate", arguments["false_alarm_rate"])
        steps = require_positive("detector_steps", arguments["detector_steps"]) or 1
        metric = require_one_of("fct_metric", arguments["fct_metric"], ("auto", "mse", "cosine"))
        transforms = require_positive("num_transforms", arguments["num_transforms"]) or 1
        self._settings = measure_fct.Detector(
            start, None, steps, transforms, arguments["transform"], seed, metric=metric
        )
        self._max_removed = max_removed
        kind = "given" if self.external_verdict is not None else "subpopulations" if share == "auto" else "fct"
        self.meaning, self.by_subpopulations = MEANINGS[kind], True

    def setup(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a checkpoint is loaded, keep the weights that a fresh detector starts from; forget an earlier fit."""
        self._early = None
        if self._settings.start == "fresh" and self.external_verdict is None:
            self._initial = on_cpu(pl_module.state_dict())

    def require(self, session: Session) -> None:
        """Check at the start of a fit what can be checked then; a fresh detector has its weights from here on.

        Raises:
            TrainerError: It cannot have any, since the weights that training started from are not known.
            ArgumentError: The user's own detector cannot take the place of the model.
            DataError: The verdict is on other data.
            ModelError: The model has no units that could be measured.
        """
        scanner = session.scanner
        if self._early is not None:
            self._early.require_same_data(scanner)
        if self._initial is not None:
            self._initial = start_of_fit(session.trainer, session.module, self._initial)
            if self._initial is None:
                raise TrainerError(
                    '`detector="fresh"` needs the weights that training started from, but the checkpoint was written '
                    "without this callback and the model is built in `configure_model`. Build it in `__init__`, or "
                    'pass `detector="copy"`.'
                )
        if self.external_verdict is not None:
            session.require_same_data(self.external_verdict)
        else:
            require_detector(session.trainer, session.module, scanner, self._settings, units=self.suspect == "auto")

    def observe(self, session: Session, first: int) -> None:
        """Measure neighbors half-way to the first detection, in the features of the model."""
        wanted = self.external_verdict is None and self.suspect == "auto" and self._early is None
        if wanted and 2 * session.epochs_done >= first:
            self._early = early_neighbors(session.trainer, session.module, session.scanner)

    def detect(self, session: Session) -> Detection:
        """Train the copy, measure, and decide."""
        trainer, module, scanner, earlier = session.trainer, session.module, session.scanner, session.case.verdict
        if self.external_verdict is not None:
            detection = from_verdict(self.external_verdict, scanner.read_labels(trainer, module), trusted=self.trusted)
        else:
            settings = replace(self._settings, initial=self._initial)
            found = distinguish(trainer, module, scanner, settings, units=self.suspect == "auto")
            detection = detection_of(
                found,
                earlier,
                suspect=self.suspect,
                trusted=self.trusted,
                max_removed=self._max_removed,
                approved=session.case.approved,
                agreement=None if self._early is None else self._early.agreement,
                false_alarm_rate=self.false_alarm_rate,
            )
        detection = replace(detection, verdict=spared(detection.verdict, scanner.unread, earlier))
        agreed: Detection = trainer.strategy.broadcast(detection, src=0)  # float ties
        return agreed

    def close(self) -> None:
        """Nothing is kept between detections."""

    def state_dict(self) -> dict[str, Any]:
        """The weights that a fresh detector starts from, and what the early neighbors had in common."""
        return {"initial": self._initial, "early": None if self._early is None else self._early.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take these weights from the checkpoint: those of now are of a later moment."""
        self._initial = state_dict["initial"] or self._initial
        early = state_dict["early"]
        self._early = None if early is None else EarlyNeighbors(**early)


def detection_of(
    found: Distinguished,
    earlier: Verdict | None,
    *,
    suspect: str | float,
    trusted: float,
    max_removed: float,
    approved: Tensor | None = None,
    agreement: Tensor | None = None,
    false_alarm_rate: float = FALSE_ALARM_RATE,
) -> Detection:
    """Suspect the subpopulations of single labels, or a share of all samples; trust the most consistent ones.

    Args:
        found: What the detector measured.
        earlier: The verdict of an earlier fit; what it removed stays removed.
        suspect: Share of the samples with the largest FCT; ``"auto"`` looks for subpopulations.
        trusted: Share of the samples of each class with the smallest FCT.
        max_removed: Largest share of all samples that may be suspect.
        approved: Samples that are not suspect, bool ``(N,)``; see :func:`~lightning_backdoor.functional.decide`.
        agreement: Share of every sample's neighbors that had its label early in training, float ``(N,)``.
        false_alarm_rate: Chance at most that noise is taken for a subpopulation in a training.
    """
    if found.units is not None and isinstance(suspect, str):
        measured = replace(found.units, bias=found.fct)  # one of all labels may be a style: nothing could confirm it
        decision = decide_by_units(
            measured,
            earlier,
            rule="auto",
            max_removed=max_removed,
            approved=approved,
            agreement=agreement,
            false_alarm_rate=false_alarm_rate,
            all_to_all=False,
        )
    else:
        decision = _share(found, earlier, float(suspect), max_removed, approved)
    trust = select_trusted(found.fct, found.labels, decision.keep, trusted)
    verdict = verdict_of(decision, found.labels, earlier, trusted=trust, suspect=~decision.keep)
    gaps = tuple((found.label, found.standardized_gap) for found in decision.subpopulations)
    return Detection(verdict, decision.num_flagged_before_cap, gaps)


def from_verdict(given: Verdict, labels: Tensor, *, trusted: float) -> Detection:
    """Take the verdict of another defense: what it removed is suspect, what it found least suspicious is trusted.

    Args:
        given: That verdict; masks of its own are taken as they are.
        labels: Labels of the samples, long ``(N,)``.
        trusted: Share of the samples of each class.
    """
    suspect = ~given.keep if given.suspect is None else given.suspect
    keep = given.keep & ~suspect
    trust = select_trusted(given.scores, labels, keep, trusted) if given.trusted is None else given.trusted & keep
    return Detection(replace(given, keep=keep, labels=labels, trusted=trust, suspect=suspect), int(suspect.sum()))


def _share(
    found: Distinguished, earlier: Verdict | None, share: float, max_removed: float, approved: Tensor | None
) -> Decision:
    decision = decide(
        found.fct[:, None],
        found.fct,
        found.labels,
        approved=approved,
        fraction=share,
        by_ranking=True,
        removed=None if earlier is None else ~earlier.keep,
        max_removed=max_removed,
    )
    if earlier is None:
        return decision
    return add_removed(decision, earlier.scores, earlier.keep, threshold=decision.threshold, max_removed=max_removed)
