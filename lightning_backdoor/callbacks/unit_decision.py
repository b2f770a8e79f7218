"""From the activations of units to a decision on samples: NONE's, and that of the detector of D-BR and D-ST."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_backdoor.detection.decision import Decision, add_removed, decide, decide_by_break
from lightning_backdoor.detection.subpopulations import FALSE_ALARM_RATE
from lightning_backdoor.scanning.measure_units import Measured
from lightning_backdoor.verdict import Verdict

__all__ = ["decide_by_units"]


def decide_by_units(
    measured: Measured,
    earlier: Verdict | None,
    *,
    rule: str,
    max_removed: float,
    approved: Tensor | None = None,
    agreement: Tensor | None = None,
    false_alarm_rate: float = FALSE_ALARM_RATE,
    all_to_all: bool = True,
) -> Decision:
    """Decide on all samples by the activations of units; what an earlier verdict removed stays removed.

    Args:
        measured: The measurement, of N samples.
        earlier: The verdict of an earlier round.
        rule: ``"auto"`` looks for subpopulations, ``"paper"`` cuts the raw bias at its natural break.
        max_removed: Largest share of the samples that may be removed in all, in ``(0, 1)``.
        approved: Samples that stay, bool ``(N,)``; see :func:`~lightning_backdoor.functional.decide`.
        agreement: Share of every sample's neighbors that had its label early in training, float ``(N,)``.
        false_alarm_rate: Chance at most that noise is taken for a subpopulation in a training.
        all_to_all: Look for a subpopulation of all labels, too, as under an all-to-all attack.
    """
    keep = None if earlier is None or bool(earlier.keep.all()) else earlier.keep
    rows = slice(None) if keep is None else keep  # a mask would copy the responses, which may be a gigabyte
    fine = None if approved is None else approved[rows]
    if rule == "paper":
        decision = decide_by_break(measured.raw_bias[rows], approved=fine, max_removed=max_removed)
    else:
        decision = decide(
            measured.activations[rows],
            measured.bias[rows],
            measured.labels[rows],
            approved=fine,
            agreement=None if agreement is None else agreement[rows],
            all_to_all=all_to_all,
            pictures=None if measured.pictures is None else measured.pictures[rows],
            false_alarm_rate=false_alarm_rate,
            max_removed=max_removed,
        )
    if earlier is None or keep is None:
        return decision
    limits: dict[str, Any] = {"max_removed": max_removed, "labels": None if rule == "paper" else measured.labels}
    return add_removed(decision, earlier.scores, keep, threshold=earlier.threshold, **limits)
