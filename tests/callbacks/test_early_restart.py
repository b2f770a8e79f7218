"""What is beyond doubt early in the warm-up of UltraClean leads to the restart at once; all else waits for the scan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_backdoor import UltraCleanCallback, Verdict
from lightning_backdoor.responses import Restart
from lightning_backdoor.scanning.measure_denoised import DenoisedScan
from tests.callbacks.helpers import same_state
from tests.callbacks.test_ultraclean_resume import SaveAll
from tests.contract.problem import WARNS, Run, fit
from tests.contract.test_default_rule import clean, planted

pytestmark = WARNS

WARMUP, EPOCHS = 6, 7


def train(callbacks: list[Any], data: Any = None, **kwargs: Any) -> Run:
    return fit(callbacks, data or planted(), epochs=EPOCHS, **kwargs)


def defense(**kwargs: Any) -> UltraCleanCallback:
    return UltraCleanCallback(**{"warmup_epochs": WARMUP, **kwargs})


def begun(run: Run) -> list[int]:
    return [epoch for epoch, _ in run.module.epochs()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[UltraCleanCallback, Run, list[Path]]:
    callback, saver = defense(), SaveAll(tmp_path_factory.mktemp("whole"))
    return callback, train([callback, saver]), saver.paths


def test_a_planted_backdoor_that_shows_early_is_removed_early(whole: Any) -> None:
    callback, run, _ = whole
    assert torch.equal(~callback.verdict.keep, planted().poisoned)
    assert begun(run) == [*range(WARMUP // 2), *range(EPOCHS)]
    assert [(event.epochs, event.run, event.removed) for event in callback.history] == [
        (WARMUP // 2, 1, 18),
        (EPOCHS, 2, 0),
    ]
    assert run.module.epochs()[-1][1] == callback.verdict.keep.nonzero().flatten().tolist()
    (finding,) = callback.verdict.findings
    assert finding.gate == "strict"
    assert finding.diagnosis == "wrong labels"


def test_its_clean_twin_is_scanned_as_ever_and_left_alone() -> None:
    callback = defense()
    run = train([callback], clean())
    assert bool(callback.verdict.keep.all())
    assert [event.epochs for event in callback.history] == [WARMUP, EPOCHS]
    assert same_state(train([], clean()).module, run.module)


def test_what_is_not_beyond_doubt_waits_for_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_backdoor.callbacks.ultraclean.is_sure", lambda *_: False)
    callback = defense()
    run = train([callback])
    assert torch.equal(~callback.verdict.keep, planted().poisoned)
    assert begun(run) == [*range(WARMUP), *range(EPOCHS)]


def test_a_class_that_is_learned_before_the_poisons_with_its_label_is_not_taken_for_them() -> None:
    """After two epochs it is the class that gets its label and lies far apart; the poisons are the rest."""
    callback = defense(warmup_epochs=3)
    train([callback])
    assert torch.equal(~callback.verdict.keep, planted().poisoned)


@pytest.mark.parametrize("response", ["report", "continue"])
def test_only_a_restart_comes_early(response: Any) -> None:
    callback = defense(response=response)
    run = train([callback])
    assert callback.history[0].epochs == WARMUP
    assert begun(run) == [*range(EPOCHS)]
    if response == "report":
        assert same_state(train([]).module, run.module)


def test_approved_images_are_not_removed_early() -> None:
    callback = defense(approved=planted().poisoned.nonzero().flatten().tolist())
    run = train([callback])
    assert bool(callback.verdict.keep.all())
    assert begun(run) == [*range(EPOCHS)]


def test_resumed_anywhere_it_ends_the_same(whole: Any) -> None:
    expected, run, saved = whole
    for path in saved[3:6]:  # of the epochs before, with and after the early scan
        callback = defense()
        again = train([callback], ckpt=path)
        assert torch.equal(callback.verdict.keep, expected.verdict.keep), path.name
        assert torch.equal(callback.verdict.scores, expected.verdict.scores), path.name
        assert callback.history == expected.history, path.name
        assert same_state(again.module, run.module), path.name


def test_a_group_that_may_be_the_class_itself_waits_for_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_spared(verdict: Verdict, *_: Any) -> Any:
        return replace(verdict, keep=torch.ones_like(verdict.keep)), verdict.findings

    monkeypatch.setattr("lightning_backdoor.callbacks.base.without_majorities", all_spared)
    callback = defense(response=Restart(last_detection=False))
    with pytest.warns(UserWarning, match="rather than the class itself") as told:
        train([callback])
    assert [(event.epochs, event.removed) for event in callback.history] == [(WARMUP, 0)]
    assert len([one for one in told if "the class itself" in str(one.message)]) == 1


def test_the_early_scan_denoises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> None:
        raise AssertionError("the features alone are enough")

    monkeypatch.setattr(DenoisedScan, "run", refused)
    callback = defense(response=Restart(last_detection=False))
    train([callback])
    assert [event.removed for event in callback.history] == [18, 0]
