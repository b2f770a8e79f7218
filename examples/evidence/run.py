"""Run one cell: train, measure, return a row."""

from __future__ import annotations

import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from examples.evidence import data, model
from examples.evidence.cells import AT_THE_END, ATTACKS, CALLBACKS, clean_share, filtered
from examples.evidence.random_reset import RandomReset
from lightning_backdoor import NONECallback, __version__, attacks, baselines, functional, metrics

BATCH = 128


def run_cell(
    train: TensorDataset,
    test: TensorDataset,
    attack: str,
    defence: str,
    *,
    epochs: int,
    seed: int,
    reference: dict[str, Any],
    cache: Path,
) -> dict[str, Any]:
    """Train under ``attack`` with ``defence`` and return the row of the result file.

    Args:
        train: Clean training images.
        test: Clean test images.
        attack: Key of ``ATTACKS``.
        defence: ``"undefended"``, ``"perfect"``, ``"random"``, ``"random-reset"``, ``"fine-tune"`` or a key of
            ``CALLBACKS``.
        epochs: Epochs of one training.
        seed: Seed of the poison, the weights and the batches.
        reference: For the two random baselines, the row of the defence whose size they have.
        cache: Folder for the checkpoints of undefended trainings before their last epoch.
    """
    recipe = ATTACKS[attack].made(train, lambda: clean_model(train, epochs, seed, cache))
    dataset = recipe.train(train, seed)
    truth = attacks.poisoned_mask(dataset)
    poisoned = torch.zeros(len(train), dtype=torch.bool) if truth is None else truth
    callback = CALLBACKS[defence]() if defence in CALLBACKS else None
    if defence == "random-reset":
        labels = torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])
        callback = RandomReset(reference["units"], labels, ~poisoned, seed)
    if defence == "fine-tune":
        labels = torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])
        callback = baselines.FineTuneTrusted(verdict=clean_share(labels, poisoned, seed), epochs=5)
    if defence in ("perfect", "random"):
        dataset = filtered(dataset, defence, poisoned, reference.get("removed", 0), seed)
    shared = checkpoint(cache, attack, len(train), epochs, seed)
    late = defence in AT_THE_END and shared.exists()
    callbacks = [] if callback is None else [callback]
    if defence == "undefended":
        callbacks.append(_BeforeTheLastEpoch(shared, epochs))
    began = time.perf_counter()
    network = train_network(dataset, callbacks, epochs, seed, shared if late else None)
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
        "clean_accuracy": accuracy(network, test),
        "asr": accuracy(network, recipe.test(test)),
        "removed": len(train) - len(dataset) if callback is None else int((~callback.verdict.keep).sum()),
        "seconds": round(seconds, 1),
        "epochs_shared_with_undefended": epochs - 1 if late else 0,
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
    if isinstance(callback, NONECallback):
        row["units"] = dict(Counter(layer for done in callback.history for layer, *_ in done.units))
        row["undone"] = any(done.undone for done in callback.history)
    return row


class _BeforeTheLastEpoch(pl.Callback):
    """Saves a checkpoint from which a run can go on into its last epoch."""

    def __init__(self, path: Path, epochs: int) -> None:
        self.path, self.epochs = path, epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epochs - 2:
            trainer.save_checkpoint(self.path)


def checkpoint(cache: Path, attack: str, images: int, epochs: int, seed: int) -> Path:
    """Where the undefended training under ``attack`` is kept as it was before its last epoch."""
    return cache / f"{attack}-{images}-{epochs}-{seed}.ckpt"


def clean_model(train: TensorDataset, epochs: int, seed: int, cache: Path) -> functional.PixelModel:
    """The classifier that an attacker has: trained on clean data, from the cache or else now; pixels in ``[0, 1]``."""
    path = checkpoint(cache, "clean", len(train), epochs, seed)
    if not path.exists():
        train_network(train, [_BeforeTheLastEpoch(path, epochs)], epochs, seed, None)
    network = model.Classifier(steps=1)
    network.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return functional.PixelModel(network.eval(), std=1 / 255)


def train_network(
    dataset: Dataset[Any], callbacks: list[pl.Callback], epochs: int, seed: int, checkpoint: Path | None
) -> model.Classifier:
    pl.seed_everything(seed, verbose=False)
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, drop_last=True)
    network = model.Classifier(steps=epochs * len(loader))
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", precision="bf16-mixed", callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(network, loader, ckpt_path=checkpoint)
    return network.eval()


@torch.no_grad()
def accuracy(network: model.Classifier, dataset: Dataset[Any]) -> float:
    """Share of the images that get the label of the dataset."""
    metric = metrics.RecoveredAccuracy()
    for images, labels in DataLoader(dataset, batch_size=500):
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(images)
        metric.update(logits.float(), labels)
    return float(metric.compute())
