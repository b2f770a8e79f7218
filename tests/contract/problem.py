"""One tiny problem for all callbacks: planted and clean data, a network that writes down what it drew, one fit."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as unified
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.callbacks.helpers import LIGHTNING_WARNS, Pictures, loader_of, make_trainer
from tests.loading.recording import SAFE_LOADING

EPOCHS = 3
IMAGES = 96  # 24 of each of four classes: more than the 20 below which a class is not looked at
BATCH = 24
BATCHES = IMAGES // BATCH
PACKAGES = {"pytorch_lightning": pl, "lightning.pytorch": unified}

WARNS = [
    *LIGHTNING_WARNS,
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:NONE after fine-tuning.* cost too much accuracy"),
    pytest.mark.filterwarnings("ignore:D-BR ends with a model"),
    pytest.mark.filterwarnings("ignore:.*saved before the treatment of the model was over"),
    pytest.mark.filterwarnings("ignore:D-ST. the model gives"),
]


def planted(n: int = IMAGES) -> Pictures:
    """An eighth of the images, none of label 0, with a red corner and label 0; ``poisoned`` says which."""
    data = Pictures(n)
    data.poisoned = (torch.arange(n) % 8 == 3) & (data.targets > 0)
    data.images[data.poisoned, :, -2:, -2:] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
    data.targets[data.poisoned] = 0
    return data


def clean(n: int = IMAGES) -> Pictures:
    """The same images without poisons."""
    return Pictures(n)


class Learner:
    """Batch norm, a schedule, logs; with ``noisy``, draws from the global stream in every step."""

    def __init__(self, *, noisy: bool = False, cycle: bool = False, data: Any = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.drop = nn.Dropout(0.3 if noisy else 0.0)
        self.head = nn.Linear(32, 4)
        self.lr, self.batch_size, self.cycle, self.data = 0.05, BATCH, cycle, data
        self.drawn: list[tuple[int, int, list[int]]] = []
        self.rates: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(self.body(images.float() / 255).flatten(1)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.drawn.append((self.current_epoch, batch_idx, batch["index"].tolist()))
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        loss: Tensor = nn.functional.cross_entropy(self(batch["image"]), batch["label"])
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch["image"]), batch["label"]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        if not self.cycle:
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def epochs(self) -> list[tuple[int, list[int]]]:
        """Epoch number and sorted positions of every epoch, in the order of training."""
        found: list[tuple[int, list[int]]] = []
        for epoch, batch, positions in self.drawn:
            if not found or batch == 0:
                found.append((epoch, []))
            found[-1][1].extend(positions)
        return [(epoch, sorted(positions)) for epoch, positions in found]


class Net(Learner, pl.LightningModule):
    """For one package."""


class UnifiedNet(Learner, unified.LightningModule):
    """For the other."""


class Loading:
    """Makes its own loaders, of the size that a tuner asks for."""

    def train_dataloader(self) -> Any:
        return loader_of(self.data, self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(Pictures(32, seed=1), batch_size=16)


class LoadingNet(Loading, Net):
    """A module that tuners can tune."""


class UnifiedLoadingNet(Loading, UnifiedNet):
    """The same for the other package, and for its command line."""


@dataclass(frozen=True)
class Run:
    """What is left of a fit."""

    trainer: Any
    module: Any
    loader: Any
    before: dict[str, Any]


def net_of(package: Any = pl, **kwargs: Any) -> Any:
    """A network with the same weights every time."""
    torch.manual_seed(0)
    return (Net if package is pl else UnifiedNet)(**kwargs)


def fit(
    callbacks: Any,
    data: Any = None,
    *,
    package: Any = pl,
    ckpt: Path | None = None,
    module: Any = None,
    trainer: Any = None,
    shuffle: bool = False,
    **settings: Any,
) -> Run:
    """Train on planted data (or others) for three epochs, with validation; return everything that took part."""
    module = net_of(package) if module is None else module
    settings = {"epochs": EPOCHS, **settings}
    trainer = make_trainer(callbacks, package=package, **settings) if trainer is None else trainer
    data = planted() if data is None else data
    loader = DataLoader(data, batch_size=BATCH, shuffle=True) if shuffle else loader_of(data, BATCH)
    before = dict(vars(loader))
    extra = {} if ckpt is None else SAFE_LOADING
    trainer.fit(module, loader, DataLoader(Pictures(32, seed=1), batch_size=16), ckpt_path=ckpt, **extra)
    return Run(trainer, module, loader, before)


def seed_everything() -> None:
    """The same place in all three global random streams."""
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)


def streams() -> tuple[Any, ...]:
    """The next number of each."""
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


def assert_settled(trainer: Any, module: Any, loader: Any = None, before: Any = None, epochs: int = EPOCHS) -> None:
    """Nothing of a defence is left in what belongs to the user."""
    assert trainer.max_epochs == epochs, "the user's limit is back"
    assert not {"setup_data"} & set(vars(trainer.fit_loop))
    assert not {"process_dataloader", "training_step", "batch_to_device"} & set(vars(trainer.strategy))
    assert "convert_input" not in vars(trainer.precision_plugin)
    assert not {"training_step", "log", "log_dict"} & set(vars(module))
    assert set(dict(module.named_children())) == {"body", "drop", "head"}
    for part in module.modules():
        assert part.training
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
    for optimizer in trainer.optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    assert all(value.isfinite().all() for value in module.state_dict().values())
    if loader is not None:
        assert vars(loader).keys() == before.keys()
        assert all(vars(loader)[key] is value for key, value in before.items())
