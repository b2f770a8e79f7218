"""A baseline: NONE's treatment of units that were picked at random, on data that stay as they are."""

from __future__ import annotations

from typing import Any

import torch

from lightning_backdoor import NONECallback, Verdict
from lightning_backdoor.callbacks.compromised import reset_chosen
from lightning_backdoor.callbacks.rounds import Round
from lightning_backdoor.trainer.finetuning import enough_epochs


class RandomReset(NONECallback):
    """Reset some units of each layer, then fine-tune.

    Args:
        units: Layer name to number of units.
        seed: Seed of the choice.
    """

    def __init__(self, units: dict[str, int], seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.units = units

    def _look(self, trainer: Any, pl_module: Any) -> None:
        generator = torch.Generator().manual_seed(self.reading.seed)
        chosen = [
            (place, unit, 0, 0.0)
            for place, layer in enumerate(self._layers)
            for unit in torch.randperm(layer.size, generator=generator)[: self.units.get(layer.name, 0)].tolist()
        ]
        labels = self._training_set.scan(
            trainer, pl_module, lambda _, batch: {"labels": self._training_set.labels(batch)}, description="labels"
        )["labels"]
        nothing = torch.zeros(len(labels))
        self.verdict = Verdict(nothing, nothing == 0, float("inf"), "random reset", labels)
        units = tuple((self._layers[place].name, unit, 0, 0.0) for place, unit, *_ in chosen)
        self.history.append(Round(trainer.current_epoch + 1, 0, 0, (), units, (), 0.0, None))
        reset_chosen(self._layers, chosen, mode=self.reset, optimizers=trainer.optimizers, seed=self.reading.seed)
        self._tuning.begin(trainer, enough_epochs(trainer), self.lr)
