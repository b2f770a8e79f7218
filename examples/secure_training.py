"""Train a timm model on poisoned digits by D-ST, beside ordinary training on all of them and on the clean ones.

    python examples/secure_training.py --model test_convnext --epochs 24

No download; needs the ``examples`` extra. ``--suspects D-BR`` lets D-BR judge the data after an ordinary training and
hands its verdict to D-ST, whose own detector starts from nothing and sees little in a few hundred images per class.
"""

import argparse
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from kornia.augmentation import ColorJiggle, RandomAffine
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_backdoor import DBRCallback, DSTCallback, attacks


class Classifier(pl.LightningModule):
    """A timm model on uint8 images (B, 3, 32, 32), with AdamW and a one-cycle schedule."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.network = timm.create_model(model, num_classes=10)

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images.float() / 255 - 0.5) / 0.5)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> dict[str, Any]:
        adamw = torch.optim.AdamW(self.parameters(), 2e-3, weight_decay=0.02)
        cycle = torch.optim.lr_scheduler.OneCycleLR(adamw, 2e-3, self.trainer.estimated_stepping_batches)
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The digits as uint8 images (3, 32, 32): 1,400 to train on, 397 to test on."""
    data = load_digits()
    pixels = torch.from_numpy(data.images * 255 / 16).float().unsqueeze(1)
    pixels = nn.functional.interpolate(pixels, size=32, mode="bilinear").round().to(torch.uint8).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return tuple(TensorDataset(pixels[part], labels[part]) for part in (order[:1400], order[1400:]))


def shifted(pixels: Tensor) -> Tensor:
    """Views that leave digits what they are, uint8 (B, C, H, W): a little shift, turn and other colours, no mirror."""
    moved = RandomAffine(degrees=10, translate=(0.1, 0.1), p=1.0)(pixels.float() / 255)
    return ColorJiggle(0.4, 0.4, p=0.8)(moved).mul(255).round().clamp(0, 255).byte()


def train(name: str, epochs: int, dataset: Dataset, callbacks: list[pl.Callback]) -> Classifier:
    """Train a new model of this timm name."""
    pl.seed_everything(0)
    model = Classifier(name)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=epochs, callbacks=callbacks, enable_model_summary=False, **quiet)
    trainer.fit(model, DataLoader(dataset, batch_size=64, shuffle=True, drop_last=True))
    return model.eval().cpu()


@torch.no_grad()
def accuracy(model: Classifier, dataset: Dataset) -> float:
    """Per cent of the images that get the label that the dataset gives them."""
    images, labels = next(iter(DataLoader(dataset, batch_size=len(dataset))))
    return 100 * float((model(images).argmax(dim=1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="test_resnet", help="any timm name")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--suspects", choices=["own", "D-BR"], default="own", help="which detector finds them")
    options = parser.parse_args()
    clean, test = digits()
    dataset = attacks.poison(clean, attacks.BadNets(), target=0, rate=0.05)
    attacked = attacks.triggered(test, attacks.BadNets(), target=0)
    detector = DBRCallback(response="report")  # looks at the end, and changes nothing
    if options.suspects == "D-BR":
        train(options.model, options.epochs, dataset, [detector])
    defence = DSTCallback(verdict=detector.verdict, detector_steps=500, views=shifted, report_dir="backdoor_report")
    kept = Subset(dataset, (~dataset.poisoned).nonzero().flatten().tolist())
    runs = {"undefended": (dataset, []), "perfect filter": (kept, []), "D-ST": (dataset, [defence])}
    print(f"{'':16} {'clean accuracy':>14} {'ASR':>6}")
    for name, (data, callbacks) in runs.items():
        model = train(options.model, options.epochs, data, callbacks)
        print(f"{name:16} {accuracy(model, test):14.1f} {accuracy(model, attacked):6.1f}")


if __name__ == "__main__":
    main()
