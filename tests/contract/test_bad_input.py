"""Data that no defence can work with: named, refused, and nothing of the user's is harmed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_backdoor.errors import BackdoorDefenseError, DataError
from tests.callbacks.helpers import Pictures, loader_of, make_trainer
from tests.contract.problem import BATCH, EPOCHS, WARNS, Loading, Net, assert_settled, fit, net_of, planted
from tests.contract.registry import Entry, every_defense, every_kind_of_defense

pytestmark = WARNS


class Broken(Pictures):
    """One image cannot be read."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if i == 70:
            raise OSError("image 70 is cut off")
        return super().__getitem__(i)


@every_defense
def test_an_image_that_cannot_be_read_ends_the_fit_and_nothing_else(entry: Entry) -> None:
    callback, module = entry.make(), net_of()
    trainer = make_trainer([callback], EPOCHS)
    with pytest.raises(OSError, match="image 70 is cut off"):
        fit([], Broken(96), module=module, trainer=trainer)
    assert_settled(trainer, module)
    assert callback.verdict is None
    run = fit([callback])
    assert entry.acted(callback, run.trainer)


class NotANumber(Pictures):
    """One image of floats is not a number, far from those that are looked at first."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = super().__getitem__(i)
        return {**item, "image": item["image"].float() / 255 * (float("nan") if i == 90 else 1.0)}


class Robust(Net):
    """A model that does not mind."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(255 * images.nan_to_num())


@every_defense
def test_an_image_that_is_not_a_number_is_named(entry: Entry) -> None:
    torch.manual_seed(0)
    callback, module = entry.make(), Robust()
    trainer = make_trainer([callback], EPOCHS)
    with pytest.raises(BackdoorDefenseError, match="90"):
        fit([], NotANumber(96), module=module, trainer=trainer)
    assert_settled(trainer, module)
    assert callback.verdict is None


class Shrinking(Loading, Net):
    """Fewer images in every epoch."""

    def train_dataloader(self) -> Any:
        return loader_of(planted(96 - 8 * self.current_epoch), BATCH)


@pytest.mark.case("27")
@every_kind_of_defense
def test_a_dataset_that_changes_its_size_is_refused_once_positions_count(entry: Entry) -> None:
    torch.manual_seed(0)
    callback, module = entry.make(), Shrinking()
    trainer = make_trainer([callback], EPOCHS, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(BackdoorDefenseError, match=r"\d+ samples"):
        trainer.fit(module)
    assert_settled(trainer, module)


class Fractions(Pictures):
    """Labels that are no class indices."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = super().__getitem__(i)
        return {**item, "label": item["label"] + 0.5}


@every_kind_of_defense
def test_labels_that_are_no_class_indices_are_refused_before_the_first_step(entry: Entry) -> None:
    callback, module = entry.make(), net_of()
    trainer = make_trainer([callback], EPOCHS)
    with pytest.raises(DataError, match=r"labels .*They have fractions"):
        fit([], Fractions(96), module=module, trainer=trainer)
    assert trainer.global_step == 0
    assert_settled(trainer, module)
