"""Ask a question about the training images through the machinery of the defences, and train nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from benchmarks import model
from benchmarks.cases import Case
from benchmarks.training import BATCH
from lightning_backdoor.callbacks.base import Defense
from lightning_backdoor.scanning.scanner import DatasetScanner, ScanOptions

Question = Callable[[pl.Trainer, model.Classifier, DatasetScanner], Any]


class Look(Defense):
    """Asks the question at the start of fit and keeps the answer; the fit ends there."""

    method = "Look"

    def __init__(self, question: Question) -> None:
        super().__init__(max_removed=0.3, options=ScanOptions(), report_dir=None, name=None)
        self.question = question
        self.answer: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look, and stop."""
        super().on_train_start(trainer, pl_module)
        self.answer = self.question(trainer, pl_module, self._training_set)
        trainer.should_stop = True


def look(case: Case, question: Question, *, start_from: Path | None) -> Any:
    """What a question has for an answer, for a network with fresh weights or those of a checkpoint."""
    pl.seed_everything(0, verbose=False)
    loader = DataLoader(case.dataset, batch_size=BATCH, shuffle=True, drop_last=True)
    module = model.Classifier(case.setting.epochs * len(loader), case.setting.model, case.setting.recipe)
    if start_from is not None:
        module.load_state_dict(torch.load(start_from, weights_only=True)["state_dict"])
    asking = Look(question)
    trainer = pl.Trainer(
        max_epochs=1, min_epochs=0, limit_train_batches=1, accelerator="cpu", precision="bf16-mixed",
        callbacks=[asking], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return asking.answer
