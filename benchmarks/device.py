"""``python -m benchmarks.device``: what a defence costs on one device, as a ratio of wall-clock times.

Trains a network without a defence, then with each defence as users write it (no arguments), alone on the machine, one
after the other: clean data, then attacks. One JSON line per finished training in ``device.jsonl``; a run that was
interrupted, or ended by ``--budget``, goes on with the first missing one. ``--table`` prints the rows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from benchmarks import command, rows
from benchmarks.cells import ATTACKS
from benchmarks.cost import measured
from benchmarks.data import cifar10, dataset_name, per_class
from benchmarks.model import RECIPE
from benchmarks.networks import NETWORKS, PRETRAINED, efficientnet_lite0
from benchmarks.protocols import Cell, Setting
from benchmarks.run import judgement
from benchmarks.table import number, percent, table
from benchmarks.training import accuracy, train_network
from lightning_backdoor import DBRCallback, NONECallback, UltraCleanCallback

RESULTS = Path(__file__).with_name("device.jsonl")
UNDEFENDED = "undefended"
DEFENCES: dict[str, Callable[[], list[Any]]] = {
    UNDEFENDED: list,
    "ultraclean": lambda: [UltraCleanCallback()],
    "NONE": lambda: [NONECallback()],
    "D-BR": lambda: [DBRCallback()],
}
FROM_SCRATCH = Setting("resnet18", 50_000, 12, RECIPE)
FINETUNING = Setting(PRETRAINED, 4_000, 5, "adamw")
TRAININGS = [
    *(Cell(FROM_SCRATCH, "clean", defence) for defence in DEFENCES),
    *(Cell(FROM_SCRATCH, attack, defence) for attack in ("badnets-5%", "blended-5%") for defence in [*DEFENCES][1:]),
    *(Cell(FINETUNING, attack, defence) for attack in ("clean", "badnets-5%") for defence in DEFENCES),
    *(Cell(FROM_SCRATCH, attack, UNDEFENDED) for attack in ("badnets-5%", "blended-5%")),
]
"""In the order in which they run: what others are compared with comes first."""

FOUND = 2.0
"""Expected time of a training in which something is found, as a multiple of the undefended one, to keep a budget."""


def trainings(options: argparse.Namespace) -> list[Cell]:
    """The trainings that were asked for, in their order, with the changes that were asked for."""
    found = [
        replace(
            cell,
            setting=replace(
                cell.setting,
                dataset=dataset_name(options.data),
                images=min(cell.setting.images, options.images or cell.setting.images),
                epochs=options.epochs or cell.setting.epochs,
                model=(options.model if cell.setting.model != PRETRAINED else None) or cell.setting.model,
            ),
        )
        for cell in TRAININGS
        if options.weights is not None or cell.setting.model != PRETRAINED
    ]
    words = options.only or [""]
    return [cell for cell in found if any(word in cell.name for word in words)]


def run_training(cell: Cell, clean: TensorDataset, test: TensorDataset, options: argparse.Namespace) -> rows.Row:
    """Train one cell, and return its row."""
    setting, recipe = cell.setting, ATTACKS[cell.attack]
    dataset = recipe.train(clean, cell.seed)
    poisoned = torch.zeros(len(clean), dtype=torch.bool) if recipe.trigger is None else dataset.poisoned
    defences = DEFENCES[cell.defence]()
    with measured(options.device) as meter:
        network = train_network(
            dataset, defences, setting, cell.seed, None, device=options.device, workers=options.workers
        )
    return {
        **rows.identity(setting, cell.attack, cell.seed),
        **rows.poison(int(poisoned.sum()), len(clean)),
        "defence": cell.defence,
        "clean_accuracy": accuracy(network, test, options.device),
        "asr": accuracy(network, recipe.test(test), options.device),
        **(judgement(defences, poisoned) if defences else {"removed": 0}),
        **meter.row(len(clean), 0),
        "workers": options.workers,
        "test_images": len(test),
        **rows.circumstances("benchmarks.device", options.device),
    }


def ratio(row: rows.Row, found: Iterable[rows.Row]) -> float | None:
    """Time of a training over the median of the undefended ones in the same setting, of one commit, on one machine."""
    same = ("dataset", "images", "model", "recipe", "epochs", "hardware", "workers", "versions")
    beside = [
        other["seconds"]
        for other in found
        if other["defence"] == UNDEFENDED and all(other[name] == row[name] for name in same)
    ]
    return row["seconds"] / statistics.median(beside) if beside else None


def markdown(found: list[rows.Row]) -> str:
    """The rows as a table."""
    left = ("network, images, epochs", "attack", "defence", "hardware", "commit")
    header = [*left[:3], "accuracy", "ASR", "TPR", "FPR", "time", "epochs' work", *left[3:]]
    body = [
        [
            f"{row['model']}, {row['images']:,}, {row['epochs']}",
            row["attack"],
            row["defence"],
            *(percent([row.get(name)]) for name in ("clean_accuracy", "asr", "tpr")),
            percent([row.get("fpr")], 2),
            number([ratio(row, found)], 2),
            number([row["epoch_equivalents"]], 1),
            row["hardware"],
            str(row["versions"]["commit"]),
        ]
        for row in found
    ]
    return table(header, body, left)


def run(options: argparse.Namespace) -> None:
    """Run the missing trainings, as many as the budget allows."""
    began = time.monotonic()
    command.begin(options)
    if options.weights is not None:
        NETWORKS[PRETRAINED] = partial(efficientnet_lite0, options.weights)
    everything, test = (cifar10(options.data, split) for split in ("train", "test"))
    warm = per_class(everything, 50)
    warm_settings: set[Setting] = set()
    for cell in trainings(options):
        done = rows.read(options.results)
        if rows.cell_key(cell) in map(rows.key, done):
            continue
        beside = [row["seconds"] for row in done if rows.setting_of(row) == cell.setting and row["attack"] == "clean"]
        expected = max(beside, default=0.0) * (FOUND if cell.attack != "clean" else 1.0)
        if time.monotonic() - began + expected > options.budget:
            print(f"{cell.name} and what follows is left: about {expected:.0f} s, and the budget ends.", flush=True)
            return
        if cell.setting not in warm_settings:  # kernels are chosen and loaded at the first batches
            train_network(warm, [], replace(cell.setting, epochs=1), 0, None, device=options.device)
            warm_settings.add(cell.setting)
        row = run_training(cell, per_class(everything, cell.setting.images // 10), test, options)
        rows.append(options.results, row)
        told = f"accuracy {row['clean_accuracy']:.3f} ASR {row['asr']:.3f} {row['seconds']} s"
        print(f"{cell.name:45} {told}", flush=True)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the rows; run nothing")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which none is started")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes of the training loader")
    parser.add_argument("--weights", type=Path, help="ImageNet weights of EfficientNet-Lite0; without, none is tuned")
    parser.add_argument("--images", type=int, help="training images, at most")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--model", choices=list(NETWORKS), help="in place of ResNet-18")
    parser.add_argument("--only", nargs="*", help="only trainings whose model/attack/defence/seed-N/ contains one")
    options = parser.parse_args()
    if not options.table:
        run(options)
    print(markdown(rows.latest(rows.read(options.results))))


if __name__ == "__main__":
    main()
