"""`UltraCleanCallback()` without an argument in front of many models, batches, sizes and loaders."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as lightning_pytorch
import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torchvision.transforms import v2

from lightning_backdoor import UltraCleanCallback
from tests.callbacks.helpers import LIGHTNING_WARNS, make_trainer

pytestmark = [*LIGHTNING_WARNS, pytest.mark.filterwarnings("ignore:No layer's output is the logits themselves")]

BACKBONES = {
    "resnet": ("test_resnet", 32, {}),
    "vgg": ("vgg11", 32, {"mlp_ratio": 0.01}),
    "efficientnet": ("test_efficientnet", 32, {}),
    "mobilenet": ("mobilenetv3_small_050", 32, {}),
    "convnext": ("test_convnext", 32, {}),
    "vit": ("test_vit", 32, {"img_size": 32}),
    "deit": ("deit_tiny_distilled_patch16_224", 32, {"img_size": 32, "depth": 1}),
    "mixer": ("mixer_s32_224", 32, {"img_size": 32}),
    "resmlp": ("resmlp_12_224", 32, {"img_size": 32}),
    "regnet": ("regnetx_002", 32, {}),
    "densenet": ("densenet121", 32, {"growth_rate": 4, "block_config": (1, 1)}),
}


def module_of(package: Any, network: nn.Module, unpack: Any = lambda batch: (batch[0], batch[1])) -> Any:
    class Module(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Tensor) -> Any:
            return self.network(images)

        def training_step(self, batch: Any, _: int) -> Tensor:
            images, labels = unpack(batch)
            logits = self(images)
            logits = logits[0] if isinstance(logits, tuple) else logits
            loss: Tensor = nn.functional.cross_entropy(logits, labels)
            return loss

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    return Module()


def conv(channels: int = 3, classes: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, classes)
    )


class Items(Dataset[Any]):
    """Images in 0..1, or normalised, made into any kind of item."""

    def __init__(
        self,
        make: Any = lambda image, label, i: (image, label),
        n: int = 24,
        shape: Any = (3, 16, 16),
        classes: int = 4,
        normalize: Any = lambda pixels: pixels,
    ) -> None:
        pixels = torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(0)).float() / 255
        self.images, self.labels, self.make = normalize(pixels), torch.arange(n) % classes, make

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        return self.make(self.images[i], int(self.labels[i]), i)


def assert_works(
    module: Any, data: Any, package: Any = pl, epochs: int = 1, batch_size: int = 12
) -> UltraCleanCallback:
    """One run; the verdict covers the dataset, and its labels are the dataset's."""
    callback = UltraCleanCallback()
    trainer = make_trainer([callback], epochs, package=package)
    loader = data if isinstance(data, DataLoader) else DataLoader(data, batch_size=batch_size, shuffle=True)
    trainer.fit(module, loader)
    verdict = callback.verdict
    assert len(verdict) == len(loader.dataset)
    assert bool(verdict.scores.isfinite().all())
    assert verdict.scores.unique().numel() > 1
    assert torch.equal(verdict.labels, loader.dataset.labels)
    return callback


@pytest.mark.parametrize("family", BACKBONES)
def test_timm_backbones(family: str) -> None:
    name, size, settings = BACKBONES[family]
    network = timm.create_model(name, pretrained=False, num_classes=4, **settings)
    package = pl if len(family) % 2 else lightning_pytorch
    normalize = v2.Normalize(network.pretrained_cfg["mean"], network.pretrained_cfg["std"])
    assert_works(module_of(package, network), Items(shape=(3, size, size), normalize=normalize), package)


@pytest.mark.parametrize(
    ("make", "unpack"),
    [
        (lambda x, y, i: (x, y), lambda b: (b[0], b[1])),
        (lambda x, y, i: [x, torch.tensor(y)], lambda b: (b[0], b[1])),
        (lambda x, y, i: {"pixel_values": x, "labels": y}, lambda b: (b["pixel_values"], b["labels"])),
        (lambda x, y, i: {"foo": y, "bar": x}, lambda b: (b["bar"], b["foo"])),
        (lambda x, y, i: {"id": i, "name": str(i), "img": x, "cls": y}, lambda b: (b["img"], b["cls"])),
        (lambda x, y, i: (x, {"label": y, "index": i}), lambda b: (b[0], b[1]["label"])),
    ],
    ids=["tuple", "list", "dict", "strange keys", "dict with more", "nested"],
)
def test_batches(make: Any, unpack: Any) -> None:
    assert_works(module_of(pl, conv(), unpack), Items(make))


@pytest.mark.parametrize("package", [pl, lightning_pytorch], ids=["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize(
    ("shape", "classes", "n"),
    [((1, 8, 8), 2, 24), ((3, 8, 8), 4, 24), ((1, 28, 28), 10, 24), ((4, 16, 20), 4, 24), ((3, 8, 8), 1000, 60)],
    ids=str,
)
def test_sizes_channels_and_classes(package: Any, shape: tuple[int, ...], classes: int, n: int) -> None:
    data = Items(n=n, shape=shape, classes=classes)
    assert_works(module_of(package, conv(shape[0], classes)), data, package, epochs=2)


def test_a_large_image() -> None:
    assert_works(module_of(pl, conv()), Items(n=4, shape=(3, 224, 224)), batch_size=2)


def test_two_classes_on_one_logit() -> None:
    class Binary(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = conv(classes=1)

        def forward(self, images: Tensor) -> Tensor:
            return self.network(images)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.binary_cross_entropy_with_logits(self(batch[0]).squeeze(1), batch[1].float())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    assert_works(Binary(), Items(classes=2))


class Folder(Dataset[Any]):
    """PIL images with a transform, like torchvision's datasets."""

    def __init__(self, transform: Any, n: int = 30) -> None:
        generator = np.random.default_rng(0)
        self.pictures = [Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(n)]
        self.labels, self.transform = torch.arange(n) % 3, transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> Any:
        return self.transform(self.pictures[i]), int(self.labels[i])


def transform_of(*augmentation: Any) -> Any:
    ends = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.485, 0.456, 0.406], [0.229] * 3)]
    return v2.Compose([v2.Resize((16, 16)), *augmentation, *ends])


@pytest.mark.parametrize("package", [pl, lightning_pytorch], ids=["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_datamodule_with_a_weighted_sampler_and_pil_transforms(package: Any, workers: int) -> None:
    class Data(package.LightningDataModule):
        def __init__(self) -> None:
            super().__init__()
            self.train = Folder(transform_of(v2.RandomHorizontalFlip(), v2.RandomCrop(16, padding=2)))
            self.calls = 0

        def train_dataloader(self) -> Any:
            self.calls += 1
            sampler = WeightedRandomSampler([0.1, 0.2, 0.7] * 10, 30)
            return DataLoader(self.train, batch_size=10, sampler=sampler, num_workers=workers)

        def val_dataloader(self) -> Any:
            return DataLoader(Folder(transform_of()), batch_size=10)

    data, callback = Data(), UltraCleanCallback()
    before = vars(data.train).copy()
    trainer = make_trainer([callback], epochs=2, package=package)
    trainer.fit(module_of(package, conv(classes=3)), datamodule=data)
    assert torch.equal(callback.verdict.labels, data.train.labels)
    assert callback.verdict.scores.unique().numel() > 1
    assert data.calls == 1
    assert vars(data.train) == before, "the user's transform is back"
