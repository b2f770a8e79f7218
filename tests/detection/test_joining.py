"""Verdicts of several detectors become one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_backdoor.detection.joining import join_verdicts
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.verdict import Finding, Verdict

LABELS = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1])


def finding(label: int, *positions: int, suggested: Tensor | None = None) -> Finding:
    return Finding(
        label, torch.tensor(positions), "strict", (), torch.tensor([0]), torch.ones(1), 0.0, suggested_labels=suggested
    )


def verdict(*findings: Finding, scores: Tensor | None = None) -> Verdict:
    keep = torch.ones(12, dtype=torch.bool)
    scores = torch.full((12,), 0.25) if scores is None else scores.clone()
    for place, found in enumerate(findings):
        keep[found.positions], scores[found.positions] = False, 1.0 + place
    return Verdict(
        scores, keep, 0.5 if findings else math.inf, "gate" if findings else "none", LABELS, findings=findings
    )


def test_a_sample_is_in_the_first_of_its_findings_which_names_who_else_has_it() -> None:
    first = verdict(finding(0, 3, 1, 2))
    second = verdict(finding(0, 4, 1, 2, suggested=torch.tensor([7, 8, 9])), finding(1, 8))
    joined = join_verdicts({"a": first, "b": second}, max_removed=0.5)
    assert [(found.label, found.positions.tolist(), found.detectors) for found in joined.findings] == [
        (0, [3, 1, 2], ("a", "b")),
        (0, [4], ("b",)),
        (1, [8], ("b",)),
    ]
    assert joined.findings[1].suggested_labels.tolist() == [7]
    assert joined.removed.tolist() == [8, 1, 2, 3, 4]
    assert joined.threshold == 0.5
    assert joined.rule == "a: gate; b: gate"
    assert torch.equal(joined.scores, torch.maximum(first.scores, second.scores))
    assert torch.equal(joined.finding_indices >= 0, ~joined.keep)


def test_a_finding_of_which_another_detector_has_half_is_not_confirmed() -> None:
    joined = join_verdicts({"a": verdict(finding(0, 1, 2)), "b": verdict(finding(0, 2, 3))}, max_removed=0.5)
    assert [found.detectors for found in joined.findings] == [("a",), ("b",)]


def test_verdicts_without_a_finding_keep_all() -> None:
    joined = join_verdicts({"a": verdict(), "b": verdict()}, max_removed=0.5)
    assert bool(joined.keep.all())
    assert joined.threshold == math.inf
    assert not joined.findings


def test_both_limits_hold_for_all_detectors_together() -> None:
    apart = {"a": verdict(finding(0, 0, 1)), "b": verdict(finding(1, 6), finding(1, 7))}
    joined = join_verdicts(apart, max_removed=0.25)
    assert joined.removed.tolist() == [7, 0, 1]
    assert joined.threshold == 1.0, "of the removed sample with the least score"
    whole = {"a": verdict(finding(0, 0, 1, 2)), "b": verdict(finding(0, 3, 4, 5))}
    assert int(join_verdicts(whole, max_removed=0.9).keep[:6].sum()) == 1, "some of every label stay"


def test_there_must_be_a_verdict() -> None:
    with pytest.raises(ArgumentError, match="`verdicts` must hold at least one verdict"):
        join_verdicts({}, max_removed=0.5)
