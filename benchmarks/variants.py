"""Defences with one part changed, for ablations; no other module of the benchmark uses inner names of the library."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.cells import BEYOND
from lightning_backdoor import DBRCallback, DSTCallback, NONECallback, Verdict
from lightning_backdoor.callbacks.base import Detector
from lightning_backdoor.events import Event
from lightning_backdoor.responses.base import Detection, Session
from lightning_backdoor.responses.reset_units import ResetUnits
from lightning_backdoor.responses.two_stage import TwoStage
from lightning_backdoor.responses.unlearn import Unlearn, split_of


class GivenVerdict(Detector):
    """No measurement: a verdict with labels."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict

    def detect(self, session: Session) -> Detection:
        """Return the verdict."""
        return Detection(self.verdict, int((~self.verdict.keep).sum()))


class RandomUnits(ResetUnits):
    """Reset units that are drawn at random in place of the compromised ones, in one round.

    Args:
        units: Layer name to number of units.
        seed: Seed of the draw.
    """

    def __init__(self, units: dict[str, int], seed: int) -> None:
        super().__init__(rounds=1, extra_epochs=BEYOND, by_quota=True, seed=seed)
        self.units = units

    def respond(self, session: Session, detection: Detection, event: Event) -> Event:
        """Plan the round as usual, with other units."""
        generator = torch.Generator().manual_seed(self._seed)
        drawn = tuple(
            (layer.name, unit, 0, 0.0)
            for layer in self._layers
            for unit in torch.randperm(layer.size, generator=generator)[: self.units.get(layer.name, 0)].tolist()
        )
        return replace(super().respond(session, detection, event), units=drawn)


class RandomReset(NONECallback):
    """Remove given samples, reset random units of each layer, then fine-tune: the control for the choice of units.

    Args:
        units: Layer name to number of units.
        labels: Labels of all samples, long (N,).
        keep: Samples that stay, bool (N,).
        seed: Seed of the choice.
    """

    def __init__(self, units: dict[str, int], labels: Tensor, keep: Tensor, seed: int = 0) -> None:
        super().__init__(rounds=1, extra_epochs=BEYOND, seed=seed, response=RandomUnits(units, seed))
        self.units, self.labels, self.keep = units, labels, keep
        self._detector = GivenVerdict(Verdict((~keep).float(), keep, 0.5, "random reset", labels))


class _UnlearnAlone(Unlearn):
    """Epochs of suspects alone."""

    def _draw(self, session: Session) -> None:
        split = split_of(session.verdict, self._seed)
        self._split = replace(split, trusted=torch.zeros_like(split.trusted))
        super()._draw(session)


class UnlearnOnly(DBRCallback):
    """D-BR that learns no trusted images anew."""

    def __init__(self, *, verdict: Verdict) -> None:
        super().__init__(verdict=verdict, response=_UnlearnAlone())


class _OtherFeatures(TwoStage):
    """The labels of all samples, or of none, in the first stage."""

    def __init__(self, recipe: Any, *, believed: bool) -> None:
        super().__init__(recipe)
        self.believed = believed

    def _attach(self, session: Session) -> Any:
        running = super()._attach(session)
        running.flags = replace(running.flags, trusted=torch.full_like(running.flags.trusted, self.believed))
        return running


class OtherLabels(DSTCallback):
    """D-ST whose first stage uses all labels, or none; the second stage is unchanged."""

    def __init__(self, *, believed: bool, **arguments: Any) -> None:
        super().__init__(supervised_features=False, reassign_uncertain=False, **arguments)
        self.believed = believed
        assert isinstance(self._response, TwoStage)
        self._response = _OtherFeatures(self._response._recipe, believed=believed)
