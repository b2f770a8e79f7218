"""Run one cell: train, measure, return a row."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from examples.evidence import model, rows
from examples.evidence.cells import AT_THE_END, ATTACKS, CALLBACKS, clean_share, filtered
from examples.evidence.cost import measured
from examples.evidence.protocols import Cell, Setting
from examples.evidence.random_reset import RandomReset
from lightning_backdoor import NONECallback, attacks, baselines, functional, metrics

BATCH = 128
EARLY = 3  # epochs: the backdoor is learned, most of the classes are not


def run_cell(
    cell: Cell,
    train: TensorDataset,
    test: TensorDataset,
    *,
    reference: rows.Row,
    cache: Path,
    device: str = "cpu",
    workers: int = 0,
) -> rows.Row:
    """Train one cell, and return its row of the result file.

    Args:
        cell: The attack, the defence (``"undefended"``, ``"perfect"``, ``"random"``, ``"random-reset"``,
            ``"fine-tune"`` or a key of ``CALLBACKS``), the seed of the poison, the weights and the batches.
        train: Clean training images, as many as the setting of the cell says.
        test: Clean test images.
        reference: For the two random baselines, the row of the defence whose size they have.
        cache: Folder for the checkpoints of undefended trainings before their last epoch.
        device: ``"cpu"`` or ``"cuda"``.
        workers: Worker processes of the training loader.
    """
    setting, seed, defence = cell.setting, cell.seed, cell.defence
    recipe = ATTACKS[cell.attack].made(train, lambda: clean_model(train, setting, seed, cache, device))
    dataset = recipe.train(train, seed)
    truth = attacks.poisoned_mask(dataset)
    poisoned = torch.zeros(len(train), dtype=torch.bool) if truth is None else truth
    callback = _callback(defence, dataset, poisoned, seed, reference)
    if defence in ("perfect", "random"):
        dataset = filtered(dataset, defence, poisoned, reference.get("removed", 0), seed)
    shared = checkpoint(cache, setting, cell.attack, seed)
    late = defence in AT_THE_END and shared.exists()
    callbacks = [] if callback is None else [callback]
    if defence == "undefended":
        callbacks += [Snapshot(shared, setting.epochs - 1), Snapshot(early(shared), EARLY)]
    with measured(device) as meter:
        network = train_network(
            dataset, callbacks, setting, seed, shared if late else None, device=device, workers=workers
        )
    row = {
        **rows.identity(setting, cell.attack, seed),
        **rows.poison(int(poisoned.sum()), len(train)),
        "defence": defence,
        "clean_accuracy": accuracy(network, test, device),
        "asr": accuracy(network, recipe.test(test), device),
        "removed": len(train) - len(dataset) if callback is None else int((~callback.verdict.keep).sum()),
        **meter.row(len(train), setting.epochs - 1 if late else 0),
        **rows.circumstances("examples.evidence", device),
    }
    if callback is not None:
        rates = metrics.DetectionRates()
        rates.update(callback.verdict.scores, callback.verdict.keep, poisoned)
        row |= {name: None if value.isnan() else float(value) for name, value in rates.compute().items()}
        row["rule"] = callback.verdict.rule
        callback.verdict.save(verdict_of(shared, defence))
    if isinstance(callback, NONECallback):
        row["units"] = dict(Counter(layer for done in callback.history for layer, *_ in done.units))
        row["undone"] = any(done.undone for done in callback.history)
    return row


def _callback(defence: str, dataset: Any, poisoned: torch.Tensor, seed: int, reference: rows.Row) -> Any:
    """The callback of a defence, or ``None`` for what is no callback."""
    if defence == "random-reset":
        return RandomReset(reference["units"], labels_of(dataset), ~poisoned, seed)
    if defence == "fine-tune":
        return baselines.FineTuneTrusted(verdict=clean_share(labels_of(dataset), poisoned, seed), epochs=5)
    return CALLBACKS[defence]() if defence in CALLBACKS else None


def labels_of(dataset: Any) -> torch.Tensor:
    """Labels as a victim receives them, long (N,)."""
    return torch.tensor([int(dataset[i][1]) for i in range(len(dataset))])


def images_of(dataset: Any) -> torch.Tensor:
    """Images as a victim receives them, uint8 (N, 3, 32, 32)."""
    return torch.stack([dataset[i][0] for i in range(len(dataset))])


class Snapshot(pl.Callback):
    """Saves a checkpoint after so many epochs, from which a run can go on; ``stop`` ends the run there."""

    def __init__(self, path: Path, epochs: int, *, stop: bool = False) -> None:
        self.path, self.epochs, self.stop = path, epochs, stop

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epochs - 1:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = self.stop


def checkpoint(cache: Path, setting: Setting, attack: str, seed: int) -> Path:
    """Where the undefended training under ``attack`` is kept as it was before its last epoch."""
    usual = Setting(images=setting.images, epochs=setting.epochs)
    other = "" if setting == usual else f"-{setting.model}-{setting.recipe}"
    return cache / f"{attack}-{setting.images}-{setting.epochs}-{seed}{other}.ckpt"


def early(shared: Path) -> Path:
    """Where the same training is kept as it was after ``EARLY`` epochs."""
    return shared.with_suffix(".early.ckpt")


def verdict_of(shared: Path, defence: str) -> Path:
    """Where the verdict of a defence on the same training set is kept."""
    return shared.with_suffix(f".{defence}.pt")


def clean_model(
    train: TensorDataset, setting: Setting, seed: int, cache: Path, device: str = "cpu"
) -> functional.PixelModel:
    """The classifier that an attacker has: trained on clean data, from the cache or else now; pixels in ``[0, 1]``."""
    path = checkpoint(cache, setting, "clean", seed)
    if not path.exists():
        train_network(train, [Snapshot(path, setting.epochs - 1)], setting, seed, None, device=device)
    return functional.PixelModel(restored(path, setting), std=1 / 255)


def restored(path: Path, setting: Setting) -> model.Classifier:
    """The network of a checkpoint, for evaluation, on the CPU."""
    network = model.Classifier(steps=1, network=setting.model, recipe=setting.recipe)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    return network.eval()


def train_network(
    dataset: Dataset[Any],
    callbacks: list[pl.Callback],
    setting: Setting,
    seed: int,
    checkpoint: Path | None,
    *,
    device: str = "cpu",
    workers: int = 0,
) -> model.Classifier:
    """Train the network of a setting with callbacks, from a checkpoint on if there is one."""
    pl.seed_everything(seed, verbose=False)
    loader = DataLoader(
        dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    network = model.Classifier(setting.epochs * len(loader), setting.model, setting.recipe)
    trainer = pl.Trainer(
        max_epochs=setting.epochs, accelerator=device, devices=1, precision="bf16-mixed", callbacks=callbacks,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(network, loader, ckpt_path=checkpoint)
    return network.eval()


@torch.no_grad()
def answers(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits (N, 10) of uint8 images (N, 3, 32, 32), on the CPU."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([network(part).float() for part in images.split(500)])


@torch.no_grad()
def accuracy(network: model.Classifier, dataset: Dataset[Any], device: str = "cpu") -> float:
    """Share of the images that get the label of the dataset."""
    metric = metrics.RecoveredAccuracy()
    network.to(device)
    for images, labels in DataLoader(dataset, batch_size=500):
        with torch.autocast(device, torch.bfloat16):
            logits = network(images.to(device))
        metric.update(logits.float().cpu(), labels)
    return float(metric.compute())
