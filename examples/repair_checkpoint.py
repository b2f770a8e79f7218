"""Repair a timm checkpoint that may hold a backdoor, with the data that it was trained on.

    python examples/repair_checkpoint.py --model resnet18 --data path/to/folder --checkpoint suspicious.pt

Loads the weights, lets D-BR find the images that the backdoor was learned from and unlearn them, saves the weights as
``--save`` and says how the model has changed. ``--data`` as for ``timm_imagefolder.py``; without it the data are
scikit-learn's digits. ``--attack`` poisons them, so that the effect can be measured; ``--attack none`` takes them as
they are. Without ``--checkpoint`` a model is trained on them first and saved as ``backdoored.pt``. Needs the
``examples`` extra.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from quickstart import digits  # beside this script, which Python puts first on its path
from timm_imagefolder import TRIGGERS, Classifier, Images, load, transforms
from torch.utils.data import DataLoader

from lightning_backdoor import DBRCallback, attacks, metrics

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pytorch_lightning")


def as_images(dataset: Any) -> Images:
    """A dataset of uint8 tensors like torchvision's datasets."""
    pixels, labels = dataset.tensors
    return Images(pixels.permute(0, 2, 3, 1).numpy(), labels.tolist(), [str(label) for label in range(10)])


def fit(network: Classifier, dataset: Any, callbacks: list[pl.Callback], options: argparse.Namespace) -> None:
    """Train, with the callbacks."""
    trainer = pl.Trainer(
        max_epochs=options.epochs, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loader = DataLoader(dataset, options.batch_size, shuffle=True, num_workers=options.workers, drop_last=True)
    trainer.fit(network, loader)


@torch.no_grad()
def right(network: Classifier, dataset: Any) -> float:
    """Per cent of the images that get the label that the dataset gives them."""
    metric = metrics.RecoveredAccuracy()
    for images, labels in DataLoader(dataset, batch_size=500):
        metric.update(network.eval().cpu()(images), labels)
    return 100 * float(metric.compute())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="test_resnet", help="any timm name")
    parser.add_argument("--data", help="digits if left out")
    parser.add_argument("--images", type=int, help="use only so many training images")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--checkpoint", type=Path, help="state_dict of the timm model")
    parser.add_argument("--save", type=Path, default=Path("repaired.pt"))
    parser.add_argument("--attack", choices=[*sorted(TRIGGERS), "none"], default="badnets")
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--epochs", type=int, default=12, help="of the training without --checkpoint")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--report", default="backdoor_report")
    options = parser.parse_args()

    train, test = load(options.data, options.images) if options.data else map(as_images, digits())
    dataset, held_out = train, {"clean accuracy": test}
    if options.attack != "none":
        trigger = TRIGGERS[options.attack]
        dataset = attacks.poison(train, trigger, 0, rate=options.rate)
        held_out["ASR"] = attacks.triggered(test, trigger, 0)
    dataset.transform = transforms(options.size, train=options.data is not None)  # no mirrored digits
    for part in held_out.values():
        part.transform = transforms(options.size, train=False)

    pl.seed_everything(0, verbose=False)
    steps = options.epochs * (len(dataset) // options.batch_size)
    network = Classifier(options.model, len(train.classes), steps, options.lr, pretrained=False)
    if options.checkpoint is None:
        options.checkpoint = Path("backdoored.pt")
        fit(network, dataset, [], options)
        torch.save(network.network.state_dict(), options.checkpoint)
    network.network.load_state_dict(torch.load(options.checkpoint, weights_only=True))
    before = [right(network, part) for part in held_out.values()]

    defence = DBRCallback(warmup_epochs=0, report_dir=options.report)  # now, with the weights as they are
    fit(network, dataset, [defence], options)
    torch.save(network.network.state_dict(), options.save)
    after = [right(network, part) for part in held_out.values()]

    suspects = len(defence.verdict.removed)
    print(f"{options.model}, {len(dataset):,} images, {suspects:,} of them suspect and unlearned; in per cent:\n")
    for name, one, other in zip(held_out, before, after, strict=True):
        print(f"{name:16} {one:6.1f} -> {other:6.1f}")
    print(f"\nSaved: {options.save}. The report: {options.report}/report.html")


if __name__ == "__main__":
    main()
