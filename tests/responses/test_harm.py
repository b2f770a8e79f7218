"""A treatment is undone where it costs one class too much, however good all images together look."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_backdoor import DBRCallback, NONECallback, Verdict
from lightning_backdoor.events import Event
from lightning_backdoor.report.of_events import sentence
from lightning_backdoor.responses.base import Session
from lightning_backdoor.responses.harm import drawn_by_label, harmed_class
from lightning_backdoor.responses.unlearn import split_of
from tests.callbacks.helpers import LIGHTNING_WARNS, same_state
from tests.callbacks.test_undo import dbr, fit, none

pytestmark = [
    *LIGHTNING_WARNS,
    pytest.mark.filterwarnings("ignore:NONE after fine-tuning.* cost too much accuracy"),
    pytest.mark.filterwarnings("ignore:D-BR ends with a model"),
]


def right(hits: dict[int, int], size: int) -> tuple[Tensor, Tensor]:
    """Samples that get their label, so many of each, and the labels."""
    correct = torch.cat([torch.arange(size) < count for count in hits.values()])
    return correct, torch.tensor([*hits]).repeat_interleave(size)


def test_one_class_of_forty_that_is_lost_is_seen() -> None:
    """All images together lose 2.5 points, half of what they may."""
    before, labels = right(dict.fromkeys(range(40), 100), 100)
    after, _ = right({**dict.fromkeys(range(40), 100), 17: 0}, 100)
    assert harmed_class(before, after, labels) == (17, 1.0, 0.0)
    assert harmed_class(before, before, labels) is None
    assert harmed_class(after, before, labels) is None, "a gain is no harm"


@pytest.mark.parametrize(("size", "most"), [(20, 6), (100, 19), (1000, 128)])
def test_it_may_lose_ten_points_and_three_standard_errors(size: int, most: int) -> None:
    before, labels = right({0: size, 1: size}, size)
    assert harmed_class(before, right({0: size, 1: size - most}, size)[0], labels) is None
    assert harmed_class(before, right({0: size, 1: size - most - 1}, size)[0], labels) is not None


def test_of_a_few_samples_nothing_is_said() -> None:
    before, labels = right({0: 19, 1: 19}, 19)
    assert harmed_class(before, ~before, labels) is None
    assert harmed_class(before[:0], before[:0], labels[:0]) is None
    assert harmed_class(before, ~before, torch.full_like(labels, -1)) is None


def test_chance_harms_no_class() -> None:
    """Clean twin: 2,000 classes of 20 to 500 samples, each of which loses five points at random."""
    generator = torch.Generator().manual_seed(0)
    for size in (20, 50, 500):
        labels = torch.arange(2000).repeat_interleave(size)
        before = torch.rand(len(labels), generator=generator) < 0.9
        after = before & (torch.rand(len(labels), generator=generator) > 0.05)
        assert harmed_class(before, after, labels) is None


def test_the_class_that_is_treated_is_named_first() -> None:
    before, labels = right(dict.fromkeys(range(4), 100), 100)
    after, _ = right({0: 100, 1: 0, 2: 60, 3: 50}, 100)
    assert harmed_class(before, after, labels) == (1, 1.0, 0.0)
    assert harmed_class(before, after, labels, [2, 3]) == (3, 1.0, 0.5)
    assert harmed_class(before, after, labels, [0]) == (1, 1.0, 0.0)


def test_some_samples_of_every_label_are_drawn() -> None:
    labels = torch.tensor([0, 1, 1, 1, 1, 3, 3, 3]).repeat(20)
    mask = torch.arange(len(labels)) % 2 == 1
    drawn = drawn_by_label(mask, labels, 15, torch.Generator().manual_seed(0))
    assert not bool((drawn & ~mask).any())
    assert torch.bincount(labels[drawn]).tolist() == [0, 15, 0, 15]
    assert not bool(drawn_by_label(mask & False, labels, 15, torch.Generator()).any())


def test_every_class_is_watched_beside_a_large_one() -> None:
    labels = torch.cat([torch.zeros(5000).long(), torch.arange(1, 40).repeat_interleave(60)])
    suspect = torch.arange(len(labels)) % 7 == 0
    trusted = ~suspect & (labels > 30)  # all of some classes
    scores = torch.zeros(len(labels))
    split = split_of(Verdict(scores, ~suspect, 0.5, "known", labels, trusted=trusted, suspect=suspect), 0)
    assert torch.bincount(labels[split.by_class]).min() >= 50
    assert torch.bincount(labels[split.by_class]).max() == 100
    assert not bool((split.by_class & suspect).any())
    assert int(split.watched.sum()) == 1024, "as before"


def treated(callback: Any, patched: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """One treatment whose overall accuracy is not looked at."""
    for name, value in {"reset_units.MAX_LOSS": 2.0, "unlearn.MAX_LOSS": 2.0, **patched}.items():
        monkeypatch.setattr(f"lightning_backdoor.responses.{name}", value)
    _, module = fit([callback])
    return callback.history[0], module


@pytest.mark.parametrize("make", [dbr, lambda **more: none(rounds=1, fallback=None, **more)], ids=["D-BR", "NONE"])
def test_what_costs_a_class_too_much_is_undone_and_said(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event, _ = treated(make(), {"harm.CLASS_LOSS": 1.0, "harm.LEAST": 1}, monkeypatch)
    assert not any(event.undone_steps)
    assert event.harmed is None
    _, undefended = fit([])
    event, module = treated(make(report_dir=tmp_path), {"harm.CLASS_LOSS": -2.0, "harm.LEAST": 1}, monkeypatch)
    assert all(event.undone_steps)
    assert same_state(undefended, module)
    label, before, after = event.harmed
    told = f"cost too much accuracy (label {label}: {before:.1%} -> {after:.1%} of its images given it)"
    assert told in sentence([event], 64)
    assert "cost too much accuracy (label" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("defense", [DBRCallback, NONECallback])
def test_the_authors_loops_have_no_such_bound(defense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"epochs": 1, "extra_epochs": 1} if defense is DBRCallback else {"finetune_epochs": 1, "extra_epochs": 1}
    few |= {"detector_steps": 2} if defense is DBRCallback else {}
    callback = defense.from_paper(**few)
    event, _ = treated(callback, {"harm.CLASS_LOSS": -2.0, "harm.LEAST": 1}, monkeypatch)
    assert event.undone_steps == (False,)
    assert event.harmed is None


def test_kept_and_removed_images_of_the_labels_in_question() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 3])
    keep = torch.tensor([True, True, True, True, True, False, False, False, True, False])
    verdict = Verdict((~keep).float(), keep, 0.5, "known", labels)
    correct = torch.tensor([True, True, False, True, False, True, False, False, True, True])
    session: Any = SimpleNamespace(verdict=verdict, in_training=None)
    assert Session.rates_of_labels(session, correct) == ((1, 0.5, 0.5), (2, 1.0, 0.0)), "none of label 3 is left"
    session.in_training = keep & (labels != 2)  # another defense has taken the rest
    assert Session.rates_of_labels(session, correct) == ((1, 0.5, 0.5),)


@pytest.mark.parametrize("response", ["reset", "fallback", "unlearn"])
def test_what_the_model_makes_of_them_at_the_end_stands_beside_the_accuracy_of_their_label(response: str) -> None:
    event = Event(
        9, 0, 4, response=response, accuracies=(0.9,), flagged_label_rates=(0.03,), of_labels=((7, 0.8, 0.03),)
    )
    event = replace(event, suspects=4, at_end=(0.9, 0.03)) if response == "unlearn" else replace(event, rechecked=4)
    assert "Label 7: 80.0% of its kept images get it, 3.0% of its removed ones." in sentence([event], 64)
