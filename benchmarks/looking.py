"""Measure the training images of a case through a network, and train nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import model
from benchmarks.cases import Case
from benchmarks.training import BATCH
from lightning_backdoor import measure


class Measuring(pl.Callback):
    """Measures at the start of fit and ends it there; ``settings`` are those of :func:`lightning_backdoor.measure`."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.found: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, and stop."""
        self.found = measure(trainer, pl_module, trainer.train_dataloader, **self.settings)
        trainer.should_stop = True


def look(case: Case, *, start_from: Path | None, **settings: Any) -> dict[str, Tensor]:
    """Measurements of all training images by a network with fresh weights, or with those of a checkpoint."""
    pl.seed_everything(0, verbose=False)
    loader = DataLoader(case.dataset, batch_size=BATCH, shuffle=True, drop_last=True)
    module = model.Classifier(case.setting.epochs * len(loader), case.setting.model, case.setting.recipe)
    if start_from is not None:
        module.load_state_dict(torch.load(start_from, weights_only=True)["state_dict"])
    measuring = Measuring(**settings)
    trainer = pl.Trainer(
        max_epochs=1, min_epochs=0, limit_train_batches=1, accelerator="cpu", precision="bf16-mixed",
        callbacks=[measuring], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return measuring.found
