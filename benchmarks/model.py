"""The classifier of the benchmark as an ordinary LightningModule, and the recipes that train it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.networks import NAME, NETWORKS

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
RECIPE = "one-cycle"


@dataclass(frozen=True)
class Recipe:
    """An optimizer and a schedule.

    Attributes:
        lr: Largest learning rate.
        weight_decay: Of all parameters.
        schedule: ``"steps"`` divides the rate by ten at each of ``drops``.
        drops: Shares of the training, in ``(0, 1)``; none leaves the rate as it is.
        optimizer: SGD has momentum 0.9.
        nesterov: Kind of the momentum.
        mirror: Whether half of the images are mirrored; traffic signs change their meaning.
    """

    lr: float
    weight_decay: float
    schedule: Literal["one-cycle", "cosine", "steps"]
    drops: tuple[float, ...] = ()
    optimizer: Literal["sgd", "adamw"] = "sgd"
    nesterov: bool = False
    mirror: bool = True


RECIPES = {
    RECIPE: Recipe(0.1, 5e-4, "one-cycle", nesterov=True),
    "NONE": Recipe(0.1, 1e-4, "steps", (0.4, 0.8)),  # 200 epochs, every 80
    "D-BR": Recipe(0.01, 5e-4, "steps", (0.5, 0.75)),  # 200 epochs, at 100 and 150
    "UltraClean": Recipe(0.1, 5e-4, "steps"),  # 200 epochs, constant
    "BackdoorBench": Recipe(0.01, 5e-4, "cosine"),  # 100 epochs
    "small": Recipe(2e-3, 0.0, "steps", optimizer="adamw"),  # that is Adam
    "adamw": Recipe(1e-3, 0.05, "one-cycle", optimizer="adamw"),
    "adamw-signs": Recipe(1e-3, 0.05, "one-cycle", optimizer="adamw", mirror=False),
}
"""By name; batches of 128 in all of them. For the papers' epochs see :mod:`benchmarks.protocols`."""


class Classifier(pl.LightningModule):
    """Cross-entropy under a recipe, crop and flip on the batch."""

    def __init__(self, steps: int, network: str = NAME, recipe: str = RECIPE, classes: int = 10) -> None:
        super().__init__()
        self.steps, self.recipe = steps, RECIPES[recipe]
        self.network = NETWORKS[network](classes=classes).to(memory_format=torch.channels_last)
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of uint8 images (B, 3, 32, 32)."""
        x = (images.float() - self.mean) / self.std
        return self.network(x.contiguous(memory_format=torch.channels_last))

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augment while training."""
        images, labels = batch
        return (crop_and_flip(images, mirror=self.recipe.mirror) if self.trainer.training else images), labels

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> dict[str, Any]:
        """Optimizer and schedule of the recipe over the planned number of steps."""
        recipe, schedules, steps = self.recipe, torch.optim.lr_scheduler, self.steps
        optimizer: torch.optim.Optimizer
        if recipe.optimizer == "adamw":
            optimizer = torch.optim.AdamW(self.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
        else:
            optimizer = torch.optim.SGD(
                self.parameters(), recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
            )
        schedule: torch.optim.lr_scheduler.LRScheduler
        if recipe.schedule == "one-cycle":
            schedule = schedules.OneCycleLR(optimizer, recipe.lr, total_steps=steps, pct_start=0.2)
        elif recipe.schedule == "cosine":
            schedule = schedules.CosineAnnealingLR(optimizer, steps)
        else:
            schedule = schedules.MultiStepLR(optimizer, [int(share * steps) for share in recipe.drops])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def crop_and_flip(images: Tensor, padding: int = 4, *, mirror: bool = True) -> Tensor:
    """Shift every image by up to ``padding`` pixels (zeros move in) and, if ``mirror``, mirror half of them."""
    size, side = len(images), images.shape[-1]
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    device = images.device
    offsets = torch.randint(0, 2 * padding + 1, (2, size, 1), device=device) + torch.arange(side, device=device)
    columns = torch.where(torch.rand(size, 1, device=device) < 0.5 * mirror, offsets[1].flip(1), offsets[1])
    rows = torch.arange(size, device=device)[:, None, None], offsets[0][:, :, None], columns[:, None, :]
    return padded[rows].permute(0, 3, 1, 2)
