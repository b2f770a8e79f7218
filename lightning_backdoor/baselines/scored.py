"""What the filters from the literature share: one score per sample, the rule of the paper, and restart."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor.callbacks.arguments import require_fraction, require_positive
from lightning_backdoor.callbacks.detector import Detector
from lightning_backdoor.callbacks.options import DEFAULTS, ScanArguments, document_scan
from lightning_backdoor.detection.decision import Decision, limit_removed, verdict_of
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.responses.base import Detection, Response, Session
from lightning_backdoor.responses.by_name import ResponseName, chosen_response
from lightning_backdoor.responses.restart import Restart

__all__ = [
    "BASELINE_DEFAULTS",
    "BaselineArguments",
    "Scored",
    "decision_of",
    "filter_parts",
    "penultimate_features",
    "require_features",
]

Judge = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor, str]]
"""From measured columns to scores, float ``(N,)``, samples to keep, bool ``(N,)``, and the rule in words."""

Measure = Callable[[Session, Tensor, Any], dict[str, Tensor]]
"""What is kept of a batch of samples at some positions, long ``(B,)``: tensors ``(B, ...)``."""


class BaselineArguments(ScanArguments, total=False):
    """What all filters from the literature take, beside :class:`~lightning_backdoor.callbacks.options.ScanArguments`.

    Each one scans the training set once, when training is about to end (or after ``warmup_epochs``), removes what its
    paper says, and trains anew on the rest. They are as their papers have them: **most remove images from clean data as
    well**, and there is no gate that says that nothing is wrong.

    Args:
        warmup_epochs: Epochs of ordinary training before the scan. ``None``: when training is about to end, since the
            papers look at trained networks.
        max_removed: Largest share of the training set that may be removed, in ``(0, 1)``.
        response: ``"restart"``, or as for :class:`~lightning_backdoor.UltraCleanCallback`.
    """

    warmup_epochs: int | None
    max_removed: float
    response: ResponseName | Response


document_scan(BaselineArguments)
BASELINE_DEFAULTS: dict[str, Any] = {**DEFAULTS, "warmup_epochs": None, "max_removed": 0.5, "response": "restart"}


def penultimate_features(session: Session, indices: Tensor, batch: Any) -> dict[str, Tensor]:
    """The penultimate features of a batch, float32 ``(B, D)``."""
    return {"features": session.scanner.outputs(session.trainer, session.module, batch)[1]}


class Scored(Detector):
    """One pass over the training set, and the rule of a paper within ``max_removed``.

    Args:
        judge: The rule.
        meaning: What the score measures, for the report.
        arguments: Of the filter, with defaults.
        measure: What the rule needs of every sample, beside ``labels``.
    """

    def __init__(
        self, judge: Judge, meaning: str, arguments: dict[str, Any], *, measure: Measure = penultimate_features
    ) -> None:
        self.judge, self.measure, self.meaning = judge, measure, meaning
        self._max_removed = require_fraction("max_removed", arguments["max_removed"])

    def prepare(self, session: Session) -> None:
        """Called before the pass."""

    def detect(self, session: Session) -> Detection:
        """Measure every sample, and decide."""
        self.prepare(session)
        scanner = session.scanner

        def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
            labels = scanner.labels(batch).clone()  # transfer hooks may change a batch in place
            return {"labels": labels, **self.measure(session, indices, batch)}

        found = scanner.scan(session.trainer, session.module, step, description=f"{session.case.title} scan")
        scores, keep, rule = self.judge(found)
        approved = session.case.approved
        if approved is not None and not bool(approved.all()):
            keep, scores = keep | approved, scores.masked_fill(approved, float(scores[~approved].min()))
        decided = decision_of(scores, keep, rule, max_removed=self._max_removed)
        decision = session.trainer.strategy.broadcast(decided, src=0)  # float ties must not tell ranks apart
        return Detection(
            verdict_of(decision, found["labels"], session.case.verdict),
            decision.num_flagged_before_cap,
        )


def filter_parts(arguments: dict[str, Any], detector: Detector) -> dict[str, Any]:
    """The arguments of :class:`~lightning_backdoor.callbacks.base.Defense` for a filter.

    Args:
        arguments: Of the filter, with defaults.
        detector: Its detector.
    """
    given = dict(arguments)
    own: dict[str, Response] = {"restart": Restart(last_detection=False)}
    return {
        **given,
        "detector": detector,
        "response": chosen_response(given["response"], own),
        "warmup_epochs": require_positive("warmup_epochs", given["warmup_epochs"]),
    }


def decision_of(scores: Tensor, keep: Tensor, rule: str, *, max_removed: float) -> Decision:
    """Carry out the rule of a paper within ``max_removed``.

    Every removed sample has a score above the threshold. Where the rule cuts class by class, kept ones may, too.

    Args:
        scores: Float ``(N,)``; larger is more suspicious.
        keep: Samples that the rule keeps, bool ``(N,)``.
        rule: Its name.
        max_removed: Largest share of all samples that may be removed, in ``(0, 1)``.
    """
    num_flagged_before_cap = int((~keep).sum())
    limited = limit_removed(scores, keep, max_removed)
    if not torch.equal(limited, keep):
        keep, rule = limited, f"{rule}, max_removed({max_removed:g})"
    threshold = math.inf
    if not bool(keep.all()):
        lowest = scores[~keep].min()
        below = scores[scores < lowest]
        threshold = float(below.max() if len(below) else lowest - 1)
    return Decision(scores, keep, threshold, rule, (), num_flagged_before_cap)


def require_features(features: Tensor, labels: Tensor) -> None:
    """Raise an ArgumentError unless features are ``(N, D)`` and labels are whole numbers ``(N,)``, N at least 1."""
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels) or labels.is_floating_point():
        raise ArgumentError(
            f"`features` must have shape (N, D) and `labels` (N,) with whole numbers, got {tuple(features.shape)} and "
            f"{labels.dtype} {tuple(labels.shape)}. Flatten or pool the maps first."
        )
