"""The rounds of NONE: what each found and did, what follows from it, and whether another one is due."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor.detection.decision import Decision, findings_of
from lightning_backdoor.verdict import Verdict

__all__ = [
    "OWN_LABEL",
    "STILL_OBEYED",
    "Round",
    "Series",
    "judgement",
    "readmission",
    "reset_units",
    "shares",
    "unfinished",
]

MAX_LOSS = 0.05  # of accuracy on the training images, by all rounds, beyond which the last one is undone
OWN_LABEL = 0.9  # of the removed samples get their label without having been trained on: it may well be the right one
STILL_OBEYED = 0.1  # of the removed samples get their label after a round: reason for another one
MOST_KEPT = 0.75  # of the share before it: beyond that another one would not help


@dataclass(frozen=True)
class Round:
    """One look at the units and what followed from it, in plain values that a checkpoint can hold.

    Attributes:
        epochs: Epochs trained before it.
        removed: Samples that it removed from training.
        num_flagged_before_cap: Samples that the rule pointed at in all, before ``max_removed`` limited it.
        modes: Label and separation of every second mode that it found.
        units: Layer, unit, class and score of every unit that it reset.
        unconfident: Classes without a confident sample, which were given another threshold.
        accuracy: Share of the samples in training that got their label before it, in ``[0, 1]``.
        flagged_label_rate: Share of the removed samples that got their label before it; ``None`` without any.
        accuracy_after: The same after fine-tuning; ``None`` while it lasts.
        flagged_label_rate_after: The same after fine-tuning.
        undone: Whether the weights went back because accuracy had suffered.
        shared: Whether most labels share the second mode, as under an all-to-all attack.
        readmitted: Whether the samples came back, because the model gives them their label without having seen them.
        no_room: Whether no unit was reset for want of epochs to fine-tune in.
        again: Removed samples of earlier rounds, if all that this one did was to look at them at the end of training.
    """

    epochs: int
    removed: int
    num_flagged_before_cap: int
    modes: tuple[tuple[int, float], ...]
    units: tuple[tuple[str, int, int, float], ...]
    unconfident: tuple[int, ...]
    accuracy: float
    flagged_label_rate: float | None
    accuracy_after: float | None = None
    flagged_label_rate_after: float | None = None
    undone: bool = False
    shared: bool = False
    readmitted: bool = False
    no_room: bool = False
    again: int = 0

    @property
    def remains(self) -> bool:
        """Whether the model gives over a tenth of the removed samples their label, as far as was looked last."""
        rate = self.flagged_label_rate if self.accuracy_after is None or self.undone else self.flagged_label_rate_after
        return rate is not None and rate > STILL_OBEYED and not self.readmitted

    def state_dict(self) -> dict[str, Any]:
        """Plain values that load with ``weights_only=True``."""
        return asdict(self)

    def judged(self, predicted: Tensor, verdict: Verdict, series: Series, training: Tensor | None = None) -> Round:
        """The round after its fine-tuning, and whether it has to be undone: if all rounds together cost too much.

        Samples of a shared mode come back if the model, which has not trained on them, gives most of them their label:
        an all-to-all attack changes labels.

        Args:
            predicted: The model's classes, long ``(N,)``.
            verdict: A verdict with labels.
            series: What was right and kept before it.
            training: As in :func:`shares`.
        """
        assert verdict.labels is not None
        assert series.right is not None
        assert series.keep is not None
        after, flagged_label_rate = shares(predicted, verdict, training)
        new = series.keep & ~verdict.keep
        own_label = bool(new.any()) and _share((predicted == verdict.labels)[new]) > after / 2
        lost = _share(series.right[verdict.keep if training is None else training]) - after
        readmitted, undone = self.shared and own_label, lost > MAX_LOSS
        return replace(
            self,
            accuracy_after=after,
            flagged_label_rate_after=flagged_label_rate,
            undone=readmitted or undone,
            readmitted=readmitted,
        )


@dataclass
class Series:
    """Rounds in a row, since the start, since another defence went back to it, or since one that was undone.

    Attributes:
        last_look: Epochs trained before the last look; ``None`` before the first.
        judged: Epochs trained when a round was judged last.
        treated: Rounds that reset units.
        right: Samples that got their label before the first of all rounds, bool ``(N,)``.
        keep: Samples that were kept before the last round, bool ``(N,)``.
        due: Whether the units of the last round are to be reset at the start of the next epoch.
        before: Until a round is judged, the weights to go back to if it does harm.
    """

    last_look: int | None = None
    judged: int | None = None
    treated: int = 0
    right: Tensor | None = None
    keep: Tensor | None = None
    due: bool = False
    before: dict[str, Any] | None = None

    def begin(self, weights: dict[str, Any], keep: Tensor, right: Tensor) -> None:
        """Units are to be reset with the next epoch, in a model of these weights; see ``right`` and ``keep``."""
        self.treated, self.due, self.before, self.keep = self.treated + 1, True, weights, keep
        self.right = right if self.right is None else self.right

    def end(self, epochs: int, *, undone: bool) -> None:
        """A round is over after so many epochs; after one that was undone a last look may begin anew."""
        self.judged, self.before = epochs, None
        self.treated = 0 if undone else self.treated


def readmission(verdict: Verdict, keep: Tensor) -> Verdict:
    """The verdict where the samples of a round come back, to what was kept before it, bool ``(N,)``."""
    threshold = math.inf if bool(keep.all()) else verdict.threshold
    back = keep & ~verdict.keep
    findings = tuple(one for one in verdict.findings if not bool(back[one.positions].any() & keep[one.positions].all()))
    return replace(verdict, keep=keep, threshold=threshold, rule=f"{verdict.rule}, readmitted", findings=findings)


def judgement(
    decision: Decision,
    earlier: Verdict | None,
    labels: Tensor,
    right: Tensor,
    *,
    training: Tensor | None = None,
    treated: Sequence[Round] = (),
    drops: bool = True,
    by_quota: bool = False,
) -> tuple[Verdict, int]:
    """The verdict after a look, and how many samples the rule pointed at in all.

    What a decision points at is no reason to act after a round whose removed samples get their label, although the
    model had not trained on them: these may be a clean kind of image. Nor if all of it has left the training set by
    another defence, and the model does not obey it.

    Args:
        decision: On all N samples, with what earlier rounds removed.
        earlier: The verdict before it.
        labels: Of the samples, long ``(N,)``.
        right: Samples that get their label, bool ``(N,)``.
        training: Samples that no defence has removed, bool ``(N,)``. ``None``: all.
        treated: Rounds before it that reset units, one after the other.
        drops: Whether samples leave the training set at all.
        by_quota: Whether those leave that a decision points at, come what may.
    """
    keep, num_flagged_before_cap = decision.keep, decision.num_flagged_before_cap
    before = torch.ones_like(keep) if earlier is None else earlier.keep
    new = before & ~keep
    own_labels = bool(treated) and (treated[-1].flagged_label_rate_after or 0.0) > OWN_LABEL
    gone = training is not None and bool(new.any()) and not bool((new & training).any())
    no_reason = own_labels or (gone and _share(right[new]) <= STILL_OBEYED)
    if not drops or (no_reason and not by_quota):
        keep, num_flagged_before_cap = before, int((~before).sum())
    threshold = decision.threshold
    if not torch.equal(keep, decision.keep):
        threshold = math.inf if bool(keep.all()) else float(decision.scores[keep].max())
    rule = earlier.rule if earlier is not None and torch.equal(keep, before) else decision.rule
    if no_reason and not by_quota:
        findings = () if earlier is None else earlier.findings
    else:
        findings = findings_of(decision, labels, earlier)
    return Verdict(decision.scores, keep, threshold, rule, labels, findings=findings), num_flagged_before_cap


def shares(predicted: Tensor, verdict: Verdict | None, training: Tensor | None = None) -> tuple[float, float | None]:
    """Share of the samples in training and of the removed ones (``None`` without any) that the model gives their label.

    Args:
        predicted: The model's classes, long ``(N,)``.
        verdict: A verdict with labels.
        training: Samples that no defence has removed, bool ``(N,)``. ``None``: those that the verdict keeps.
    """
    assert verdict is not None
    assert verdict.labels is not None
    right, removed = predicted == verdict.labels, ~verdict.keep
    kept = _share(right[(verdict.keep if training is None else training) & (verdict.labels >= 0)])
    return kept, _share(right[removed]) if bool(removed.any()) else None


def _share(mask: Tensor) -> float:
    return float(mask.float().mean())


def unfinished(treated: list[Round]) -> bool:
    """Whether over a tenth of the removed samples still get their label, and the last of several rounds has helped.

    The first one may have met too few of the units that obey. Where labels are true, as under a clean-label attack, the
    samples get them whatever is reset.

    Args:
        treated: Rounds that reset units, one after the other.
    """
    if not treated or treated[-1].flagged_label_rate is None or treated[-1].flagged_label_rate_after is None:
        return False
    helped = len(treated) == 1 or treated[-1].flagged_label_rate_after < MOST_KEPT * treated[-1].flagged_label_rate
    return helped and treated[-1].flagged_label_rate_after > STILL_OBEYED


def reset_units(rounds: list[Round]) -> set[tuple[str, int]]:
    """Layer and number of every unit that was reset, in one round or in several."""
    return {(layer, unit) for round_ in rounds for layer, unit, *_ in round_.units}
