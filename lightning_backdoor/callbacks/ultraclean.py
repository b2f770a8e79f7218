"""UltraClean: drop the training images on which gentle denoising reveals a trigger."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_backdoor.callbacks.arguments import require_class, require_fraction, require_one_of, require_positive
from lightning_backdoor.callbacks.base import Defense
from lightning_backdoor.callbacks.detector import Detector
from lightning_backdoor.callbacks.options import ScanArguments
from lightning_backdoor.detection.decision import Decision, add_removed, decide, verdict_of
from lightning_backdoor.detection.majorities import MAX_REMOVED_OF_CLASS
from lightning_backdoor.detection.subpopulations import FALSE_ALARM_RATE, SCANS
from lightning_backdoor.detection.whole_classes import whole_classes
from lightning_backdoor.events import Event, Signaled
from lightning_backdoor.responses.base import Detection, Response, Session
from lightning_backdoor.responses.by_name import ResponseName, chosen_response
from lightning_backdoor.responses.explaining import ordinary_samples
from lightning_backdoor.responses.limits import planned_max_epochs
from lightning_backdoor.responses.reset_units import ResetUnits
from lightning_backdoor.responses.restart import Restart
from lightning_backdoor.responses.unlearn import Unlearn
from lightning_backdoor.scanning.early_neighbors import EarlyNeighbors, early_neighbors
from lightning_backdoor.scanning.measure_denoised import DENOISERS, DenoisedScan
from lightning_backdoor.scanning.measure_whole_classes import turned_by_patterns
from lightning_backdoor.verdict import Verdict

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["DenoisedFeatures", "UltraCleanCallback"]

DEFAULT_WARMUP = 10  # epochs, where the number of planned epochs is not known
CACHE_BYTES = 2**31  # denoised images beyond this size are kept in a temporary file
MEANINGS = {
    "auto": "It measures whether the image belongs to a second population inside its class, by what the model sees in "
    "it and how that moves when the image is gently denoised.",
    "paper": "It measures how much the answer of the model changes when the image is gently denoised.",
}


class DenoisedFeatures(Detector):
    """Features of every image, and how they move when it is denoised.

    Args:
        score: ``"auto"`` or ``"paper"``, see :class:`UltraCleanCallback`.
        output: What the paper's score compares.
        fraction: Share of the considered samples that is flagged in any case; ``None``: subpopulations are.
        target_class: Only samples with this label are considered.
        max_removed: Largest share of all samples that may be flagged.
        false_alarm_rate: Chance at most that noise is taken for a subpopulation in a training.
    """

    def __init__(
        self,
        *,
        score: str = "auto",
        output: str = "logits",
        fraction: float | None = None,
        target_class: int | None = None,
        max_removed: float = 0.3,
        false_alarm_rate: float = FALSE_ALARM_RATE,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._false_alarm_rate = false_alarm_rate
        self._paper, self._softmax, self._fraction = score == "paper", output == "softmax", fraction
        self._target_class, self._max_removed, self._cache_bytes = target_class, max_removed, cache_bytes
        self._scan: DenoisedScan | None = None
        self._early: EarlyNeighbors | None = None
        self._again = False  # whether there is a verdict of an earlier fit
        self.meaning = MEANINGS[score]
        self.explains = fraction is None
        self.by_subpopulations = not (self._paper and fraction is not None)

    def setup(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the early neighbors of an earlier fit that passed no verdict."""
        if not self._again:
            self._early = None

    def require(self, session: Session) -> None:
        """Raise if the class is none of the model's, or the model cannot be shown denoised images."""
        session.scanner.require_class("target_class", self._target_class)
        session.scanner.require_replaceable(session.trainer, session.module)
        if self._early is not None:
            self._early.require_same_data(session.scanner)

    def observe(self, session: Session, first: int) -> None:
        """Measure neighbors half-way to the first scan, and before it by an epoch at least."""
        wanted = not self._paper and self._fraction is None and self._early is None
        if wanted and 2 * session.epochs_done >= first:
            self._keep(session)
            self._early = early_neighbors(session.trainer, session.module, session.scanner)

    def detect(self, session: Session) -> Detection:
        """Measure every image as it is and denoised, and decide."""
        if session.scanner.kept or session.case.detects_again:
            self._keep(session)
        found = self._scan_of(session).run(session.trainer, session.module)
        session.scanner.forget_if_scarce(session.trainer)
        if session.case.approved is not None:
            found["approved"] = session.case.approved
        decided = self.decide(found, session.case.verdict)
        decision = session.trainer.strategy.broadcast(decided, src=0)  # float ties must not tell ranks apart
        self._again = True
        verdict = verdict_of(decision, found["labels"], session.case.verdict)
        return Detection(
            verdict,
            decision.num_flagged_before_cap,
            tuple((found.label, found.standardized_gap) for found in decision.subpopulations),
            correct=found["right"],
            whole_classes=self._whole_classes(session, verdict),
        )

    def _whole_classes(self, session: Session, verdict: Verdict) -> tuple[Signaled, ...]:
        """Labels that may carry a signal in all of their images, by those that stand out in no other way."""
        if self._paper or self._fraction is not None or verdict.labels is None:
            return ()
        ordinary, approved = ordinary_samples(verdict), session.case.approved
        if approved is not None:
            ordinary = ordinary & ~approved
        turned = turned_by_patterns(
            session.trainer, session.module, session.scanner, labels=verdict.labels, ordinary=ordinary
        )
        found = whole_classes(*turned, false_alarm_rate=self._false_alarm_rate, scans=SCANS)
        if self._target_class is not None:
            found = [one for one in found if one.label == self._target_class]
        return tuple((one.label, one.rate, one.others, one.p_value) for one in found)

    def _scan_of(self, session: Session) -> DenoisedScan:
        """What scans and stores denoised images, until :meth:`close`."""
        if self._scan is None:
            self._scan = DenoisedScan(
                session.scanner,
                world_size=session.trainer.world_size,
                cache_bytes=self._cache_bytes,
                softmax=self._softmax,
                pictures=self._fraction is None,
            )
        return self._scan

    def _keep(self, session: Session) -> None:
        """Keep the images that the next scan reads for those that follow, beside the denoised ones."""
        scan = self._scan_of(session)
        if session.scanner.keep(session.trainer, session.module, scan.room):
            scan.close()

    def decide(self, found: dict[str, Tensor], old: Verdict | None) -> Decision:
        """Decide on all samples by what the scan measured; what an earlier verdict removed stays removed."""
        paper, by_fraction = self._paper, self._fraction is not None
        labels = None if by_fraction else found["labels"]
        if self._early is not None:
            found = {**found, "agreement": self._early.agreement}
        # Removed samples are left out: beside them the clean rest of a class looks like a second group. Without any,
        # there is no indexing, which would copy all responses.
        if old is not None and not by_fraction and not bool(old.keep.all()):
            found = {name: column[old.keep] for name, column in found.items()}
        decision = decide(
            found["susceptibility"][:, None] if paper else found["responses"],
            found["susceptibility"] if paper else found["movement"],
            found["labels"],
            considered=None if self._target_class is None else found["labels"] == self._target_class,
            fraction=self._fraction,
            by_ranking=paper and by_fraction,
            approved=found.get("approved"),
            removed=None if old is None or not by_fraction else ~old.keep,
            agreement=found.get("agreement"),
            pictures=found.get("pictures"),
            false_alarm_rate=self._false_alarm_rate,
            max_removed=self._max_removed,
        )
        if old is None:
            return decision
        threshold = decision.threshold if by_fraction else old.threshold  # scores of two models share no scale
        limits: dict[str, Any] = {"max_removed": self._max_removed, "labels": labels}
        joined = add_removed(decision, old.scores, old.keep, threshold=threshold, **limits)
        return replace(joined, rule=old.rule) if torch.equal(joined.keep, old.keep) else joined

    def metrics(self, history: list[Event]) -> dict[str, float]:
        """The largest standardized gap of all subpopulations so far, 0 without one."""
        gaps = [gap for event in history for _, gap in event.subpopulations]
        return {"separation": max(gaps, default=0.0)}

    def denoised_for(self, session: Session) -> Callable[[Sequence[int]], Sequence[Tensor]] | None:
        """The images denoised in both ways."""
        return lambda indices: [denoise(session.scanner.images(indices)) for denoise in DENOISERS]

    def close(self) -> None:
        """Forget the images, denoised and as they were read."""
        if self._scan is not None:
            self._scan.close()
            self._scan.data.forget()
            self._scan = None

    def state_dict(self) -> dict[str, Any]:
        """What the early neighbors had in common."""
        return {"early": None if self._early is None else self._early.state_dict(), "again": self._again}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue an interrupted run."""
        early = state_dict["early"]
        self._early = None if early is None else EarlyNeighbors(**early)
        self._again = state_dict["again"]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running Trainer."""
        return {**self.__dict__, "_scan": None}


class UltraCleanCallback(Defense):
    """Drop training images that gentle denoising exposes as triggered, and train on what is left.

    Implements UltraClean (`Zhao and Lao, 2023 <https://arxiv.org/abs/2312.10657>`_) inside a Trainer. After a warm-up
    every training image goes through the network three times: as it is, after a local median and after non-local means.
    What moves when the image is denoised is the evidence. If samples are removed, weights, optimizer, schedulers and
    averages go back to the start of fit and the Trainer trains its full number of epochs on the kept images (the paper
    trains a fresh model, too: a network does not forget a backdoor by itself). Weak backdoors are learned late: there
    is a last scan at the end, which may rewind as well, twice at most. If nothing stands out, nothing changes.
    Half-way through a warm-up of two epochs or more it notes how many of an image's neighbours have its label. Images
    that lay among other classes then, and are a population of their class later, need not stand out as far as others.

    A class whose images carry a signal in common, all of them, cannot be divided. Each scan puts what denoising takes
    out of the mean image of a label on images of other labels, and warns of a label into which this turns them, unlike
    the other labels; nothing is removed. A texture or a mark that one class alone has looks the same. With fewer than
    five labels there is little to compare with; ``false_alarm_rate`` bounds these warnings by themselves.

    Assumes no clean data, no poison rate and no target class, but that an image without augmentation is the same at
    every scan: 64 are read again at each. Costs the epochs before a rewind once more; one forward pass, and three per
    scan, with up to 256 images more for each label; reading and denoising the images, once; two uint8 copies of them
    (in memory up to ``cache_bytes``, else in a temporary file) and, until the last scan, the images as they were read,
    where what is left of ``cache_bytes`` and a quarter of the free memory hold them (else each scan reads them, and up
    to 64 of each label, and 256 for every 32 labels, once more; so do several processes, which keep a part each); four
    bytes per image and feature in a scan; the initial weights in checkpoints.

    Differs from the paper: the score compares features class by class instead of adding up the outputs; the cut is
    estimated behind a no-poison gate instead of given; early neighbours; images are denoised as the network sees them.

    Args:
        warmup_epochs: Epochs of ordinary training before the scan. ``None``: half of ``max_epochs`` (10 if that is not
            set); with the paper's score and cut and a rewind, when training is about to end. Strong backdoors show
            early, weak ones late. The scan never comes later than the last epoch.
        score: ``"auto"`` finds subpopulations in the features and their movement; ``"paper"`` is L1 on the outputs.
        output: What ``score="paper"`` compares: ``"logits"`` or ``"softmax"`` (which saturates and ranks poorly).
        rule: ``"auto"`` removes subpopulations that pass the no-poison gate; ``"fraction"`` the top ``fraction``.
        fraction: Share of the considered samples that ``rule="fraction"`` removes, in all, in ``(0, 1)``.
        max_removed: Largest share of the training set that may be removed, in ``(0, 1)``. With ``rule="auto"`` 15 % of
            each label stay in any case (of the median label, where a label is larger).
        max_removed_of_class: Largest share of a label, in ``(0, 1]``, removed for standing out. A group by which
            more would be gone may be the class itself. It is kept, with a warning, unless its labels are wrong, it came
            in addition to as many images as other labels have, or what it has in common makes the model give its label
            to other images. 1: no such limit.
        false_alarm_rate: Chance at most, in ``(0, 1)``, that noise in the features of clean data is taken for a group
            that stands out, in a training. A smaller one takes more evidence, which few images cannot give.
        target_class: Only samples with this label are considered (the paper's known-class scenario).
        response: ``"restart"`` goes back to the start of fit after samples were removed, and trains anew on the rest;
            ``"continue"`` trains on from there, without a last scan; ``"reset"`` resets the units that removed samples
            drive; ``"unlearn"`` unlearns removed samples; ``"report"`` changes nothing. Or a
            :class:`~lightning_backdoor.responses.Response` with settings of its own. After a restart counters (numbers,
            strings and None among the attributes of the module and of callbacks) have gone back as well; for anything
            else the module may have a method ``on_backdoor_restart()``, a callback
            ``on_backdoor_restart(trainer, pl_module)``.
        rescore_every: Scan again every so many epochs after the first scan; removed samples stay removed. With
            ``rule="fraction"`` the first scan removes all that may go, and later ones renew the scores of the rest.
        **scan: See :class:`~lightning_backdoor.callbacks.options.ScanArguments`.

    Raises:
        ArgumentError: If an argument is out of range.
        DataError: At the start of fit, if the training data cannot be scanned.
        TrainerError: At the start of fit, if a Trainer setting rules the defence out.

    Example:
        >>> UltraCleanCallback(warmup_epochs=5, name="first")
        UltraCleanCallback(warmup_epochs=5, name='first')
    """

    method: ClassVar[str] = "UltraClean"
    title: ClassVar[str] = "UltraClean"

    def __init__(
        self,
        *,
        warmup_epochs: int | None = None,
        score: Literal["auto", "paper"] = "auto",
        output: Literal["logits", "softmax"] = "logits",
        rule: Literal["auto", "fraction"] = "auto",
        fraction: float = 0.2,
        max_removed: float = 0.3,
        max_removed_of_class: float = MAX_REMOVED_OF_CLASS,
        false_alarm_rate: float = FALSE_ALARM_RATE,
        target_class: int | None = None,
        response: ResponseName | Response = "restart",
        rescore_every: int | None = None,
        cache_bytes: int = CACHE_BYTES,
        **scan: Unpack[ScanArguments],
    ) -> None:
        self.score = require_one_of("score", score, ("auto", "paper"))
        self.output = require_one_of("output", output, ("logits", "softmax"))
        self.rule = require_one_of("rule", rule, ("auto", "fraction"))
        self.fraction = require_fraction("fraction", fraction)
        self.false_alarm_rate = require_fraction("false_alarm_rate", false_alarm_rate)
        self.target_class = require_class("target_class", target_class)
        self.max_removed_of_class = max_removed_of_class
        self.response, self.rescore_every, self.cache_bytes = response, rescore_every, cache_bytes
        seed = scan.get("seed", 0)
        own: dict[str, Response] = {
            "restart": Restart(last_detection=rule == "auto", every=rescore_every),
            "reset": ResetUnits(seed=seed),
            "unlearn": Unlearn(seed=seed),
        }
        super().__init__(
            detector=DenoisedFeatures(
                score=score,
                output=output,
                fraction=fraction if rule == "fraction" else None,
                target_class=target_class,
                max_removed=require_fraction("max_removed", max_removed),
                false_alarm_rate=false_alarm_rate,
                cache_bytes=cache_bytes,
            ),
            response=chosen_response(response, own),
            warmup_epochs=require_positive("warmup_epochs", warmup_epochs),
            every=rescore_every,
            max_removed=max_removed,
            max_removed_of_class=max_removed_of_class if rule == "auto" else 1.0,
            **scan,
        )

    @classmethod
    def from_paper(cls, **overrides: Any) -> UltraCleanCallback:
        """Use the paper's score (L1 on softmax outputs) and cut (a fraction of 0.2), which always removes images.

        The network that is measured is trained to the end, and so is the one that starts again on the rest: the fit
        takes twice its epochs. ``warmup_epochs`` sets an earlier scan. With another response than
        ``"restart"`` nothing would be trained after the end, so that the scan comes after half of the epochs.
        """
        return cls(**{"score": "paper", "output": "softmax", "rule": "fraction", **overrides})

    def _first_detection(self, trainer: Trainer) -> int:
        if (
            self.warmup_epochs is None
            and isinstance(self._procedure.response, Restart)
            and (self.score, self.rule) == ("paper", "fraction")
        ):
            return sys.maxsize  # when training is about to end
        return warmup_or_half(self.warmup_epochs, planned_max_epochs(trainer))


def warmup_or_half(warmup_epochs: int | None, max_epochs: int | None) -> int:
    """The user's warm-up, else half of the planned epochs, else 10 where their number is not known."""
    if warmup_epochs is not None:
        return warmup_epochs
    return max(1, math.ceil(max_epochs / 2)) if max_epochs is not None and max_epochs > 0 else DEFAULT_WARMUP
