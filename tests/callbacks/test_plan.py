"""A repair fits into the epochs, steps or minutes that are planned, unless more are allowed; a restart begins anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_backdoor import DBRCallback, NONECallback, Verdict
from lightning_backdoor.baselines import ABL, FineTuneTrusted
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.responses.limits import about_to_end, repair_begins
from lightning_backdoor.responses.reset_units import ResetUnits
from lightning_backdoor.responses.unlearn import Unlearn
from tests.callbacks.helpers import (
    LIGHTNING_WARNS,
    DigitNet,
    Net,
    Pictures,
    always,
    fit,
    loader_of,
    make_trainer,
    poisoned_digits,
    same_state,
    state_of,
)
from tests.callbacks.test_dbr import GIVEN

pytestmark = [
    *LIGHTNING_WARNS,
    pytest.mark.filterwarnings("ignore:NONE after fine-tuning.* cost too much accuracy"),
    pytest.mark.filterwarnings("ignore:D-BR ends with a model"),
]

EPOCHS, BATCHES = 4, 4


def none(**kwargs: Any) -> NONECallback:
    return NONECallback(**{"rule": "paper", **kwargs})


def dbr(**kwargs: Any) -> DBRCallback:
    return DBRCallback(**{"verdict": GIVEN, "trusted": 0.2, "fallback": None, **kwargs})


def abl(**kwargs: Any) -> ABL:
    return ABL(**{"isolate": 0.0625, "warmup_epochs": 1, **kwargs})


def tuned(**kwargs: Any) -> FineTuneTrusted:
    return FineTuneTrusted(**{"verdict": GIVEN, **kwargs})


REPAIRS = {"NONE": none, "D-BR": dbr, "ABL": abl, "FineTuneTrusted": tuned}
every_repair = pytest.mark.parametrize("name", REPAIRS)


class Planned(Net):
    """Counts on the plan, as many templates do: lists by epoch and by step, and a counter of its own."""

    def __init__(self, epochs: int = EPOCHS) -> None:
        super().__init__()
        self.by_epoch, self.by_step = [0.9] * epochs, [0.1] * (epochs * BATCHES)
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = self.by_epoch[self.current_epoch] + self.by_step[self.global_step] + 0 * self.by_step[self.steps]
        self.steps += 1
        return weight * super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        sgd = torch.optim.SGD(self.parameters(), lr=0.05)
        rates = [1.0] * (len(self.by_epoch) + 1)
        return [sgd], [torch.optim.lr_scheduler.LambdaLR(sgd, lambda epoch: rates[epoch])]


def train(callbacks: list[Any], make: Any = Planned, epochs: int | None = EPOCHS, **kwargs: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    module, trainer = make(), make_trainer(callbacks, epochs, **kwargs)
    trainer.fit(module, loader_of(Pictures()))
    return trainer, module


@pytest.mark.parametrize(
    ("end", "needed", "extra", "begins"),
    [(12, 3, 0, 9), (12, 3, 1, 10), (12, 3, 9, 12), (6, 15, 0, 3), (1, 5, 0, 1), (2, 5, 0, 1), (60, 18, 0, 42)],
)
def test_a_repair_begins_so_late_that_it_still_fits(end: int, needed: int, extra: int, begins: int) -> None:
    assert repair_begins(end, needed, extra) == begins
    assert repair_begins(None, needed, extra) > 10**6


@every_repair
def test_a_repair_takes_no_epoch_and_no_step_beyond_the_plan(name: str) -> None:
    callback = REPAIRS[name]()
    trainer, module = train([callback])
    assert trainer.current_epoch == EPOCHS
    assert trainer.global_step <= EPOCHS * BATCHES
    assert len({epoch for epoch, *_ in module.drawn}) == EPOCHS
    assert not callback.verdict.keep.all()
    last = callback.history[-1]
    assert len(last.undone_steps) == 1 if name == "NONE" else 0 < len(last.undone_steps) <= EPOCHS // 2


@every_repair
def test_steps_that_are_planned_are_not_exceeded(name: str) -> None:
    callback = REPAIRS[name]()
    trainer, _ = train([callback], Net, epochs=None, max_steps=14)
    assert trainer.global_step == 14
    last = callback.history[-1]
    assert last.treated


@pytest.mark.filterwarnings("ignore:.*saved before the treatment of the model was over")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
@pytest.mark.parametrize("name", ["NONE", "D-BR"])
def test_a_run_by_steps_is_resumed_in_a_repair_and_after_it(name: str, tmp_path: Path) -> None:
    more = {"finetune_epochs": 2, "rounds": 1} if name == "NONE" else {"epochs": 2}
    saver = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    train([REPAIRS[name](**more), saver], Net, epochs=None, max_steps=16, enable_checkpointing=True)
    for epoch in (2, 3):  # within the repair, and at its end
        callback = REPAIRS[name](**more)
        trainer, _ = fit([callback], epochs=None, max_steps=16, ckpt=tmp_path / f"epoch={epoch}.ckpt")
        assert trainer.global_step == 16
        last = callback.history[0]
        assert last.treated


@pytest.mark.parametrize("limit", [0.5, 2])
def test_limit_train_batches_is_taken_of_an_epoch_of_repair_once(limit: float) -> None:
    trainer, _ = train([dbr(epochs=1)], Net, epochs=2, limit_train_batches=limit)
    assert trainer.global_step == 2 * 2


@pytest.mark.parametrize("limit", [0.5, 2, 3])
def test_epochs_beyond_the_plan_unlearn_and_relearn_within_limit_train_batches(limit: float) -> None:
    """The paper's loop, with two batches of suspects and two of trusted samples in a full epoch."""
    suspect = torch.arange(64) // 4 % 2 == 0
    given = Verdict(torch.arange(64).float(), ~suspect, 0.0, "known", suspect=suspect, trusted=~suspect)
    callback = DBRCallback.from_paper(verdict=given, epochs=2, extra_epochs=2)
    trainer, module = train([callback], Net, epochs=1, limit_train_batches=limit)
    assert trainer.current_epoch == 3
    for epoch in (1, 2):
        batches = [positions for at, _, positions in module.drawn if at == epoch]
        assert len(batches) == (limit if isinstance(limit, int) else 2)
        assert {bool(suspect[positions[0]]) for positions in batches} == {True, False}, "both kinds"


@every_repair
def test_extra_epochs_are_taken_if_they_are_allowed(name: str) -> None:
    more = {"finetune_epochs": 3, "rounds": 1} if name == "NONE" else {"epochs": 3}
    trainer, _ = train([REPAIRS[name](extra_epochs=2, **more)], Net)
    assert trainer.current_epoch <= EPOCHS + 2
    if name != "D-BR":  # whose repair may be complete before
        assert trainer.current_epoch == EPOCHS + 2
    assert trainer.max_epochs == EPOCHS


@every_repair
def test_without_an_epoch_left_nothing_is_repaired_and_it_says_so(name: str) -> None:
    callback = REPAIRS[name]()
    with pytest.warns(UserWarning, match=r"no epoch is left.*`extra_epochs`"):
        trainer, _ = train([callback], Net, epochs=1)
    assert trainer.current_epoch == 1
    assert callback.history[-1].no_room


@pytest.mark.parametrize("value", [-1, 0.5, True])
@every_repair
def test_extra_epochs_are_a_whole_number(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match="`extra_epochs` must be a whole number of at least 0"):
        REPAIRS[name](extra_epochs=value)


@pytest.mark.parametrize("name", ["NONE", "D-BR"])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_repair_ends_with_the_time_that_is_planned(name: str, interval: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that batches alone move: six seconds are a batch and a half."""
    seconds = [0.0]

    class Ticking(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seconds[0] += 4.0
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr("pytorch_lightning.callbacks.timer.time.monotonic", lambda: seconds[0])
    timer = pl.callbacks.Timer({"seconds": 4 * BATCHES * 4 + 6}, interval=interval, verbose=False)
    callback = REPAIRS[name]()
    trainer, _ = train([callback, timer], Ticking, epochs=50)
    planned = 4 * BATCHES + 2 if interval == "step" else 5 * BATCHES
    assert planned - 2 <= trainer.global_step <= planned
    last = callback.history[-1]
    assert last.epochs == 2, "half of what the time is enough for"
    assert last.treated


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("name", ["NONE", "D-BR"])
def test_a_repair_is_judged_with_its_last_step_and_may_exceed_the_time_by_extra_epochs(
    name: str, extra: int, interval: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, judged = [0.0], list[int]()

    class Ticking(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seconds[0] += 4.0 if extra or self.current_epoch < 3 else 12.0  # over within the repair
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr("pytorch_lightning.callbacks.timer.time.monotonic", lambda: seconds[0])
    timer = pl.callbacks.Timer({"seconds": 4 * BATCHES * 4 + 6}, interval=interval, verbose=False)
    more = {"finetune_epochs": 2, "rounds": 1} if name == "NONE" else {"epochs": 2}
    callback = REPAIRS[name](extra_epochs=extra, warmup_epochs=4 - (not extra), **more)
    owner = ResetUnits if name == "NONE" else Unlearn
    judge = owner._judge

    def noted(response: Any, session: Any, **options: Any) -> None:
        judged.append(session.trainer.global_step)
        judge(response, session, **options)

    monkeypatch.setattr(owner, "_judge", noted)
    trainer, _ = train([callback, timer], Ticking, epochs=50)
    assert judged[-1] == trainer.global_step, "nothing is trained that was not judged"
    assert trainer.current_epoch == 4 + extra


def test_a_restart_gives_counters_back_and_calls_the_modules_hook() -> None:
    class Hooked(Planned):
        restarts: int

        def on_fit_start(self) -> None:
            self.restarts = 0

        def on_backdoor_restart(self) -> None:
            self.restarts += 1
            self.where = self.trainer.current_epoch, self.trainer.global_step, self.steps

    class Patience(pl.Callback):
        def __init__(self) -> None:
            self.epochs, self.called = 0, 0

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.epochs += 1

        def on_backdoor_restart(self, trainer: Any, pl_module: Any) -> None:
            assert self.epochs == 0
            self.called += 1

    patience = Patience()
    trainer, module = train([always(warmup_epochs=2), patience], Hooked)
    assert trainer.current_epoch == EPOCHS
    assert module.steps == trainer.global_step, "counted from the restart"
    assert module.restarts == 1
    assert module.where == (0, 0, 0)
    assert (patience.epochs, patience.called) == (EPOCHS, 1)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_restart_leaves_alone_what_setup_and_the_first_steps_have_made(resumed: bool, tmp_path: Path) -> None:
    class Late(Net):
        def __init__(self) -> None:
            super().__init__()
            self.total: int | None = None
            self.criterion: Any = None

        def setup(self, stage: str) -> None:
            self.total = 5

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert self.total == 5
            if self.criterion is None:
                assert self.global_step in (0, BATCHES)
                self.criterion = torch.nn.CrossEntropyLoss()
            return super().training_step(batch, batch_idx)

    path = None
    if resumed:
        trainer, _ = train([], Late, epochs=1)
        path = tmp_path / "undefended.ckpt"
        trainer.save_checkpoint(path)
    module = Late()
    trainer = make_trainer([always(warmup_epochs=2)], EPOCHS)
    trainer.fit(module, loader_of(Pictures()), ckpt_path=path)
    assert module.criterion is not None
    assert trainer.current_epoch == EPOCHS


class Broken(Net):
    """Fails in one epoch."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.current_epoch == self.at and batch_idx == 1:
            raise RuntimeError("broken")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("name", ["NONE", "D-BR"])
def test_a_repair_that_fails_leaves_the_trained_weights_and_a_file_of_them(name: str, tmp_path: Path) -> None:
    _, trained = train([], Net)
    callback, made = REPAIRS[name](extra_epochs=50, report_dir=tmp_path), []
    with pytest.raises(RuntimeError, match="broken") as failure:
        train([callback], lambda: made.append(Broken(at=EPOCHS)) or made[0])
    module = made[0]
    assert same_state(trained, module)
    (path,) = tmp_path.glob("*.ckpt")
    assert same_state(trained, torch.load(path, weights_only=True)["state_dict"])
    if hasattr(failure.value, "__notes__"):
        (note,) = failure.value.__notes__
        assert f"{callback.title} failed after epoch {EPOCHS}" in note
        assert str(path) in note


def test_a_detection_that_fails_leaves_the_trained_weights_and_a_file_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("disk full")

    for name, callback in (("ultraclean", always()), ("NONE", none()), ("D-BR", dbr())):
        folder, module = tmp_path / name, Net()  # not trained to the end: as it is at the detection
        callback.report_dir = str(folder)
        with monkeypatch.context() as patch:
            for method in ("scan", "predict", "read_labels"):
                patch.setattr(f"lightning_backdoor.scanning.scanner.DatasetScanner.{method}", fails)
            with pytest.raises(RuntimeError, match="disk full"):
                train([callback], lambda module=module: module)
        (path,) = folder.glob("*.ckpt")
        assert same_state(state_of(module), torch.load(path, weights_only=True)["state_dict"])


def test_an_error_after_the_fit_leaves_the_weights_alone(tmp_path: Path) -> None:
    class Interrupted(Broken):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            try:
                return super().training_step(batch, batch_idx)
            except RuntimeError:
                raise KeyboardInterrupt from None

        def test_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("broken test")

    callback = none(extra_epochs=50, report_dir=tmp_path)
    trainer, other = make_trainer([callback], EPOCHS), Interrupted(at=-1)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        trainer.fit(Interrupted(at=EPOCHS), loader_of(Pictures()))
    before = state_of(other)
    with pytest.raises(RuntimeError, match="broken test"):
        trainer.test(other, loader_of(Pictures()), verbose=False)
    assert same_state(before, other)
    assert not list(tmp_path.glob("*.ckpt"))


def test_an_error_of_the_training_writes_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        train([none(report_dir=tmp_path)], lambda: Broken(at=1))
    assert not list(tmp_path.glob("*.ckpt"))


def test_after_a_round_that_was_undone_the_last_word_is_about_the_model_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_backdoor.responses.reset_units.MAX_LOSS", -2.0)
    poisoned, callback = poisoned_digits(), NONECallback(warmup_epochs=4, finetune_epochs=1, fallback=None)
    monkeypatch.setattr(callback._procedure.response, "_epochs_after", lambda trainer: 0)  # or the round would go on
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="NONE") as told:
        make_trainer([callback], 6).fit(DigitNet(), DataLoader(poisoned, batch_size=32, shuffle=True))
    assert [bool(past.units) for past in callback.history] == [True, False]
    last = callback.history[-1]
    assert last.removed == 0
    assert last.flagged_label_rates[-1] > 0.9, "the images are out already, and the model still gives them their label"
    assert last.no_room
    messages = [str(one.message) for one in told]
    assert any("no epoch is left for fine-tuning: the backdoor may still be there" in message for message in messages)


def test_images_that_are_out_and_still_get_their_label_are_reason_for_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = iter([-2.0, 2.0])
    poisoned = poisoned_digits()
    callback = NONECallback(warmup_epochs=4, finetune_epochs=1, extra_epochs=1, fallback=None)
    response = callback._procedure.response
    begin = response._judge

    def judge(*args: Any, **options: Any) -> None:
        monkeypatch.setattr("lightning_backdoor.responses.reset_units.MAX_LOSS", next(judged))
        begin(*args, **options)

    monkeypatch.setattr(response, "_judge", judge)
    monkeypatch.setattr(response, "_epochs_after", lambda trainer: 0)  # or the first round would go on in their place
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"the weights went back|NONE ends with a model"):
        make_trainer([callback], 6).fit(DigitNet(), DataLoader(poisoned, batch_size=32, shuffle=True))
    first, second, *_ = callback.history
    assert first.undone
    assert second.removed == 0
    assert second.units
    assert not second.undone


def test_training_that_goes_on_after_a_repair_ends_with_a_scan_of_the_removed_images() -> None:
    poisoned, callback = poisoned_digits(), NONECallback(warmup_epochs=4, finetune_epochs=3, rounds=1)
    torch.manual_seed(0)
    make_trainer([callback], 8).fit(DigitNet(), DataLoader(poisoned, batch_size=32, shuffle=True))
    assert [past.epochs for past in callback.history] == [4, 8]
    last = callback.history[-1]
    assert last.rechecked == len(callback.verdict.removed) > 0
    assert last.flagged_label_rates[-1] < 0.1
    assert callback.history[0].treated


def test_the_last_epoch_is_the_last_also_for_callbacks_whose_turn_comes_before_that_of_a_repair() -> None:
    ends: list[bool] = []

    class Before(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            ends.append(about_to_end(trainer))

    train([Before(), none(finetune_epochs=2, rounds=1)], Net)
    assert ends == [False, False, False, True]
    ends.clear()
    train([Before(), none(finetune_epochs=1, rounds=1, extra_epochs=1)], Net)
    assert ends == [False, False, False, True, True], "at the end of the plan, and of the repair"


def test_a_file_that_cannot_be_written_does_not_hide_the_error_of_the_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("lightning_backdoor.responses.checkpointing._save_weights", full)
    with pytest.raises(RuntimeError, match="broken") as failure:
        train([none(extra_epochs=50, report_dir=tmp_path)], lambda: Broken(at=EPOCHS))
    if hasattr(failure.value, "__notes__"):
        assert "no file of them could be written" in failure.value.__notes__[0]
