"""The filter that guesses: what does choosing samples add to dropping as many of them?"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_backdoor.baselines.baseline import Baseline
from lightning_backdoor.callbacks.base import require_fraction
from lightning_backdoor.detection.decision import select_fraction
from lightning_backdoor.scanning.scanner import DatasetScanner

__all__ = ["RandomFilter"]


class RandomFilter(Baseline):
    """Drop a share of the training set at random, and train on what is left.

    It scans, goes back and trains anew when the other baselines do, and differs from them in what it removes alone. A
    baseline: **it removes clean images as often as poisoned ones**. Its opposite, the filter that knows the truth, is
    none that a user could have; it is part of the evidence in ``examples``.

    Args:
        fraction: Share of the training set that is removed, in ``(0, 1)``.
        **common: Arguments of every baseline, see :class:`~lightning_backdoor.baselines.Baseline`.

    Example:
        >>> RandomFilter(fraction=0.2)
        RandomFilter(fraction=0.2)
    """

    method: ClassVar[str] = "RandomFilter"
    title: ClassVar[str] = "Random filter"
    meaning: ClassVar[str] = "It is a random number."

    def __init__(self, *, fraction: float = 0.05, **common: Any) -> None:
        super().__init__(**common)
        self.fraction = require_fraction("fraction", fraction)

    def _measure(
        self, trainer: Any, pl_module: Any, data: DatasetScanner, indices: Tensor, batch: Any
    ) -> dict[str, Tensor]:
        return {}

    def _judge(self, found: dict[str, Tensor]) -> tuple[Tensor, Tensor, str]:
        generator = torch.Generator().manual_seed(self.options.seed)
        scores = torch.rand(len(found["labels"]), generator=generator)
        return scores, select_fraction(scores, self.fraction)[0], f"random({self.fraction:g})"
