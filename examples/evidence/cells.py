"""The cells of the benchmark: which attack meets which defence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from lightning_backdoor import DBRCallback, DSTCallback, NONECallback, UltraCleanCallback, attacks

TARGET = 0


@dataclass(frozen=True)
class Attack:
    """A poisoned training set: the trigger, how much of it, and on which labels."""

    trigger: attacks.Trigger | None = None
    rate: float = 0.0
    rate_of: str = "dataset"
    labels: str = "dirty"

    def train(self, dataset: Dataset[Any], seed: int) -> Any:
        """The training set under this attack."""
        if self.trigger is None:
            return dataset
        return attacks.poison(
            dataset, self.trigger, TARGET, rate=self.rate, rate_of=self.rate_of, labels=self.labels, seed=seed
        )

    def test(self, dataset: Dataset[Any]) -> Any:
        """The triggered test set; for clean data that of BadNets, to know the success rate of chance."""
        labels = "all_to_all" if self.labels == "all_to_all" else "dirty"
        return attacks.triggered(dataset, self.trigger or attacks.BadNets(), TARGET, labels=labels)


ATTACKS: dict[str, Attack] = {
    "clean": Attack(),
    "badnets-1%": Attack(attacks.BadNets(), 0.01),
    "badnets-5%": Attack(attacks.BadNets(), 0.05),
    "blended-5%": Attack(attacks.Blended(), 0.05),
    "sig-80%": Attack(attacks.SIG(), 0.8, "target_class", "clean"),
    "all-to-all-10%": Attack(attacks.BadNets(), 0.1, "dataset", "all_to_all"),
}

CALLBACKS: dict[str, Callable[[], Any]] = {
    "ultraclean": UltraCleanCallback,
    "ultraclean-paper": lambda: UltraCleanCallback.from_paper(output="logits"),
    "NONE": NONECallback,
    "NONE-paper": NONECallback.from_paper,
    "D-BR": DBRCallback,
    "D-BR-paper": DBRCallback.from_paper,
    "D-ST": DSTCallback,
}

AT_THE_END = ("NONE", "NONE-paper", "random-reset", "D-BR", "D-BR-paper")
"""Defences that act when training is about to end: they share the undefended training up to its last epoch."""


def filtered(dataset: Dataset[Any], defence: str, poisoned: torch.Tensor, size: int, seed: int) -> Dataset[Any]:
    """The training set of the two filters that are no defences: the one that knows, and the one that guesses."""
    if defence == "perfect":
        removed = poisoned.nonzero().squeeze(1)
    else:
        removed = torch.randperm(len(poisoned), generator=torch.Generator().manual_seed(seed))[:size]
    keep = torch.ones(len(poisoned), dtype=torch.bool)
    keep[removed] = False
    return Subset(dataset, keep.nonzero().squeeze(1).tolist())


def grid() -> list[tuple[str, str]]:
    """All cells in the order in which they run: what later cells need comes first."""
    one_target = [name for name in ATTACKS if name != "all-to-all-10%"]
    poisoned = [name for name in one_target if name != "clean"]
    return [
        *((attack, "undefended") for attack in ATTACKS),
        *((attack, "ultraclean") for attack in one_target),
        *((attack, "NONE") for attack in ATTACKS),
        *((attack, "perfect") for attack in poisoned),
        *((attack, "random") for attack in poisoned),
        *((attack, "random-reset") for attack in poisoned),
        *((attack, "NONE-paper") for attack in ATTACKS),
        *((attack, "ultraclean-paper") for attack in one_target),
        *((attack, "D-BR") for attack in ATTACKS),
        *((attack, "D-BR-paper") for attack in ATTACKS),
        *((attack, "D-ST") for attack in ATTACKS),
    ]
