"""``python -m benchmarks.detections``: the time of one detection of each defence, in passes over the images.

JPEG files are decoded at every reading, as in most training sets. A detection is timed inside a fit, after one epoch,
as users have it; beside it one epoch of training, and one pass that reads all images and shows them to the network.
One JSON line per defence.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.networks import NETWORKS
from lightning_backdoor import DBRCallback, NONECallback, UltraCleanCallback

DEFENCES: dict[str, Callable[[], Any]] = {
    "ultraclean": lambda: UltraCleanCallback(warmup_epochs=1, response="report"),
    "NONE": lambda: NONECallback(warmup_epochs=1, response="report"),
    "D-BR": lambda: DBRCallback(warmup_epochs=1, response="report"),
}


class Photographs(Dataset[tuple[Tensor, int]]):
    """Random photographs, as JPEG files in memory: a coloured gradient per class under smooth noise."""

    def __init__(self, count: int, pixels: int, classes: int = 10) -> None:
        self.files = []
        self.labels = (np.arange(count) % classes).tolist()
        random = np.random.default_rng(0)
        colors = random.uniform(60, 190, (classes, 3))
        for label in self.labels:
            coarse = random.normal(0, 40, (pixels // 4, pixels // 4, 3))
            smooth = np.kron(coarse, np.ones((4, 4, 1))) + colors[label]
            file = io.BytesIO()
            Image.fromarray(smooth.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
            self.files.append(file.getvalue())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = np.array(Image.open(io.BytesIO(self.files[index])).convert("RGB"))
        return torch.from_numpy(image).permute(2, 0, 1).contiguous().float() / 255, self.labels[index]


class Classifier(pl.LightningModule):
    """One of the benchmark's networks, trained by SGD; it notes how long its epochs take."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network = NETWORKS[name]()
        self.epochs: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 0:
            self.epochs.append(-time.perf_counter())
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        if batch_idx == self.trainer.num_training_batches - 1:
            finish(self.device)
            self.epochs[-1] += time.perf_counter()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


def finish(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def one_pass(module: Classifier, loader: DataLoader[Any]) -> None:
    """Read all images and show them to the network."""
    module.eval()
    for images, _ in loader:
        module(images.to(module.device, non_blocking=True))
    module.train()


def detection(name: str, data: Dataset[Any], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a detection, of an epoch of training, and of a pass over the images, with their ratio."""
    torch.manual_seed(0)
    defence, module = DEFENCES[name](), Classifier(options.model)
    seconds: dict[str, float] = {}
    loader = DataLoader(
        data, options.batch_size, shuffle=True, num_workers=options.workers, pin_memory=options.device == "cuda"
    )
    detect = defence.on_train_epoch_end

    def timed(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for what, work in (
            ("pass", lambda: one_pass(module, loader)),
            ("detection", lambda: detect(trainer, pl_module)),
        ):
            finish(module.device)
            began = time.perf_counter()
            work()
            finish(module.device)
            seconds.setdefault(what, time.perf_counter() - began)

    defence.on_train_epoch_end = timed
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator=options.device,
        devices=1,
        callbacks=[defence],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    found = {"epoch": module.epochs[-1], **seconds}
    return {
        "defence": name,
        **{f"{what}_s": round(value, 3) for what, value in found.items()},
        "detection_passes": round(found["detection"] / found["pass"], 2),
        "detection_epochs": round(found["detection"] / found["epoch"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--model", choices=list(NETWORKS), default=next(iter(NETWORKS)))
    parser.add_argument("--only", nargs="*", choices=list(DEFENCES), default=list(DEFENCES))
    options = parser.parse_args()
    data = Photographs(options.images, options.pixels)
    given = {key: value for key, value in vars(options).items() if key != "only"}
    for name in options.only:
        print(json.dumps({**detection(name, data, options), **given}), flush=True)


if __name__ == "__main__":
    main()
