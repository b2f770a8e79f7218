"""What small trainings with each defence lead to, to the last bit: for changes that must not change behavior.

``python -m benchmarks.equivalence --write before.json`` trains every cell and writes digests of the verdict and of the
final weights; ``--compare before.json`` trains again and names the cells that differ. Results depend on the machine and
on the number of threads, so both runs belong on one machine; each cell runs on one thread. Cells that a file holds
already are skipped, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import subprocess
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.digits import Classifier, all_digits
from lightning_backdoor import DBRCallback, DSTCallback, NONECallback, UltraCleanCallback, attacks

DEFENCES = {"ultraclean": UltraCleanCallback, "none": NONECallback, "dbr": DBRCallback, "dst": DSTCallback}
EPOCHS = {"digits": 12, "cifar10": 8}
PER_CLASS = 200  # images of CIFAR-10
EXACT = ("removed", "steps", "verdict", "weights")  # the rule is words, which may change


def cifar10(folder: Path) -> TensorDataset:
    """The first 200 training images of each class of ``cifar10_train.npz``, uint8 (3, 32, 32)."""
    packed = np.load(folder / "cifar10_train.npz")
    jpeg, offsets, labels = packed["jpeg"], packed["offsets"], packed["labels"].astype(np.int64)
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == label)[:PER_CLASS] for label in np.unique(labels)]))
    images = [np.asarray(Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes()))) for i in chosen]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return TensorDataset(pixels, torch.from_numpy(labels[chosen]))


def run(name: str, data: Dataset[Any], epochs: int) -> dict[str, Any]:
    """Train with a defence and return digests of verdict and weights, with a few readable figures."""
    pl.seed_everything(0, verbose=False)
    defence, model = DEFENCES[name](), Classifier()
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[defence], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=64, shuffle=True))
    verdict = defence.verdict
    assert verdict is not None, f"{name} has passed no verdict"
    masks = [verdict.keep, verdict.labels, verdict.trusted, verdict.suspect]
    return {
        "removed": len(verdict.removed),
        "rule": verdict.rule,
        "steps": trainer.global_step,
        "verdict": digest([verdict.scores, torch.tensor(verdict.threshold), *(m for m in masks if m is not None)]),
        "weights": digest(list(model.state_dict().values())),
    }


def digest(tensors: list[Tensor]) -> str:
    """SHA-256 of the values, the first 16 digits."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of cifar10_train.npz")
    parser.add_argument("--write", type=Path, help="file for the digests")
    parser.add_argument("--compare", type=Path, help="file of an earlier run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    done: dict[str, Any] = {}
    if arguments.write is not None and arguments.write.exists():
        done = json.loads(arguments.write.read_text())["cells"]
    before = {} if arguments.compare is None else json.loads(arguments.compare.read_text())["cells"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    first_digits = TensorDataset(*(part[:1400] for part in all_digits()))
    sources = {"digits": first_digits, "cifar10": cifar10(arguments.data)}
    differing = []
    for source, name, poisoned in product(sources, DEFENCES, (True, False)):
        cell = f"{source} {name} {'poisoned' if poisoned else 'clean'}"
        if cell not in done:
            clean = sources[source]
            data = attacks.poison(clean, attacks.BadNets(), target=0, rate=0.05) if poisoned else clean
            done[cell] = run(name, data, EPOCHS[source])
        told = ""
        if cell in before:
            same = all(before[cell][key] == done[cell][key] for key in EXACT)
            told = "same" if same else "DIFFERS"
            differing += [] if same else [cell]
        print(cell, done[cell], told, flush=True)
        if arguments.write is not None:
            arguments.write.write_text(json.dumps({"commit": commit, "cells": done}, indent=1))
    if before:
        print(f"{len(differing)} of {len(before)} cells differ: {differing}")


if __name__ == "__main__":
    main()
