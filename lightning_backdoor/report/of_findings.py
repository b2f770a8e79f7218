"""Findings in plain sentences: whether their labels are right, and what the model does with what they share."""

from __future__ import annotations

import torch

from lightning_backdoor.verdict import Finding

__all__ = ["KEEP", "diagnosis_sentence", "success_sentence"]

KEEP = "If they look fine, pass their positions as `approved` and train again: they will be kept."


def diagnosis_sentence(finding: Finding) -> str:
    """Say whether the labels of a group look right, and by what; empty where no model says anything."""
    own, accuracy = finding.own_label_rate, finding.reference_accuracy
    if own is None or accuracy is None:
        return ""
    evidence = (
        f"a model that was not trained on them gives label {finding.label} to {own:.0%} of them, and {accuracy:.0%} of "
        "ordinary images their label"
    )
    if finding.diagnosis == "wrong labels":
        return f"The labels look wrong: {evidence}{_instead(finding)}."
    if finding.diagnosis == "right labels":
        return f"The labels look right: {evidence}. This is a clean-label attack or a harmless kind of image."
    return f"Whether the labels are right is not clear: {evidence}."


def success_sentence(finding: Finding) -> str:
    """Say what the model does with what a group has in common; empty where it was not estimated."""
    if finding.estimated_asr is None:
        return ""
    return (
        f"What they have in common, put on images of other classes, turns {finding.estimated_asr:.0%} of them into "
        f"label {finding.label} (ordinary images: {finding.control_asr or 0.0:.0%})."
    )


def _instead(finding: Finding) -> str:
    """The labels that the model gives most often in place of the group's, for the end of a sentence."""
    if finding.suggested_labels is None:
        return ""
    others = finding.suggested_labels[(finding.suggested_labels >= 0) & (finding.suggested_labels != finding.label)]
    labels, counts = torch.unique(others, return_counts=True)
    most = labels[counts.argsort(descending=True, stable=True)][:3].tolist()
    return f"; most often it says {', '.join(map(str, most))} instead" if most else ""
