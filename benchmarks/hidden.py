"""``python -m benchmarks.hidden``: attacks that no single unit shows, on digits, in whole trainings.

Digits in random hues, of which the 75 reddest are labeled 0 without any other change (an attack by labels alone), and
Adap-Blend with stripes, behind as many covers as poisons; each with its clean twin. One row for each training:
accuracy, attack success rate (red digits of other classes, or triggered ones, that are taken for a 0), and what was
removed. Rows that are there already are not made again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks import command, digits, rows
from benchmarks.explained import percent, right
from benchmarks.samples import Change, Samples, attack, drawn, in_hue, tinted
from benchmarks.table import table as markdown
from lightning_backdoor import DBRCallback, NONECallback, UltraCleanCallback, attacks
from lightning_backdoor.callbacks import Defense

STRIPES = attacks.AdaptiveBlend(pattern="stripe")
IMAGES, EPOCHS, BATCH = 1400, 10, 64
CASES: dict[str, Change | None] = {
    "tinted-75": tinted(75),
    "tinted": tinted(0),
    "stripes-4%": attack(STRIPES, 0.04, covers=0.04),
    "clean": None,
}
DEFENCES: dict[str, Callable[[], Defense] | None] = {
    "undefended": None, "UltraClean": UltraCleanCallback, "NONE": NONECallback, "D-BR": DBRCallback,
}  # fmt: skip
IDENTITY = ("case", "seed", "defence")


def made(name: str, seed: int) -> tuple[Samples, TensorDataset, Dataset[Any]]:
    """Training set, test set, and test images of other classes that an attack makes a 0, with this label."""
    images, labels = digits.all_digits()
    order, change = drawn(len(labels), seed), CASES[name]
    of_test = Samples.clean(images[order[IMAGES:]], labels[order[IMAGES:]])
    train = Samples.clean(images[order[:IMAGES]], labels[order[:IMAGES]])
    train = train if change is None else change(train, seed)
    if not name.startswith("tinted"):
        test = TensorDataset(of_test.images, of_test.labels)
        return train, test, attacks.triggered(test, STRIPES, 0)
    others = of_test.images[of_test.labels != 0]
    red = TensorDataset(in_hue(others, torch.zeros(len(others))), torch.zeros(len(others), dtype=torch.long))
    return train, TensorDataset(tinted(0)(of_test, seed + 1000).images, of_test.labels), red


def run(name: str, seed: int, defence: str, device: str) -> rows.Row:
    """Train and measure; the row of a training."""
    started, (train, test, attacked), make = time.perf_counter(), made(name, seed), DEFENCES[defence]
    callbacks = [] if make is None else [make()]
    pl.seed_everything(seed, verbose=False)
    network = digits.Classifier()
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator=device, callbacks=[*callbacks], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(network, DataLoader(TensorDataset(train.images, train.labels), BATCH, shuffle=True, drop_last=True))
    network.cpu().eval()
    verdict = callbacks[0].verdict if callbacks else None
    removed = torch.zeros_like(train.poisoned) if verdict is None else ~verdict.keep
    return {
        **dict(zip(IDENTITY, (name, seed, defence), strict=True)),
        "images": len(train),
        "epochs": EPOCHS,
        "accuracy": right(network, test),
        "asr": right(network, attacked),
        "poisons": int(train.poisoned.sum()),
        "removed": int((removed & train.poisoned).sum()),
        "removed_others": int((removed & ~train.poisoned).sum()),
        "gates": [finding.gate for finding in (() if verdict is None else verdict.findings)],
        "diagnoses": [finding.diagnosis for finding in (() if verdict is None else verdict.findings)],
        "seconds": round(time.perf_counter() - started),
        **rows.circumstances("benchmarks.hidden", device),
    }


def table(found: list[rows.Row]) -> str:
    """Rows as a table."""
    lines = [
        [
            row["case"], str(row["seed"]), row["defence"], percent(row["accuracy"], 1), percent(row["asr"], 1),
            f"{row['removed']} of {row['poisons']}", str(row["removed_others"]), ", ".join(row["gates"]),
            ", ".join(row["diagnoses"]),
        ]
        for row in found
    ]  # fmt: skip
    left, told = ["digits", "seed", "defence"], ["gates", "diagnoses"]
    return markdown([*left, "accuracy", "ASR", "removed", "others", *told], lines, left=[*left, *told])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trainings", nargs="*", default=[f"{name}@0" for name in CASES], help="as case@seed")
    parser.add_argument("--defences", nargs="*", choices=list(DEFENCES), default=list(DEFENCES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "hidden.jsonl")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="print what is there, and end")
    options = parser.parse_args()
    command.quiet(options.threads)
    done = {tuple(row[name] for name in IDENTITY) for row in rows.read(options.out)}
    for training in [] if options.show else options.trainings:
        name, _, seed = training.partition("@")
        for defence in options.defences:
            if (name, int(seed or 0), defence) not in done:
                row = run(name, int(seed or 0), defence, options.device)
                rows.append(options.out, row)
                print(table([row]).splitlines()[-1], row["seconds"], "s", flush=True)
    print(table(rows.read(options.out)))


if __name__ == "__main__":
    main()
