"""Scikit-learn's digits, and a small network for them, with which an experiment takes a minute."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


class Classifier(pl.LightningModule):
    """Three convolutions with batch norms on uint8 images; Adam."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.layers(images.float() / 255)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on all parameters."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def all_digits() -> tuple[Tensor, Tensor]:
    """The 1,797 digits as they come, uint8 (N, 3, 32, 32), and their labels."""
    data = load_digits()
    pixels = torch.from_numpy(data.images * 255 / 16).float().unsqueeze(1)
    pixels = F.interpolate(pixels, size=(32, 32), mode="bilinear").round().to(torch.uint8).repeat(1, 3, 1, 1)
    return pixels, torch.from_numpy(data.target).long()


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,400 digits to train on and 397 to test on, drawn at random."""
    pixels, labels = all_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = (TensorDataset(pixels[part], labels[part]) for part in (order[:1400], order[1400:]))
    return train, test


@torch.no_grad()
def right(model: Classifier, dataset: Dataset[tuple[Tensor, Tensor]]) -> float:
    """Per cent of the images that get the label that the dataset gives them."""
    images, labels = next(iter(DataLoader(dataset, batch_size=len(dataset))))  # type: ignore[arg-type]
    return 100 * float((model(images).argmax(dim=1) == labels).float().mean())
