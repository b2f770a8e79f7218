"""NONE's measurement: which units are driven out of their range, and how every training sample drives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor.functional.hyperplane import HyperplaneStatistics, strong_thresholds
from lightning_backdoor.surgery.units import UnitLayer
from lightning_backdoor.trainer.scan import all_gather
from lightning_backdoor.trainer.training_set import TrainingSet

__all__ = ["UnitScan"]

_HALF = torch.finfo(torch.half).max


class UnitScan:
    """Two passes over a training set: statistics of all units, then the responses of a few chosen ones.

    Args:
        data: The training set.
        layers: Layers whose units are looked at, U units in all; they are numbered in the order of the layers.
        strong: Probability above which a sample is confidently of a class.
        weak: Probability below which it is confidently not of a class.
    """

    def __init__(self, data: TrainingSet, layers: Sequence[UnitLayer], *, strong: float, weak: float) -> None:
        self.data = data
        self.names = [layer.name for layer in layers]
        self.units = sum(layer.size for layer in layers)
        self.strong, self.weak = strong, weak

    def statistics(self, trainer: Any, pl_module: Any) -> tuple[HyperplaneStatistics, dict[str, Tensor], list[int]]:
        """Measure every unit; once more, with other thresholds, if some class has no confident sample.

        Returns:
            The statistics; per sample ``labels`` and ``predicted`` long ``(N,)`` and ``confidence`` float ``(N,)``; and
            the classes that needed another threshold.
        """
        statistics, found = self._pass(trainer, pl_module, self.strong)
        thresholds, replaced = strong_thresholds(
            found["confidence"], found["predicted"], self.data.num_classes, self.strong
        )
        if replaced:
            statistics, found = self._pass(trainer, pl_module, thresholds)
        return statistics, found, replaced

    def responses(self, trainer: Any, pl_module: Any, units: Tensor) -> Tensor:
        """Responses of some units ``(M,)`` to every training sample, half ``(N, M)``."""

        def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
            _, responses = self.data.responses(trainer, pl_module, batch, self.names)
            return {"responses": responses[:, units.to(responses.device)].clamp(-_HALF, _HALF).half()}

        return self.data.scan(trainer, pl_module, step, description="NONE responses")["responses"]

    def _pass(
        self, trainer: Any, pl_module: Any, strong: float | Tensor
    ) -> tuple[HyperplaneStatistics, dict[str, Tensor]]:
        statistics = HyperplaneStatistics(self.units, self.data.num_classes, strong=strong, weak=self.weak)

        def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
            labels = self.data.labels(batch).clone()  # transfer hooks may change a batch in place
            logits, responses = self.data.responses(trainer, pl_module, batch, self.names)
            probabilities = logits.softmax(dim=1)
            statistics.update(responses, probabilities)
            confidence, predicted = probabilities.max(dim=1)
            return {"labels": labels, "confidence": confidence, "predicted": predicted}

        found = self.data.scan(trainer, pl_module, step, description="NONE statistics")
        if trainer.world_size > 1:
            statistics.load(list(all_gather(trainer, statistics.state())))
        return statistics, found
