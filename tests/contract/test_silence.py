"""Law 2 for every public callback: until it acts, and where it finds nothing, the training is the user's own."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor

from tests.callbacks.helpers import same_state, state_of
from tests.contract.problem import WARNS, assert_settled, clean, fit, net_of, seed_everything, streams
from tests.contract.registry import ENTRIES, Entry, every

pytestmark = WARNS
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "bf16, accumulation, clipping": {
        "precision": "bf16-mixed",
        "accumulate_grad_batches": 3,
        "gradient_clip_val": 0.5,
    },
    "several validations, a sanity check": {"val_check_interval": 0.5, "num_sanity_val_steps": 2},
}


def train(callbacks: list[Any], folder: Path, settings: dict[str, Any]) -> tuple[Any, ...]:
    """Everything that somebody could compare: weights, order, rates, logged rows, modes, random streams."""
    module = net_of(noisy=True)
    module.drop.p = 0.3
    seed_everything()
    logger = CSVLogger(folder)
    run = fit(callbacks, clean(), module=module, shuffle=True, logger=logger, log_every_n_steps=1, **settings)
    after = streams()
    assert_settled(run.trainer, module, run.loader, run.before)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [
            {key: value for key, value in row.items() if value and not key.startswith("backdoor/")}
            for row in csv.DictReader(file)
        ]
    rows = [row for row in rows if row.keys() - {"epoch", "step"}]  # a row of the callback's own
    counters = (run.trainer.current_epoch, run.trainer.global_step)
    return state_of(module), (module.drawn, module.rates, rows, counters, after)


@pytest.fixture(scope="module", params=SETTINGS)
def plain(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    settings = SETTINGS[request.param]
    return settings, train([], tmp_path_factory.mktemp("plain"), settings)


@pytest.mark.case("22")
@pytest.mark.parametrize(
    "entry", [entry for entry in ENTRIES if entry.silent is not None], ids=lambda entry: entry.name
)
def test_where_nothing_is_found_the_training_is_bit_identical(entry: Entry, plain: Any, tmp_path: Path) -> None:
    settings, expected = plain
    callback = entry.make_silent()
    found = train([callback], tmp_path, settings)
    if entry.kind != "watch":
        assert callback.verdict is not None, "it looked"
        assert callback.verdict.keep.all()
        assert callback.verdict.threshold == float("inf")
    assert same_state(expected[0], found[0])
    assert expected[1] == found[1]


class Moment(pl.Callback):
    """Weights at the beginning of one epoch, every time that it begins."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.seen: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self.seen.append(state_of(pl_module))


@every
def test_until_it_acts_the_weights_are_those_of_a_training_without_it(entry: Entry) -> None:
    callback, moment = entry.make(**entry.untouched), Moment(entry.first)
    run = fit([moment, callback], module=net_of(noisy=True))
    plain = fit([], module=net_of(noisy=True), epochs=entry.first)
    assert entry.acted(callback, run.trainer)
    found = moment.seen[0] if moment.seen else state_of(run.module)
    assert same_state(plain.module, found)


def test_those_that_always_act_say_so() -> None:
    loud = {entry.name: entry.cls.__doc__ or "" for entry in ENTRIES if entry.silent is None}
    assert set(loud) == {"ABL", "FineTuneTrusted"}
    assert "unlearns images whatever the data look like" in loud["ABL"]
    assert "some epochs go through the trusted images" in loud["FineTuneTrusted"]
    assert torch.is_grad_enabled()
