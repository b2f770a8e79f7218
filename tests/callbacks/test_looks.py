"""What several scans of one run found, in words that stay true."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_backdoor.callbacks.looks import Look, sentence

from lightning_backdoor import UltraCleanCallback
from lightning_backdoor.detection.decision import Decision, add_removed
from lightning_backdoor.detection.subpopulations import Subpopulation
from tests.callbacks.helpers import LIGHTNING_WARNS, fit

pytestmark = LIGHTNING_WARNS

FOUND = Look(epochs=2, run=1, removed=8, num_flagged_before_cap=9, rewinds=True, modes=((1, 3.25),))
MORE = Look(epochs=4, run=2, removed=1_000, num_flagged_before_cap=1_008, rewinds=False, modes=((3, 2.6),))
QUIET = Look(epochs=5, run=2, removed=0, num_flagged_before_cap=8, rewinds=False, modes=())


@pytest.mark.parametrize(
    ("looks", "words"),
    [
        ([QUIET], "looked at 2,000 training images: 0 removed."),
        ([QUIET, QUIET], "looked at 2,000 training images: 0 removed."),
        ([FOUND], "looked at 2,000 training images: 8 removed; training starts again on the rest."),
        ([FOUND, QUIET], "looked again at 2,000 training images: nothing new was found; 8 stay removed."),
        ([FOUND, MORE], "looked again at 2,000 training images: 1,000 more removed, 1,008 in all."),
    ],
)
def test_the_sentence_is_about_the_latest_look(looks: list[Look], words: str) -> None:
    assert sentence(looks, 2000) == words


def test_a_look_survives_a_checkpoint(tmp_path: Path) -> None:
    torch.save(FOUND.state_dict(), tmp_path / "look")
    assert Look(**torch.load(tmp_path / "look", weights_only=True)) == FOUND


class Once(UltraCleanCallback):
    """Finds a second mode at the first look and nothing at any later one."""

    def _decide(self, found: Any) -> Decision:
        scores, keep = torch.linspace(0, 0.4, 64), torch.ones(64, dtype=torch.bool)
        if self.verdict is None:
            scores[:8], keep[:8] = 0.9, False
            mode = Subpopulation(1, torch.tensor([0]), torch.ones(1), 0.0, -1.0, 1.0, 3.25, 99.0, 8)
            return Decision(scores, keep, 0.5, "subpopulation(none)", (mode,), 8)
        quiet = Decision(scores, keep, float("inf"), "subpopulation(none)", (), 0)
        return add_removed(quiet, self.verdict.scores, self.verdict.keep, threshold=0.5, max_removed=0.3)


def test_a_quiet_last_look_leaves_what_was_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = Once(warmup_epochs=2, report_dir=tmp_path)
    with caplog.at_level(logging.INFO):
        trainer, _ = fit([callback], epochs=3)
    said = [record.getMessage() for record in caplog.records if "UltraClean" in record.getMessage()]
    assert said == [
        "UltraClean looked at 64 training images: 8 removed; training starts again on the rest.",
        "UltraClean looked again at 64 training images: nothing new was found; 8 stay removed.",
    ]
    assert trainer.callback_metrics["backdoor/ultraclean/separation"] == 3.25
    assert trainer.callback_metrics["backdoor/ultraclean/removed"] == 8
    page = (tmp_path / "report.html").read_text()
    assert "1 (separation 3.2, found after epoch 2)" in page
    assert "epoch 2, epoch 3 of run 2" in page
    assert "8 of 64 training images were removed" in page
    assert "started again from its first weights" in page


@pytest.mark.parametrize("score", ["auto", "paper"])
def test_modes_are_facts_where_they_were_looked_for(tmp_path: Path, score: Any) -> None:
    fit([UltraCleanCallback(warmup_epochs=1, report_dir=tmp_path, score=score, rule="fraction")], epochs=1)
    assert ("classes with a subpopulation" in (tmp_path / "report.html").read_text()) == (score == "auto")


def test_a_quiet_look_at_a_model_that_has_learned_little_says_so() -> None:
    words = "gives only 43% of the training images their label: it may not have learned a backdoor yet"
    assert words in sentence([replace(QUIET, accuracy=0.43)], 100)
    assert sentence([replace(QUIET, accuracy=0.5)], 100) == sentence([QUIET], 100)
    assert words not in sentence([replace(FOUND, accuracy=0.43)], 100)
