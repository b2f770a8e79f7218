"""Train the network of a setting, and ask it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks import model
from benchmarks.protocols import Setting
from lightning_backdoor import metrics

BATCH = 128


class Snapshot(pl.Callback):
    """Saves a checkpoint after so many epochs, from which a run can go on; ``stop`` ends the run there."""

    def __init__(self, path: Path, epochs: int, *, stop: bool = False) -> None:
        self.path, self.epochs, self.stop = path, epochs, stop

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epochs - 1:
            trainer.save_checkpoint(self.path)
            trainer.should_stop |= self.stop


def train_network(
    dataset: Dataset[Any],
    callbacks: list[pl.Callback],
    setting: Setting,
    seed: int,
    checkpoint: Path | None,
    *,
    device: str = "cpu",
    workers: int = 0,
    mixed: bool = True,
    batch: int | None = None,
) -> model.Classifier:
    """Train the network of a setting with callbacks, from a checkpoint on if there is one; ``mixed``: in bfloat16."""
    pl.seed_everything(seed, verbose=False)
    loader = DataLoader(
        dataset, batch or BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    network = model.Classifier(setting.epochs * len(loader), setting.model, setting.recipe, setting.classes)
    trainer = pl.Trainer(
        max_epochs=setting.epochs, accelerator=device, devices=1, callbacks=callbacks,
        precision="bf16-mixed" if mixed else "32-true",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(network, loader, ckpt_path=checkpoint)
    return network.eval()


def labels_of(dataset: Any) -> torch.Tensor:
    """Labels as a victim receives them, long (N,)."""
    return torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])


def images_of(dataset: Any) -> torch.Tensor:
    """Images as a victim receives them, uint8 (N, 3, 32, 32)."""
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


@torch.no_grad()
def logits_of(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits (N, 10) of uint8 images (N, 3, 32, 32), on the CPU."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([network(part).float() for part in images.split(500)])


@torch.no_grad()
def accuracy(network: model.Classifier, dataset: Dataset[Any], device: str = "cpu", *, mixed: bool = True) -> float:
    """Share of the images that get the label of the dataset; ``mixed``: in bfloat16."""
    metric = metrics.RecoveredAccuracy()
    network.to(device)
    for images, labels in DataLoader(dataset, batch_size=500):
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            logits = network(images.to(device))
        metric.update(logits.float().cpu(), labels)
    return float(metric.compute())
