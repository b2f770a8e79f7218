"""UltraClean on scikit-learn's digits, from a poisoned training set to a clean model and a report.

Run ``python examples/quickstart.py``: no arguments, no download, about a minute on two CPU cores. Needs the
``examples`` extra (scikit-learn, matplotlib). The images are small and easy: no published number is reproduced.
"""

import logging
import time
import warnings

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_backdoor import UltraCleanCallback, attacks, metrics

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


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The digits as uint8 images (3, 32, 32): 1,400 to train on, 397 to test on."""
    data = load_digits()
    pixels = torch.from_numpy(data.images * 255 / 16).float().unsqueeze(1)
    pixels = F.interpolate(pixels, size=(32, 32), mode="bilinear").round().to(torch.uint8).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return tuple(TensorDataset(pixels[part], labels[part]) for part in (order[:1400], order[1400:]))


def train(dataset: Dataset, callbacks: list[pl.Callback]) -> tuple[Classifier, float]:
    """Train for 12 epochs and return the model and the seconds that it took."""
    pl.seed_everything(0, verbose=False)
    start, model = time.perf_counter(), Classifier()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=12, accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **quiet)
    trainer.fit(model, DataLoader(dataset, batch_size=64, shuffle=True))
    return model.eval(), time.perf_counter() - start


@torch.no_grad()
def accuracy(model: Classifier, dataset: Dataset) -> float:
    """Per cent of the images that get the label that the dataset gives them."""
    images, labels = next(iter(DataLoader(dataset, batch_size=len(dataset))))
    return 100 * float((model(images).argmax(dim=1) == labels).float().mean())


def main() -> None:
    clean, test = digits()
    poisoned = attacks.poison(clean, attacks.BadNets(), target=0, rate=0.05)
    attacked_test = attacks.triggered(test, attacks.BadNets(), target=0)
    truth = poisoned.poisoned
    defence = UltraCleanCallback(report_dir="backdoor_report")
    runs = {
        "undefended": train(poisoned, callbacks=[]),
        "UltraClean": train(poisoned, callbacks=[defence]),  # the one line that changes
        "perfect filter": train(Subset(poisoned, (~truth).nonzero().flatten().tolist()), callbacks=[]),
        "trained on clean data": train(clean, callbacks=[]),
    }
    rates = metrics.DetectionRates()
    rates.update(defence.verdict.scores, defence.verdict.keep, truth)
    found = rates.compute()
    detection = {"undefended": (0, 0), "UltraClean": (found["tpr"], found["fpr"]), "perfect filter": (1, 0)}

    print(f"{len(poisoned):,} digits, {int(truth.sum())} of them with a trigger and the wrong label; in per cent:\n")
    print(f"{'':22} {'clean accuracy':>14} {'ASR':>6} {'TPR':>6} {'FPR':>6} {'seconds':>8}")
    for name, (model, seconds) in runs.items():
        tpr, fpr = (f"{100 * float(rate):.1f}" for rate in detection[name]) if name in detection else "--"
        right, success = accuracy(model, test), accuracy(model, attacked_test)
        print(f"{name:22} {right:14.1f} {success:6.1f} {tpr:>6} {fpr:>6} {seconds:8.1f}")
    print("\nASR: triggered test images that are taken for a 0. The report: backdoor_report/report.html")


if __name__ == "__main__":
    main()
