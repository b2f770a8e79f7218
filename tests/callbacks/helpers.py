"""Tiny poisoned data, a model that says what it was trained on, and Trainers that say nothing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from lightning_backdoor import UltraCleanCallback, attacks
from lightning_backdoor.responses.limits import hold_open, release
from tests.accelerators import on_cpu, trainer_settings

LIGHTNING_WARNS = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches.*log_every_n_steps"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`"),
    # tests that write weights down: they are copies that came of the training
    pytest.mark.filterwarnings(r"ignore:`(Before|FirstBatches|Moments?)\..*copies of the model"),
]


class Pictures(Dataset[dict[str, Tensor]]):
    """Bright quadrants under noise, uint8; a position that says which one is part of every item."""

    def __init__(self, n: int = 64, size: int = 8, channels: int = 3, classes: int = 4, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.arange(n) % classes
        self.images = torch.randint(0, 120, (n, channels, size, size), generator=generator, dtype=torch.uint8)
        half = size // 2
        for image, label in zip(self.images, self.targets.tolist(), strict=True):
            row, column = label // 2 % 2 * half, label % 2 * half
            image[:, row : row + half, column : column + half] += 100

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"image": self.images[i], "label": self.targets[i], "index": torch.tensor(i)}


class Pairs(Dataset[tuple[Any, Any]]):
    """The same as ``(image, label)``."""

    def __init__(self, n: int = 64, **kwargs: Any) -> None:
        data = Pictures(n, **kwargs)
        self.images, self.targets = data.images, data.targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.images[i], self.targets[i]


class ByEpoch(Sampler[int]):
    """A shuffle that depends on the epoch alone, so that an interrupted run draws what the other one drew."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.epoch = n, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.n, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Net(pl.LightningModule):
    """A small batch-normalised network that writes down which positions it saw in which epoch."""

    def __init__(self, channels: int = 3, classes: int = 4, width: int = 8, lr: float = 0.05, schedule: bool = True):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
        )
        self.head = nn.Linear(4 * width, classes)
        self.lr, self.schedule = lr, schedule
        self.drawn: list[tuple[int, int, list[int]]] = []
        self.logged: list[float] = []
        self.rates: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images.float() / 255).flatten(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = (batch["image"], batch["label"]) if isinstance(batch, dict) else (batch[0], batch[1])
        if isinstance(batch, dict):
            self.drawn.append((self.current_epoch, batch_idx, batch["index"].tolist()))
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("loss", loss)
        self.logged.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = (batch["image"], batch["label"]) if isinstance(batch, dict) else (batch[0], batch[1])
        self.log("val_loss", nn.functional.cross_entropy(self(images), labels))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)] if self.schedule else []

    def epochs(self) -> list[tuple[int, list[int]]]:
        """Epoch number and sorted positions of every epoch, in the order of training."""
        found: list[tuple[int, list[int]]] = []
        for epoch, batch, positions in self.drawn:
            if not found or batch == 0:
                found.append((epoch, []))
            found[-1][1].extend(positions)
        return [(epoch, sorted(positions)) for epoch, positions in found]


class FirstBatches(pl.Callback):
    """What optimizer, counters and schedulers look like before every first batch of an epoch 0."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, i: int) -> None:
        if trainer.current_epoch == 0 and i == 0:
            self.seen.append(
                {
                    "step": trainer.global_step,
                    "momentum": len(trainer.optimizers[0].state),
                    "lr": trainer.optimizers[0].param_groups[0]["lr"],
                    "schedule": [
                        copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs
                    ],
                    "weights": state_of(pl_module),
                }
            )


class HeldOpen(pl.Callback):
    """Another defence that needs more epochs than planned, from the start to the end of ``until``."""

    def __init__(self, until: int, shown: int | None = None) -> None:
        self.until, self.shown = until, shown

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        hold_open(trainer, self, self.shown)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch + 1 >= self.until:
            release(trainer, self)


def make_trainer(callbacks: list[Any], epochs: int | None = 4, package: Any = pl, **kwargs: Any) -> Any:
    """A silent Trainer on the CPU that writes nothing unless told to."""
    settings: dict[str, Any] = {
        "max_epochs": epochs,
        **trainer_settings(package),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return package.Trainer(callbacks=callbacks, **{**settings, **kwargs})


def loader_of(dataset: Any, batch_size: int = 16, **kwargs: Any) -> DataLoader[Any]:
    """A loader whose shuffle depends on the epoch alone."""
    return DataLoader(dataset, batch_size=batch_size, sampler=ByEpoch(len(dataset)), **kwargs)


def fit(
    callbacks: list[Any], dataset: Any = None, epochs: int | None = 4, val: Any = None, ckpt: Any = None, **kwargs: Any
) -> tuple[Any, Net]:
    """Train a fresh :class:`Net` and return Trainer and module."""
    torch.manual_seed(0)
    module, trainer = Net(), make_trainer(callbacks, epochs, **kwargs)
    train = loader_of(Pictures() if dataset is None else dataset)
    trainer.fit(module, train, None if val is None else DataLoader(val, batch_size=16), ckpt_path=ckpt)
    return trainer, module


def always(**kwargs: Any) -> UltraCleanCallback:
    """UltraClean that removes a quarter after two epochs, whatever the data look like."""
    return UltraCleanCallback(**{"warmup_epochs": 2, "rule": "fraction", "fraction": 0.25, **kwargs})


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of weights and buffers, on the CPU."""
    return {name: on_cpu(value).clone() for name, value in module.state_dict().items()}


def same_state(a: nn.Module | dict[str, Tensor], b: nn.Module | dict[str, Tensor]) -> bool:
    """Whether all weights and buffers are equal bit by bit."""
    left, right = (on_cpu(x.state_dict() if isinstance(x, nn.Module) else x) for x in (a, b))
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def digits(n: int = 700) -> tuple[TensorDataset, TensorDataset]:
    """scikit-learn's digits as uint8 (3, 16, 16): ``n`` to train on, 397 to test on."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    pixels = torch.from_numpy(data.images * 255 / 16).float().unsqueeze(1)
    pixels = nn.functional.interpolate(pixels, size=(16, 16), mode="bilinear").round().byte().repeat(1, 3, 1, 1)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    labels = torch.from_numpy(data.target).long()
    train, test = (TensorDataset(pixels[part], labels[part]) for part in (order[:n], order[1400:]))
    return train, test


class DigitNet(Net):
    """Three convolutional blocks, enough to learn digits and a backdoor in six epochs."""

    def __init__(self) -> None:
        super().__init__(schedule=False)
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(64, 10)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def train_digits(dataset: Any, callbacks: list[Any], epochs: int = 6, **kwargs: Any) -> tuple[Any, DigitNet]:
    torch.manual_seed(0)
    module, trainer = DigitNet(), make_trainer(callbacks, epochs=epochs, **kwargs)
    trainer.fit(module, DataLoader(dataset, batch_size=64, shuffle=True))
    return trainer, module


@functools.cache
def poisoned_digits(n: int = 700) -> Any:
    """``n`` digits, one in twenty with a mark and label 0."""
    return attacks.poison(digits(n)[0], attacks.BadNets(), target=0, rate=0.05)


@functools.cache
def undefended(poisoned: bool) -> DigitNet:
    """What six epochs of ordinary training lead to: many tests compare with it, and none changes it."""
    return train_digits(poisoned_digits() if poisoned else digits()[0], [])[1]


@torch.no_grad()
def share_right(module: nn.Module, dataset: Any) -> float:
    """Share of the images that get the label that the dataset gives them."""
    images, labels = next(iter(DataLoader(dataset, batch_size=len(dataset))))
    return float((module.eval()(images).argmax(dim=1) == labels).float().mean())
