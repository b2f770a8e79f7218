"""Whether the labels of a group that stands out are right, by the answers of a model that was trained without it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_backdoor.verdict import Diagnosis, Finding

__all__ = ["MIN_SAMPLES", "diagnose", "same_answer", "undiagnosed"]

# Frozen after seven of the sets of ``benchmarks/values.py`` (digits-badnets-5%, digits-tinted-75, signs-sticker-5%,
# badnets-5%, sig-80%, kind-drawing-40%, kind-watermark-20%); the other sets judge them. ``SEVERAL`` was raised once
# after that, from 0.5, and a clause on one clear label removed: ``benchmarks.gallery`` had a clean kind called wrong.
MIN_SAMPLES = 5  # of a group, of its label and of others: shares of fewer say nothing
LEARNED = 0.25  # of the way from always answering the most frequent label to no mistake: a model that has learned
KNOWN = 0.5  # of its accuracy, which the accuracy on the label must reach: else too little of the label was left
# How often a group gets its label, from 0, as often as samples of other labels, to 1, as often as those of its own.
# Groups with wrong labels were at 0 on all sets, clean kinds of image at 0.8 and 0.9.
OTHER, ALIKE = 0.2, 0.5
SURE = 0.7  # of the confidence on ordinary samples; these may have been trained on, which raises it by a quarter
# Of the different answers to samples of other labels: 0.3 for a clean-label attack, 0.5 for a clean kind of image that
# a network of four classes takes for two of the others, 0.9 for wrong labels. One or two other labels for a whole group
# are no evidence: they may be what a strange kind of image looks like to a model. So answers to samples of other labels
# must differ themselves: two of them are the same with this chance at most, which three classes or fewer hardly reach.
SEVERAL, AT_MOST = 0.8, 0.5


def undiagnosed(findings: Iterable[Finding]) -> list[Finding]:
    """Findings that are large enough for a diagnosis, and that no model without them has labeled."""
    return [one for one in findings if one.suggested_labels is None and len(one) >= MIN_SAMPLES]


def same_answer(answers: Tensor) -> float:
    """Chance that two different samples have the same answer; one over it is an effective number of answers.

    Args:
        answers: Classes, long ``(n,)``, n ≥ 2.

    Example:
        >>> import torch
        >>> same_answer(torch.tensor([0, 0, 1, 1]))
        0.3333333333333333
    """
    counts = torch.unique(answers, return_counts=True)[1].double()
    n = len(answers)
    return float((counts * (counts - 1)).sum() / (n * (n - 1)))


def diagnose(
    finding: Finding,
    labels: Tensor,
    predicted: Tensor,
    confidence: Tensor,
    *,
    unseen: Tensor,
    ordinary: Tensor,
) -> Finding:
    """Say by the answers of a model that was trained, or repaired, without a group whether its labels are right.

    ``"wrong labels"``: the group gets its label about as seldom as samples of other labels do, the model is about as
    sure as on ordinary samples, and its answers are about as varied as those to samples of other labels.
    ``"right labels"``: the group gets its label about as often as ordinary samples of it. Else, or if the
    model has not learned (the label), ``"unclear"``.

    Args:
        finding: The group.
        labels: Labels as given, long ``(N,)``, -1 where there is none.
        predicted: The model's answer to every sample, long ``(N,)``, -1 where there is none.
        confidence: The probability that it gives its answer, float ``(N,)``.
        unseen: Samples that it was trained or repaired without, bool ``(N,)``; others of the group have no part in the
            diagnosis.
        ordinary: Samples that the group is compared with, bool ``(N,)``: best such that the model never saw either.

    Returns:
        The finding with diagnosis, suggested labels and what the model does with ordinary samples.
    """
    ordinary = ordinary & (predicted >= 0) & (labels >= 0)
    answered = unseen[finding.positions] & (predicted[finding.positions] >= 0)
    suggested = torch.where(answered, predicted[finding.positions], -1)
    sure = confidence[finding.positions].float().where(answered, 0.0)
    if not bool(answered.any()) or not bool(ordinary.any()):
        return finding
    compared = _Ordinary(labels[ordinary], predicted[ordinary], confidence[ordinary])
    return replace(
        finding,
        diagnosis=_diagnosis(finding.label, suggested[answered], sure[answered], compared),
        suggested_labels=suggested,
        suggested_confidences=sure,
        reference_accuracy=float((predicted == labels)[ordinary].float().mean()),
        reference_confidence=float(confidence[ordinary].float().mean()),
        reference_model="unseen",
    )


@dataclass(frozen=True)
class _Ordinary:
    """Samples that a group is compared with: label, answer of the model and its probability, ``(n,)`` each."""

    labels: Tensor
    predicted: Tensor
    confidence: Tensor


def _diagnosis(label: int, answers: Tensor, sure: Tensor, ordinary: _Ordinary) -> Diagnosis:
    correct, own = (ordinary.predicted == ordinary.labels).float(), ordinary.labels == label
    if min(len(answers), int(own.sum()), int((~own).sum())) < MIN_SAMPLES:
        return "unclear"
    to_others = ordinary.predicted[~own]
    accuracy, of_own = float(correct.mean()), float(correct[own].mean())
    of_others = float((to_others == label).float().mean())
    frequent = float(torch.unique(ordinary.labels, return_counts=True)[1].max()) / len(own)
    if accuracy < frequent + LEARNED * (1 - frequent) or of_own < KNOWN * accuracy or of_own <= of_others:
        return "unclear"
    alike = (float((answers == label).float().mean()) - of_others) / (of_own - of_others)
    if alike >= ALIKE:
        return "right labels"
    other = answers[answers != label]
    if alike > OTHER or len(other) < MIN_SAMPLES:
        return "unclear"
    surer = float(sure.mean()) / float(ordinary.confidence.float().mean())
    usual, same = same_answer(to_others), same_answer(other)
    varied = usual <= AT_MOST and same * SEVERAL <= usual
    return "wrong labels" if varied and surer >= SURE else "unclear"
