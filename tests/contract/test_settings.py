"""Trainer settings and Lightning's own callbacks beside every public callback; what is refused is refused in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    StochasticWeightAveraging,
)
from pytorch_lightning.loggers import CSVLogger

from lightning_backdoor.errors import TrainerError
from tests.callbacks.helpers import make_trainer, same_state
from tests.contract.problem import BATCHES, EPOCHS, WARNS, LoadingNet, assert_settled, fit, net_of, planted
from tests.contract.registry import Entry, every_kind, in_turn

pytestmark = [
    *WARNS,
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)` before"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.filterwarnings("ignore:Failed to compute suggestion for learning rate"),
]

SETTINGS: dict[str, dict[str, Any]] = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.1},
    "clipping by value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "no validation until the end": {"check_val_every_n_epoch": EPOCHS},
}

REFUSES = {
    ("filter", "StochasticWeightAveraging"): r"replaces the scheduler and cannot go back.*Lightning's WeightAveraging",
    ("repair", "StochasticWeightAveraging"): r"does not go together with StochasticWeightAveraging.*WeightAveraging",
    ("own", "StochasticWeightAveraging"): r"optimizer of its own, which StochasticWeightAveraging would change",
    ("filter", "max_time"): r'`Trainer\(max_time=...\)` must be left out when response="restart"',
    ("own", "max_steps"): r"plans its stages by epochs, got max_epochs=-1, max_steps=8. Pass Trainer\(max_epochs=",
}
"""Kind of callback and setting, and what the error says about them; whatever is not here works."""


def attempt(entry: Entry, cell: str, work: Callable[[], Any]) -> Any:
    """Do it, or see it refused by the words that are promised; ``None`` then."""
    words = REFUSES.get((entry.kind, cell))
    if words is None:
        return work()
    with pytest.raises(TrainerError, match=words):
        work()
    return None


@in_turn("cell", SETTINGS)
def test_settings_of_the_trainer(entry: Entry, cell: str) -> None:
    callback = entry.make()
    run = fit([callback], **SETTINGS[cell])
    assert entry.acted(callback, run.trainer)
    assert run.trainer.current_epoch == entry.epochs
    assert_settled(run.trainer, run.module, run.loader, run.before)
    assert run.trainer.accumulate_grad_batches == SETTINGS[cell].get("accumulate_grad_batches", 1)


@in_turn("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_strategies_that_shard_the_model_are_refused(entry: Entry, name: str) -> None:
    if not hasattr(pl.strategies, name):
        pytest.skip(f"this Lightning has no {name}")
    callback = entry.make()
    trainer = make_trainer([callback], EPOCHS)
    trainer._accelerator_connector.strategy = object.__new__(getattr(pl.strategies, name))  # needs no GPU, no DeepSpeed
    with pytest.raises(TrainerError, match=rf"strategy=.*{name}, which shards it.*strategy='ddp'"):
        callback.setup(trainer, net_of(), "fit")


@pytest.mark.case("25")
@every_kind
def test_stochastic_weight_averaging(entry: Entry) -> None:
    averaging, callback = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), entry.make()
    run = attempt(entry, "StochasticWeightAveraging", lambda: fit([callback, averaging]))
    assert run is None or entry.acted(callback, run.trainer)


@every_kind
def test_a_time_limit(entry: Entry) -> None:
    callback = entry.make()
    run = attempt(entry, "max_time", lambda: fit([callback], max_time="00:01:00:00"))
    if run is not None:
        assert entry.acted(callback, run.trainer)
        assert_settled(run.trainer, run.module, run.loader, run.before)


@every_kind
def test_a_plan_by_steps(entry: Entry) -> None:
    callback = entry.make()
    run = attempt(entry, "max_steps", lambda: fit([callback], epochs=-1, max_steps=2 * BATCHES))
    if run is not None:
        assert entry.acted(callback, run.trainer)
        assert run.trainer.max_steps == 2 * BATCHES
        assert_settled(run.trainer, run.module, run.loader, run.before, epochs=-1)


@every_kind
def test_averaged_weights_are_those_of_the_treated_model(entry: Entry) -> None:
    averaging = pytest.importorskip("pytorch_lightning.callbacks.weight_averaging")
    average, callback = averaging.EMAWeightAveraging(decay=0.5), entry.make()
    run = fit([average, callback])
    assert entry.acted(callback, run.trainer)
    assert all(value.isfinite().all() for value in run.module.state_dict().values())
    assert same_state(average._average_model.module, run.module), "Lightning copies the average at the end"
    steps = int(average._average_model.n_averaged)
    if entry.kind == "filter":
        assert steps == run.trainer.global_step < EPOCHS * BATCHES + 1, "of the training after the restart alone"
    elif entry.kind == "repair":
        assert steps == 0, "nothing since the repair was judged"
    else:
        assert 0 < steps <= run.trainer.global_step


@every_kind
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_training_that_stops_early_is_looked_at_all_the_same(entry: Entry, first: bool) -> None:
    stopping = EarlyStopping("val_loss", patience=1, min_delta=1e9)
    callback = entry.make()
    run = fit([callback, stopping] if first else [stopping, callback], epochs=9)
    assert entry.acted(callback, run.trainer)
    assert run.trainer.current_epoch < 9
    assert_settled(run.trainer, run.module, run.loader, run.before, epochs=9)


@pytest.mark.case("26")
@every_kind
def test_a_one_cycle_schedule_is_not_asked_to_go_beyond_its_end(entry: Entry) -> None:
    callback = entry.make()
    run = fit([callback], module=net_of(cycle=True))
    assert entry.acted(callback, run.trainer)
    assert run.trainer.current_epoch == entry.epochs
    assert_settled(run.trainer, run.module, run.loader, run.before)


@every_kind
def test_rates_are_logged_and_metrics_are_in_the_file(entry: Entry, tmp_path: Path) -> None:
    logger, callback = CSVLogger(tmp_path), entry.make()
    run = fit([callback, LearningRateMonitor()], logger=logger, log_every_n_steps=1)
    assert entry.acted(callback, run.trainer)
    columns = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert any(name.startswith("lr-") for name in columns)
    assert any(name.startswith("backdoor/") for name in columns)
    assert {"val_loss"} <= set(columns)


def tuned(entry: Entry, finder: pl.Callback, folder: Path) -> Any:
    """A fit in which Lightning tries something out first."""
    torch.manual_seed(0)
    callback, module = entry.make(), LoadingNet(data=planted())
    trainer = make_trainer([callback, finder], EPOCHS, default_root_dir=folder)
    trainer.fit(module)
    assert entry.acted(callback, trainer)
    assert trainer.current_epoch == entry.epochs
    assert_settled(trainer, module)
    return module


@pytest.mark.case("25")
@every_kind
def test_the_learning_rate_finder(entry: Entry, tmp_path: Path) -> None:
    tuned(entry, LearningRateFinder(num_training_steps=6, update_attr=True), tmp_path)


@pytest.mark.case("25")
@every_kind
def test_the_batch_size_finder(entry: Entry, tmp_path: Path) -> None:
    module = tuned(entry, BatchSizeFinder(max_trials=2, steps_per_trial=1, init_val=8), tmp_path)
    assert module.batch_size == 16
