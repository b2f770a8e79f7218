"""Events in words: one sentence for the console, a last one at the end of a fit, and facts of the report."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_backdoor import Finding, UltraCleanCallback, Verdict
from lightning_backdoor.callbacks.ultraclean import DenoisedFeatures
from lightning_backdoor.detection.decision import Decision, add_removed
from lightning_backdoor.detection.subpopulations import Subpopulation
from lightning_backdoor.events import Event, own_label
from lightning_backdoor.report.of_events import evidence, last_word, nothing_learned, reset_units, sentence
from tests.callbacks.helpers import LIGHTNING_WARNS, Net, Pictures, fit, loader_of, make_trainer

pytestmark = LIGHTNING_WARNS

FOUND = Event(2, 8, 9, ((1, 3.25),), response="restart", restarts=True)
MORE = Event(4, 1_000, 1_008, ((3, 2.6),), response="restart", run=2)
QUIET = Event(5, 0, 8, response="restart", run=2)
ROUND = Event(
    3,
    70,
    70,
    response="reset",
    units=(("body.0", 1, 0, 2.0),),
    accuracies=(0.99, 0.98),
    flagged_label_rates=(1.0, 0.0),
    undone_steps=(False,),
)
NOTHING = Event(3, 0, 0, response="reset", accuracies=(0.99,), flagged_label_rates=(None,))


def test_sentences_say_what_came_of_a_round() -> None:
    assert sentence([ROUND], 100).endswith("of removed images given their label 100.0% -> 0.0%.")
    assert sentence([replace(ROUND, flagged_label_rates=(1.0, 0.4))], 100).endswith(
        "40.0%; part of the backdoor may still be there."
    )
    doubtful = sentence([replace(ROUND, flagged_label_rates=(1.0, 0.95))], 100)
    assert "95.0%; the backdoor may still be there, or these may be clean images of one kind" in doubtful
    undone = replace(ROUND, undone_steps=(True,))
    assert "the backdoor may still be there" in sentence([undone], 100)
    back = sentence([replace(undone, reassigned=True)], 100)
    assert "without having seen them, so all of this was undone" in back
    assert "backdoor" not in back


@pytest.mark.parametrize(("accuracy", "rate", "own"), [(0.62, 0.878, True), (0.62, 0.5, False), (0.98, 0.878, False)])
def test_how_often_images_get_their_label_is_compared_with_the_accuracy(
    accuracy: float, rate: float, own: bool
) -> None:
    event = replace(ROUND, accuracies=(accuracy, accuracy), flagged_label_rates=(1.0, rate))
    assert own_label(event) == own
    assert ("have true labels" in sentence([event], 100)) == own


@pytest.mark.parametrize(("accuracy", "told"), [(0.26, True), (0.4, False)])
def test_a_model_that_has_learned_nothing_has_no_verdict(accuracy: float, told: bool) -> None:
    verdict = Verdict(torch.zeros(100), torch.ones(100, dtype=torch.bool), 1.0, "rule", torch.arange(100) % 4)
    event = Event(3, 0, 0, accuracies=(accuracy,))
    assert ("has learned nothing" in nothing_learned(event, verdict)) == told
    assert nothing_learned(replace(event, removed=1), verdict) == ""


def test_a_rate_at_which_nothing_is_learned_is_told() -> None:
    torch.manual_seed(0)
    module = Net(lr=1e4)
    trainer = make_trainer([UltraCleanCallback(warmup_epochs=2)], 2)
    with pytest.warns(UserWarning, match="UltraClean has no verdict on these data: the model has learned nothing"):
        trainer.fit(module, loader_of(Pictures()))


def test_sentences_say_what_a_scan_found_where_no_unit_is_reset() -> None:
    removed = replace(ROUND, units=(), accuracies=(0.99,), flagged_label_rates=(1.0,), undone_steps=())
    assert "no unit that they drive can be reset: the backdoor may still be there" in sentence([removed], 100)
    little = "The model gives only 43% of the training images their label"
    assert little not in sentence([NOTHING], 100)
    assert little in sentence([replace(NOTHING, accuracies=(0.43,))], 100)
    assert little not in sentence([replace(removed, accuracies=(0.43,))], 100)
    assert sentence([NOTHING], 100).endswith("0 removed, no unit reset.")
    found = replace(NOTHING, flagged_label_rates=(0.885,))
    assert "removed before 88.5% are given their label; part of the backdoor may still be there." in sentence(
        [found], 9
    )
    assert "no epoch is left for fine-tuning" in sentence([replace(found, removed=70, no_room=True)], 100)
    ended = sentence([ROUND, replace(NOTHING, flagged_label_rates=(0.2,), rechecked=70)], 100)
    assert ended.startswith("at the end of training: accuracy on training images 99.0%; of 70 removed images 20.0%")
    assert ended.endswith("part of the backdoor may still be there.")


def test_the_last_word_is_about_the_weights_that_are_left() -> None:
    verdict = Verdict(torch.zeros(100), torch.arange(100) >= 70, 0.5, "given")
    told = last_word(replace(ROUND, flagged_label_rates=(1.0, 0.4)), verdict)
    assert told.startswith("ends with a model that gives 40.0% of the 70 removed images their label; part of")
    assert last_word(ROUND, verdict) == ""
    assert last_word(replace(ROUND, undone_steps=(True,)), verdict) == "", "that was said of the round"
    assert last_word(replace(NOTHING, flagged_label_rates=(0.9,), no_room=True), verdict) == ""
    assert "gives 90.0% of" in last_word(replace(NOTHING, flagged_label_rates=(0.9,)), verdict)


def diagnosed_as(*diagnoses: str) -> Verdict:
    """Seventy removed samples, in a finding for each diagnosis."""
    parts = torch.arange(70).tensor_split(max(len(diagnoses), 1))
    rule: Any = ("strict", (), torch.arange(1), torch.ones(1), 0.5)
    found = [
        Finding(0, part, *rule, diagnosis=one)  # type: ignore[arg-type]
        for part, one in zip(parts, diagnoses, strict=False)
    ]
    labels = torch.zeros(100).long()
    return Verdict(torch.zeros(100), torch.arange(100) >= 70, 0.5, "given", labels, findings=tuple(found))


@pytest.mark.parametrize("rate", [0.12, 0.97])
@pytest.mark.parametrize(
    ("diagnoses", "said", "unsaid"),
    [
        (["wrong labels"], "other images with the same trigger may be left", "may be right"),
        (["wrong labels", "wrong labels"], "other images with the same trigger may be left", "may be right"),
        (["right labels"], "their labels look right", "other images"),
        (["wrong labels", "right labels"], "of some their labels look right", "other images"),
    ],
)
def test_after_a_second_training_the_last_word_follows_the_diagnosis(
    diagnoses: list[str], said: str, unsaid: str, rate: float
) -> None:
    event = Event(5, 0, 70, response="fallback", rechecked=70, accuracies=(0.98,), flagged_label_rates=(rate,))
    told = last_word(event, diagnosed_as(*diagnoses))
    assert told.startswith(f"ends with a model that gives {rate:.1%} of the 70 removed images their label, though")
    assert said in told
    assert unsaid not in told


@pytest.mark.parametrize("diagnoses", [[], ["unclear"], ["wrong labels", "unclear"]])
def test_labels_of_unknown_kind_may_be_right_where_the_model_gives_them_as_often_as_others(
    diagnoses: list[str],
) -> None:
    event = Event(5, 0, 70, response="fallback", rechecked=70, accuracies=(0.98,), flagged_label_rates=(0.97,))
    assert "their labels may be right" in last_word(event, diagnosed_as(*diagnoses))
    told = last_word(replace(event, flagged_label_rates=(0.12,)), diagnosed_as(*diagnoses))
    assert "may be right" not in told
    assert "part of the backdoor may still be there" in told


def test_wrong_labels_are_not_called_clean_images_after_a_repair() -> None:
    event, wrong = replace(ROUND, flagged_label_rates=(1.0, 0.97)), diagnosed_as("wrong labels")
    for told in (last_word(event, wrong), sentence([event], 100, verdict=wrong)):
        assert "; the backdoor may still be there." in told
        assert "clean images" not in told
    for verdict in (diagnosed_as("unclear"), diagnosed_as("right labels"), diagnosed_as()):
        for told in (last_word(event, verdict), sentence([event], 100, verdict=verdict)):
            assert "or these may be clean images of one kind" in told


@pytest.mark.parametrize("diagnosis", ["wrong labels", "unclear", "right labels"])
def test_the_page_says_of_a_round_what_the_console_says(diagnosis: str) -> None:
    event, verdict = replace(ROUND, flagged_label_rates=(1.0, 0.97)), diagnosed_as(diagnosis)
    page = evidence(
        [event],
        verdict,
        images=lambda _: torch.zeros(0),
        denoised=None,
        read_with="no transform",
        classes=None,
        meaning="",
        by_subpopulations=False,
        seconds=0.0,
        max_removed=0.3,
    )
    console = sentence([event], len(verdict), verdict=verdict)
    assert page.facts["round 1"] == console.rstrip(".")
    assert ("clean images of one kind" in console) == (diagnosis != "wrong labels")


def test_a_unit_that_is_reset_again_counts_once() -> None:
    first, second = (("body.0", 1, 0, 2.0), ("body.0", 2, 0, 1.0)), (("body.0", 2, 0, 3.0), ("body.4", 2, 0, 1.0))
    rounds = [replace(ROUND, units=units) for units in (first, second)]
    assert reset_units(rounds) == {("body.0", 1), ("body.0", 2), ("body.4", 2)}


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ([QUIET], "looked at 2,000 training images: 0 removed."),
        ([QUIET, QUIET], "looked at 2,000 training images: 0 removed."),
        ([FOUND], "looked at 2,000 training images: 8 removed; training starts again on the rest."),
        ([FOUND, QUIET], "looked again at 2,000 training images: nothing new was found; 8 stay removed."),
        ([FOUND, MORE], "looked again at 2,000 training images: 1,000 more removed, 1,008 in all."),
        (
            [replace(FOUND, response="report", restarts=False)],
            'looked at 2,000 training images: 8 stand out; response="report" changes nothing.',
        ),
    ],
)
def test_the_sentence_of_a_filter_is_about_the_latest_scan(history: list[Event], words: str) -> None:
    assert sentence(history, 2000) == words


@pytest.mark.parametrize("event", [FOUND, ROUND])
def test_an_event_survives_a_checkpoint(event: Event, tmp_path: Path) -> None:
    torch.save(event.state_dict(), tmp_path / "event")
    assert Event(**torch.load(tmp_path / "event", weights_only=True)) == event


class Once(DenoisedFeatures):
    """Finds a subpopulation in the first scan and nothing in any later one."""

    def decide(self, found: Any, old: Verdict | None) -> Decision:
        scores, keep = torch.linspace(0, 0.4, 64), torch.ones(64, dtype=torch.bool)
        if old is None:
            scores[:8], keep[:8] = 0.9, False
            one = Subpopulation(1, torch.tensor([0]), torch.ones(1), 0.0, -1.0, 1.0, 3.25, 99.0, 8)
            return Decision(scores, keep, 0.5, "subpopulation(none)", (one,), 8)
        quiet = Decision(scores, keep, float("inf"), "subpopulation(none)", (), 0)
        return add_removed(quiet, old.scores, old.keep, threshold=0.5, max_removed=0.3)


def test_a_quiet_last_scan_leaves_what_was_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = UltraCleanCallback(warmup_epochs=2, report_dir=tmp_path)
    callback._procedure.detector = Once()
    with caplog.at_level(logging.INFO):
        trainer, _ = fit([callback], epochs=3)
    said = [record.getMessage() for record in caplog.records if "UltraClean" in record.getMessage()]
    of_labels = "; ".join(
        f"label {label}: {kept:.1%} of its kept images get it, {removed:.1%} of its removed ones"
        for label, kept, removed in callback.history[-1].of_labels
    )
    assert of_labels, "the model was trained without them"
    assert said == [
        "UltraClean looked at 64 training images: 8 removed; training starts again on the rest.",
        "UltraClean looked again at 64 training images: nothing new was found; 8 stay removed. L" + of_labels[1:] + ".",
    ]
    assert trainer.callback_metrics["backdoor/ultraclean/separation"] == 3.25
    assert trainer.callback_metrics["backdoor/ultraclean/removed"] == 8
    page = (tmp_path / "report.html").read_text()
    assert "1 (separation 3.2, found after epoch 2)" in page
    assert "epoch 2, epoch 3 of run 2" in page
    assert "8 of 64 training images were removed" in page
    assert "started again from its first weights" in page


@pytest.mark.parametrize("score", ["auto", "paper"])
def test_subpopulations_are_facts_where_they_were_looked_for(tmp_path: Path, score: Any) -> None:
    fit([UltraCleanCallback(warmup_epochs=1, report_dir=tmp_path, score=score, rule="fraction")], epochs=1)
    assert ("classes with a subpopulation" in (tmp_path / "report.html").read_text()) == (score == "auto")


def test_a_quiet_scan_of_a_model_that_has_learned_little_says_so() -> None:
    words = "gives only 43% of the training images their label: it may not have learned a backdoor yet"
    assert words in sentence([replace(QUIET, accuracies=(0.43,))], 100)
    assert sentence([replace(QUIET, accuracies=(0.5,))], 100) == sentence([QUIET], 100)
    assert words not in sentence([replace(FOUND, accuracies=(0.43,))], 100)
