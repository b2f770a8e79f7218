"""Networks of which only a part can learn: a linear head on a frozen backbone, adapters on frozen layers."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_backdoor import DBRCallback, DSTCallback
from lightning_backdoor.errors import ModelError
from tests.callbacks.helpers import (
    LIGHTNING_WARNS,
    Net,
    Pictures,
    loader_of,
    make_trainer,
    same_state,
    state_of,
)
from tests.contract.problem import clean, planted

pytestmark = LIGHTNING_WARNS


class Probed(Net):
    """A linear head on random convolutions that stay as they are; with ``hidden``, without gradients."""

    def __init__(self, *, hidden: bool = False) -> None:
        torch.manual_seed(0)
        super().__init__(width=32, schedule=False)
        self.body = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(2))
        self.body.requires_grad_(False)
        self.hidden = hidden

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.hidden):
            features = self.body(images.float() / 255).flatten(1)
        return self.head(features)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.head.parameters(), lr=0.03)


class Obeyed(pl.Callback):
    """Share of the poisons that get their label when training ends; must stand before the defence."""

    def __init__(self, data: Any) -> None:
        self.images, self.labels = data.images[data.poisoned], data.targets[data.poisoned]
        self.shares: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            self.shares.append(float((pl_module(self.images).argmax(dim=1) == self.labels).float().mean()))


kinds = pytest.mark.parametrize("hidden", [False, True], ids=["frozen", "without gradients"])


@kinds
def test_dbr_repairs_a_head_on_a_frozen_backbone(hidden: bool) -> None:
    data, module = planted(192), Probed(hidden=hidden)
    before, obeyed = state_of(module.body), Obeyed(data)
    callback = DBRCallback(detector_steps=5, epochs=3)
    make_trainer([obeyed, callback], 8).fit(module, loader_of(data, 32))
    assert obeyed.shares[7] > 0.9, "the attack must work for the defence to have something to do"
    assert obeyed.shares[-1] < 0.5 * obeyed.shares[7]
    assert torch.equal(callback.verdict.suspect, data.poisoned)
    assert same_state(before, module.body)
    assert not any(parameter.requires_grad for parameter in module.body.parameters())


@kinds
def test_dbr_finds_nothing_in_clean_data_on_a_frozen_backbone(hidden: bool) -> None:
    callback = DBRCallback(detector_steps=5, epochs=3)
    make_trainer([callback], 8).fit(Probed(hidden=hidden), loader_of(clean(192), 32))
    assert callback.verdict.keep.all()


def test_the_copy_learns_features_although_those_of_the_model_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    twins: list[Any] = []
    monkeypatch.setattr("lightning_backdoor.trainer.distinguish._agree", lambda _, twin: twins.append(twin))
    module = Probed()
    before = state_of(module.body)
    make_trainer([DBRCallback(suspect=0.1, detector_steps=2, epochs=1)], 1).fit(module, loader_of(Pictures()))
    assert not torch.equal(twins[0].body[0].weight, before["0.weight"])
    assert torch.equal(module.body[0].weight, before["0.weight"])


def test_a_share_by_features_that_cannot_learn_is_refused_at_the_start() -> None:
    module = Probed(hidden=True)
    with pytest.raises(ModelError, match=r"no gradient reaches what makes the features .* Pass suspect=\"auto\""):
        make_trainer([DBRCallback(suspect=0.1)], 1).fit(module, loader_of(Pictures()))
    assert not module.drawn
    assert not any(parameter.requires_grad for parameter in module.body.parameters())
    own = DBRCallback(suspect=0.1, detector=Probed(), detector_steps=2, epochs=1)
    make_trainer([own], 1).fit(Probed(hidden=True), loader_of(Pictures()))
    assert own.verdict is not None, "the remedy works"


def test_dst_cannot_learn_features_of_a_frozen_backbone_and_says_what_can_be_used() -> None:
    module = Probed()
    with pytest.raises(ModelError, match=r"no parameter before layer 'head' can learn.* or use DBRCallback"):
        make_trainer([DSTCallback()], 3).fit(module, loader_of(Pictures()))
    assert not module.drawn
