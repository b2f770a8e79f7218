"""A module trains in the mode that it arrives in; every defence says at the start if that is evaluation mode."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl

from tests.callbacks.helpers import make_trainer
from tests.contract.problem import EPOCHS, WARNS, Net, fit, net_of
from tests.contract.registry import Entry, every_kind_of_defense, of

pytestmark = [*WARNS, pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start")]  # Lightning says so, too


class Begun(Exception):
    """The fit has come to its first epoch."""


class End(pl.Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        raise Begun


def start(entry: Entry, module: Net) -> None:
    trainer = make_trainer([entry.make(), End()], EPOCHS)
    with pytest.raises(Begun):
        fit([], module=module, trainer=trainer)


@every_kind_of_defense
def test_a_module_in_evaluation_mode_is_told_and_the_remedy_works(entry: Entry) -> None:
    module = net_of().eval()
    with pytest.warns(UserWarning, match=r"all layers of `Net` that learn are in evaluation mode.* `model.train\(\)`"):
        start(entry, module)
    assert not any(part.training for part in module.modules()), "it is the user's module"
    start(entry, module.train())


@every_kind_of_defense
def test_a_part_in_evaluation_mode_is_the_users_choice(entry: Entry) -> None:
    module = net_of()
    module.body.eval()
    start(entry, module)
    assert not module.body[1].training


def test_what_does_not_learn_says_nothing_of_the_mode_of_training() -> None:
    """As with a model whose weights, but not the LightningModule around it, were loaded in evaluation mode."""
    module = net_of()
    module.body.eval()
    module.head.eval()
    assert module.training
    with pytest.warns(UserWarning, match="in evaluation mode"):
        start(of("UltraCleanCallback"), module)
