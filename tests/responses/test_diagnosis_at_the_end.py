"""A reset leaves the diagnosis to the end of training, where a copy of the model is seldom needed for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_backdoor import Finding
from lightning_backdoor.responses import ResetUnits, Response, WithFallback, explaining
from tests.callbacks.helpers import LIGHTNING_WARNS, Net, fit, loader_of, make_trainer, same_state
from tests.responses.helpers import Scripts, pictures

pytestmark = [*LIGHTNING_WARNS, pytest.mark.filterwarnings("ignore:.* (ends with a model|cost too much|takes most)")]
ALL_STEPS = 3 * 10 + 9  # of four epochs, the last of them without twenty images
NOT_YET = "It is not known yet whether their labels are right"


@pytest.fixture(autouse=True)
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of the fit before every training of a copy."""
    trained: list[int] = []
    original = explaining.trained_without

    def train(trainer: pl.Trainer, *args: Any, **options: Any) -> Any:
        trained.append(trainer.global_step)
        return original(trainer, *args, **options)

    monkeypatch.setattr("lightning_backdoor.responses.explaining.PROBE_STEPS", 120)
    monkeypatch.setattr("lightning_backdoor.responses.explaining.trained_without", train)
    return trained


def run(response: Response, *callbacks: pl.Callback, wrong: bool, epochs: int = 4) -> tuple[Finding, Scripts]:
    data, members = pictures(wrong=wrong)
    callback = Scripts(members, response)
    fit([callback, *callbacks], epochs=epochs, dataset=data)
    (finding,) = callback.verdict.findings
    return finding, callback


def test_a_model_that_is_trained_anew_says_it_without_a_copy(
    copies: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    finding, callback = run(WithFallback(ResetUnits()), wrong=False, epochs=4)
    assert [event.response for event in callback.history] == ["reset", "fallback", "fallback"]
    assert (finding.diagnosis, finding.reference_model) == ("right labels", "unseen")
    assert not copies
    found, treated, anew, ended = (
        record.getMessage() for record in caplog.records if "Scripts " in record.getMessage()
    )
    assert NOT_YET in found
    assert NOT_YET not in treated + anew, "it is said once"
    assert "Their labels look right: a model that never saw them gives" in ended


@pytest.mark.parametrize("response", [ResetUnits(), WithFallback(ResetUnits())], ids=["alone", "with a fallback"])
def test_a_repaired_model_that_takes_them_for_other_classes_needs_no_copy(
    response: Response, copies: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    finding, callback = run(response, wrong=True, epochs=4)
    assert callback.repaired
    assert (finding.diagnosis, finding.reference_model) == ("wrong labels", "repaired")
    assert float((finding.suggested_labels == finding.positions % 4).float().mean()) > 0.8
    assert not copies
    found, ended = (record.getMessage() for record in caplog.records if "Scripts " in record.getMessage())
    assert NOT_YET in found
    assert "The repaired model takes 20 of 20 of them for other classes" in ended


def test_right_labels_are_never_said_by_the_repaired_model(copies: list[int]) -> None:
    """It has learned them: what is left of that makes it give them their labels, be they right or wrong."""
    finding, callback = run(ResetUnits(), wrong=False)
    assert callback.repaired is False
    assert (finding.diagnosis, finding.reference_model) == ("right labels", "unseen")
    assert copies == [ALL_STEPS], "at the end"


def test_what_the_repaired_model_leaves_open_is_said_by_a_copy(
    copies: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = explaining._by_answers

    def first(*args: Any, **options: Any) -> list[Finding]:
        found = original(*args, **options)
        return found if copies else [replace(one, diagnosis="unclear") for one in found]

    monkeypatch.setattr(explaining, "_by_answers", first)
    finding, _ = run(WithFallback(ResetUnits()), wrong=True)
    assert (finding.diagnosis, finding.reference_model) == ("wrong labels", "unseen")
    assert copies == [ALL_STEPS]


@pytest.mark.filterwarnings("ignore:Scripts keeps 20 of the 40 images with label 0")
def test_whether_most_of_a_label_is_removed_is_said_at_once(copies: list[int]) -> None:
    """They are removed only if their labels are wrong, so that this cannot wait."""
    data, members = pictures(wrong=False)
    callback = Scripts(members, WithFallback(ResetUnits()))
    callback._procedure.most_of_label = 0.3
    fit([callback], epochs=4, dataset=data)
    assert callback.verdict.findings[0].diagnosis == "right labels"
    assert copies[0] == 30, "after three epochs"
    assert not len(callback.verdict.removed)


def test_a_fit_that_somebody_stops_says_it_last(caplog: pytest.LogCaptureFixture) -> None:
    """A stop that comes after the defense's last hook of an epoch."""

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = trainer.should_stop or trainer.current_epoch == 4

    finding, _ = run(ResetUnits(finetune_epochs=1, rounds=1), Stop(), wrong=True, epochs=8)
    assert finding.diagnosis == "wrong labels"
    assert "Their labels look wrong" in caplog.text


@pytest.mark.parametrize("restart", [True, False])
def test_resumed_before_it_is_known_a_run_says_the_same(restart: bool, copies: list[int], tmp_path: Path) -> None:
    data, members = pictures(wrong=False)
    path = tmp_path / "saved.ckpt"

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 2 and not path.exists():
                trainer.save_checkpoint(path)

    whole, resumed = (Scripts(members, WithFallback(ResetUnits()) if restart else ResetUnits()) for _ in range(2))
    _, module = fit([whole, Save()], epochs=4, dataset=data)
    torch.manual_seed(9)  # other weights, which are not the start
    again = Net()
    make_trainer([resumed], 4).fit(again, loader_of(data), ckpt_path=path)
    (one,), (other,) = whole.verdict.findings, resumed.verdict.findings
    assert one.diagnosis == other.diagnosis == "right labels"
    assert torch.equal(one.suggested_confidences, other.suggested_confidences)
    assert len(copies) == (0 if restart else 2)
    assert same_state(module, again)
    assert [event.response for event in whole.history] == [event.response for event in resumed.history]
