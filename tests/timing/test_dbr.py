"""What D-BR's detector costs beside epochs of training, and an epoch of repair beside an ordinary one (printed)."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_backdoor import DBRCallback, Verdict
from lightning_backdoor.scanning.measure_fct import Detector, distinguish
from tests.scanning.helpers import LIGHTNING_WARNS
from tests.timing.test_ultraclean import Images, Model, opened, timed

pytestmark = [*LIGHTNING_WARNS, pytest.mark.benchmark]


def test_the_detector_against_epochs_of_training(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(2)
    n = 50_000
    trainer, module, loader, data = opened(n)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)

    def epoch() -> None:
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(module(images), labels).backward()
            optimizer.step()

    def ours() -> None:
        distinguish(trainer, module, data, Detector("copy", None, 200, 2, None, 0), units=True)

    before, ratio, after = timed(epoch), timed(ours), timed(epoch)
    ratio /= (before + after) / 2
    with capsys.disabled():
        print(
            f"\nD-BR's detector, {n} images, 2 x 200 steps, 2 transformations, units: {ratio:.2f}"
            f" epochs of training (epochs: {before:.1f} s and {after:.1f} s)"
        )


class Trained(Model):
    """The network with a training step."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Clock(pl.Callback):
    """Seconds per image of every epoch, with what other callbacks do at its end."""

    def __init__(self) -> None:
        self.costs: list[float] = []
        self.images, self.began = 0, 0.0

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.images, self.began = 0, time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.images += len(batch[0])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.costs.append((time.perf_counter() - self.began) / self.images)


def test_an_epoch_of_repair_against_an_ordinary_one(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(2)
    n, ordinary = 8000, 3
    suspect = torch.arange(n) % 20 == 0
    verdict = Verdict(suspect.float(), ~suspect, 0.5, "given", torch.arange(n) % 10)
    clock = Clock()
    trainer = pl.Trainer(
        max_epochs=ordinary, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[DBRCallback(verdict=verdict, epochs=4, mean=(0.5,) * 3, std=(0.5,) * 3), clock],
    )  # fmt: skip
    trainer.fit(Trained(), DataLoader(Images(n), batch_size=128, shuffle=True))
    plain, repair = clock.costs[1 : ordinary - 1] + clock.costs[:1], clock.costs[ordinary:]
    with capsys.disabled():
        print(
            f"\nD-BR, time per image of an epoch of repair with its check / of an ordinary epoch, {n} images: "
            f"{statistics.median(repair) / statistics.median(plain):.2f}"
        )
