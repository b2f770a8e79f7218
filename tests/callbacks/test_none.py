"""NONE in a Trainer: planted truth and its clean twin, silence until it acts, what it gives back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning_pytorch
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_backdoor import NONECallback, attacks
from tests.callbacks.helpers import LIGHTNING_WARNS, DigitNet, digits, make_trainer, same_state, share_right

pytestmark = LIGHTNING_WARNS


def train_digits(dataset: Any, callbacks: list[Any], epochs: int = 6, **kwargs: Any) -> tuple[Any, DigitNet]:
    torch.manual_seed(0)
    module, trainer = DigitNet(), make_trainer(callbacks, epochs=epochs, **kwargs)
    trainer.fit(module, DataLoader(dataset, batch_size=64, shuffle=True))
    return trainer, module


@pytest.fixture(scope="module")
def poisoned() -> Any:
    return attacks.poison(digits()[0], attacks.BadNets(), target=0, rate=0.05)


def test_finds_planted_poisons_resets_units_and_removes_the_backdoor(poisoned: Any) -> None:
    _, test = digits()
    attacked = attacks.triggered(test, attacks.BadNets(), target=0)
    _, undefended = train_digits(poisoned, [])
    assert share_right(undefended, attacked) > 0.6, "the attack must work for the defence to have something to do"

    callback = NONECallback()
    trainer, module = train_digits(poisoned, [callback])

    truth, removed = poisoned.poisoned, ~callback.verdict.keep
    assert (removed & truth).sum() >= 0.9 * truth.sum()
    assert (removed & ~truth).sum() <= 0.01 * len(truth)
    assert share_right(module, attacked) < 0.1
    assert share_right(module, test) > share_right(undefended, test) - 0.05
    assert trainer.current_epoch == 12, "fine-tuning beyond the planned six epochs"
    assert trainer.max_epochs == 6, "the user's limit is back"
    assert trainer.callback_metrics["backdoor/none/units_reset"] > 0


def test_removes_nothing_from_clean_data_and_the_training_is_bit_identical() -> None:
    train, _ = digits()
    _, plain = train_digits(train, [])
    callback = NONECallback()
    trainer, module = train_digits(train, [callback])
    assert same_state(plain.state_dict(), module)
    assert callback.verdict.keep.all()
    assert trainer.current_epoch == 6
