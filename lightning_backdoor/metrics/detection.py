"""How well a verdict separates poisoned from clean training images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_backdoor.errors import ArgumentError

__all__ = ["DetectionRates"]


class DetectionRates(Metric):
    """Compare verdicts with the ground truth.

    ``compute`` returns a dict of floats in ``[0, 1]``:

    * ``tpr``: removed poisons / poisons; ``nan`` when nothing is poisoned.
    * ``fpr``: removed clean images / clean images; always defined, 0 when there is no clean image.
    * ``precision``: removed poisons / removed images; ``nan`` when nothing was removed.
    * ``auroc``: probability that a poison has a higher score than a clean image, ties counted half; independent of the
      threshold; ``nan`` when only one kind is present or a score is ``nan``.

    Example:
        >>> import torch
        >>> rates = DetectionRates()
        >>> rates.update(scores=torch.tensor([0.1, 0.2, 0.9, 0.8]), keep=torch.tensor([True, True, False, False]),
        ...              poisoned=torch.tensor([False, False, True, False]))
        >>> {name: round(value.item(), 3) for name, value in rates.compute().items()}
        {'tpr': 1.0, 'fpr': 0.333, 'precision': 0.5, 'auroc': 1.0}
    """

    is_differentiable = False
    full_state_update = False

    scores: list[Tensor]
    keep: list[Tensor]
    poisoned: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("scores", "keep", "poisoned"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, keep: Tensor, poisoned: Tensor) -> None:
        """Add samples, usually ``update(verdict.scores, verdict.keep, dataset.poisoned)``.

        Args:
            scores: Suspicion, float, shape ``(N,)``; larger is more suspicious.
            keep: Samples that were kept, bool, shape ``(N,)``.
            poisoned: Samples that are poisoned, bool, shape ``(N,)``.

        Raises:
            ArgumentError: If the shapes differ or a mask is not boolean.
        """
        for name, values in (("keep", keep), ("poisoned", poisoned)):
            if values.dtype != torch.bool or values.shape != scores.shape or values.ndim != 1:
                raise ArgumentError(
                    f"`{name}` must be a boolean mask of shape (N,) like `scores` {tuple(scores.shape)}, "
                    f"got {values.dtype} {tuple(values.shape)}."
                )
        self.scores.append(scores)
        self.keep.append(keep)
        self.poisoned.append(poisoned)

    def compute(self) -> dict[str, Tensor]:
        """Return ``tpr``, ``fpr``, ``precision`` and ``auroc``, each a float scalar."""
        if not self.scores:
            return {name: torch.tensor(torch.nan) for name in ("tpr", "fpr", "precision", "auroc")}
        flagged, poisoned = ~dim_zero_cat(self.keep), dim_zero_cat(self.poisoned)
        found, wronged = (flagged & poisoned).sum(), (flagged & ~poisoned).sum()
        return {
            "tpr": found / poisoned.sum(),
            "fpr": wronged / (~poisoned).sum().clamp(min=1),
            "precision": found / flagged.sum(),
            "auroc": _auroc(dim_zero_cat(self.scores), poisoned),
        }


def _auroc(scores: Tensor, positive: Tensor) -> Tensor:
    """Return the area under the ROC curve as Mann and Whitney count it, exact with ties."""
    if scores.isnan().any():
        return torch.tensor(torch.nan, device=scores.device)
    poisons, clean = scores[positive].contiguous(), scores[~positive].sort().values
    below, not_above = (torch.searchsorted(clean, poisons, right=right).double() for right in (False, True))
    wins = (below + not_above).sum() / 2
    return (wins / (len(poisons) * len(clean))).float()
