"""How easily a few pixels mislead a network that nobody attacked, undefended and trained with NONE.

Run ``python examples/natural_backdoor.py``: no arguments, no download, about a minute on two CPU cores. Needs the
``examples`` extra (scikit-learn, matplotlib). The data are clean: what REASR finds are natural backdoors, patterns of a
few pixels that send most digits to one class. NONE is meant for planted backdoors; see its row for what it does here.
"""

import logging
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_backdoor import NONECallback, metrics
from lightning_backdoor.report import write_trigger_sheet

REPORT = Path("backdoor_report") / "natural"
BUDGETS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.12)  # of 1,024 pixels; the paper's begin at 2 %, which is too easy here
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pytorch_lightning")


class Classifier(pl.LightningModule):
    """A small convolutional network on uint8 images (B, 3, 32, 32)."""

    def __init__(self) -> None:
        super().__init__()
        layers = []
        for before, after in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.float() / 255)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def digits() -> tuple[Tensor, Tensor]:
    """The digits as uint8 images (1797, 3, 32, 32) and their labels, shuffled."""
    data = load_digits()
    pixels = torch.from_numpy(data.images * 255 / 16).float().unsqueeze(1)
    pixels = F.interpolate(pixels, size=(32, 32), mode="bilinear").round().to(torch.uint8).repeat(1, 3, 1, 1)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order], torch.from_numpy(data.target).long()[order]


def train(images: Tensor, labels: Tensor, callbacks: list[pl.Callback]) -> Classifier:
    """Train for 12 epochs."""
    pl.seed_everything(0, verbose=False)
    model = Classifier()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=12, accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **quiet)
    trainer.fit(model, DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True))
    return model.eval()


def main() -> None:
    images, labels = digits()
    test_images, test_labels = images[1400:], labels[1400:]
    runs = {
        "undefended": [],
        "NONE": [NONECallback(samples="keep", extra_epochs=100, rounds=3, report_dir=REPORT)],
    }
    print(f"{len(test_images)} clean digits; success of the best trigger of at most b % of the pixels, in per cent:")
    columns = [f"reasr@{100 * budget:g}%" for budget in BUDGETS]
    heads = "".join(f"{column.removeprefix('reasr'):>7}" for column in columns)
    print(f"\n{'':12} {'clean accuracy':>14} {heads} {'seconds':>8}")
    for name, callbacks in runs.items():
        start = time.perf_counter()
        model = train(images[:1400], labels[:1400], callbacks)
        with torch.no_grad():
            accuracy = 100 * float((model(test_images).argmax(dim=1) == test_labels).float().mean())
        reasr = metrics.REASR(model, budgets=BUDGETS, std=1 / 255, candidates=2, steps=80, batch_size=32)
        reasr.update(test_images, test_labels)
        rates = reasr.compute()
        cells = "".join(f"{100 * float(rates[column]):7.1f}" for column in columns)
        print(f"{name:12} {accuracy:14.1f} {cells} {time.perf_counter() - start:8.1f}")
        write_trigger_sheet(REPORT / f"triggers_{name.lower()}.png", reasr.triggers, test_images, test_labels)
    print(f"\nLower is better. The triggers: {REPORT}/triggers_*.png")


if __name__ == "__main__":
    main()
