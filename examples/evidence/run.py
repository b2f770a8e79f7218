"""Run one cell: train, measure, return a row."""

from __future__ import annotations

import platform
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from examples.evidence import data, model
from examples.evidence.cells import ATTACKS, CALLBACKS, filtered
from lightning_backdoor import __version__, attacks, metrics

BATCH = 128


def run_cell(
    train: TensorDataset, test: TensorDataset, attack: str, defence: str, *, epochs: int, seed: int, removed: int
) -> dict[str, Any]:
    """Train under ``attack`` with ``defence`` and return the row of the result file.

    Args:
        train: Clean training images.
        test: Clean test images.
        attack: Key of ``ATTACKS``.
        defence: ``"none"``, ``"perfect"``, ``"random"`` or a key of ``CALLBACKS``.
        epochs: Epochs of one training.
        seed: Seed of the poison, the weights and the batches.
        removed: How many samples the random filter removes.
    """
    recipe = ATTACKS[attack]
    dataset = recipe.train(train, seed)
    truth = attacks.poisoned_mask(dataset)
    poisoned = torch.zeros(len(train), dtype=torch.bool) if truth is None else truth
    callback = CALLBACKS[defence]() if defence in CALLBACKS else None
    if defence in ("perfect", "random"):
        dataset = filtered(dataset, defence, poisoned, removed, seed)
    began = time.perf_counter()
    network = _train(dataset, [] if callback is None else [callback], epochs, seed)
    seconds = time.perf_counter() - began
    row = {
        "dataset": data.NAME,
        "images": len(train),
        "model": model.NAME,
        "attack": attack,
        "poisons": int(poisoned.sum()),
        "defence": defence,
        "epochs": epochs,
        "seed": seed,
        "clean_accuracy": _accuracy(network, test),
        "asr": _accuracy(network, recipe.test(test)),
        "removed": len(train) - len(dataset) if callback is None else int((~callback.verdict.keep).sum()),
        "seconds": round(seconds, 1),
        "versions": {
            "lightning_backdoor": __version__,
            "torch": torch.__version__,
            "pytorch_lightning": pl.__version__,
        },
        "hardware": f"{torch.get_num_threads()} CPU threads, {platform.machine()}",
    }
    if callback is not None:
        rates = metrics.DetectionRates()
        rates.update(callback.verdict.scores, callback.verdict.keep, poisoned)
        row |= {name: None if value.isnan() else float(value) for name, value in rates.compute().items()}
        row["rule"] = callback.verdict.rule
    return row


def _train(dataset: Dataset[Any], callbacks: list[pl.Callback], epochs: int, seed: int) -> model.Classifier:
    pl.seed_everything(seed, verbose=False)
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, drop_last=True)
    network = model.Classifier(steps=epochs * len(loader))
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", precision="bf16-mixed", callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(network, loader)
    return network.eval()


@torch.no_grad()
def _accuracy(network: model.Classifier, dataset: Dataset[Any]) -> float:
    """Share of the images that get the label of the dataset."""
    metric = metrics.RecoveredAccuracy()
    for images, labels in DataLoader(dataset, batch_size=500):
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(images)
        metric.update(logits.float(), labels)
    return float(metric.compute())
