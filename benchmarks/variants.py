"""A defence whose units are chosen at random, for comparison."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cells import BEYOND
from lightning_backdoor import Verdict
from lightning_backdoor.callbacks import Defense, Detector
from lightning_backdoor.responses import Detection, Event, ResetUnits, Session


class GivenVerdict(Detector):
    """No measurement: a verdict with labels."""

    features = False

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict

    def require(self, session: Session) -> None:
        """Keep the session."""
        self.session = session

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
        self.units, self.seed = units, seed

    def respond(self, session: Session, detection: Detection, event: Event) -> Event:
        """Plan the round as usual, with other units."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = []
        for name, count in self.units.items():
            size = len(session.module.get_submodule(name).weight)  # of a layer: one row for each unit
            drawn += [(name, unit, 0, 0.0) for unit in torch.randperm(size, generator=generator)[:count].tolist()]
        return replace(super().respond(session, detection, event), units=tuple(drawn))


class RandomReset(Defense):
    """Remove given samples, reset random units of each layer, then fine-tune: the control for the choice of units.

    Args:
        units: Layer name to number of units.
        labels: Labels of all samples, long (N,).
        keep: Samples that stay, bool (N,).
        seed: Seed of the choice.
    """

    method = "random_reset"
    title = "Random reset"

    def __init__(self, units: dict[str, int], labels: Tensor, keep: Tensor, seed: int = 0) -> None:
        self.units, self.labels, self.keep = units, labels, keep
        super().__init__(
            detector=GivenVerdict(Verdict((~keep).float(), keep, 0.5, "random reset", labels)),
            response=RandomUnits(units, seed),
            warmup_epochs=None,
            max_removed=0.3,
            seed=seed,
        )
