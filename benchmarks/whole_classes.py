"""``python -m benchmarks.whole_classes``: what is said of classes that carry something in all of their images.

One row for each training: which labels UltraClean names half way and at the end. The class is that of the number of the
seed. Rows that are there already are not made again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import command, digits, rows
from benchmarks.explained import right
from benchmarks.samples import KINDS, clean_images
from benchmarks.table import table as markdown
from lightning_backdoor import UltraCleanCallback, attacks

ALL: dict[str, Any] = {"rate_of": "target_class", "labels": "clean"}
ATTACKS = {"sig": attacks.SIG(), "blended": attacks.Blended(), "badnets": attacks.BadNets()}
CASES = ("clean", *ATTACKS, "tint", *KINDS)
TINT = torch.tensor([1.0, 0.7, 0.5])[:, None, None]


def made(name: str, images: Tensor, labels: Tensor, label: int, seed: int) -> Any:
    """The training set of a case, all images of a label changed."""
    if name in ATTACKS:
        return attacks.poison(TensorDataset(images, labels), ATTACKS[name], label, 1.0, seed=seed, **ALL)
    images, own = images.clone(), labels == label
    if name != "clean":
        changed = images[own] * TINT if name == "tint" else KINDS[name](images[own].float())
        images[own] = changed.round().clamp(0, 255).to(torch.uint8)
    return TensorDataset(images, labels)


def run(source: str, name: str, seed: int, data: tuple[TensorDataset, TensorDataset], options: Any) -> rows.Row:
    """Train, measure half way and at the end, and return the row."""
    started, label, (train, test) = time.perf_counter(), seed % 10, data
    dataset, half = made(name, *train.tensors, label, seed), max(options.epochs // 2, 1)
    watching = UltraCleanCallback(
        response="report", warmup_epochs=half, rescore_every=half, false_alarm_rate=options.rate
    )
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(
        max_epochs=options.epochs, accelerator=options.device, callbacks=[watching], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    network = digits.Classifier()
    trainer.fit(network, DataLoader(dataset, 64, shuffle=True, drop_last=True))
    network.cpu().eval()
    asr = right(network, attacks.triggered(test, ATTACKS[name], label)) if name in ATTACKS else None
    return {
        "source": source,
        "case": name,
        "seed": seed,
        "label": None if name == "clean" else label,
        "images": len(train),
        "epochs": options.epochs,
        "accuracy": right(network, test),
        "asr": asr,
        "named": [event.whole_classes for event in watching.history],
        "flagged": 0 if watching.verdict is None else int((~watching.verdict.keep).sum()),
        "seconds": round(time.perf_counter() - started),
        **rows.circumstances("benchmarks.whole_classes", options.device),
    }


def table(found: list[rows.Row]) -> str:
    """Rows as a table."""
    lines = []
    for row in found:
        asr, label = "" if row["asr"] is None else f"{100 * row['asr']:.0f}", row["label"]
        told = [", ".join(f"{each[0]} ({100 * each[1]:.0f} %)" for each in one) or "none" for one in row["named"]]
        cells = [f"{row['source']} {row['images']:,}", row["case"], row["seed"], "" if label is None else label]
        cells += [f"{100 * row['accuracy']:.0f}", asr, row["flagged"], " / ".join(told)]
        lines.append([str(cell) for cell in cells])
    left, last = ["images", "case"], "named: half way / end"
    head = [*left, "seed", "class", "accuracy", "ASR", "single images flagged", last]
    return markdown(head, lines, left=[*left, last])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of cifar10_<split>.npz")
    parser.add_argument("--source", choices=("digits", "cifar10"), default="digits")
    parser.add_argument("--images", type=int, default=3000, help="of CIFAR-10")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--trainings", nargs="*", default=[f"{name}@0" for name in CASES], help="as case@seed")
    parser.add_argument("--rate", type=float, default=0.01, help="false-alarm rate")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "whole_classes.jsonl")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="print what is there, and end")
    options = parser.parse_args()
    command.quiet(options.threads)
    done = {(row["source"], row["case"], row["seed"]) for row in rows.read(options.out)}
    data: tuple[TensorDataset, TensorDataset] | None = None
    for training in [] if options.show else options.trainings:
        name, _, seed = training.partition("@")
        if (options.source, name, int(seed or 0)) in done:
            continue
        if data is None:
            data = clean_images(options.source, options.data, options.images)
        row = run(options.source, name, int(seed or 0), data, options)
        rows.append(options.out, row)
        print(table([row]).splitlines()[-1], row["seconds"], "s", flush=True)
    print(table(rows.read(options.out)))


if __name__ == "__main__":
    main()
