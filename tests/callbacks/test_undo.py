"""A round that is undone leaves the model that the user would have had: with averages, after a resume, every time."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_backdoor import DBRCallback, NONECallback
from lightning_backdoor.responses.reset_units import ResetUnits
from tests.callbacks.helpers import (
    LIGHTNING_WARNS,
    Net,
    Pictures,
    fit,
    loader_of,
    make_trainer,
    same_state,
)
from tests.callbacks.test_dbr import GIVEN
from tests.callbacks.test_ultraclean_resume import SaveAll, run

pytestmark = [
    *LIGHTNING_WARNS,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:NONE after fine-tuning.* cost too much accuracy"),
    pytest.mark.filterwarnings("ignore:D-BR ends with a model"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]


def none(**kwargs: Any) -> NONECallback:
    """NONE that resets units, whatever the data look like."""
    return NONECallback(**{"rule": "paper", "finetune_epochs": 2, "extra_epochs": 20, **kwargs})


def dbr(**kwargs: Any) -> DBRCallback:
    """D-BR that unlearns four samples in three epochs, whatever the data look like."""
    return DBRCallback(**{"verdict": GIVEN, "epochs": 3, "extra_epochs": 3, "trusted": 0.2, "fallback": None, **kwargs})


def undo(monkeypatch: pytest.MonkeyPatch, *, rounds: tuple[bool, ...] = (True,)) -> None:
    """Have every epoch of D-BR undone, and the rounds of NONE, in turn, as told."""
    judged, told = ResetUnits._judged_event, chain(rounds, repeat(rounds[-1]))  # a round may be judged several times
    monkeypatch.setattr(
        ResetUnits, "_judged_event", lambda self, *args: replace(judged(self, *args), undone_steps=(next(told),))
    )
    monkeypatch.setattr("lightning_backdoor.responses.unlearn.MAX_LOSS", -2.0)


def ema(decay: float = 0.9) -> Any:
    averaging = pytest.importorskip("pytorch_lightning.callbacks.weight_averaging")
    return averaging.EMAWeightAveraging(decay=decay)


class Average(pl.Callback):
    """An average as users write it: no state in checkpoints, and at the end it becomes the model."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.average = AveragedModel(pl_module, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.average.update_parameters(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.load_state_dict(self.average.module.state_dict())


class HandMade(pl.Callback):
    """An average in a plain dict, which comes with the first batch; it has no state in checkpoints either."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        if not hasattr(self, "shadow"):
            self.shadow = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        for name, value in pl_module.state_dict().items():
            if value.is_floating_point():
                self.shadow[name] = 0.5 * self.shadow[name] + 0.5 * value

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.load_state_dict(self.shadow)


both = pytest.mark.parametrize("make", [none, dbr])


@both
@pytest.mark.parametrize("average", [ema, Average, HandMade])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_the_average_that_becomes_the_model_holds_nothing_of_it(
    make: Any, average: Any, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plain = fit([])
    _, averaged = fit([average()])
    assert not same_state(plain, averaged)
    undo(monkeypatch)
    callback = make()
    _, module = fit([average(), callback] if first else [callback, average()])
    assert callback.verdict.removed.numel()
    if first:
        assert same_state(averaged, module)
        return
    decay = 0.9 if average is ema else 0.5  # its turn comes after the undoing: one more step, towards the same weights
    for name, value in averaged.state_dict().items():
        expected = value.lerp(plain.state_dict()[name], 1 - decay) if value.is_floating_point() else value
        assert torch.allclose(module.state_dict()[name], expected, atol=1e-6), name


@both
def test_an_average_inside_the_model_holds_nothing_of_it(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class WithAverage(Net):
        def __init__(self) -> None:
            super().__init__()
            self.average = AveragedModel(self.body, use_buffers=True)

        def on_train_batch_end(self, *args: Any) -> None:
            self.average.update_parameters(self.body)

        def on_train_end(self) -> None:
            self.body.load_state_dict(self.average.module.state_dict())

    def trained(callbacks: list[Any]) -> Net:
        torch.manual_seed(0)
        module = WithAverage()
        make_trainer(callbacks).fit(module, loader_of(Pictures()))
        return module

    plain, averaged = fit([])[1].body.state_dict(), trained([]).body.state_dict()
    undo(monkeypatch)
    module = trained([make()])
    for name, value in averaged.items():  # the module's turn comes after the undoing: a 17th step to the same weights
        expected = value.lerp(plain[name], 1 / 17) if value.is_floating_point() else value
        assert torch.allclose(module.body.state_dict()[name], expected, atol=1e-6), name


def test_a_round_that_is_undone_leaves_what_the_round_before_came_to(monkeypatch: pytest.MonkeyPatch) -> None:
    undo(monkeypatch, rounds=(False,))
    _, first = fit([none(rounds=1)])
    undo(monkeypatch, rounds=(False, True))
    callback = none(rounds=2)
    _, module = fit([ema(), callback])
    assert [past.undone for past in callback.history] == [False, True]
    assert same_state(first, module), "the weights that were judged, not their average with the reset ones"


@both
@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_the_model_that_was_judged_is_the_one_that_the_user_gets(
    make: Any, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo(monkeypatch, rounds=(False,))
    monkeypatch.setattr("lightning_backdoor.responses.unlearn.MAX_LOSS", 2.0)
    _, plain = fit([make()])
    callback = make()
    _, module = fit([callback, ema(decay)])
    assert not any(callback.history[-1].undone_steps)
    assert callback.history[-1].treated
    assert same_state(plain, module)


@both
@pytest.mark.parametrize("average", [None, ema, Average, HandMade])
def test_resumed_anywhere_it_is_undone_all_the_same(
    make: Any, average: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo(monkeypatch)
    averages = [] if average is None else [average]
    saver = SaveAll(tmp_path)
    _, expected = run([*(kind() for kind in averages), make(), saver], val=False)
    during = [path for path in saver.paths if torch.load(path, weights_only=True)["epoch"] in (2, 3)]
    assert during
    for path in during:
        resumed = make()
        _, module = run([*(kind() for kind in averages), resumed], path, val=False)
        assert resumed.history[-1].undone
        assert same_state(expected, module), path.name


class Momentum(pl.Callback):
    """Momentum before every epoch."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        states = trainer.optimizers[0].state.values()
        self.seen.append([state["momentum_buffer"].clone() for state in states])


def test_the_optimizer_goes_back_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    undo(monkeypatch)
    momentum = Momentum()
    fit([dbr(), momentum])
    for again in momentum.seen[5:]:
        assert all(torch.equal(a, b) for a, b in zip(momentum.seen[4], again, strict=True))
