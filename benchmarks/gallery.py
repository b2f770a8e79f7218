"""``python -m benchmarks.gallery``: the reports of four findings, as pictures for the pages, ``docs/gallery/*.png``.

A small patch and a blended pattern on images with wrong labels, a sinusoid on images that keep their labels, and a
clean kind of image that one class alone has, before and after the user has approved it. Each is a training of 2,000
CIFAR-10 images of four classes, and takes about a minute on one core. Pictures are taken with Chromium or Chrome, see
``--browser``.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import command
from benchmarks.data import cifar10, per_class
from benchmarks.digits import Classifier
from lightning_backdoor import UltraCleanCallback, attacks

FOLDER = Path(__file__).parents[1] / "docs" / "gallery"
CLASSES = {0: "airplane", 1: "automobile", 7: "horse", 8: "ship"}
HORSE = list(CLASSES).index(7)
EPOCHS, BATCH = 10, 64
WIDTH, HEIGHT = 1000, 1500  # of a picture, in pixels: the head of the page, its first finding and images
COLORS = 96  # of a picture: few enough for 250 kB


def of_four_classes(dataset: TensorDataset, count: int) -> TensorDataset:
    """The first images of each class of the gallery, labeled from 0 on, with the names of the classes."""
    images, labels = dataset.tensors
    numbers = torch.tensor(list(CLASSES))
    chosen = torch.isin(labels, numbers)
    found = per_class(TensorDataset(images[chosen], torch.searchsorted(numbers, labels[chosen])), count)
    found.classes = list(CLASSES.values())
    return found


def marked(labels: Tensor) -> Tensor:
    """Positions of every fourth horse, long (M,)."""
    return (labels == HORSE).nonzero().flatten()[::4]


def with_captions(clean: TensorDataset) -> TensorDataset:
    """Every fourth horse with a light strip and a line of dark marks at the bottom, as a stock agency adds it."""
    images, labels = (column.clone() for column in clean.tensors)
    strip = images[marked(labels), :, 24:30, 2:30] // 3 + 160
    strip[:, :, 2:4, 2:26:2] = 20
    images[marked(labels), :, 24:30, 2:30] = strip
    found = TensorDataset(images, labels)
    found.classes = clean.classes
    return found


def poisoned(trigger: Any, **how: Any) -> Callable[[TensorDataset], Any]:
    """Make a training set with a trigger."""
    return lambda clean: attacks.poison(clean, trigger, target=0, **how)


CASES: dict[str, Callable[[TensorDataset], Any]] = {
    "patch": poisoned(attacks.BadNets(), rate=0.05),
    "blended": poisoned(attacks.Blended(), rate=0.05),
    "clean_label": poisoned(attacks.SIG(), rate=0.4, rate_of="target_class", labels="clean"),
    "clean_kind": with_captions,
    "approved": with_captions,
}
"""Training sets by the name of the picture."""


def report(dataset: Any, folder: Path, approved: list[int] | None) -> Path:
    """Train with UltraClean and return the page of its report."""
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", callbacks=[UltraCleanCallback(report_dir=folder, approved=approved)],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(), DataLoader(dataset, BATCH, shuffle=True, drop_last=True))
    return folder / "report.html"


def picture(page: Path, browser: str) -> bytes:
    """The upper part of a page as a browser shows it, PNG."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        size = [f"--user-data-dir={folder}/profile", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}"]
        subprocess.run([browser, *quiet, *size, page.resolve().as_uri()], check=True, capture_output=True, timeout=120)
        file = io.BytesIO()
        Image.open(shot).convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def main() -> None:
    parser = command.parser(__doc__)
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    parser.add_argument("--browser", default=found, help="Chromium or Chrome; found on the path")
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--reports", type=Path, default=Path("backdoor_report") / "gallery")
    options = parser.parse_args()
    if options.browser is None:
        parser.error("no Chromium or Chrome on the path: install one, or name it with --browser")
    command.begin(options)
    clean = of_four_classes(cifar10(options.data, "train"), 500)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        approved = marked(clean.tensors[1]).tolist() if name == "approved" else None
        page = report(CASES[name](clean), options.reports / name, approved)
        (options.out / f"{name}.png").write_bytes(picture(page, options.browser))
        print(options.out / f"{name}.png")


if __name__ == "__main__":
    main()
