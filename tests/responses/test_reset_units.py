"""Rounds of resets: what is withdrawn before them, what they may cost, what comes back, and whether one follows."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_backdoor import Verdict
from lightning_backdoor.events import Event
from lightning_backdoor.responses.base import Detection, Session
from lightning_backdoor.responses.reset_units import ResetUnits, unfinished
from lightning_backdoor.verdict import Finding


def first(count: int, size: int = 1000) -> Tensor:
    return torch.arange(size) < count


def verdict_on(keep: Tensor) -> Verdict:
    return Verdict(torch.zeros(len(keep)), keep, 0.5, "given", torch.zeros(len(keep), dtype=torch.long))


def session_of(verdict: Verdict | None, history: list[Event] | None = None, training: Tensor | None = None) -> Session:
    """A session with a verdict in force, and with the samples that all defenses keep."""
    case: Any = SimpleNamespace(title="NONE", verdict=verdict, history=history or [])
    loader_filter: Any = SimpleNamespace(keep=training)
    nothing: Any = None
    return Session(nothing, nothing, nothing, loader_filter, case, 0.0)


def round_of(epochs: int = 5, removed: int = 0, **kwargs: Any) -> Event:
    """An event of a round that resets one unit."""
    return Event(epochs, removed, removed, response="reset", units=(("body.0", 0, 0, 1.0),), **kwargs)


def response_with(*, correct: Tensor, keep: Tensor) -> ResetUnits:
    """In a round; samples that got their label before the first one, and that were kept before this one."""
    response = ResetUnits()
    response._correct, response._keep = correct, keep
    return response


@pytest.mark.parametrize(("right", "undone"), [(940, True), (960, False)])
def test_rounds_share_one_bound_on_what_they_may_cost(right: int, undone: bool) -> None:
    response = response_with(correct=first(1000), keep=first(1000))
    event = round_of(accuracies=(0.97,), flagged_label_rates=(None,))  # the first one cost three
    judged = response._judged_event(session_of(verdict_on(first(1000))), event, (~first(right)).long())
    assert judged.accuracies == (0.97, pytest.approx(right / 1000))
    assert judged.undone_steps == (undone,)


def test_images_that_leave_later_do_not_hide_what_the_rounds_cost() -> None:
    kept, predicted = first(900), (~first(800)).long()  # of the images that are left a hundred have been forgotten
    response = response_with(correct=first(1000), keep=first(1000))
    event = round_of(removed=100, accuracies=(0.8,), flagged_label_rates=(None,))
    judged = response._judged_event(session_of(verdict_on(kept)), event, predicted)
    assert judged.undone, "eleven points since the start, none in this round"


def test_samples_of_this_round_come_back_whatever_earlier_ones_removed() -> None:
    before, kept = ~first(600, 2000), ~first(1000, 2000)  # 600 true poisons, then 400 that are innocent
    predicted = first(600, 2000).long()  # the model gives none of the former their label, and all of the latter
    response = response_with(correct=first(2000, 2000), keep=before)
    event = round_of(removed=400, accuracies=(1.0,), flagged_label_rates=(0.4,))
    for all_to_all in (True, False):
        judged = response._judged_event(session_of(verdict_on(kept)), replace(event, all_to_all=all_to_all), predicted)
        assert judged.flagged_label_rates == (0.4, pytest.approx(0.4))
        assert (judged.reassigned, judged.undone) == (all_to_all, all_to_all)


def test_nothing_new_leaves_after_a_round_whose_images_have_their_own_label() -> None:
    earlier, right = verdict_on(~first(100)), first(1000)
    detection = Detection(replace(verdict_on(~first(250)), rule="subpopulation(none)"), 250, correct=right)
    for rate, left, rule in ((0.95, 100, "given"), (0.5, 250, "subpopulation(none)")):
        past = round_of(3, 100, accuracies=(1.0, 1.0), flagged_label_rates=(1.0, rate), undone_steps=(False,))
        session, response = session_of(earlier, [past]), ResetUnits()
        response._rounds_done = 1
        revised = response.revise(session, detection)
        assert (len(revised.verdict.removed), revised.num_flagged_before_cap) == (left, left)
        assert revised.verdict.rule == rule
        quota = ResetUnits(by_quota=True)
        quota._rounds_done = 1
        assert len(quota.revise(session, detection).verdict.removed) == 250


def test_samples_that_stay_in_the_data_are_never_removed() -> None:
    unit = torch.zeros(1, dtype=torch.long)
    finding = Finding(0, first(100).nonzero().squeeze(1), "strict", (), unit, torch.ones(1), 0.5)
    detection = Detection(replace(verdict_on(~first(100)), findings=(finding,)), 100, correct=~first(100))
    for training in (None, ~first(100)):  # another defense has removed them already, and they are not learned
        revised = ResetUnits(by_quota=True, drop=False).revise(session_of(None, training=training), detection)
        assert revised.verdict.keep.all()
        assert revised.verdict.threshold == math.inf
        assert revised.verdict.findings[0] is finding
        assert revised.num_flagged_before_cap == 0


@pytest.mark.parametrize(
    ("trained_on", "labeled", "left"),
    [(~first(100), 0, 0), (~first(100), 20, 100), (~first(90), 0, 100)],
    ids=["all gone, none obeyed", "all gone, obeyed", "some in training"],
)
def test_what_another_defense_has_removed_counts_where_the_model_obeys_it(
    trained_on: Tensor, labeled: int, left: int
) -> None:
    detection = Detection(verdict_on(~first(100)), 100, correct=first(labeled) | ~first(100))
    revised = ResetUnits().revise(session_of(None, training=trained_on), detection)
    assert (len(revised.verdict.removed), revised.num_flagged_before_cap) == (left, left)
    assert (revised.verdict.threshold == math.inf) == (left == 0)


@pytest.mark.parametrize(
    ("rates", "more"),
    [
        ([], False),
        ([(1.0, 0.11)], True),
        ([(1.0, 0.1)], False),
        ([(1.0, 0.99)], True),
        ([(1.0, 0.4), (0.4, 0.29)], True),
        ([(1.0, 0.4), (0.4, 0.31)], False),
        ([(1.0, 0.4), (0.4, 0.1)], False),
        ([(1.0, None)], False),
        ([(None, None)], False),
        ([(1.0,)], False),
    ],
)
def test_rounds_are_unfinished_if_many_obey_and_the_last_of_several_has_helped(
    rates: list[tuple[float | None, ...]], more: bool
) -> None:
    assert unfinished([round_of(accuracies=(0.9, 0.9), flagged_label_rates=both) for both in rates]) is more


def test_what_is_in_training_and_what_was_removed_are_told_apart() -> None:
    verdict, correct = verdict_on(first(4, 6)), torch.tensor([1, 1, 1, 0, 1, 0]).bool()
    assert session_of(verdict).label_rates(correct) == (0.75, 0.5)
    helped = torch.tensor([0, 0, 1, 1, 0, 0]).bool()
    assert session_of(verdict, training=helped).label_rates(correct) == (0.5, 0.5), "another defense helped"
