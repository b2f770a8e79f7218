"""The filter that guesses: what does choosing samples add to dropping as many of them?"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_backdoor.baselines.scored import BASELINE_DEFAULTS, BaselineArguments, Scored, filter_parts
from lightning_backdoor.callbacks.arguments import require_fraction
from lightning_backdoor.callbacks.base import Defense
from lightning_backdoor.detection.decision import select_fraction
from lightning_backdoor.responses.base import Session

__all__ = ["RandomFilter"]


class RandomFilter(Defense):
    """Drop a share of the training set at random, and train on what is left.

    It scans, goes back and trains anew when the other baselines do, and differs from them in what it removes alone. A
    baseline: **it removes clean images as often as poisoned ones**. Its opposite, the filter that knows the truth, is
    none that a user could have; it is part of the evidence in ``examples``.

    Args:
        fraction: Share of the training set that is removed, in ``(0, 1)``.
        **common: See :class:`~lightning_backdoor.baselines.BaselineArguments`.

    Example:
        >>> RandomFilter(fraction=0.2)
        RandomFilter(fraction=0.2)
    """

    method: ClassVar[str] = "RandomFilter"
    title: ClassVar[str] = "Random filter"
    shared = BaselineArguments
    shared_defaults = BASELINE_DEFAULTS
    meaning: ClassVar[str] = "It is a random number."

    def __init__(self, *, fraction: float = 0.05, **common: Unpack[BaselineArguments]) -> None:
        self.fraction = require_fraction("fraction", fraction)
        self.arguments: dict[str, Any] = {**BASELINE_DEFAULTS, **common}
        detector = Scored(self._judge, self.meaning, self.arguments, measure=_nothing)
        super().__init__(**filter_parts(self.arguments, detector))

    def _judge(self, found: dict[str, Tensor]) -> tuple[Tensor, Tensor, str]:
        generator = torch.Generator().manual_seed(self.arguments["seed"])
        scores = torch.rand(len(found["labels"]), generator=generator)
        return scores, select_fraction(scores, self.fraction)[0], f"random({self.fraction:g})"


def _nothing(session: Session, indices: Tensor, batch: Any) -> dict[str, Tensor]:
    """No measurement: the scores are random numbers."""
    return {}
