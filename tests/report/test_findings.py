"""The section of a finding: what is said of it, its pictures, its figures, and the line that approves it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_backdoor.detection import subpopulations
from lightning_backdoor.report.explanation import (
    approval,
    figure_row,
    labels_sentence,
    size_sentence,
    suggestions,
    trigger_sentence,
)
from lightning_backdoor.report.portraits import FETCHED, PART, PICTURED, portray, spread
from lightning_backdoor.report.sentences import summarize
from lightning_backdoor.report.table import class_rows
from lightning_backdoor.verdict import GateFigure, Verdict
from tests.report.helpers import evidence, explained, finding, verdict
from tests.report.test_writer import written

EXPLAINED = explained()
WRONG, RIGHT, UNCLEAR = EXPLAINED.findings


def test_wrong_labels_are_said_with_the_classes_that_they_belong_to() -> None:
    told = labels_sentence(WRONG, evidence())
    assert told.startswith("Their labels look wrong: their content belongs to other classes.")
    assert "takes 18 of 19 of them for other classes, “cat” (12) and “owl” (6)." in told
    assert "It is 89 % sure on average, and 95 % on ordinary images, of which it gives 97 % their label." in told
    assert "may be fine" not in told


def test_right_and_unclear_labels_say_that_the_images_may_be_fine() -> None:
    right = labels_sentence(RIGHT, evidence())
    assert "Their labels look right: a model that never saw them gives 30 of 30 of them this label." in right
    assert "These images may be fine: a clean kind of image that only “cow” has looks like this" in right
    assert labels_sentence(UNCLEAR, evidence()) == (
        "It is not known whether their labels are right. These images may be fine: look at them."
    )


def test_the_estimated_attack_success_rate_has_its_control_and_its_way() -> None:
    told = trigger_sentence(WRONG, evidence())
    assert "Estimated attack success rate: 93 %, and 2 % with ordinary images in the place of the group" in told
    assert "by pasting the region that the group shares" in told
    assert trigger_sentence(RIGHT, evidence()).startswith("Not estimated")
    alone = replace(WRONG, control_asr=None, asr_method="a way of tomorrow")
    assert "93 %. What they" in trigger_sentence(alone, evidence())
    assert "by a way of tomorrow" in trigger_sentence(alone, evidence())


def test_how_many_are_found_and_what_became_of_them() -> None:
    assert size_sentence(WRONG, EXPLAINED) == "20 images of the 57 of this label stand out. All of them were removed."
    assert size_sentence(RIGHT, EXPLAINED).endswith("24 of them were removed and 6 kept.")
    kept = Verdict(**{**vars(verdict(20, 0)), "findings": (finding(1, torch.tensor([3])),)})
    assert size_sentence(kept.findings[0], kept).endswith("stands out. None of them was removed.")


def test_suggested_labels_are_counted() -> None:
    rows = suggestions(WRONG)
    assert [(label, images) for label, images, _ in rows] == [(0, 12), (3, 6), (1, 1), (-1, 1)]
    assert rows[0][2] == pytest.approx(float(WRONG.suggested_confidences[:12].mean()))
    assert rows[-1][2] is None
    assert suggestions(UNCLEAR) == []


def test_figures_have_a_meaning_and_their_bound() -> None:
    meaning, value, bound = figure_row(WRONG.figures[0])
    assert "gap between the group and the rest of its label" in meaning
    assert (value, bound) == ("5.125", "at least 2.5")
    assert figure_row(WRONG.figures[1])[2] == "less than 1.6"
    assert figure_row(GateFigure("a_new_figure", 3.0, "≈", 1.0)) == ("a new figure", "3", "≈ 1")


def test_every_figure_of_a_gate_has_a_meaning() -> None:
    sources = "".join(path.read_text() for path in Path(subpopulations.__file__).parent.glob("*.py"))
    names = set(re.findall(r'GateFigure\(\s*"(\w+)"', sources))
    assert len(names) >= 14
    assert not [name for name in names if figure_row(GateFigure(name, 1.0, ">=", 1.0))[0] == name.replace("_", " ")]


def test_the_line_that_approves_a_finding() -> None:
    few = finding(3, torch.tensor([7, 3]))
    assert approval(few, 1, "NONECallback") == "NONECallback(approved=[3, 7])"
    assert approval(WRONG, 0, "UltraCleanCallback") == (
        "UltraCleanCallback(approved=callback.verdict.findings[0].positions)"
    )
    assert approval(few, 1, "") == "approved=[3, 7]"


def test_the_summary_names_groups_diagnoses_and_the_trigger() -> None:
    summary = summarize(EXPLAINED, "UltraClean", class_rows(EXPLAINED), evidence())
    assert summary.found == (
        "3 groups of images stand out from their classes: 20 of “dog” (labels look wrong), 30 of “cow” (labels look "
        "right) and 5 of “owl” (labels may be right). What those of “dog” have in common works as a trigger: with it, "
        "an estimated 93 % of other images get this label."
    )
    assert "download `reviewed.csv`, and pass its path as `approved`" in summary.then
    one = replace(EXPLAINED, findings=(WRONG,))
    alone = summarize(one, "UltraClean", class_rows(one), evidence())
    assert alone.found.startswith("One group of images stands out from its class: 20 of “dog” (labels look wrong).")
    assert "verdict.relabeled(dataset)" in alone.then
    many = replace(EXPLAINED, findings=tuple(finding(2, torch.tensor([place])) for place in range(9)))
    assert "and 6 more." in summarize(many, "UltraClean", class_rows(many), evidence()).found


def test_a_trigger_is_not_claimed_of_a_rate_like_the_control() -> None:
    weak = replace(EXPLAINED, findings=(replace(WRONG, control_asr=0.7),))
    assert "works as a trigger" not in summarize(weak, "UltraClean", class_rows(weak), evidence()).found


@pytest.mark.parametrize(("asr", "control", "works"), [(0.4, 0.05, True), (0.93, 0.62, True), (0.55, 0.27, False)])
def test_the_summary_and_the_decisions_call_the_same_findings_a_trigger(
    asr: float, control: float, works: bool
) -> None:
    one = replace(WRONG, estimated_asr=asr, control_asr=control)
    judged = replace(EXPLAINED, findings=(replace(UNCLEAR, estimated_asr=0.95, control_asr=0.9), one))
    found = summarize(judged, "UltraClean", class_rows(judged), evidence()).found
    assert one.works_as_trigger == ("“dog” have in common works as a trigger" in found) == works


def test_the_summary_says_how_many_images_are_approved() -> None:
    for fine, words in ((0, ""), (1, " 1 image is approved."), (3, " 3 images are approved.")):
        for judged in (EXPLAINED, verdict(200, 0)):
            kept = judged.keep.nonzero().squeeze(1)[:fine]
            approved = torch.zeros(200, dtype=torch.bool).index_fill(0, kept, True)
            marked = replace(judged, approved=approved)
            looked = summarize(marked, "UltraClean", class_rows(marked), evidence()).looked
            assert looked.endswith(words)
            assert ("approved" in looked) == (fine > 0)


def test_found_and_not_removed_is_said() -> None:
    kept = replace(EXPLAINED, keep=torch.ones(200, dtype=torch.bool))
    summary = summarize(kept, "UltraClean", class_rows(kept), evidence())
    assert summary.headline == "55 of 200 training images stand out, none was removed"
    assert summary.done == "All 200 images stay in training."


def planted(size: int = 8) -> tuple[Verdict, object]:
    """Noise images of one label; those of the finding have a bright corner."""
    pixels = torch.randint(80, 120, (200, 3, size, size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pixels[:40, :, -2:, -2:] = 200
    plain = verdict(200, 40, classes=1)
    judged = replace(plain, labels=torch.ones(200, dtype=torch.long), findings=(finding(1, torch.arange(40)),))
    return judged, lambda positions: pixels[torch.as_tensor(positions)]


def test_the_common_picture_shows_what_the_group_shares() -> None:
    judged, images = planted()
    (portrait,), pixels = portray(judged, evidence(images=images))
    assert portrait.common is not None
    difference = portrait.common.tiles[2].float().mean(dim=2)
    assert bool((difference[-2:, -2:] > 240).all())
    assert bool(((difference - 128).abs() < 15)[:6, :6].all())
    assert portrait.common.counts == (40, 64)
    assert portrait.common.factor == pytest.approx(1.27, abs=0.1)
    assert len(portrait.members) == 24
    assert portrait.members[0] == 0
    assert portrait.members[-1] == 39
    assert len(portrait.ordinary) == 8
    assert min(portrait.ordinary) >= 40
    assert set(pixels) == {*portrait.members, *portrait.ordinary}


def test_images_are_fetched_in_small_parts_and_not_too_many() -> None:
    asked: list[int] = []

    def images(positions: list[int]) -> Tensor:
        asked.append(len(positions))
        return torch.zeros(len(positions), 3, 200, 100, dtype=torch.uint8)

    many = tuple(finding(place % 4, torch.arange(place * 80, place * 80 + 80)) for place in range(30))
    judged = replace(verdict(4000, 2400), findings=many)
    portraits, pixels = portray(judged, evidence(images=images))
    assert len(portraits) == PICTURED
    assert max(asked) <= PART
    assert sum(asked) <= FETCHED
    assert len(pixels) <= 350
    assert {tile.shape for tile in pixels.values()} == {(96, 48, 3)}, "many of them are smaller"
    _, few = portray(replace(judged, findings=many[:1]), evidence(images=images))
    assert {tile.shape for tile in few.values()} == {(160, 80, 3)}


def test_images_of_several_sizes_are_compared_in_one() -> None:
    judged, _ = planted()

    def images(positions: list[int]) -> Tensor:
        side = 8 if 0 in positions else 10
        return torch.full((len(positions), 1, side, side), 7, dtype=torch.uint8)

    (portrait,), pixels = portray(judged, evidence(images=images))
    assert portrait.common is not None
    assert {tile.shape for tile in pixels.values()} == {(8, 8, 3)}


def test_without_ordinary_images_there_is_no_comparison() -> None:
    whole = replace(verdict(40, 40, classes=1), findings=(finding(1, torch.arange(40)),))
    (portrait,), _ = portray(whole, evidence())
    assert portrait.common is None
    assert portrait.ordinary == []
    assert portray(whole, evidence(images=None)) == ([], {})


def test_spread_takes_the_first_and_the_last() -> None:
    assert spread(torch.arange(10), 4).tolist() == [0, 3, 6, 9]
    assert spread(torch.arange(3), 4).tolist() == [0, 1, 2]


def test_the_page_has_a_section_for_each_finding(tmp_path) -> None:
    page = written(tmp_path, EXPLAINED, callback="UltraCleanCallback", false_alarm_rate=0.01)
    assert "Finding 0: 20 images labeled “dog”" in page.text
    assert "Beside them: ordinary images of “cow”" in page.text
    assert "UltraCleanCallback(approved=[90, 91, 92, 93, 94])" in page.text
    assert 'UltraCleanCallback(approved="reviewed.csv")' in page.text
    assert "finding in 1 % of trainings at most" in page.text
    assert "dog (its own) 1 100 %" not in page.text
    links = [attrs.get("href") for tag, attrs in page.tags if tag == "a"]
    assert links[:3] == ["#finding-0", "#finding-1", "#finding-2"]
    sections = [attrs["id"] for tag, attrs in page.tags if tag == "section" and "id" in attrs]
    assert sections == ["finding-0", "finding-1", "finding-2"]
    assert sum("data-whole" in attrs for _, attrs in page.tags) == 3


def test_a_page_without_images_has_the_sections(tmp_path) -> None:
    page = written(tmp_path, EXPLAINED, images=None, denoised=None)
    assert "Finding 2: 5 images labeled “owl”" in page.text
    assert not [attrs for tag, attrs in page.tags if tag == "figure" and "data-keep" in attrs]
