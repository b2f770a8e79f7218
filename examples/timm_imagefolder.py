"""Any timm classifier on an image folder, attacked on purpose, with and without a defence.

    python examples/timm_imagefolder.py --model resnet18 --data path/to/folder --attack badnets --rate 0.05

``--data`` is a folder with ``train/<class>/*`` and ``test/<class>/*``. Trains from random weights.
"""

import argparse
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lightning_backdoor import DBRCallback, DSTCallback, NONECallback, UltraCleanCallback, attacks

ATTACKS = {"badnets": attacks.BadNets(), "blended": attacks.Blended(), "trojan": attacks.Trojan()}
DEFENCES = {"ultraclean": UltraCleanCallback, "NONE": NONECallback, "D-BR": DBRCallback, "D-ST": DSTCallback}


class Classifier(pl.LightningModule):
    """A timm model with AdamW and a one-cycle schedule."""

    def __init__(self, model: str, classes: int) -> None:
        super().__init__()
        self.network = timm.create_model(model, num_classes=classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self(images).argmax(dim=1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        adamw = torch.optim.AdamW(self.parameters(), 2e-3, weight_decay=0.02)
        cycle = torch.optim.lr_scheduler.OneCycleLR(adamw, 2e-3, self.trainer.estimated_stepping_batches)
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def transforms(size: int, augment: bool) -> v2.Compose:
    """Resize to the model's size and normalize; crop and mirror at random if ``augment``."""
    drawn = [v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()] if augment else []
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    return v2.Compose([v2.Resize((size, size)), *drawn, *finish])


def accuracy(model: Classifier, dataset: Dataset) -> float:
    """Per cent of the images that get the label that the dataset gives them."""
    trainer = pl.Trainer(logger=False, enable_progress_bar=False)
    (found,) = trainer.validate(model, DataLoader(dataset, batch_size=500), verbose=False)
    return 100 * found["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="any timm name")
    parser.add_argument("--data", required=True)
    parser.add_argument("--size", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--attack", choices=ATTACKS, default="badnets")
    parser.add_argument("--rate", type=float, default=0.05, help="share of the images that are poisoned")
    parser.add_argument("--defence", choices=DEFENCES, nargs="+", default=["ultraclean"])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    train, test = (ImageFolder(f"{options.data}/{part}") for part in ("train", "test"))
    poisoned = attacks.poison(train, ATTACKS[options.attack], target=0, rate=options.rate)
    attacked = attacks.triggered(test, ATTACKS[options.attack], target=0)
    poisoned.transform = transforms(options.size, augment=True)
    test.transform = attacked.transform = transforms(options.size, augment=False)
    truth = poisoned.poisoned
    print(f"{len(poisoned):,} images, {int(truth.sum()):,} of them with a trigger and the wrong label; in per cent:")
    print(f"{'':14} {'clean accuracy':>14} {'ASR':>6} {'TPR':>6} {'FPR':>6}")
    for name in ["undefended", *options.defence, "perfect filter"]:
        pl.seed_everything(0, verbose=False)
        callbacks = [DEFENCES[name](report_dir="backdoor_report")] if name in DEFENCES else []
        dataset = Subset(poisoned, (~truth).nonzero().flatten().tolist()) if name == "perfect filter" else poisoned
        loader = DataLoader(dataset, batch_size=128, shuffle=True, drop_last=True, num_workers=options.workers)
        model = Classifier(options.model, len(train.classes))
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(max_epochs=options.epochs, callbacks=callbacks, enable_model_summary=False, **quiet)
        trainer.fit(model, loader, DataLoader(test, batch_size=500, num_workers=options.workers))
        found = ""
        if callbacks:
            removed = (~callbacks[0].verdict.keep).float()
            found = f"{100 * removed[truth].mean():6.1f} {100 * removed[~truth].mean():6.2f}"
        print(f"{name:14} {accuracy(model, test):14.1f} {accuracy(model, attacked):6.1f} {found}")


if __name__ == "__main__":
    main()
