"""Events in words: one sentence for the console, and a last one at the end of a fit."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_backdoor import Verdict
from lightning_backdoor.events import Event
from lightning_backdoor.report.of_events import last_word, reset_units, sentence

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


def test_a_unit_that_is_reset_again_counts_once() -> None:
    first, second = (("body.0", 1, 0, 2.0), ("body.0", 2, 0, 1.0)), (("body.0", 2, 0, 3.0), ("body.4", 2, 0, 1.0))
    rounds = [replace(ROUND, units=units) for units in (first, second)]
    assert reset_units(rounds) == {("body.0", 1), ("body.0", 2), ("body.4", 2)}
