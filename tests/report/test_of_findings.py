"""A finding in words says whether its labels are right, by what, and how its images are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.report.explanation import NOT_YET, labels_sentence, trigger_sentence
from lightning_backdoor.report.of_events import KEEP, findings_told
from lightning_backdoor.report.sentences import summarize
from lightning_backdoor.verdict import Diagnosis, Finding, Verdict

PLAIN = Finding(2, torch.arange(4), "strict", (), torch.tensor([0]), torch.tensor([1.0]), 0.0)
KNOWN = replace(
    PLAIN,
    suggested_labels=torch.tensor([3, 3, 5, 2]),
    suggested_confidences=torch.full((4,), 0.9),
    reference_accuracy=0.9,
    reference_confidence=0.95,
)
TRIED = {"estimated_asr": 0.8, "control_asr": 0.1, "asr_method": "blend"}


def verdict(finding: Finding) -> Verdict:
    keep = torch.arange(10) >= 4
    return Verdict((~keep).float(), keep, 0.5, "rule", torch.full((10,), 2), findings=(finding,))


@pytest.mark.parametrize("diagnosis", ["wrong labels", "right labels", "unclear"])
@pytest.mark.parametrize("classes", [None, ["cat", "dog", "owl", "fox", "bee", "ant"]])
def test_the_console_has_the_sentences_of_the_report(diagnosis: Diagnosis, classes: list[str] | None) -> None:
    finding, evidence = replace(KNOWN, **TRIED, diagnosis=diagnosis), Evidence(classes=classes)
    told = findings_told(verdict(finding), classes, approved=True)
    assert told.startswith(f" 4 images labeled “{'owl' if classes else 'class 2'}”: ")
    assert labels_sentence(finding, evidence) in told
    assert trigger_sentence(finding, evidence) in told


def test_nothing_is_said_that_is_not_known() -> None:
    assert findings_told(verdict(PLAIN), approved=True) == ""
    told = findings_told(verdict(KNOWN), approved=True)
    assert told
    assert "Not estimated" not in told
    assert KEEP not in findings_told(verdict(replace(PLAIN, **TRIED)), approved=True)


def test_what_is_found_out_at_the_end_of_training_is_said_to_be_unknown_until_then() -> None:
    large = replace(PLAIN, positions=torch.arange(8))
    told = findings_told(verdict(large), approved=True, diagnosis_follows=True)
    assert told == f" 8 images labeled “class 2”: {NOT_YET}"
    assert "at the end of training" in NOT_YET
    assert findings_told(verdict(PLAIN), approved=True, diagnosis_follows=True) == "", "too few for a diagnosis"
    assert summarize(verdict(large), "NONE", [], Evidence(diagnosis_follows=True)).found.endswith(
        "8 of “class 2” (labels not checked yet)."
    )


def test_the_repaired_model_is_named_where_it_says_that_labels_are_wrong() -> None:
    finding = replace(KNOWN, diagnosis="wrong labels")
    assert "A model that never saw them takes 3 of 4" in labels_sentence(finding, Evidence())
    assert "The repaired model takes 3 of 4" in labels_sentence(
        replace(finding, reference_model="repaired"), Evidence()
    )


@pytest.mark.parametrize(
    ("diagnosis", "approved"), [("right labels", True), ("right labels", False), ("unclear", True)]
)
def test_how_images_are_kept(diagnosis: Diagnosis, approved: bool) -> None:
    told = findings_told(verdict(replace(KNOWN, diagnosis=diagnosis)), approved=approved)
    assert (KEEP in told) == approved
    assert KEEP not in findings_told(verdict(replace(KNOWN, diagnosis="wrong labels")), approved=True)


@pytest.mark.parametrize("diagnosis", ["wrong labels", "right labels", "unclear"])
def test_the_report_calls_a_group_harmless_unless_its_labels_are_wrong(diagnosis: Diagnosis) -> None:
    then = summarize(verdict(replace(KNOWN, diagnosis=diagnosis)), "Method", [], Evidence()).then
    assert ("harmless" in then) == ("`approved`" in then) == (diagnosis != "wrong labels")
    assert "somebody has touched" not in then
