"""A training set under an attack, and where what is known of it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from benchmarks import rows
from benchmarks.cache import checkpoint, clean_model, undefended
from benchmarks.cells import ATTACKS, Attack
from benchmarks.cost import measured
from benchmarks.protocols import Setting
from benchmarks.training import accuracy, train_network


@dataclass(frozen=True)
class Case:
    """An attack under which something is measured.

    Attributes:
        setting: How networks are trained.
        attack: Name of the attack.
        seed: Of the poison, the weights and the batches.
        recipe: The attack with its trigger.
        dataset: The training set of N samples.
        poisoned: Which of them are poisoned, bool ``(N,)``.
        covers: Which of them are covers, bool ``(N,)``.
        cache: Folder of what several commands share.
    """

    setting: Setting
    attack: str
    seed: int
    recipe: Attack
    dataset: Any
    poisoned: Tensor
    covers: Tensor
    cache: Path

    @property
    def shared(self) -> Path:
        """Where the undefended network before its last epoch is kept."""
        return checkpoint(self.cache, self.setting, self.attack, self.seed)

    @property
    def known(self) -> rows.Row:
        """What a row says before anything is measured."""
        identity = rows.identity(self.setting, self.attack, self.seed)
        return {**identity, **rows.poison(int(self.poisoned.sum()), len(self.poisoned))}

    def undefended(self, *, at_first: bool = False) -> Path:
        """The same, trained now if it is not there; or the one of its first epochs."""
        return undefended(self.dataset, self.setting, self.attack, self.seed, self.cache, at_first=at_first)

    def trained(
        self,
        callbacks: list[pl.Callback],
        test: TensorDataset,
        *,
        dataset: Any = None,
        start: Path | None = None,
        epochs_done: int = 0,
    ) -> rows.Row:
        """Clean accuracy, ASR and cost of a training with callbacks, from a checkpoint on if there is one."""
        with measured("cpu") as meter:
            network = train_network(
                self.dataset if dataset is None else dataset, callbacks, self.setting, self.seed, start
            )
        return {
            "clean_accuracy": accuracy(network, test),
            "asr": accuracy(network, self.recipe.test(test)),
            **meter.row(len(self.dataset), epochs_done),
        }


def opened(attack: str, train: TensorDataset, setting: Setting, seed: int, cache: Path, *, device: str = "cpu") -> Case:
    """An attack on clean training images."""
    recipe = ATTACKS[attack].made(train, lambda: clean_model(train, setting, seed, cache, device))
    dataset = recipe.train(train, seed)
    none = torch.zeros(len(train), dtype=torch.bool)
    poisoned, covers = (none, none) if recipe.trigger is None else (dataset.poisoned, dataset.covers)
    return Case(setting, attack, seed, recipe, dataset, poisoned, covers, cache)
