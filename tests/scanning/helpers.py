"""A model with every trap for a careless scan, randomly augmented data, and a callback that scans from any hook."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_backdoor.data.views import scan_loader
from lightning_backdoor.scanning.isolation import prepare_batch
from lightning_backdoor.scanning.outputs import call_model
from lightning_backdoor.scanning.scan import scan, shard
from tests.accelerators import trainer_settings

LIGHTNING_WARNS = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


class NoisyData(Dataset[tuple[Tensor, Tensor]]):
    """Images whose augmentation draws from torch, numpy and random."""

    def __init__(self, n: int = 63) -> None:
        self.images = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        self.labels = torch.arange(n) % 4

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(()) + float(np.random.rand()) + random.random()
        return self.images[i] + 0.1 * noise, self.labels[i]


class Trap(pl.LightningModule):
    """Dropout, batch norm, a frozen eval() batch norm, logging in forward, a buffer that counts, a cached tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.frozen = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(6, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.cache: Tensor | None = None
        self.losses: list[float] = []
        self.augmented = 0
        self.seen_stage: set[str] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.log("forward_mean", images.mean())
        self.log_dict({"forward_std": images.std()})
        hidden = self.drop(self.frozen(self.norm(self.conv(images))).relu().mean((2, 3)))
        if self.cache is None:
            self.cache = torch.ones(6, device=hidden.device)
        return self.fc(hidden * self.cache)

    def on_train_epoch_start(self) -> None:
        self.frozen.eval()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen_stage.add(str(self.trainer.state.stage))
        if not self.trainer.training:
            return batch
        self.augmented += 1
        return batch[0] * (1 + 0.1 * torch.rand(())), batch[1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Scanner(pl.Callback):
    """Scans the whole training set whenever one of ``hooks`` is called."""

    def __init__(self, data: NoisyData, hooks: tuple[str, ...], batch_size: int = 10, num_workers: int = 0) -> None:
        self.data, self.batch_size, self.num_workers = data, batch_size, num_workers
        self.results: list[dict[str, Tensor]] = []
        for hook in hooks:
            setattr(self, hook, self.run)

    def run(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.results.append(scan_logits(trainer, pl_module, self.data, self.batch_size, self.num_workers))


def scan_logits(
    trainer: Any, module: Any, data: NoisyData, batch_size: int = 10, num_workers: int = 0
) -> dict[str, Tensor]:
    loader = scan_loader(
        train_loader(data), shard(len(data), trainer), seed=5, batch_size=batch_size, num_workers=num_workers
    )

    def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
        images, labels = prepare_batch(trainer, module, batch)
        logits = call_model(module, images)
        return {"logits": logits, "label": labels, "right": logits.argmax(1) == labels}

    return scan(trainer, module, loader, step, description="scanning")


def make_trainer(callbacks: list[Any], epochs: int = 2, **settings: Any) -> pl.Trainer:
    options: dict[str, Any] = {
        **trainer_settings(pl),
        "max_epochs": epochs,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": callbacks,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(**{**options, **settings})


def train_loader(data: NoisyData, num_workers: int = 0) -> DataLoader[Any]:
    return DataLoader(data, batch_size=16, shuffle=True, num_workers=num_workers, persistent_workers=num_workers > 0)
