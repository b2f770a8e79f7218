"""What can be measured of every sample without a decision."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_backdoor import measure
from lightning_backdoor.errors import ArgumentError
from tests.accelerators import trainer_settings
from tests.scanning.helpers import LIGHTNING_WARNS

pytestmark = LIGHTNING_WARNS
N = 40


class Net(pl.LightningModule):
    """One convolution on uint8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images.float() / 255))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Measuring(pl.Callback):
    """Measures before the first step."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.found = settings, {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.found = measure(trainer, pl_module, trainer.train_dataloader, **self.settings)


def fitted(*callbacks: pl.Callback) -> Net:
    pl.seed_everything(0)
    module = Net()
    images = torch.randint(0, 256, (N, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(images, torch.arange(N) % 2)
    trainer = pl.Trainer(
        max_epochs=1, **trainer_settings(pl), callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=8, shuffle=True))
    return module


def test_every_sample_is_measured_in_the_order_of_the_dataset_and_training_stays_the_same() -> None:
    every = ("denoised", "units", "fct", "detector_units")
    measuring = Measuring(what=every, detector_steps=2)
    module, plain = fitted(measuring), fitted()
    found = measuring.found
    scores = {"susceptibility", "movement", "bias", "raw_bias", "fct"}
    assert set(found) == scores | {"labels", "denoised", "units", "detector_units"}
    assert {len(values) for values in found.values()} == {N}
    assert {found[name].dim() for name in scores} == {1}
    assert found["denoised"].shape == (N, 12)
    assert torch.equal(found["labels"], torch.arange(N) % 2), "the loader shuffles, positions stay"
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in module.state_dict().items())
    parts = [Measuring(what=(name,), detector_steps=2) for name in every[:3]]
    for part in parts:
        fitted(part)
        assert all(torch.equal(value, found[name]) for name, value in part.found.items()), "no part changes another"


def test_an_unknown_quantity_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"`what` must name some of 'denoised'.*got \['loss'\]"):
        fitted(Measuring(what=("loss",)))
