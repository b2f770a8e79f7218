"""A baseline: NONE's treatment of units that were picked at random, without the samples that NONE removed."""

from __future__ import annotations

from typing import Any

import torch
from lightning_backdoor.callbacks.rounds import Round, shares
from torch import Tensor

from benchmarks.cells import BEYOND
from lightning_backdoor import NONECallback, Verdict
from lightning_backdoor.responses.extra_epochs import enough_epochs
from lightning_backdoor.responses.weight_copies import weights


class RandomReset(NONECallback):
    """Remove given samples, reset some units of each layer, then fine-tune: what does *choosing* units add?

    Args:
        units: Layer name to number of units.
        labels: Labels of all samples, long (N,).
        keep: Samples that stay, bool (N,).
        seed: Seed of the choice.
    """

    def __init__(self, units: dict[str, int], labels: Tensor, keep: Tensor, seed: int = 0) -> None:
        super().__init__(rounds=1, extra_epochs=BEYOND, seed=seed)
        self.units = units
        self.given = Verdict((~keep).float(), keep, 0.5, "random reset", labels)

    def _look(self, trainer: Any, pl_module: Any) -> None:
        generator = torch.Generator().manual_seed(self.options.seed)
        chosen = [
            (place, unit, 0, 0.0)
            for place, layer in enumerate(self._layers)
            for unit in torch.randperm(layer.size, generator=generator)[: self.units.get(layer.name, 0)].tolist()
        ]
        predicted = self._training_set.predict(trainer, pl_module, description="check")
        accuracy, flagged_label_rate = shares(predicted, self.given)
        removed = self._adopt(self.given)
        units = tuple((self._layers[place].name, unit, 0, 0.0) for place, unit, *_ in chosen)
        self.history.append(
            Round(trainer.current_epoch + 1, removed, removed, (), units, (), accuracy, flagged_label_rate)
        )
        self._series.last_look = trainer.current_epoch + 1
        everything = torch.ones_like(self.given.keep)
        self._series.begin(weights(trainer, pl_module), everything, predicted == self.given.labels)
        self._tuning.begin(trainer, enough_epochs(trainer), self.lr)
