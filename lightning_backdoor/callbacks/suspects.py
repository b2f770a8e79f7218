"""From what a detector says, or another defence has found, to the samples that are unlearned and learned anew."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor.callbacks.base import require_same_data, spared
from lightning_backdoor.callbacks.compromised import judge_samples
from lightning_backdoor.detection.decision import Decision, add_removed, decide, findings_of
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional.consistency import select_trusted
from lightning_backdoor.responses.unlearn import Split
from lightning_backdoor.scanning.measure_fct import Detector, Distinguished, distinguish, require_detector
from lightning_backdoor.scanning.scanner import DatasetScanner
from lightning_backdoor.verdict import Verdict

__all__ = ["Judge", "Judgement", "from_verdict", "judge", "masks_of", "split_of"]

WATCHED = 1024


@dataclass(frozen=True)
class Judgement:
    """A verdict and what led to it.

    Attributes:
        verdict: With ``trusted`` and ``suspect``.
        num_flagged_before_cap: Samples that the rule pointed at before ``max_removed`` limited it.
        modes: Label and separation of the second modes that were found.
    """

    verdict: Verdict
    num_flagged_before_cap: int
    modes: tuple[tuple[int, float], ...]

    @property
    def counts(self) -> tuple[int, int, list[int]]:
        """Suspects, trusted samples, and the classes without any of the latter."""
        labels, suspect, trusted = masks_of(self.verdict)
        present = torch.unique(labels[labels >= 0]).tolist()
        lacking = sorted(set(present) - set(labels[trusted].tolist()))
        return int(suspect.sum()), int(trusted.sum()), lacking


@dataclass(frozen=True)
class Judge:
    """Who tells suspects and trusted samples: a detector, or the verdict of another defence.

    Attributes:
        external_verdict: That verdict; there is no detector then.
        detector: How the detector is trained.
        suspect: ``"auto"``, or a share of all samples; see :func:`judge`.
        trusted: Share of the samples of each class.
        max_removed: Largest share of all samples that may be suspected.
    """

    external_verdict: Verdict | None
    detector: Detector
    suspect: str | float
    trusted: float
    max_removed: float

    @property
    def meaning(self) -> str:
        """Where the scores are from: ``"external_verdict"``, ``"modes"`` or ``"fct"``."""
        return "given" if self.external_verdict is not None else "modes" if self.suspect == "auto" else "fct"

    def require(self, trainer: Any, pl_module: Any, data: DatasetScanner) -> None:
        """Check at the start of a fit what can be checked then.

        Raises:
            ArgumentError: ``trusted`` leaves less than one sample for each class, or the user's own detector cannot
                take the place of the model.
            DataError: The verdict is on other data.
            ModelError: The model has no units that could be asked.
        """
        if self.external_verdict is not None:
            require_same_data(self.external_verdict, data)
        elif self.trusted * len(data) < data.num_classes:
            raise ArgumentError(
                f"`trusted` must leave at least one image for each of {data.num_classes} classes, got {self.trusted} "
                f"of {len(data)} images. Pass a larger share, or the `verdict` of another defence."
            )
        else:
            require_detector(trainer, pl_module, data, self.detector, units=self.suspect == "auto")

    def judge(self, trainer: Any, pl_module: Any, data: DatasetScanner, earlier: Verdict | None) -> Judgement:
        """Judge all samples; every process must call it and gets the same judgement."""
        if self.external_verdict is not None:
            judgement = from_verdict(self.external_verdict, data.read_labels(trainer, pl_module), trusted=self.trusted)
        else:
            found = distinguish(trainer, pl_module, data, self.detector, units=self.suspect == "auto")
            judgement = judge(found, earlier, suspect=self.suspect, trusted=self.trusted, max_removed=self.max_removed)
        judgement = replace(judgement, verdict=spared(judgement.verdict, data.unread, earlier))
        agreed: Judgement = trainer.strategy.broadcast(judgement, src=0)  # float ties
        return agreed


def judge(
    found: Distinguished, earlier: Verdict | None, *, suspect: str | float, trusted: float, max_removed: float
) -> Judgement:
    """Suspect the second populations of single labels, or a share of all samples; trust the most consistent ones.

    Args:
        found: What the detector says.
        earlier: The verdict of an earlier fit; what it removed stays removed.
        suspect: Share of the samples with the largest FCT; ``"auto"`` looks for second populations.
        trusted: Share of the samples of each class with the smallest FCT.
        max_removed: Largest share of all samples that may be suspected.
    """
    if isinstance(suspect, str):
        assert found.units is not None
        measured = replace(found.units, bias=found.fct)  # a mode of all labels may be a style: nothing could confirm it
        decision = judge_samples(measured, earlier, rule="auto", max_removed=max_removed, shared=False)
    else:
        decision = _share(found, earlier, suspect, max_removed)
    suspects = ~decision.keep
    trust = select_trusted(found.fct, found.labels, decision.keep, trusted)
    cut = decision.scores, decision.keep, decision.threshold, decision.rule
    findings = findings_of(decision, found.labels, earlier)
    verdict = Verdict(*cut, found.labels, trusted=trust, suspect=suspects, findings=findings)
    return Judgement(
        verdict,
        decision.num_flagged_before_cap,
        tuple((mode.label, mode.standardized_gap) for mode in decision.subpopulations),
    )


def from_verdict(external_verdict: Verdict, labels: Tensor, *, trusted: float) -> Judgement:
    """Take another defence's word for it: what it removed is suspect, what it found least suspicious is trusted.

    Args:
        external_verdict: Its verdict; masks of its own are taken as they are.
        labels: Labels of the samples, long ``(N,)``.
        trusted: Share of the samples of each class.
    """
    suspect = ~external_verdict.keep if external_verdict.suspect is None else external_verdict.suspect
    keep = external_verdict.keep & ~suspect
    trust = (
        select_trusted(external_verdict.scores, labels, keep, trusted)
        if external_verdict.trusted is None
        else external_verdict.trusted & keep
    )
    verdict = replace(external_verdict, keep=keep, labels=labels, trusted=trust, suspect=suspect)
    return Judgement(verdict, int(suspect.sum()), ())


def split_of(verdict: Verdict, seed: int) -> Split:
    """What a verdict means for a repair, and samples to watch accuracy on: up to 1024 that the repair does not see.

    Where there are none of these, trusted ones.
    """
    labels, suspect, trusted = masks_of(verdict)
    pool = verdict.keep & ~trusted & (labels >= 0)
    positions = (pool if bool(pool.any()) else trusted).nonzero().squeeze(1)
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))
    watched = torch.zeros_like(trusted)
    watched[positions[order[:WATCHED]]] = True
    return Split(labels, suspect, trusted, watched)


def masks_of(verdict: Verdict) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, suspects and trusted samples of a verdict that has them all."""
    labels, suspect, trusted = verdict.labels, verdict.suspect, verdict.trusted
    assert labels is not None
    assert suspect is not None
    assert trusted is not None
    return labels, suspect, trusted


def _share(found: Distinguished, earlier: Verdict | None, share: float, max_removed: float) -> Decision:
    decision = decide(
        found.fct[:, None],
        found.fct,
        found.labels,
        fraction=share,
        by_ranking=True,
        removed=None if earlier is None else ~earlier.keep,
        max_removed=max_removed,
    )
    if earlier is None:
        return decision
    return add_removed(decision, earlier.scores, earlier.keep, threshold=decision.threshold, max_removed=max_removed)
