"""Run one cell: train, measure, return a row."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import TensorDataset

from benchmarks import rows
from benchmarks.cache import EARLY, early, undefended
from benchmarks.candidates import together
from benchmarks.cases import opened
from benchmarks.cells import AT_THE_END, BEYOND, CALLBACKS, CLEAN_MODEL, clean_share, filtered
from benchmarks.cost import measured
from benchmarks.protocols import Cell
from benchmarks.training import Snapshot, accuracy, labels_of, train_network
from benchmarks.variants import RandomReset
from lightning_backdoor import NONECallback, baselines, metrics


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
        cell: The attack, the defence (``"undefended"``, ``"clean-model"``, ``"perfect"``, ``"random"``,
            ``"random-reset"``, ``"fine-tune"`` or a key of ``CALLBACKS``), the seed of the poison, the weights and the
            batches. A clean model has the next seed: no trigger was made against it.
        train: Clean training images, as many as the setting of the cell says.
        test: Clean test images.
        reference: For the two random baselines, the row of the defence whose size they have.
        cache: Folder for the checkpoints of undefended trainings before their last epoch.
        device: ``"cpu"`` or ``"cuda"``.
        workers: Worker processes of the training loader.
    """
    setting, seed, defence = cell.setting, cell.seed, cell.defence
    case = opened(cell.attack, train, setting, seed, cache, device=device)
    dataset, poisoned, shared = case.dataset, case.poisoned, case.shared
    if defence == CLEAN_MODEL:
        dataset, seed = train, seed + 1
        shared = undefended(train, setting, "clean", seed, cache, device=device)
    defences = _callbacks(defence, dataset, poisoned, seed, reference)
    if defence in ("perfect", "random"):
        dataset = filtered(dataset, defence, poisoned, reference.get("removed", 0), seed)
    late = defence in (*AT_THE_END, CLEAN_MODEL) and shared.exists()
    watchers: list[pl.Callback] = []
    if defence == "undefended":
        watchers = [Snapshot(shared, setting.epochs - 1), Snapshot(early(shared), EARLY)]
    with measured(device) as meter:
        network = train_network(
            dataset, [*defences, *watchers], setting, seed, shared if late else None, device=device, workers=workers
        )
    return {
        **case.known,
        "defence": defence,
        "clean_accuracy": accuracy(network, test, device),
        "asr": accuracy(network, case.recipe.test(test), device),
        "removed": len(train) - len(dataset),
        **(judgement(defences, poisoned) if defences else {}),
        **meter.row(len(train), setting.epochs - 1 if late else 0),
        **rows.circumstances("benchmarks", device),
    }


def _callbacks(defence: str, dataset: Any, poisoned: torch.Tensor, seed: int, reference: rows.Row) -> list[Any]:
    """The callbacks of a defence; none for what is no callback."""
    if defence == "random-reset":
        return [RandomReset(reference["units"], labels_of(dataset), ~poisoned, seed)]
    if defence == "fine-tune":
        return [
            baselines.FineTuneTrusted(
                verdict=clean_share(labels_of(dataset), poisoned, seed), epochs=5, extra_epochs=BEYOND
            )
        ]
    return CALLBACKS[defence]() if defence in CALLBACKS else []


def judgement(callbacks: list[Any], poisoned: torch.Tensor) -> rows.Row:
    """What the callbacks removed, together, and which units they reset."""
    verdicts = [callback.verdict for callback in callbacks]
    scores, keep = together((verdict.scores, verdict.keep) for verdict in verdicts)
    rates = metrics.DetectionRates()
    rates.update(scores, keep, poisoned)
    row: rows.Row = {
        "removed": int((~keep).sum()),
        **{name: None if value.isnan() else float(value) for name, value in rates.compute().items()},
        "rule": ", ".join(verdict.rule for verdict in verdicts),
    }
    if len(verdicts) > 1:
        row["removed_by"] = [len(verdict.removed) for verdict in verdicts]
    for callback in callbacks:
        if isinstance(callback, (NONECallback, RandomReset)):
            units = {(layer, unit) for done in callback.history for layer, unit, *_ in done.units}
            row["units"] = dict(Counter(layer for layer, _ in units))
            row["undone"] = any(done.undone for done in callback.history)
    return row
