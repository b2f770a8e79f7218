"""The loop of every ablation: rows with a name, for several attacks, each measured once and kept in its own file."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from examples.evidence import rows
from examples.evidence.cells import ATTACKS, Attack
from examples.evidence.cost import measured
from examples.evidence.data import packed_cifar10, per_class
from examples.evidence.protocols import Setting
from examples.evidence.run import accuracy, checkpoint, clean_model, train_network
from lightning_backdoor import attacks

Variants = dict[str, Callable[[], rows.Row]]
"""The rows under one attack: the name of each, and what measures it."""


@dataclass(frozen=True)
class Case:
    """An attack under which rows are measured.

    Attributes:
        setting: How networks are trained.
        attack: Name of the attack.
        recipe: The attack with its trigger.
        dataset: The poisoned training set.
        poisoned: Which of its N samples are, bool ``(N,)``.
        test: Clean test images.
        cache: Folder of the checkpoints of ``python -m examples.evidence run``.
    """

    setting: Setting
    attack: str
    recipe: Attack
    dataset: Any
    poisoned: Tensor
    test: TensorDataset
    cache: Path

    @property
    def shared(self) -> Path:
        """Checkpoint of the undefended network before its last epoch."""
        return checkpoint(self.cache, self.setting, self.attack, 0)

    @property
    def known(self) -> rows.Row:
        """What a row says before anything is measured."""
        identity = rows.identity(self.setting, self.attack, 0)
        return {**identity, **rows.poison(int(self.poisoned.sum()), len(self.poisoned))}

    def trained(
        self, callbacks: list[pl.Callback], *, dataset: Any = None, start: Path | None = None, epochs_done: int = 0
    ) -> rows.Row:
        """Clean accuracy, ASR and cost of a training with callbacks, from a checkpoint on if there is one."""
        with measured("cpu") as meter:
            network = train_network(self.dataset if dataset is None else dataset, callbacks, self.setting, 0, start)
        return {
            "clean_accuracy": accuracy(network, self.test),
            "asr": accuracy(network, self.recipe.test(self.test)),
            **meter.row(len(self.dataset), epochs_done),
        }


def ablation(
    description: str | None,
    results: Path,
    variants: Callable[[Case], Variants],
    table: Callable[[list[rows.Row]], str],
    *,
    attacks_by_default: Sequence[str],
) -> None:
    """Read the command line, measure the rows that are missing, and print all.

    Args:
        description: What the command is for.
        results: The file of its rows.
        variants: The rows under one attack.
        table: Rows as a table.
        attacks_by_default: Names of attacks.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of cifar10_<split>.npz")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="folder of the undefended networks")
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attacks", nargs="+", default=list(attacks_by_default))
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    torch.set_num_threads(options.threads)
    clean = per_class(packed_cifar10(options.data, "train"), options.images // 10)
    test = packed_cifar10(options.data, "test")
    setting = Setting(images=len(clean), epochs=options.epochs)
    module = f"examples.evidence.{results.stem}"
    for attack in options.attacks:
        case = opened(clean, test, setting, attack, options.cache)
        for name, measure in variants(case).items():
            known = {**case.known, "row": name}
            if rows.key(known, "row") not in {rows.key(row, "row") for row in rows.read(options.results)}:
                row = {**known, **measure(), **rows.circumstances(module, "cpu")}
                rows.append(options.results, row)
                print(attack, name, file=sys.stderr, flush=True)
    print(table(rows.read(options.results)))


def opened(clean: TensorDataset, test: TensorDataset, setting: Setting, attack: str, cache: Path) -> Case:
    """An attack on clean training images."""
    recipe = ATTACKS[attack].made(clean, lambda: clean_model(clean, setting, 0, cache))
    dataset = recipe.train(clean, 0)
    truth = attacks.poisoned_mask(dataset)
    poisoned = torch.zeros(len(clean), dtype=torch.bool) if truth is None else truth
    return Case(setting, attack, recipe, dataset, poisoned, test, cache)
