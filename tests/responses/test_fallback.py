"""A repair that fails is followed by one restart from the weights at the start of the fit; one that works by none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_backdoor import DBRCallback, NONECallback, UltraCleanCallback, Verdict
from lightning_backdoor.callbacks import Defense, Detector
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.events import Event, repaired
from lightning_backdoor.responses import Detection, ResetUnits, Response, Session, Unlearn, WithFallback
from tests.callbacks.helpers import poisoned_digits, same_state, state_of, train_digits
from tests.callbacks.test_ultraclean_resume import SaveAll
from tests.contract.problem import EPOCHS, WARNS, Run, assert_settled, fit, net_of, seed_everything

pytestmark = [*WARNS, pytest.mark.filterwarnings("ignore:.* (ends with a model|could not|looked at)")]
FLAGGED = list(range(0, 40, 4))


class Scripted(Detector):
    """Flags ten images."""

    def detect(self, session: Session) -> Detection:
        labels = session.scanner.read_labels(session.trainer, session.module)
        keep = torch.ones(len(labels), dtype=torch.bool)
        keep[FLAGGED] = False
        return Detection(Verdict((~keep).float(), keep, 0.5, "scripted", labels), len(FLAGGED))


class Repair(Response):
    """Takes one epoch, and leaves a share of the flagged images with their label."""

    name = "reset"

    def __init__(self, rate: float, *, room: bool = True) -> None:
        self.rate, self.room, self.left = rate, room, 0

    @property
    def busy(self) -> bool:  # type: ignore[override]
        return self.left > 0

    def respond(self, session: Session, detection: Detection, event: Event) -> Event:
        self.left = int(self.room)
        return replace(event, accuracies=(0.9,), flagged_label_rates=(1.0,), no_room=not self.room)

    def on_train_epoch_end(self, session: Session) -> bool:
        if not self.left:
            return False
        self.left = 0
        history = session.case.history
        history[-1] = replace(
            history[-1], accuracies=(0.9, 0.9), flagged_label_rates=(1.0, self.rate), undone_steps=(False,)
        )
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"left": self.left}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.left = state_dict["left"]


class Scripts(Defense):
    """The scripted detector before a scripted repair."""

    method = title = "Scripts"

    def __init__(self, repair: Response, warmup_epochs: int = 1, *, fallback: bool = True) -> None:
        response = WithFallback(repair) if fallback else repair
        super().__init__(detector=Scripted(), response=response, warmup_epochs=warmup_epochs, max_removed=0.5)


def begun(run: Run) -> list[int]:
    return [epoch for epoch, _ in run.module.epochs()]


@pytest.mark.parametrize("repair", [Repair(1.0), Repair(0.2), Repair(0.0, room=False)], ids=["none", "part", "no room"])
def test_a_repair_that_fails_is_followed_by_one_restart_without_the_flagged_images(repair: Repair) -> None:
    callback = Scripts(repair)
    run = fit([callback])
    first = 2 if repair.room else 1
    assert begun(run) == [*range(first), *range(EPOCHS)]
    assert [event.response for event in callback.history] == ["reset", "fallback", "fallback"]
    assert [event.restarts for event in callback.history] == [False, True, False]
    assert callback.history[-1].rechecked == len(FLAGGED)
    assert callback.repaired is not callback.history[-1].remains
    drawn = {position for _, positions in run.module.epochs()[first:] for position in positions}
    assert not drawn & set(FLAGGED)
    assert_settled(run.trainer, run.module, run.loader, run.before, epochs=EPOCHS)


def test_a_repair_that_works_is_all() -> None:
    callback = Scripts(Repair(0.05))
    assert begun(fit([callback])) == [*range(EPOCHS)]
    assert "fallback" not in {event.response for event in callback.history}
    assert callback.repaired is True


@pytest.mark.filterwarnings("ignore:Scripts after fine-tuning.* cost too much accuracy")
@pytest.mark.parametrize("fallback", [False, True])
def test_a_repair_may_cost_less_accuracy_where_a_restart_can_follow(
    fallback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_backdoor.responses.reset_units.harmed_class", lambda *_: None)
    monkeypatch.setattr("lightning_backdoor.responses.reset_units.MAX_LOSS", 1.0)
    repair = ResetUnits(rounds=1, finetune_epochs=1, extra_epochs=1, lr=1e-9, reset_fraction=0.9)
    callback = Scripts(repair, warmup_epochs=4, fallback=fallback)
    train_digits(poisoned_digits(), [callback], epochs=4)
    first, *others = callback.history
    assert 0.2 < first.accuracies[0] - first.accuracies[1] < 1
    assert first.undone is fallback
    assert [event.response for event in others] == (["fallback"] * 2 if fallback else [])


def test_the_restart_begins_with_the_weights_at_the_start_of_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    module = net_of()
    before, seen = state_of(module), []
    begin = type(module).on_train_epoch_start

    def note(self: Any) -> None:
        seen.append(state_of(self))
        begin(self)

    monkeypatch.setattr(type(module), "on_train_epoch_start", note)
    fit([Scripts(Repair(1.0))], module=module)
    assert same_state(seen[0], before)
    assert same_state(seen[2], before)
    assert not same_state(seen[1], before)


@pytest.mark.parametrize("which", range(EPOCHS + 2))
def test_resumed_it_ends_the_same(which: int, tmp_path: Path) -> None:
    def train(*callbacks: Any, ckpt: Path | None = None) -> tuple[Scripts, Run]:
        callback = Scripts(Repair(1.0))
        seed_everything()
        return callback, fit([callback, *callbacks], ckpt=ckpt)

    saver = SaveAll(tmp_path)
    whole, run = train(saver)
    again, resumed = train(ckpt=[path for path in saver.paths if "epoch_end" in path.name][which])
    assert again.history == whole.history
    assert same_state(state_of(resumed.module), state_of(run.module))


@pytest.mark.parametrize("room", [True, False])
def test_where_a_restart_is_ruled_out_the_warning_says_why(room: bool) -> None:
    callback = Scripts(Repair(1.0, room=room))
    with pytest.warns(UserWarning, match=r"could not train anew without the flagged images: .*max_time"):
        fit([callback], max_time={"hours": 1})
    assert callback.repaired is False


def test_defaults_and_how_to_have_none() -> None:
    for make, kind in ((NONECallback, ResetUnits), (DBRCallback, Unlearn)):
        assert isinstance(make()._procedure.response, WithFallback)
        assert isinstance(make()._procedure.response.repair, kind)
        assert isinstance(make(fallback=None)._procedure.response, kind)
        assert not isinstance(make(response="continue")._procedure.response, WithFallback)
        assert repr(make(fallback=None)) == f"{make.__name__}(fallback=None)"
        assert isinstance(make.from_paper()._procedure.response, kind), "the authors' loops keep what has come of them"
        with pytest.raises(ArgumentError, match=r"`fallback` must be one of 'restart', None"):
            make(fallback="again")


def test_the_report_says_that_training_began_anew(tmp_path: Path) -> None:
    for rate, told in ((0.2, True), (0.05, False)):
        callback = Scripts(Repair(rate))
        callback.report_dir = str(tmp_path / str(rate))
        fit([callback])
        page = (tmp_path / str(rate) / "report.html").read_text()
        assert ("Flagged images kept their label, so training began anew" in page) is told
        assert ("20.0% of the flagged images get their label" in page) is told


def test_a_repair_that_measured_nothing_falls_back_too() -> None:
    class Unmeasured(Repair):
        def respond(self, session: Session, detection: Detection, event: Event) -> Event:
            return replace(event, no_room=True, suspects=len(FLAGGED))

    callback = Scripts(Unmeasured(1.0))
    fit([callback])
    assert [event.restarts for event in callback.history] == [False, True, False]
    assert callback.repaired is not callback.history[-1].remains


def test_what_another_defense_has_made_obsolete_leads_to_no_restart() -> None:
    repair = Repair(1.0)
    response, history = WithFallback(repair), [Event(1, 10, 10, accuracies=(0.9,), flagged_label_rates=(0.99,))]
    case: Any = SimpleNamespace(title="Scripts", verdict="any", history=history)
    session = Session(None, None, None, None, case, 0.0)  # type: ignore[arg-type]
    response._restart._start = {}
    response.on_other_restart(session)
    assert not response._fall_back(session)
    assert not response.on_train_epoch_end(session)


def test_a_figure_of_weights_that_are_gone_says_nothing_of_the_model() -> None:
    before = Event(3, 10, 10, accuracies=(0.9,), flagged_label_rates=(0.99,))
    again = Event(3, 0, 10, response="fallback", restarts=True, accuracies=(0.9,), flagged_label_rates=(0.99,))
    assert repaired([before]) is False
    assert repaired([before, again]) is None
    assert repaired([before, again, Event(3, 0, 10, accuracies=(0.9,), flagged_label_rates=(0.02,))]) is True


@pytest.mark.parametrize(("written", "resumed"), [(None, "restart"), ("restart", None)])
def test_a_checkpoint_with_another_fallback_is_refused_in_words(written: Any, resumed: Any, tmp_path: Path) -> None:
    saver = SaveAll(tmp_path)
    fit([NONECallback(fallback=written), saver])
    with pytest.raises(ArgumentError, match=r"was written with `response=.*fallback"):
        fit([NONECallback(fallback=resumed)], ckpt=saver.paths[-1])


def test_a_quota_of_another_defense_never_leads_to_a_restart() -> None:
    for response, kind in (("reset", ResetUnits), ("unlearn", Unlearn)):
        assert isinstance(UltraCleanCallback(rule="fraction", response=response)._procedure.response, kind)
