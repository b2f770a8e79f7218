"""Small networks that two CPU cores can train, as an ordinary LightningModule."""

from __future__ import annotations

import pytorch_lightning as pl
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "resnet9-relu-0.26M"
WIDTHS = (16, 32, 64, 96)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_conv(width, width), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def resnet9(widths: tuple[int, int, int, int] = WIDTHS, classes: int = 10) -> nn.Sequential:
    """Six plain and two residual stages with max pooling, 265 thousand parameters."""
    a, b, c, d = widths
    pool = nn.MaxPool2d(2)
    return nn.Sequential(
        _conv(3, a), _conv(a, b), pool, Residual(b), _conv(b, c), pool, _conv(c, d), pool, Residual(d),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(d, classes),
    )  # fmt: skip


class PreActivation(nn.Module):
    """Batch norm and GELU before each of two convolutions, beside the identity or a projection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.GELU(), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs), nn.GELU(), nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )  # fmt: skip
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.branch(x)


def preact_gelu(widths: tuple[int, int, int, int] = WIDTHS, classes: int = 10) -> nn.Sequential:
    """Four pre-activation stages whose sum is pooled as it is, so that features have signs; 272 thousand parameters."""
    a, b, c, d = widths
    return nn.Sequential(
        nn.Conv2d(3, a, 3, padding=1, bias=False), PreActivation(a, a, 1), PreActivation(a, b, 2),
        PreActivation(b, c, 2), PreActivation(c, d, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(d, classes),
    )  # fmt: skip


def small_vit(classes: int = 10) -> nn.Module:
    """A vision transformer of timm with patches of 4 x 4 pixels, 0.46 million parameters."""
    return timm.models.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3, num_classes=classes
    )


NETWORKS = {NAME: resnet9, "preact-gelu": preact_gelu, "vit": small_vit}


class Classifier(pl.LightningModule):
    """Cross-entropy, SGD with Nesterov momentum under a one-cycle schedule, crop and flip on the batch."""

    def __init__(self, steps: int, lr: float = 0.1, weight_decay: float = 5e-4, network: str = NAME) -> None:
        super().__init__()
        self.steps, self.lr, self.weight_decay = steps, lr, weight_decay
        self.network = NETWORKS[network]().to(memory_format=torch.channels_last)
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of uint8 images (B, 3, 32, 32)."""
        x = (images.float() - self.mean) / self.std
        return self.network(x.contiguous(memory_format=torch.channels_last))

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augment while training."""
        images, labels = batch
        return (crop_and_flip(images) if self.trainer.training else images), labels

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> dict[str, object]:
        """SGD under one cycle over the planned number of steps."""
        sgd = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=self.weight_decay, nesterov=True)
        cycle = torch.optim.lr_scheduler.OneCycleLR(sgd, self.lr, total_steps=self.steps, pct_start=0.2)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Shift every image by up to ``padding`` pixels (zeros move in) and mirror half of them."""
    size, side = len(images), images.shape[-1]
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    offsets = torch.randint(0, 2 * padding + 1, (2, size, 1)) + torch.arange(side)
    columns = torch.where(torch.rand(size, 1) < 0.5, offsets[1].flip(1), offsets[1])
    rows = torch.arange(size)[:, None, None], offsets[0][:, :, None], columns[:, None, :]
    return padded[rows].permute(0, 3, 1, 2)
