"""A class whose images all carry a signal: a warning, and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_backdoor import UltraCleanCallback, attacks, audit
from lightning_backdoor.responses import Detection, Report, ResetUnits, Response, Session, Unlearn, WithFallback
from tests.callbacks.helpers import LIGHTNING_WARNS, DigitNet, digits, fit, same_state, share_right, train_digits
from tests.responses.helpers import Scripted, Scripts, pictures

pytestmark = LIGHTNING_WARNS
LABEL = 3
WARNS = "may carry a signal in all images"


@functools.cache
def signaled() -> Any:
    """Digits, all of one class with a sinusoid."""
    return attacks.poison(digits()[0], attacks.SIG(), target=LABEL, rate=1.0, rate_of="target_class", labels="clean")


@functools.cache
def victim() -> DigitNet:
    return train_digits(signaled(), [])[1]


def test_a_signal_in_all_images_of_a_class_is_a_warning_and_changes_nothing(tmp_path: Path) -> None:
    assert share_right(victim(), attacks.triggered(digits()[1], attacks.SIG(), target=LABEL)) > 0.6, "the attack works"

    callback = UltraCleanCallback(report_dir=tmp_path)
    with pytest.warns(UserWarning, match=f"UltraClean warns: “class {LABEL}” {WARNS}") as said:
        _, module = train_digits(signaled(), [callback])

    assert same_state(module, victim())
    assert bool(callback.verdict.keep.all())
    assert {found[0] for event in callback.history for found in event.whole_classes} == {LABEL}
    label, rate, others, chance = callback.history[-1].whole_classes[0]
    assert label == LABEL
    assert rate > others + 0.3
    assert chance < 0.01
    assert sum(WARNS in str(warning.message) for warning in said) == 1, "once, and not at every scan"
    page = (tmp_path / "report.html").read_text()
    assert "a class may carry a signal in all of its images</h1>" in page
    assert f"“class {LABEL}” {WARNS}" in page
    assert "harmless mark or texture" in page


def test_images_that_the_user_has_approved_are_not_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    labels = torch.as_tensor(signaled().targets)
    approved = (labels == LABEL).nonzero().squeeze(1)
    audit(victim(), signaled(), detectors="features", approved=approved, progress=False)
    assert not [warning for warning in recwarn if WARNS in str(warning.message)]
    with pytest.warns(UserWarning, match=f"The audit warns: “class {LABEL}” {WARNS}"):
        audit(victim(), signaled(), detectors="features", progress=False)


def test_an_audit_with_its_own_choice_of_detectors_warns() -> None:
    """The signal is measured by one of them."""
    with pytest.warns(UserWarning, match=f"The audit warns: “class {LABEL}” {WARNS}"):
        audit(victim(), signaled(), diagnose=False, progress=False)


class Signaled(Scripted):
    """Finds the same group, and a signal in all images of a class."""

    def detect(self, session: Session) -> Detection:
        return replace(super().detect(session), whole_classes=((2, 0.9, 0.1, 0.001),))


@pytest.mark.filterwarnings("ignore:.* ends with a model")
@pytest.mark.parametrize(
    "response",
    [Report, lambda: ResetUnits(finetune_epochs=1), lambda: Unlearn(epochs=1), lambda: WithFallback(Unlearn(epochs=1))],
    ids=["report", "reset", "unlearn", "fallback"],
)
def test_a_class_is_warned_of_once_whatever_is_done(
    response: Callable[[], Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_backdoor.responses.explaining.PROBE_STEPS", 60)
    data, members = pictures(wrong=False)
    callback = Scripts(members, response())
    callback._procedure.detector = Signaled(members)
    with pytest.warns(UserWarning, match=f"Scripts warns: “class 2” {WARNS}") as said:
        fit([callback], epochs=5, dataset=data)
    assert sum(WARNS in str(warning.message) for warning in said) == 1


@pytest.mark.parametrize("classes", [10, {"cat": 0}], ids=["count", "dict"])
def test_a_dataset_whose_classes_are_no_names_is_trained_on(
    classes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_backdoor.responses.explaining.PROBE_STEPS", 5)
    data, members = pictures(wrong=False)
    data.classes = classes
    callback = Scripts(members, Report())
    callback.report_dir = str(tmp_path)
    callback._procedure.detector = Signaled(members)
    with pytest.warns(UserWarning, match=f"Scripts warns: “class 2” {WARNS}") as said:
        trainer, _ = fit([callback], epochs=4, dataset=data)
    assert trainer.current_epoch == 4
    assert not [warning for warning in said if "is incomplete" in str(warning.message)]
    assert (tmp_path / "report.html").exists()


def test_a_report_that_cannot_be_prepared_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("no evidence")

    monkeypatch.setattr("lightning_backdoor.callbacks.reporting.evidence", fails)
    monkeypatch.setattr("lightning_backdoor.responses.explaining.PROBE_STEPS", 5)
    data, members = pictures(wrong=False)
    callback = Scripts(members, Report())
    callback.report_dir = str(tmp_path)
    with pytest.warns(UserWarning, match=r"report in .* is incomplete: KeyError: 'no evidence'"):
        trainer, _ = fit([callback], epochs=4, dataset=data)
    assert trainer.current_epoch == 4


def test_a_class_in_a_color_of_its_own_is_quiet() -> None:
    """Gentle denoising takes no color out of an image."""
    images, labels = digits()[0].tensors
    tinted = images.clone()
    own = labels == LABEL
    color = torch.tensor([1.0, 0.7, 0.5])[:, None, None]
    tinted[own] = (tinted[own] * color).to(torch.uint8)
    callback = UltraCleanCallback(response="report", warmup_epochs=6)
    train_digits(TensorDataset(tinted, labels), [callback])
    assert callback.history
    assert not any(event.whole_classes for event in callback.history)
