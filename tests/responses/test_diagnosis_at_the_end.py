"""A reset leaves the diagnosis to the end of training, where a copy of the model is seldom needed for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_backdoor import Finding, Verdict
from lightning_backdoor.detection.diagnosis import diagnose
from lightning_backdoor.responses import (
    Detection,
    ResetUnits,
    Response,
    Restart,
    Session,
    WithFallback,
    explaining,
    reset_units,
)
from tests.callbacks.helpers import LIGHTNING_WARNS, Net, fit, loader_of, make_trainer, same_state
from tests.responses.helpers import Scripted, Scripts, pictures

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


class Once(ResetUnits):
    """No detection follows one that led to nothing."""

    repeats = False


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
    callback = Scripts(members, WithFallback(Once()))
    callback._procedure.most_of_label = 0.3
    fit([callback], epochs=4, dataset=data)
    assert callback.verdict.findings[0].diagnosis == "right labels"
    assert copies == [30], "after three epochs, and never again"
    assert not len(callback.verdict.removed)


@pytest.mark.filterwarnings("ignore:Scripts keeps 20 of the 40 images with label 0")
def test_a_copy_that_fails_at_once_is_not_tried_again_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def fail(trainer: pl.Trainer, *args: Any, **options: Any) -> Any:
        tried.append(trainer.global_step)
        raise RuntimeError("no memory")

    monkeypatch.setattr(explaining, "trained_without", fail)
    data, members = pictures(wrong=False)
    callback = Scripts(members, Once())
    callback._procedure.most_of_label = 0.3
    with pytest.warns(UserWarning, match="No copy of the model could be trained") as warned:
        fit([callback], epochs=4, dataset=data)
    assert tried == [30]
    assert sum("No copy" in str(one.message) for one in warned) == 1


def test_a_fit_that_somebody_stops_says_it_last(caplog: pytest.LogCaptureFixture) -> None:
    """A stop that comes after the defense's last hook of an epoch."""

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = trainer.should_stop or trainer.current_epoch == 4

    finding, _ = run(ResetUnits(finetune_epochs=1, rounds=1), Stop(), wrong=True, epochs=8)
    assert finding.diagnosis == "wrong labels"
    found, treated, ended = (record.getMessage() for record in caplog.records if "Scripts" in record.getMessage())
    assert NOT_YET in found
    assert "after fine-tuning" in treated
    assert ended.startswith("Scripts: 20 images labeled")
    assert "Their labels look wrong" in ended


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


class Groups(Scripted):
    """Finds several groups, of which some stay in training."""

    def __init__(self, *groups: Tensor, kept: int = 0) -> None:
        super().__init__(torch.cat(groups[: len(groups) - kept]))
        self.groups = groups

    def detect(self, session: Session) -> Detection:
        found = super().detect(session)
        (one,) = found.verdict.findings
        findings = tuple(replace(one, positions=group) for group in self.groups)
        return replace(found, verdict=replace(found.verdict, findings=findings))


def with_groups(response: Response, *groups: Tensor, kept: int = 0) -> Scripts:
    callback = Scripts(groups[0], response)
    callback._procedure.detector = Groups(*groups, kept=kept)
    return callback


def test_a_copy_leaves_alone_what_the_repaired_model_has_said(
    copies: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, members = pictures(wrong=True)
    original = explaining._by_answers

    def first(*args: Any, **options: Any) -> list[Finding]:
        found = original(*args, **options)
        return found if copies else [found[0], replace(found[1], diagnosis="unclear")]

    monkeypatch.setattr(explaining, "_by_answers", first)
    told: list[Finding] = []
    by_repaired = explaining.diagnosed_by_repaired

    def note(*args: Any, **options: Any) -> Verdict:
        verdict = by_repaired(*args, **options)
        told.extend(verdict.findings)
        return verdict

    monkeypatch.setattr("lightning_backdoor.callbacks.base.diagnosed_by_repaired", note)
    callback = with_groups(ResetUnits(), members[:10], members[10:])
    fit([callback], epochs=4, dataset=data)
    one, other = callback.verdict.findings
    assert one is told[0]
    assert [found.reference_model for found in (one, other)] == ["repaired", "unseen"]
    assert other.suggested_labels is not None
    assert len(copies) == 1


def test_a_later_model_without_the_images_takes_the_place_of_the_repaired_one() -> None:
    labels = torch.arange(40) % 2
    finding = Finding(0, torch.arange(5), "scripted", (), torch.tensor([0]), torch.tensor([1.0]), 0.0)
    unseen, ordinary = torch.arange(40) < 5, torch.arange(40) >= 5
    said = diagnose(
        replace(finding, reference_model="repaired"), labels, labels, torch.ones(40), unseen=unseen, ordinary=ordinary
    )
    assert said.reference_model == "unseen"


def test_the_next_fit_promises_nothing_of_the_one_before() -> None:
    """The first one ends by an error, so that nothing was said."""

    class Break(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 3:
                raise RuntimeError("broken")

    data, members = pictures(wrong=True)
    callback = Scripts(members, ResetUnits())
    with pytest.raises(RuntimeError, match="broken"):
        fit([callback, Break()], epochs=6, dataset=data)
    callback.warmup_epochs = 5

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = True

    fit([callback, Stop()], epochs=6, dataset=data)
    assert not callback.history


@pytest.mark.filterwarnings("ignore:Scripts looked at 160 training images.*no unit reset")
@pytest.mark.parametrize("case", ["no epoch is left", "the round was undone"])
def test_without_a_repair_no_repaired_model_says_it(
    case: str, copies: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Tensor] = []
    original = explaining.diagnosed_by_repaired

    def note(*args: Any, left_out: Tensor, **options: Any) -> Verdict:
        asked.append(left_out)
        return original(*args, left_out=left_out, **options)

    monkeypatch.setattr("lightning_backdoor.callbacks.base.diagnosed_by_repaired", note)
    undone = case == "the round was undone"
    if undone:
        monkeypatch.setattr("lightning_backdoor.responses.reset_units.MAX_LOSS", -1.0)
    finding, callback = run(ResetUnits(rounds=1), wrong=True, epochs=4 if undone else 3)
    assert any(event.undone if undone else event.no_room for event in callback.history)
    assert (finding.diagnosis, finding.reference_model) == ("wrong labels", "unseen")
    assert not asked
    assert len(copies) == 1


@pytest.mark.filterwarnings("ignore:Scripts looked at 160 training images.*no unit reset")
def test_the_repaired_model_says_nothing_of_images_that_it_was_fine_tuned_with(
    copies: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The detection after the last round finds further ones, which drive no unit that can be reset."""
    data, members = pictures(wrong=True)
    callback = with_groups(ResetUnits(rounds=2, finetune_epochs=1), members[:10])
    choose = reset_units.choose_units

    def once(*args: Any, **options: Any) -> list[reset_units.Chosen]:
        if callback.history[1:]:
            return []
        callback._procedure.detector = Groups(members[:10], members[10:])
        return choose(*args, **options)

    monkeypatch.setattr(reset_units, "choose_units", once)
    fit([callback], epochs=5, dataset=data)
    first, last = callback.verdict.findings
    assert (first.reference_model, last.reference_model) == ("repaired", "unseen")
    assert last.diagnosis == "wrong labels"
    assert len(copies) == 1


def test_another_defense_that_trains_anew_makes_the_model_one_that_never_saw_them(copies: list[int]) -> None:
    data, members = pictures(wrong=True)
    callback, other = Scripts(members, ResetUnits()), Scripts(members, Restart(last_detection=False))
    other.name = "other"
    fit([callback, other], epochs=4, dataset=data)
    (finding,) = callback.verdict.findings
    assert (finding.diagnosis, finding.reference_model) == ("wrong labels", "unseen")
    assert not copies


def test_after_a_restart_a_copy_says_it_of_what_stayed_in_training(
    copies: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Any] = []
    trained = explaining.trained_without

    def note(*args: Any, initial: Any, **options: Any) -> Any:
        starts.append(initial)
        return trained(*args, initial=initial, **options)

    monkeypatch.setattr(explaining, "trained_without", note)
    data, members = pictures(wrong=False)
    others = (data.targets == 1).nonzero().squeeze(1)[:10]
    data.targets[others] = 0
    callback = with_groups(WithFallback(ResetUnits()), members, others, kept=1)
    fit([callback], epochs=4, dataset=data)
    assert [event.response for event in callback.history] == ["reset", "fallback", "fallback"]
    removed, kept = callback.verdict.findings
    assert removed.diagnosis == "right labels"
    assert kept.suggested_labels is not None
    assert len(copies) == 1
    first = Net().state_dict()
    assert starts[0].keys() == first.keys(), "from the weights at the start"


def test_weights_at_the_start_are_kept_until_it_is_known(copies: list[int]) -> None:
    """Whether or not another detection may follow."""

    kept: list[bool] = []

    class Look(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if callback.verdict is not None:
                kept.extend(state["start"] is not None for state in [callback.state_dict()])

    data, members = pictures(wrong=False)
    callback = Scripts(members, Once())
    fit([callback, Look()], epochs=4, dataset=data)
    assert kept == [True]
    assert callback.state_dict()["start"] is None
    assert copies == [ALL_STEPS]


@pytest.mark.filterwarnings("ignore:Scripts looked at 160 training images.*no unit reset")
def test_a_repair_that_no_restart_can_follow_any_more_is_not_called_replaceable() -> None:
    """Another defense begins anew after the only restart of the fallback."""
    data, members = pictures(wrong=False)
    response = WithFallback(ResetUnits())
    callback = Scripts(members, response)

    class Other(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1 and response._restart.count:
                response.on_other_restart(callback._procedure.session)

    fit([callback, Other()], epochs=4, dataset=data)
    assert not response.repair.replaceable
