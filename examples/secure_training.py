"""Train a timm model on poisoned data by D-ST, beside ordinary training on the same data and on the clean part of it.

    python examples/secure_training.py --model resnet18 --data path/to/folder --epochs 100

``--data`` as for ``timm_imagefolder.py``; without it the data are scikit-learn's digits. ``--attack`` poisons them, so
that the effect can be measured. ``--suspects D-BR`` lets D-BR judge the data after an ordinary training and hands its
verdict to D-ST, whose own detector starts from nothing and sees little in a few hundred images per class. Needs the
``examples`` extra.
"""

from __future__ import annotations

import argparse
from typing import Any

import pytorch_lightning as pl
from kornia.augmentation import ColorJiggle, RandomAffine
from quickstart import digits  # beside this script, which Python puts first on its path
from repair_checkpoint import as_images, fit, right
from timm_imagefolder import TRIGGERS, Classifier, load, transforms
from torch import Tensor
from torch.utils.data import Subset

from lightning_backdoor import DBRCallback, DSTCallback, attacks


def shifted(pixels: Tensor) -> Tensor:
    """Views that leave digits what they are, uint8 (B, C, H, W): a little shift, turn and other colours, no mirror."""
    moved = RandomAffine(degrees=10, translate=(0.1, 0.1), p=1.0)(pixels.float() / 255)
    return ColorJiggle(0.4, 0.4, p=0.8)(moved).mul(255).round().clamp(0, 255).byte()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="test_resnet", help="any timm name")
    parser.add_argument("--data", help="digits if left out")
    parser.add_argument("--images", type=int, help="use only so many training images")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--attack", choices=sorted(TRIGGERS), default="badnets")
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--suspects", choices=["own", "D-BR"], default="own", help="who tells them")
    parser.add_argument("--detector-steps", type=int, default=500, help="of D-ST's own; a small model needs many")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="of the ordinary trainings")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--report", default="backdoor_report")
    options = parser.parse_args()

    train, test = load(options.data, options.images) if options.data else map(as_images, digits())
    trigger = TRIGGERS[options.attack]
    dataset = attacks.poison(train, trigger, 0, rate=options.rate)
    held_out = [test, attacks.triggered(test, trigger, 0)]
    dataset.transform = transforms(options.size, train=options.data is not None)  # no mirrored digits
    for part in held_out:
        part.transform = transforms(options.size, train=False)

    def trained(data: Any, callbacks: list[pl.Callback]) -> Classifier:
        pl.seed_everything(0, verbose=False)
        steps = options.epochs * (len(data) // options.batch_size)
        network = Classifier(options.model, len(train.classes), steps, options.lr, pretrained=False)
        fit(network, data, callbacks, options)
        return network

    verdict = None
    if options.suspects == "D-BR":
        judge = DBRCallback()
        trained(dataset, [judge])
        verdict = judge.verdict
    defence = DSTCallback(
        verdict=verdict, detector_steps=options.detector_steps, views=None if options.data else shifted,
        report_dir=options.report,
    )  # fmt: skip
    runs = {
        "undefended": (dataset, []),
        "perfect filter": (Subset(dataset, (~dataset.poisoned).nonzero().flatten().tolist()), []),
        "D-ST": (dataset, [defence]),
    }
    print(f"{options.model}, {len(dataset):,} images, {options.epochs} epochs; in per cent:\n")
    print(f"{'':16} {'clean accuracy':>14} {'ASR':>6}")
    for name, (data, callbacks) in runs.items():
        network = trained(data, callbacks)
        print(f"{name:16} " + "{:14.1f} {:6.1f}".format(*(right(network, part) for part in held_out)), flush=True)
    suspect = defence.verdict.suspect
    print(f"\n{int(suspect.sum()):,} images suspect, {int((suspect & dataset.poisoned).sum()):,} of them poisoned")
    print(f"The report: {options.report}/report.html")


if __name__ == "__main__":
    main()
