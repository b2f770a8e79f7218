"""Any timm classifier on an image folder (or CIFAR-10), attacked on purpose, with and without a defence.

    python examples/timm_imagefolder.py --model resnet18 --data path/to/folder --attack badnets --rate 0.05

``--data`` is a folder with ``train/<class>/*`` and ``test/<class>/*``, the word ``cifar10`` (torchvision downloads it),
or a folder with ``cifar10_train.npz`` and ``cifar10_test.npz`` (packed JPEG files). Needs the ``examples`` extra.
Trains from random weights without ``--pretrained``; it shows the defence at work and reproduces no published number.
"""

from __future__ import annotations

import argparse
import io
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets
from torchvision.transforms import v2

from lightning_backdoor import (
    BackdoorMonitor,
    DBRCallback,
    DSTCallback,
    NONECallback,
    UltraCleanCallback,
    attacks,
    metrics,
)

TRIGGERS = {
    "badnets": attacks.BadNets(),
    "blended": attacks.Blended(),
    "sig": attacks.SIG(),
    "trojan": attacks.Trojan(),
}
DEFENCES = {
    "undefended": lambda report: [],
    "ultraclean": lambda report: [UltraCleanCallback(report_dir=report)],
    "ultraclean-paper": lambda report: [UltraCleanCallback.from_paper(output="logits", report_dir=report)],
    "NONE": lambda report: [NONECallback(report_dir=report)],
    "NONE-paper": lambda report: [NONECallback.from_paper(report_dir=report)],
    "D-BR": lambda report: [DBRCallback(report_dir=report)],
    "D-ST": lambda report: [DSTCallback(report_dir=report)],
}


class Classifier(pl.LightningModule):
    """A timm model with AdamW and a one-cycle schedule."""

    def __init__(self, model: str, classes: int, steps: int, lr: float, pretrained: bool) -> None:
        super().__init__()
        self.network = timm.create_model(model, pretrained=pretrained, num_classes=classes)
        self.steps, self.lr = steps, lr

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy."""
        self.log("accuracy", (self(batch[0]).argmax(dim=1) == batch[1]).float().mean())

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW under one cycle."""
        adamw = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=0.02)
        cycle = torch.optim.lr_scheduler.OneCycleLR(adamw, self.lr, total_steps=self.steps)
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


class Images(Dataset[Any]):
    """Arrays (N, H, W, 3) as PIL images with a transform, like torchvision's datasets."""

    def __init__(self, data: Any, targets: list[int], classes: list[str]) -> None:
        self.data, self.targets, self.classes, self.transform = data, targets, classes, None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = v2.functional.to_pil_image(self.data[index])
        return (image if self.transform is None else self.transform(image)), self.targets[index]


def load(source: str, images: int | None) -> tuple[Any, Any]:
    """Training and test set without transforms; ``images`` limits the training set, the same number of each class."""
    if source == "cifar10":
        train, test = (datasets.CIFAR10("data", train=part, download=True) for part in (True, False))
    elif (Path(source) / "cifar10_train.npz").exists():
        train, test = (packed(Path(source), split) for split in ("train", "test"))
    else:
        train, test = (datasets.ImageFolder(str(Path(source) / part)) for part in ("train", "test"))
    return (train, test) if images is None else (_some(train, images), test)


def packed(folder: Path, split: str) -> Images:
    """All images of a file of packed JPEG images."""
    file = np.load(folder / f"cifar10_{split}.npz")
    jpeg, offsets = file["jpeg"], file["offsets"]
    images = np.stack([np.asarray(Image.open(io.BytesIO(jpeg[a:b].tobytes()))) for a, b in pairwise(offsets)])
    return Images(images, file["labels"].tolist(), file["classes"].tolist())


def _some(dataset: Any, images: int) -> Images:
    targets = torch.as_tensor(dataset.targets)
    share = images // len(dataset.classes)
    chosen = torch.cat([(targets == label).nonzero().squeeze(1)[:share] for label in targets.unique()]).tolist()
    pixels = [v2.functional.pil_to_tensor(dataset[i][0].convert("RGB")).permute(1, 2, 0).numpy() for i in chosen]
    return Images(pixels, [dataset.targets[i] for i in chosen], dataset.classes)


def transforms(size: int, train: bool) -> v2.Compose:
    """Resize to the model's size; crop and flip while training."""
    augment = [v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()] if train else []
    return v2.Compose(
        [
            v2.Resize((size, size)),
            *augment,
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="any timm name")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, help="use only so many training images")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--attack", choices=sorted(TRIGGERS), default="badnets")
    parser.add_argument("--rate", type=float, default=0.05, help="of the dataset (sig: of the target class)")
    parser.add_argument("--target", type=int, default=0)
    parser.add_argument("--defence", choices=[*DEFENCES, "perfect"], nargs="+", default=["undefended", "ultraclean"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", default="backdoor_report")
    options = parser.parse_args()

    train, test = load(options.data, options.images)
    trigger, clean_label = TRIGGERS[options.attack], options.attack == "sig"
    poisoned = attacks.poison(
        train, trigger, options.target, rate=options.rate,
        rate_of="target_class" if clean_label else "dataset", labels="clean" if clean_label else "dirty",
    )  # fmt: skip
    attacked = attacks.triggered(test, trigger, options.target)
    poisoned.transform = transforms(options.size, train=True)
    test.transform = attacked.transform = transforms(options.size, train=False)

    print(f"{options.model}, {len(poisoned):,} images, {options.attack} on {int(poisoned.poisoned.sum()):,} of them")
    print(f"{'':18} {'clean accuracy':>14} {'ASR':>6} {'TPR':>6} {'FPR':>7} {'removed':>8} {'seconds':>8}")
    for defence in options.defence:
        pl.seed_everything(0, verbose=False)
        callbacks = DEFENCES[defence](options.report) if defence in DEFENCES else []
        kept = (~poisoned.poisoned).nonzero().flatten().tolist()
        loader = DataLoader(
            Subset(poisoned, kept) if defence == "perfect" else poisoned,
            batch_size=options.batch_size, shuffle=True, num_workers=options.workers, drop_last=True,
            persistent_workers=options.workers > 0,
        )  # fmt: skip
        network = Classifier(
            options.model, len(train.classes), options.epochs * len(loader), options.lr, options.pretrained
        )
        monitor = BackdoorMonitor(triggered=attacked)
        trainer = pl.Trainer(
            max_epochs=options.epochs, callbacks=callbacks, logger=False, enable_checkpointing=False,
            check_val_every_n_epoch=options.epochs, enable_model_summary=False,
        )  # fmt: skip
        began, held_out = time.perf_counter(), DataLoader(test, batch_size=500, num_workers=options.workers)
        trainer.fit(network, loader, held_out)
        seconds = time.perf_counter() - began
        trainer = pl.Trainer(callbacks=[monitor], logger=False, enable_progress_bar=False)
        trainer.validate(network, held_out, verbose=False)  # NONE adds epochs after the last validation
        logged = {name.removeprefix("backdoor/"): float(value) for name, value in trainer.callback_metrics.items()}
        line = f"{defence:18} {100 * logged['clean_accuracy']:14.1f} {100 * logged['attack_success_rate']:6.1f}"
        if callbacks:
            rates = metrics.DetectionRates()
            rates.update(callbacks[0].verdict.scores, callbacks[0].verdict.keep, poisoned.poisoned)
            found, removed = rates.compute(), int((~callbacks[0].verdict.keep).sum())
            line += f" {100 * found['tpr']:6.1f} {100 * found['fpr']:7.2f} {removed:8,}"
        else:
            line += f" {'':6} {'':7} {'':8}"
        print(f"{line} {seconds:8.0f}")


if __name__ == "__main__":
    main()
