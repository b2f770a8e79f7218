"""Networks of which only a part can learn: a linear head on a frozen backbone, adapters on frozen layers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_backdoor import DBRCallback, DSTCallback, NONECallback
from lightning_backdoor.errors import ModelError
from lightning_backdoor.responses.reset_units import choose_units, frozen_layers
from lightning_backdoor.surgery import UnitLayer
from tests.callbacks.helpers import (
    LIGHTNING_WARNS,
    Net,
    Pictures,
    loader_of,
    make_trainer,
    same_state,
    state_of,
)
from tests.callbacks.test_thawing import Thaw
from tests.contract.problem import clean, planted

pytestmark = [*LIGHTNING_WARNS, pytest.mark.filterwarnings("ignore:(D-BR|NONE) ends with a model that gives")]


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
    before, flagged_label_rate = state_of(module.body), Obeyed(data)
    callback = DBRCallback(detector_steps=5, epochs=6, extra_epochs=6)
    make_trainer([flagged_label_rate, callback], 8).fit(module, loader_of(data, 32))
    assert flagged_label_rate.shares[7] > 0.9, "the attack must work for the defence to have something to do"
    assert flagged_label_rate.shares[-1] < 0.5 * flagged_label_rate.shares[7]
    assert torch.equal(callback.verdict.suspect, data.poisoned)
    assert same_state(before, module.body)
    assert not any(parameter.requires_grad for parameter in module.body.parameters())


@kinds
def test_dbr_finds_nothing_in_clean_data_on_a_frozen_backbone(hidden: bool) -> None:
    callback = DBRCallback(detector_steps=5, epochs=6, extra_epochs=6)
    make_trainer([callback], 8).fit(Probed(hidden=hidden), loader_of(clean(192), 32))
    assert callback.verdict.keep.all()


def test_the_copy_learns_features_although_those_of_the_model_are_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    twins: list[Any] = []
    monkeypatch.setattr("lightning_backdoor.scanning.measure_fct._agree", lambda _, twin: twins.append(twin))
    module = Probed()
    before = state_of(module.body)
    make_trainer([DBRCallback(suspect=0.1, detector_steps=2, epochs=1, extra_epochs=1)], 1).fit(
        module, loader_of(Pictures())
    )
    assert not torch.equal(twins[0].body[0].weight, before["0.weight"])
    assert torch.equal(module.body[0].weight, before["0.weight"])


def test_a_share_by_features_that_cannot_learn_is_refused_at_the_start() -> None:
    module = Probed(hidden=True)
    with pytest.raises(ModelError, match=r"no gradient reaches what makes the features .* Pass suspect=\"auto\""):
        make_trainer([DBRCallback(suspect=0.1)], 1).fit(module, loader_of(Pictures()))
    assert not module.drawn
    assert not any(parameter.requires_grad for parameter in module.body.parameters())
    own = DBRCallback(suspect=0.1, detector=Probed(), detector_steps=2, epochs=1, extra_epochs=1)
    make_trainer([own], 1).fit(Probed(hidden=True), loader_of(Pictures()))
    assert own.verdict is not None, "the remedy works"


def test_dst_cannot_learn_features_of_a_frozen_backbone_and_says_what_can_be_used() -> None:
    module = Probed()
    with pytest.raises(ModelError, match=r"no parameter before layer 'head' can learn.* or use DBRCallback"):
        make_trainer([DSTCallback()], 3).fit(module, loader_of(Pictures()))
    assert not module.drawn


def unit_layer(name: str, *, trainable: bool) -> UnitLayer:
    return UnitLayer(name, nn.Linear(4, 4), 4, (), trainable=trainable)


def test_units_of_layers_that_do_not_learn_are_measured_told_and_left_alone() -> None:
    layers = [unit_layer("frozen", trainable=False), unit_layer("free", trainable=True)]
    unit_shift = torch.tensor([9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0, 0.0])
    activation_excess = unit_shift[:, None].repeat(1, 3)
    for scores in (unit_shift, None):
        assert [
            (place, unit) for place, unit, *_ in choose_units(layers, activation_excess, scores, reset_fraction=0.25)
        ] == [(1, 2)]
    assert frozen_layers(layers, unit_shift) == ["frozen"]
    assert frozen_layers(layers, unit_shift.flip(0)) == ["frozen"]
    assert frozen_layers(layers, torch.tensor([0.0] * 4 + [9.0] * 4)) == []


def test_none_finds_poisons_by_units_that_are_frozen_and_says_that_they_stay() -> None:
    data, module = planted(192), Probed()
    callback, before = NONECallback(fallback=None), state_of(module.body)
    trainer = make_trainer([callback], 8)
    with (
        pytest.warns(UserWarning, match="can reset no unit: all weights that they need are frozen"),
        pytest.warns(UserWarning, match="drive units of body.0, which do not learn"),
        pytest.warns(UserWarning, match="no unit that they drive can be reset: the backdoor may still be there"),
    ):
        trainer.fit(module, loader_of(data, 32))
    assert torch.equal(~callback.verdict.keep, data.poisoned)
    assert not callback.history[0].units
    assert same_state(before, module.body)


def test_none_finds_nothing_in_clean_data_by_units_that_are_frozen() -> None:
    callback = NONECallback()
    with pytest.warns(UserWarning, match="can reset no unit"):
        make_trainer([callback], 8).fit(Probed(), loader_of(clean(192), 32))
    assert callback.verdict.keep.all()


class Adapter(nn.Module):
    """A frozen layer and a correction of low rank beside it, zero at the start."""

    def __init__(self, base: nn.Conv2d, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Conv2d(base.in_channels, rank, base.kernel_size, padding=base.padding, bias=False)
        self.up = nn.Conv2d(rank, base.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.base(images) + self.up(self.down(images))


class Adapted(Probed):
    """With an adapter at the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.body[0] = Adapter(self.body[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.03)


def test_none_resets_adapters_alone() -> None:
    data, module = planted(192), Adapted()
    callback, before = NONECallback(rounds=1, finetune_epochs=1, extra_epochs=1), state_of(module.body[0].base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_trainer([callback], 8).fit(module, loader_of(data, 32))
    assert torch.equal(~callback.verdict.keep, data.poisoned)
    assert {layer for layer, *_ in callback.history[0].units} <= {"body.0.down", "body.0.up"}
    assert callback.history[0].units
    assert same_state(before, module.body[0].base)


def test_none_finds_nothing_in_clean_data_beside_adapters() -> None:
    callback = NONECallback()
    make_trainer([callback], 8).fit(Adapted(), loader_of(clean(192), 32))
    assert callback.verdict.keep.all()


class Settled(Probed):
    """It hardly learns any more, or forgets, after six epochs."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [6], 1e-3)]


def test_what_was_found_while_units_were_frozen_is_reset_when_they_have_thawed() -> None:
    data, module = planted(192), Settled()
    callback = NONECallback(warmup_epochs=6, finetune_epochs=1, extra_epochs=1, rounds=1, fallback=None)
    with (
        pytest.warns(UserWarning, match="drive units of body.0, which do not learn"),
        pytest.warns(UserWarning, match="no unit that they drive can be reset"),
    ):
        make_trainer([Thaw(7), callback], 8).fit(module, loader_of(data, 32))
    first, second = callback.history
    assert (first.epochs, first.removed, first.units) == (6, int(data.poisoned.sum()), ())
    assert (second.epochs, second.removed) == (8, 0)
    assert {layer for layer, *_ in second.units} == {"body.0"}
