"""NONE beside callbacks that thaw layers: it looks at what can learn, when something can, and undoes what it did."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_backdoor import NONECallback
from tests.callbacks.helpers import LIGHTNING_WARNS, Net, Pictures, loader_of, make_trainer, same_state
from tests.callbacks.test_undo import none, undo

pytestmark = [
    *LIGHTNING_WARNS,
    pytest.mark.filterwarnings("ignore:NONE after fine-tuning.* cost too much accuracy"),
]


class Thaw(pl.callbacks.BaseFinetuning):
    """Thaws the first layer before the given epoch."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.body[:1])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == self.at:
            self.unfreeze_and_add_param_group(pl_module.body[:1], optimizer)


class Deeper(Net):
    """With a second convolution, whose units can learn from the start."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) * (blocks - 1),
            nn.AdaptiveAvgPool2d(2),
        )  # fmt: skip

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def train(callbacks: list[Any], blocks: int, epochs: int = 5) -> Net:
    torch.manual_seed(0)
    module = Deeper(blocks)
    make_trainer(callbacks, epochs).fit(module, loader_of(Pictures()))
    return module


@pytest.mark.parametrize("warmup_epochs", [1, None])
def test_it_waits_until_a_layer_can_learn(warmup_epochs: int | None) -> None:
    callback = none(warmup_epochs=warmup_epochs, finetune_epochs=1)
    train([Thaw(3), callback], blocks=1)
    assert [event.epochs for event in callback.history] == [4 if warmup_epochs else 5]
    assert callback.history[0].units


@pytest.mark.parametrize("warmup_epochs", [1, None])
def test_without_any_layer_that_learns_it_says_so_and_changes_nothing(warmup_epochs: int | None) -> None:
    plain = train([Thaw(99)], blocks=1)
    callback = none(warmup_epochs=warmup_epochs)
    with pytest.warns(UserWarning, match="no layer could learn when it was time to look. Thaw layers before the end"):
        module = train([Thaw(99), callback], blocks=1)
    assert callback.verdict is None
    assert callback.history == []
    assert same_state(plain, module)


def test_it_measures_the_layers_that_can_learn() -> None:
    callback = none(warmup_epochs=1, finetune_epochs=1)
    train([Thaw(3), callback], blocks=2)
    assert [event.epochs for event in callback.history] == [1]
    assert {layer for layer, *_ in callback.history[0].units} == {"body.3"}


def test_layers_that_are_thawed_in_a_round_that_is_undone_go_on_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            groups = trainer.optimizers[0].param_groups
            self.groups, self.first = len(groups), pl_module.body[0].weight.detach().clone()
            self.momentum = groups[-1]["params"][0] in trainer.optimizers[0].state

    undo(monkeypatch)
    seen, callback = Seen(), NONECallback(rule="paper", warmup_epochs=4, finetune_epochs=2, extra_epochs=1)
    train([Thaw(5), callback, seen], blocks=2, epochs=5)
    plain = train([Thaw(99)], blocks=2, epochs=4)
    assert [event.undone for event in callback.history] == [True]
    assert seen.groups == 2
    assert seen.momentum
    assert torch.equal(seen.first, plain.body[0].weight), "the weights of layers that were thawed go back, too"
