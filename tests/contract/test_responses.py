"""Every defense with every response that it offers; a report alone changes no bit of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_backdoor import Verdict
from lightning_backdoor.callbacks import Defense, Detector
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.responses import Detection, ResetUnits, Response, Restart, Session
from lightning_backdoor.scanning.measure_units import find_layers
from tests.callbacks.helpers import same_state, state_of
from tests.callbacks.test_ultraclean_resume import SaveAll
from tests.contract.problem import EPOCHS, WARNS, assert_settled, fit, net_of, planted, seed_everything, streams
from tests.contract.registry import Entry, every_defense, of

pytestmark = [*WARNS, pytest.mark.filterwarnings("ignore:.* (after fine-tuning|ends with a model|looked at)")]
OTHERS = ["restart", "continue", "reset", "unlearn"]


def run(callbacks: list[Any]) -> tuple[Any, ...]:
    """A training on planted data: weights, what was drawn, rates, random streams."""
    module = net_of(noisy=True)
    seed_everything()
    found = fit(callbacks, module=module, shuffle=True)
    assert_settled(found.trainer, module, found.loader, found.before)
    return state_of(module), module.drawn, module.rates, streams()


@pytest.fixture(scope="module")
def undefended() -> tuple[Any, ...]:
    return run([])


@every_defense
def test_a_report_alone_changes_no_bit_of_the_training(entry: Entry, undefended: Any, tmp_path: Path) -> None:
    arguments = {name: value for name, value in entry.acting.items() if name != "warmup_epochs"}
    callback = entry.cls(**arguments, response="report", report_dir=tmp_path)
    found = run([callback])
    assert same_state(undefended[0], found[0])
    assert undefended[1:] == found[1:]
    assert not callback.verdict.keep.all(), "it has found something"
    assert callback.history[-1].response == "report"
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("response", OTHERS)
@pytest.mark.parametrize("name", ["UltraCleanCallback", "NONECallback", "DBRCallback"])
def test_every_response_goes_with_every_detector(name: str, response: str) -> None:
    entry = of(name)
    callback = entry.make(response=response)
    found = fit([callback])
    assert callback.history[0].response == response
    assert callback.history[0].removed
    assert_settled(found.trainer, found.module, found.loader, found.before)
    assert all(
        bool(value.isfinite().all()) for value in found.module.state_dict().values() if value.is_floating_point()
    )
    drawn = torch.tensor(found.module.epochs()[-1][1])
    if response in ("restart", "continue", "reset") and found.trainer.current_epoch > callback.history[0].epochs:
        assert bool(callback.verdict.keep[drawn].all())


def test_two_stages_or_the_samples_alone() -> None:
    for response in ("continue", "report"):
        callback = of("DSTCallback").make(response=response)
        module = fit([callback]).module
        removed = set(callback.verdict.removed.tolist())
        drawn = {position for _, positions in module.epochs() for position in positions}
        assert removed
        assert (removed & drawn == set()) is (response == "continue"), "from the first epoch on"


@pytest.mark.parametrize("name", ["UltraCleanCallback", "DSTCallback", "SpectralSignatures"])
def test_a_response_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ArgumentError, match=r"`response` must be one of .*'report'.*, got 'forget'"):
        of(name).make(response="forget")


def test_a_checkpoint_of_another_response_is_refused_in_words(tmp_path: Path) -> None:
    saver = SaveAll(tmp_path)
    fit([of("UltraCleanCallback").make(response="continue"), saver])
    with pytest.raises(ArgumentError, match=r"written with `response='continue'`, got 'restart'. Resume with"):
        fit([of("UltraCleanCallback").make()], ckpt=saver.paths[-1])


def test_one_response_object_for_two_defenses_is_refused() -> None:
    shared = Restart(last_detection=False)
    pair = [of(name).make(response=shared) for name in ("UltraCleanCallback", "SpectralSignatures")]
    with pytest.raises(ArgumentError, match="`response` must be"):
        fit(pair)


class Scripted(Detector):
    """Flags positions that are written down beforehand: one list for each detection, the last one again and again."""

    def __init__(self, lists: list[list[int]]) -> None:
        self.lists, self.detections = lists, 0

    def detect(self, session: Session) -> Detection:
        labels = session.scanner.read_labels(session.trainer, session.module)
        keep = torch.ones(len(labels), dtype=torch.bool)
        keep[self.lists[min(self.detections, len(self.lists) - 1)]] = False
        self.detections += 1
        return Detection(Verdict((~keep).float(), keep, 0.5, "scripted", labels), int((~keep).sum()))


class ScriptedDefense(Defense):
    """A detector of a user's own, with any response."""

    method = title = "Scripted"

    def __init__(self, lists: list[list[int]], response: Response, every: int | None = None) -> None:
        detector = Scripted(lists)
        super().__init__(detector=detector, response=response, warmup_epochs=1, every=every, max_removed=0.5)


class Patience(pl.Callback):
    """Ends a fit that does not end."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        assert len(pl_module.epochs()) < 20, "the fit goes on for ever"


def test_what_was_removed_stays_removed_whatever_the_detector_says_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_backdoor.responses.reset_units.MAX_LOSS", 2.0)  # no round is undone
    poisons = planted().poisoned.nonzero().flatten().tolist()  # wrong labels, which the model does not give untrained
    callback = ScriptedDefense([poisons, []], ResetUnits(rounds=2, finetune_epochs=1, extra_epochs=3))
    fit([callback])
    assert callback.history[0].units
    assert callback._procedure.detector.detections > 1, "there was a detection after the first round"
    assert (~callback.verdict.keep).nonzero().flatten().tolist() == poisons


def test_a_restart_that_is_not_possible_any_more_is_not_waited_for() -> None:
    callback = ScriptedDefense([[1], [1, 2], [1, 2, 3]], Restart(last_detection=False), every=1)
    run = fit([Patience(), callback])
    assert [event.restarts for event in callback.history][:2] == [True, False], "the response expected one detection"
    assert run.trainer.current_epoch == EPOCHS


@pytest.mark.parametrize("arguments", [{"response": "restart"}, {"response": "unlearn"}])
def test_samples_that_are_kept_go_with_no_response_that_drops_them(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match='`samples="keep"` leaves the data as they are'):
        of("NONECallback").make(samples="keep", **arguments)


def test_repairing_at_once_goes_with_no_restart() -> None:
    with pytest.raises(ArgumentError, match="`warmup_epochs=0` treats the weights as they are"):
        of("DBRCallback").make(warmup_epochs=0, response="restart")


def test_units_are_found_in_the_mode_in_which_they_are_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []

    def noted(*arguments: Any) -> Any:
        modes.append(arguments[3:])
        return find_layers(*arguments)

    monkeypatch.setattr("lightning_backdoor.callbacks.none.find_layers", noted)
    monkeypatch.setattr("lightning_backdoor.responses.reset_units.find_layers", noted)
    fit([of("NONECallback").make(residual_mode="full_group")])
    assert set(modes) == {("full_group",)}
    assert len(modes) > 2, "at the start, for the detection and for the reset"


def test_a_second_report_is_about_the_second_model() -> None:
    callback = of("UltraCleanCallback").make(response="report")
    fit([callback])
    first = callback.verdict
    fit([callback], module=net_of())
    assert callback.verdict is not first
    assert len(callback.history) == 1
