"""Scores and weights that are recorded together are those of one state, also where a defence changes the weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MaxMetric

from lightning_backdoor import DBRCallback, NONECallback
from lightning_backdoor.baselines import FineTuneTrusted
from tests.callbacks.helpers import LIGHTNING_WARNS, Net, Pictures, always, loader_of, make_trainer, state_of
from tests.callbacks.test_dbr import GIVEN

pytestmark = [
    *LIGHTNING_WARNS,
    pytest.mark.filterwarnings("ignore:NONE after fine-tuning.* cost too much accuracy"),
    pytest.mark.filterwarnings("ignore:D-BR ends with a model"),
    pytest.mark.filterwarnings("ignore:`Best.weights`. copies of the model's weights"),
    pytest.mark.filterwarnings("ignore:.*saved before the treatment of the model was over"),
]

VAL = Pictures(32, seed=1)


def val_loss(weights: dict[str, Tensor]) -> float:
    """The loss on the validation images of a network with these weights."""
    net = Net().eval()
    net.load_state_dict({name: value for name, value in weights.items() if not name.startswith("best")})
    with torch.no_grad():
        return float(nn.functional.cross_entropy(net(VAL.images), VAL.targets))


class Scored(Net):
    """Logs the loss of all validation images at once, and the largest so far."""

    def __init__(self) -> None:
        super().__init__()
        self.best = MaxMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self(batch["image"]), batch["label"])
        self.log("val_loss", loss)
        self.best.update(loss)
        self.log("largest", self.best.compute())


class Best(pl.Callback):
    """A copy of the best weights as users write it."""

    def __init__(self) -> None:
        self.score: float | None = None
        self.weights: dict[str, Tensor] | None = None
        self.seen: list[tuple[float, dict[str, Tensor]]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        score = float(trainer.callback_metrics["val_loss"])
        self.seen.append((score, state_of(pl_module)))
        if self.score is None or score < self.score:
            self.score, self.weights = score, state_of(pl_module)


def none(**kwargs: Any) -> NONECallback:
    return NONECallback(**{"rule": "paper", "finetune_epochs": 1, "lr": 0.05, **kwargs})


def dbr(**kwargs: Any) -> DBRCallback:
    return DBRCallback(**{"verdict": GIVEN, "epochs": 2, "lr": 0.05, "trusted": 0.2, "fallback": None, **kwargs})


def tuned(**kwargs: Any) -> FineTuneTrusted:
    return FineTuneTrusted(**{"verdict": GIVEN, "epochs": 2, "lr": 0.05, **kwargs})


DEFENSES = {"NONE": none, "D-BR": dbr, "FineTuneTrusted": tuned, "UltraClean": always}


def train(callbacks: list[Any], **kwargs: Any) -> tuple[Any, Scored]:
    torch.manual_seed(0)
    module, trainer = Scored(), make_trainer(callbacks, 4, **kwargs)
    trainer.fit(module, loader_of(Pictures()), loader_of(VAL, batch_size=32))
    return trainer, module


@pytest.mark.parametrize("undone", [False, True], ids=["kept", "undone"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", DEFENSES)
def test_checkpoints_and_copies_hold_the_weights_that_were_scored(
    name: str, first: bool, undone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if undone:
        monkeypatch.setattr("lightning_backdoor.responses.reset_units.MAX_LOSS", -2.0)
        monkeypatch.setattr("lightning_backdoor.responses.unlearn.MAX_LOSS", -2.0)
    more = {"extra_epochs": 3} if name != "UltraClean" else {}
    saver = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}-{step}", monitor="val_loss", save_top_k=-1)
    defense, best = DEFENSES[name](**more), Best()
    callbacks = [defense, best] if first else [best, defense]
    train([*callbacks, saver], enable_checkpointing=True)
    assert not defense.verdict.keep.all()
    assert len(best.seen) > 4, "epochs beyond the plan, or a second run"
    for score, weights in best.seen:
        assert val_loss(weights) == pytest.approx(score, abs=1e-4)
    assert val_loss(best.weights) == pytest.approx(best.score, abs=1e-4)
    assert len(saver.best_k_models) >= 4
    for path, score in saver.best_k_models.items():
        weights = torch.load(path, weights_only=True)["state_dict"]
        assert val_loss(weights) == pytest.approx(float(score), abs=1e-4), path


def test_a_plateau_scheduler_is_told_the_score_of_the_weights_that_go_on() -> None:
    class Plateau(Scored):
        def configure_optimizers(self) -> Any:
            sgd = torch.optim.SGD(self.parameters(), lr=0.05)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd, patience=99)
            step, module = schedule.step, self
            self.told: list[tuple[float, float]] = []

            def watched(metrics: Any, *args: Any) -> None:
                module.told.append((float(metrics), val_loss(state_of(module))))
                step(metrics, *args)

            schedule.step = watched
            return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}

    torch.manual_seed(0)
    module = Plateau()
    make_trainer([none(warmup_epochs=1)], 4).fit(module, loader_of(Pictures()), loader_of(VAL, batch_size=32))
    assert len(module.told) == 4
    for told, true in module.told:
        assert told == pytest.approx(true, abs=1e-4)


def test_records_of_the_best_begin_anew_with_a_restart() -> None:
    best = Best()
    trainer, _ = train([best, always(warmup_epochs=2)])
    again = best.seen[2:]
    assert len(again) == 4
    assert best.score == min(score for score, _ in again)
    assert float(trainer.callback_metrics["largest"]) == pytest.approx(max(score for score, _ in again))


@pytest.mark.parametrize(("name", "epochs", "last"), [("NONE", 3, 2), ("D-BR", 4, 3)])
def test_all_files_from_before_the_end_of_the_treatment_are_named(
    name: str, epochs: int, last: int, tmp_path: Path
) -> None:
    """NONE fine-tunes for the last epoch, D-BR repairs in the last two."""
    saver = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=-1)
    (tmp_path / "of-another-run.ckpt").touch()
    os.utime(tmp_path / "of-another-run.ckpt", (1, 1))
    torch.manual_seed(0)
    trainer = make_trainer([saver, DEFENSES[name](lr=1e-3)], epochs, enable_checkpointing=True)
    with pytest.warns(UserWarning, match="saved before the treatment of the model was over") as told:
        trainer.fit(Scored(), loader_of(Pictures()), loader_of(VAL, batch_size=32))
    (message,) = [str(one.message) for one in told if "the treatment of the model" in str(one.message)]
    assert [f"epoch={epoch}.ckpt" in message for epoch in range(epochs)] == [True] * last + [False]
    assert "another-run" not in message
