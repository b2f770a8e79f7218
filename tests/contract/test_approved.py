"""What the user has approved is never removed, unlearned, suspected or counted, by any defense and response."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.callbacks.helpers import same_state
from tests.callbacks.test_ultraclean_resume import SaveAll
from tests.contract import test_default_rule as default
from tests.contract.problem import IMAGES, WARNS, assert_settled, fit
from tests.contract.registry import Entry, every_defense, of
from tests.contract.test_responses import OTHERS

pytestmark = [
    *WARNS,
    pytest.mark.filterwarnings("ignore:.* (after fine-tuning|ends with a model|looked at|takes most)"),
]

APPROVED = (torch.arange(IMAGES) % 8 == 3) | (torch.arange(IMAGES) % 3 == 0)
"""The planted images, and a third of all."""


def assert_left_alone(callback: Any, approved: Tensor = APPROVED) -> None:
    verdict = callback.verdict
    assert torch.equal(verdict.approved, approved)
    assert bool(verdict.keep[approved].all())
    assert verdict.suspect is None or not bool(verdict.suspect[approved].any())
    assert not bool((verdict.finding_indices[approved] >= 0).any())
    assert bool((verdict.scores[approved] <= verdict.scores[~approved].min()).all())
    for event in callback.history:
        assert event.removed <= int((~approved).sum())
        assert event.suspects <= int((~approved).sum())
        assert event.num_flagged_before_cap <= int((~approved).sum())


@every_defense
def test_it_stays_and_all_else_goes_on(entry: Entry) -> None:
    callback = entry.make(approved=APPROVED.nonzero().flatten().tolist())
    run = fit([callback])
    assert_left_alone(callback)
    if entry.name != "FineTuneTrusted":  # it learns by the verdict of another defense, which removed these alone
        assert entry.acted(callback, run.trainer), "others are removed as before"
    assert_settled(run.trainer, run.module, run.loader, run.before)


@pytest.mark.parametrize("response", [*OTHERS, "report"])
@pytest.mark.parametrize("name", ["UltraCleanCallback", "NONECallback", "DBRCallback"])
def test_it_stays_with_every_response(name: str, response: str) -> None:
    callback = of(name).make(response=response, approved=APPROVED)
    drawn = fit([callback]).module.epochs()
    assert_left_alone(callback)
    if response in ("restart", "continue", "reset"):
        assert set(APPROVED.nonzero().flatten().tolist()) <= set(drawn[-1][1])


@pytest.mark.parametrize("response", ["two_stage", "continue"])
def test_it_stays_with_the_responses_of_dst(response: str) -> None:
    callback = of("DSTCallback").make(response=response, approved=APPROVED)
    fit([callback])
    assert_left_alone(callback)


@pytest.mark.parametrize("name", ["DBRCallback", "DSTCallback"])
def test_the_verdict_of_another_defense_says_nothing_of_it(name: str) -> None:
    given = of("FineTuneTrusted").acting["verdict"]
    callback = of(name).make(verdict=given, approved=APPROVED)
    fit([callback])
    assert_left_alone(callback)
    assert not bool(callback.verdict.suspect.any()), "all that it suspects is approved"


@default.every_default
def test_where_all_that_stands_out_is_approved_the_training_is_the_users_own(name: str) -> None:
    callback = default.MAKE[name](approved=default.planted().poisoned)
    run = default.train(callback)
    assert bool(callback.verdict.keep.all())
    assert callback.verdict.findings == ()
    assert default.begun(run) == [*range(default.EPOCHS)]
    assert same_state(default.train().module, run.module)
    assert_settled(run.trainer, run.module, run.loader, run.before, epochs=default.EPOCHS)


def test_it_does_not_hide_what_is_not_approved(tmp_path: Path) -> None:
    """A third of the planted images, and ordinary ones of their label."""
    poisoned = default.planted().poisoned
    approved = (poisoned & (poisoned.cumsum(0) % 3 == 0)) | (torch.arange(len(poisoned)) % 12 == 0)
    callback = default.MAKE["UltraClean"](approved=approved, report_dir=tmp_path)
    default.train(callback)
    page = (tmp_path / "report.html").read_text()
    assert "images that you have approved (kept)" in page
    assert torch.equal(~callback.verdict.keep, poisoned & ~approved)
    assert_left_alone(callback, approved)


def test_a_resumed_run_goes_on_with_what_was_approved(tmp_path: Path) -> None:
    entry, saver = of("UltraCleanCallback"), SaveAll(tmp_path)
    expected = fit([entry.make(approved=APPROVED), saver])
    path = saver.paths[0]
    assert same_state(expected.module, fit([entry.make(approved=APPROVED.nonzero().flatten())], ckpt=path).module)
    other = entry.make(approved=[1, 2])
    with pytest.warns(UserWarning, match=r"the interrupted run approved 40 images, `approved` names 2 now"):
        run = fit([other], ckpt=path)
    assert same_state(expected.module, run.module)
    assert_left_alone(other)


def test_what_an_earlier_fit_removed_comes_back_once_it_is_approved() -> None:
    callback = of("UltraCleanCallback").make(response="continue")
    fit([callback])
    removed = ~callback.verdict.keep
    assert bool(removed.any())
    callback.approved = removed
    fit([callback])
    assert torch.equal(callback.verdict.approved, removed)
    assert bool(callback.verdict.keep[removed].all())
