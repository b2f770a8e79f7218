"""A finding that is most of its label is kept, unless something says that it is not the class itself."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_backdoor.detection.majorities import without_majorities
from lightning_backdoor.verdict import Finding, Verdict

SIZE = 20  # samples of each of five labels


def finding(label: int, first: int, count: int, **fields: Any) -> Finding:
    """So many samples of a label, from its first ones on."""
    given = {"gate": "strict", "figures": (), "units": torch.zeros(1), "weights": torch.zeros(1), "threshold": 0.5}
    return Finding(label, SIZE * label + torch.arange(first, first + count), **{**given, **fields})


def verdict(*findings: Finding, sizes: tuple[int, ...] = (SIZE,) * 5, **fields: Any) -> Verdict:
    """All samples of the findings are removed. Labels of other sizes come in their order, too."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    keep = torch.ones(len(labels), dtype=torch.bool)
    for one in findings:
        keep[one.positions] = False
    given = {"labels": labels, "suspect": ~keep, "findings": findings, **fields}
    return Verdict((~keep).float(), keep, 0.5, "subpopulation(strict: standardized_gap>=2.5)", **given)


EVERYTHING = torch.ones(5 * SIZE, dtype=torch.bool)
WRONG: dict[str, dict[str, Any]] = {
    "wrong labels": {"diagnosis": "wrong labels"},
    "neighbors were of other classes": {"gate": "early_neighbors"},
    "others lie above the threshold": {"gate": "overlap"},
    "a trigger": {"estimated_asr": 0.9, "control_asr": 0.02},
}
CLEAN: dict[str, dict[str, Any]] = {
    "nothing known": {},
    "right labels": {"diagnosis": "right labels"},
    "a class of many kinds looks like others, too": {"gate": "look_alikes"},
    "a look that the model does not obey": {"estimated_asr": 0.22, "control_asr": 0.07},
    "as ordinary images do": {"estimated_asr": 0.8, "control_asr": 0.7},
}


@pytest.mark.parametrize("fields", CLEAN.values(), ids=CLEAN)
def test_most_of_a_label_stays(fields: dict[str, Any]) -> None:
    most, few = finding(1, 0, 16, **fields), finding(3, 0, 5)
    given = verdict(most, few)
    found, spared = without_majorities(given, EVERYTHING)
    assert spared == (most,)
    assert found.findings == (most, few), "it is reported"
    assert torch.equal(~found.keep, verdict(few).keep.logical_not())
    assert torch.equal(found.suspect, ~found.keep)
    assert found.rule.endswith(", most_of_label(0.5)")
    assert found.threshold == 0.5


@pytest.mark.parametrize("fields", WRONG.values(), ids=WRONG)
def test_it_goes_if_its_labels_are_wrong_or_it_is_a_trigger(fields: dict[str, Any]) -> None:
    given = verdict(finding(1, 0, 16, **fields))
    assert without_majorities(given, EVERYTHING) == (given, ())


@pytest.mark.parametrize(("count", "stays"), [(10, False), (11, True)])
def test_half_of_a_label_goes_and_more_stays(count: int, stays: bool) -> None:
    given = verdict(finding(1, 0, count))
    found, spared = without_majorities(given, EVERYTHING)
    assert bool(spared) is stays
    assert found.threshold == (math.inf if stays else 0.5), "where nothing is removed there is no threshold"
    assert without_majorities(given, EVERYTHING, 0.6)[1] == ()
    assert without_majorities(given, EVERYTHING, 0.4)[1] == given.findings


def test_poisons_beside_as_many_own_samples_as_other_labels_have_go() -> None:
    sizes = (50, SIZE, SIZE, SIZE, SIZE)  # 30 poisons with label 0
    given = verdict(finding(0, 0, 30), sizes=sizes)
    kept = torch.ones(len(given), dtype=torch.bool)
    assert without_majorities(given, kept)[1] == ()
    assert without_majorities(verdict(finding(0, 0, 31), sizes=sizes), kept)[1] != ()


def test_a_trigger_leaves_a_part_of_the_label() -> None:
    trigger = WRONG["a trigger"]
    assert without_majorities(verdict(finding(1, 0, 17, **trigger)), EVERYTHING)[1] == ()
    assert without_majorities(verdict(finding(1, 0, 18, **trigger)), EVERYTHING)[1] != ()


def test_what_earlier_scans_have_removed_of_the_label_counts() -> None:
    first, second = finding(1, 0, 8), finding(1, 8, 4)
    before = verdict(first)
    given = verdict(first, second)
    found, spared = without_majorities(given, before.keep)
    assert spared == (second,)
    assert torch.equal(found.keep, before.keep), "what was removed stays removed"
    assert without_majorities(before, before.keep) == (before, ())


def test_it_stays_at_every_scan() -> None:
    given = verdict(finding(1, 0, 16))
    kept, _ = without_majorities(given, EVERYTHING)
    again = replace(kept, keep=given.keep, suspect=given.suspect, rule=given.rule)  # found once more
    assert torch.equal(without_majorities(again, kept.keep)[0].keep, kept.keep)


def test_without_labels_or_without_a_limit_nothing_is_kept() -> None:
    given = verdict(finding(1, 0, 16))
    assert without_majorities(given, EVERYTHING, 1.0)[1] == ()
    assert without_majorities(replace(given, labels=None), EVERYTHING)[1] == ()
    unread = replace(given, labels=torch.where(given.labels == 1, -1, given.labels))
    assert without_majorities(unread, EVERYTHING)[1] == ()
