"""NONE's measurement: units whose activations leave their usual range, and the activations of every training sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_backdoor.detection.near_duplicates import thumbnails
from lightning_backdoor.functional.hyperplane import (
    HyperplaneStatistics,
    bias_scores,
    candidate_units,
    strong_thresholds,
    unit_shifts,
)
from lightning_backdoor.scanning.isolation import isolated_eval
from lightning_backdoor.scanning.scan import all_gather, raise_on_all_ranks
from lightning_backdoor.scanning.scanner import DatasetScanner
from lightning_backdoor.surgery.graph import ResidualMode
from lightning_backdoor.surgery.units import UnitLayer, find_units

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Measured", "UnitScan", "find_layers"]

STRONG, WEAK = 0.9, 0.1  # probabilities above and below which a sample is confidently of a class, or not (NONE)

MAX_CANDIDATES = 512  # units whose responses are held for every sample, two bytes each
KEPT_BYTES = 2**28  # of the responses of all units to all samples, at most, that the first pass keeps for that
_HALF = torch.finfo(torch.half).max


@dataclass(frozen=True)
class Measured:
    """Results of the passes over N training samples and U units.

    Attributes:
        labels: Labels as given, long ``(N,)``.
        predicted: The model's classes, long ``(N,)``.
        activations: Largest response of the candidate units, half ``(N, M)``; on a GPU if they fit there.
        bias: How far each sample drives the most compromised unit of every layer out of its usual range, added up,
            float ``(N,)``.
        raw_bias: The same, of the responses as they are: the authors' score.
        activation_excess: How far each class drives each unit out of its usual range, double ``(U, K)``.
        unconfident: Classes without a confident sample, which were given another threshold.
        pictures: Small grey pictures of the samples, half ``(N, 144)``; ``None`` if near-duplicates do not matter.
    """

    labels: Tensor
    predicted: Tensor
    activations: Tensor
    bias: Tensor
    raw_bias: Tensor
    activation_excess: Tensor
    unconfident: tuple[int, ...]
    pictures: Tensor | None = None


class UnitScan:
    """Passes over a training set that measure the activations of a model's units.

    Args:
        data: The training set.
        layers: Layers whose units are measured, U units in all; they are numbered in the order of the layers.
        strong: Probability above which a sample is confidently of a class.
        weak: Probability below which it is confidently not of a class.
    """

    def __init__(
        self, data: DatasetScanner, layers: Sequence[UnitLayer], *, strong: float = STRONG, weak: float = WEAK
    ) -> None:
        self.data = data
        self.names = [layer.name for layer in layers]
        self.sizes = [layer.size for layer in layers]
        self.strong, self.weak = strong, weak

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> Measured:
        """Measure units and samples: one pass if all units can be kept, else two; another for unconfident classes."""
        keeps = 2 * len(self.data) * sum(self.sizes) <= KEPT_BYTES
        statistics, found = self.statistics(trainer, pl_module, self.strong, keeps=keeps)
        kept = found.pop("responses", None)
        thresholds, replaced = strong_thresholds(
            found["confidence"], found["predicted"], self.data.num_classes, self.strong
        )
        if replaced:
            statistics, found = self.statistics(trainer, pl_module, thresholds)
        activation_excess = statistics.activation_excess()
        strongest, of_class = activation_excess.max(dim=1)
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        tops = torch.tensor(
            [start + int(part.argmax()) for start, part in zip(starts, torch.split(strongest, self.sizes), strict=True)]
        )
        units = torch.cat([candidate_units(statistics, MAX_CANDIDATES), tops]).unique()  # type: ignore[no-untyped-call]
        activations = self._activations(trainer, pl_module, units) if kept is None else kept[:, units.to(kept.device)]
        of_tops = activations[:, torch.searchsorted(units, tops)].float().cpu()
        mean, std = (part[of_class[tops], tops] for part in statistics.usual())
        return Measured(
            found["labels"],
            found["predicted"],
            activations,
            bias_scores(of_tops, mean, std),
            bias_scores(of_tops),
            activation_excess,
            tuple(replaced),
            found["pictures"],
        )

    def statistics(
        self, trainer: Trainer, pl_module: LightningModule, strong: float | Tensor, *, keeps: bool = False
    ) -> tuple[HyperplaneStatistics, dict[str, Tensor]]:
        """One pass: statistics of all units; ``labels``, ``predicted``, ``confidence`` and ``pictures`` of samples.

        With ``keeps``, ``responses`` half ``(N, U)`` of all units, too; on a GPU if they fit there.
        """
        statistics = HyperplaneStatistics(sum(self.sizes), self.data.num_classes, strong=strong, weak=self.weak)

        def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
            labels = self.data.labels(batch).clone()  # transfer hooks may change a batch in place
            pictures = thumbnails(self.data.layout.images(batch))
            logits, activations = self.data.activations(trainer, pl_module, batch, self.names)
            probabilities = logits.softmax(dim=1)
            statistics.update(activations, probabilities)
            confidence, predicted = probabilities.max(dim=1)
            return {
                "labels": labels,
                "confidence": confidence,
                "predicted": predicted,
                "pictures": pictures,
                **({"responses": activations.clamp(-_HALF, _HALF).half()} if keeps else {}),
            }

        found = self.data.scan(trainer, pl_module, step, description="NONE statistics", stay=keeps)
        self._merge(trainer, statistics)
        return statistics, found

    def unit_shift(self, trainer: Trainer, pl_module: LightningModule, flagged: Tensor) -> Tensor:
        """How far some samples, bool ``(N,)``, drive each unit away from its other responses, double ``(U,)``."""
        statistics = HyperplaneStatistics(sum(self.sizes), 2)

        def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
            _, activations = self.data.activations(trainer, pl_module, batch, self.names)
            statistics.update(activations, torch.nn.functional.one_hot(flagged[indices].long(), 2).float())
            return {"seen": indices}

        self.data.scan(trainer, pl_module, step, description="NONE units")
        self._merge(trainer, statistics)
        return unit_shifts(statistics)

    def _activations(self, trainer: Trainer, pl_module: LightningModule, units: Tensor) -> Tensor:
        columns = units.to(pl_module.device)

        def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
            _, activations = self.data.activations(trainer, pl_module, batch, self.names)
            return {"responses": activations[:, columns].clamp(-_HALF, _HALF).half()}

        return self.data.scan(trainer, pl_module, step, description="NONE responses", stay=True)["responses"]

    @staticmethod
    def _merge(trainer: Trainer, statistics: HyperplaneStatistics) -> None:
        statistics.to("cpu")
        if trainer.world_size > 1:
            statistics.load(list(all_gather(trainer, statistics.state())))


def find_layers(
    trainer: Trainer, module: LightningModule, scanner: DatasetScanner, residual_mode: ResidualMode = "branch_only"
) -> list[UnitLayer]:
    """All layers whose units can be measured.

    Those are ``trainable`` whose units can be reset now: nothing that they need is frozen, and an optimizer has their
    weights. What the others show counts for the samples all the same.
    """
    with isolated_eval(trainer, module), raise_on_all_ranks(trainer, "search for units"):
        found = find_units(module, scanner.few(trainer, module), residual_mode=residual_mode)
    trained = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    return [replace(layer, trainable=layer.trainable and id(layer.layer.weight) in trained) for layer in found]
