"""What the report says of one finding, in sentences and figures."""

from __future__ import annotations

import torch

from lightning_backdoor.detection.diagnosis import undiagnosed
from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.report.sentences import count, listed, number, percent
from lightning_backdoor.verdict import Finding, GateFigure, Verdict

__all__ = [
    "approval",
    "figure_row",
    "heading",
    "labels_sentence",
    "model_of",
    "size_sentence",
    "suggestions",
    "trigger_sentence",
]

MAY_BE_FINE = "These images may be fine"
NOT_YET = (
    "It is not known yet whether their labels are right: this is found out at the end of training, by the repaired "
    "model or by one that is trained without them."
)
_NAMED = 3  # classes in a sentence
_SPELLED = 12  # positions that are written out in a line of code
_RELATIONS = {">=": "at least", ">": "more than", "<=": "at most", "<": "less than"}
_FIGURES = {
    "standardized_gap": "gap between the group and the rest of its label, in sums of their two standard deviations",
    "enrichment": "share of its label that lies beyond the gap, over the share of all other labels",
    "member_share": "share of its label that is in the group",
    "other_labels": "other labels that are large enough to be compared",
    "excess_variation": "how much more the group varies than the rest of its label, in standard errors",
    "largest_other_gap": "largest such gap in another label, in the same direction",
    "effective_labels": "effective number of other labels that lie beyond the gap, too",
    "early_agreement_ratio": "early in training, share of neighbors with the same label: the group's over the rest's",
    "own_auroc": "how well the rest of the label is told from all other labels (AUROC)",
    "replication_p_value": "probability that both halves of the label find the group if there is none",
    "closed_share": "things whose nearest image is another one of the group: share beyond chance, two errors added",
    "different_things": "different things in the images (near-duplicates count as one)",
    "split_labels": "share of the other labels that the same direction splits, too",
    "other_label_p_value": "probability that images with right labels look so much like images of another label",
    "other_label_excess": "images of the group that look like another label, over those of an ordinary label",
    "looks_like_labels": "effective number of labels that these images look like",
}
_WAYS = {
    "difference": "by adding the difference of the mean images",
    "blend": "by blending an image of the group into each",
    "paste": "by pasting the region that the group shares",
}


def heading(finding: Finding, evidence: Evidence) -> str:
    """Name a finding by its size and its label."""
    return f"{count(len(finding), 'image')} labeled “{evidence.class_name(finding.label)}”"


def size_sentence(finding: Finding, verdict: Verdict) -> str:
    """Say how much of the label the group is, and how much of it was removed."""
    removed = int((~verdict.keep[finding.positions]).sum())
    whole = "" if verdict.labels is None else f" of the {int((verdict.labels == finding.label).sum()):,} of this label"
    kept = len(finding) - removed
    if not removed:
        fate = "None of them was removed"
    elif not kept:
        fate = "All of them were removed"
    else:
        fate = f"{removed:,} of them {'was' if removed == 1 else 'were'} removed and {kept:,} kept"
    return f"{count(len(finding), 'image')}{whole} {'stands' if len(finding) == 1 else 'stand'} out. {fate}."


def labels_sentence(finding: Finding, evidence: Evidence) -> str:
    """Say whether the labels of the group look right, and by what."""
    seen, own, others = _answers(finding, evidence)
    name = f"“{evidence.class_name(finding.label)}”"
    if finding.diagnosis == "wrong labels":
        model = model_of(finding)
        by = f" {model[0].upper()}{model[1:]} takes {others}.{_surely(finding)}" if others else ""
        return f"Their labels look wrong: their content belongs to other classes.{by}"
    if finding.diagnosis == "right labels":
        by = f": a model that never saw them gives {own:,} of {seen:,} of them this label" if seen else ""
        return (
            f"Their labels look right{by}. {MAY_BE_FINE}: a clean kind of image that only {name} has looks like this, "
            "and so do images with a trigger and right labels. Only somebody who looks at them can tell."
        )
    if evidence.diagnosis_follows and undiagnosed([finding]):
        return NOT_YET
    by = f" A model that never saw them gives {own:,} of {seen:,} of them this label.{_surely(finding)}" if seen else ""
    return f"It is not known whether their labels are right.{by} {MAY_BE_FINE}: look at them."


def model_of(finding: Finding) -> str:
    """The model that suggests the labels, as a phrase."""
    return "the repaired model" if finding.reference_model == "repaired" else "a model that never saw them"


def _answers(finding: Finding, evidence: Evidence) -> tuple[int, int, str]:
    """How many images have a suggested label, for how many it is their own, and a phrase on the others."""
    if finding.suggested_labels is None:
        return 0, 0, ""
    known = finding.suggested_labels[finding.suggested_labels >= 0]
    own = int((known == finding.label).sum())
    classes, counts = torch.unique(known[known != finding.label], return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:_NAMED].tolist()
    top = listed([f"“{evidence.class_name(int(classes[i]))}” ({int(counts[i]):,})" for i in order])
    most = "mostly " if len(classes) > _NAMED else ""
    phrase = f"{len(known) - own:,} of {len(known):,} of them for other classes, {most}{top}"
    return len(known), own, phrase if len(classes) else ""


def _surely(finding: Finding) -> str:
    """How sure the model is, beside ordinary images."""
    suggested, confidences, usual = (
        finding.suggested_labels,
        finding.suggested_confidences,
        finding.reference_confidence,
    )
    if suggested is None or confidences is None or usual is None:
        return ""
    accuracy = finding.reference_accuracy
    known = "" if accuracy is None else f", of which it gives {percent(round(accuracy, 2))} their label"
    mean = percent(round(float(confidences[suggested >= 0].mean()), 2))
    return f" It is {mean} sure on average, and {percent(round(usual, 2))} on ordinary images{known}."


def trigger_sentence(finding: Finding, evidence: Evidence) -> str:
    """Give the estimated attack success rate, its control, and how it was estimated."""
    if finding.estimated_asr is None:
        return "Not estimated: whether what they have in common works as a trigger is not known."
    name = f"“{evidence.class_name(finding.label)}”"
    way = _WAYS.get(finding.asr_method or "", "") or f"by {finding.asr_method or 'an unknown way'}"
    control = ""
    if finding.control_asr is not None:
        control = f", and {percent(finding.control_asr)} with ordinary images in the place of the group"
    return (
        f"Estimated attack success rate: {percent(finding.estimated_asr)}{control}. What they have in common was put "
        f"on training images of other classes ({way}); counted is how many of these the model then labels {name}."
    )


def suggestions(finding: Finding) -> list[tuple[int, int, float | None]]:
    """Suggested label, number of images and mean probability, most frequent first; -1 where none is suggested."""
    if finding.suggested_labels is None:
        return []
    rows: list[tuple[int, int, float | None]] = []
    for label in torch.unique(finding.suggested_labels).tolist():
        chosen = finding.suggested_labels == label
        sure = None if finding.suggested_confidences is None else float(finding.suggested_confidences[chosen].mean())
        rows.append((label, int(chosen.sum()), None if label < 0 else sure))
    return sorted(rows, key=lambda row: (row[0] < 0, -row[1], row[0]))


def figure_row(figure: GateFigure) -> tuple[str, str, str]:
    """What a figure is, its value, and its bound, for a table."""
    meaning = _FIGURES.get(figure.name, figure.name.replace("_", " "))
    relation = _RELATIONS.get(figure.relation, figure.relation)
    return meaning, number(figure.value), f"{relation} {number(figure.bound)}"


def approval(finding: Finding, index: int, callback: str) -> str:
    """The line of code that keeps all images of a finding.

    Args:
        finding: The finding.
        index: Its place in ``verdict.findings``.
        callback: Name of the class of the defense; empty in an audit.
    """
    positions = f"{'callback.' if callback else ''}verdict.findings[{index}].positions"
    if len(finding) <= _SPELLED:
        positions = str(sorted(finding.positions.tolist()))
    return f"{callback}(approved={positions})" if callback else f"approved={positions}"
