"""How well a verdict separates poisoned from clean training images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.metrics.classes import Average, averaged, classes_of, require_classes

__all__ = ["DetectionRates"]

NAMES = ("tpr", "fpr", "precision", "auroc")


class DetectionRates(Metric):
    """Compare verdicts with the ground truth.

    ``compute`` returns a dict of floats in ``[0, 1]``:

    * ``tpr``: removed poisons / poisons; ``nan`` when nothing is poisoned.
    * ``fpr``: removed clean images / clean images; always defined, 0 when there is no clean image.
    * ``precision``: removed poisons / removed images; ``nan`` when nothing was removed.
    * ``auroc``: probability that a poison has a higher score than a clean image, ties counted half; independent of the
      threshold; ``nan`` when only one kind is present or a score is ``nan``.

    Args:
        average: ``"micro"``: of all samples. ``None``: of every class, in tensors ``(num_classes,)``. ``"macro"``: the
            mean of the classes for which a value is defined.
        num_classes: Number of classes, with ``average=None`` or ``"macro"``.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> rates = DetectionRates()
        >>> rates.update(scores=torch.tensor([0.1, 0.2, 0.9, 0.8]), keep=torch.tensor([True, True, False, False]),
        ...              poisoned=torch.tensor([False, False, True, False]))
        >>> {name: round(value.item(), 3) for name, value in rates.compute().items()}
        {'tpr': 1.0, 'fpr': 0.333, 'precision': 0.5, 'auroc': 1.0}
        >>> by_label = DetectionRates(average=None, num_classes=2)
        >>> by_label.update(torch.tensor([0.1, 0.2, 0.9, 0.8]), torch.tensor([True, True, False, False]),
        ...                 torch.tensor([False, False, True, False]), classes=torch.tensor([0, 1, 1, 1]))
        >>> by_label.compute()["fpr"]
        tensor([0.0000, 0.5000])
    """

    is_differentiable = False
    full_state_update = False

    scores: list[Tensor]
    keep: list[Tensor]
    poisoned: list[Tensor]
    classes: list[Tensor]

    def __init__(self, *, average: Average = "micro", num_classes: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.average, self.num_classes = average, require_classes(average, num_classes)
        for name in ("scores", "keep", "poisoned", *(() if self.num_classes is None else ("classes",))):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, keep: Tensor, poisoned: Tensor, classes: Tensor | None = None) -> None:
        """Add samples, usually ``update(verdict.scores, verdict.keep, dataset.poisoned)``.

        Args:
            scores: Suspicion, float, shape ``(N,)``; larger is more suspicious.
            keep: Samples that were kept, bool, shape ``(N,)``.
            poisoned: Samples that are poisoned, bool, shape ``(N,)``.
            classes: With ``average=None`` or ``"macro"``, the class that each sample counts for, whole numbers
                ``(N,)``: its label as given, such as ``verdict.labels``, or its true one for the rates of every source
                class. Samples below 0 count for none.

        Raises:
            ArgumentError: If the shapes differ, a mask is not boolean, or there are no classes but they are needed.
        """
        for name, values in (("keep", keep), ("poisoned", poisoned)):
            if values.dtype != torch.bool or values.shape != scores.shape or values.ndim != 1:
                raise ArgumentError(
                    f"`{name}` must be a boolean mask of shape (N,) like `scores` {tuple(scores.shape)}, "
                    f"got {values.dtype} {tuple(values.shape)}."
                )
        if self.num_classes is not None:
            if classes is None:
                raise ArgumentError(f"`classes` must be passed with `average={self.average!r}`, such as the labels.")
            known = classes >= 0
            places = classes_of(classes.clamp(min=0), scores, self.num_classes)
            scores, keep, poisoned = scores[known], keep[known], poisoned[known]
            self.classes.append(places[known])
        self.scores.append(scores)
        self.keep.append(keep)
        self.poisoned.append(poisoned)

    def compute(self) -> dict[str, Tensor]:
        """Return ``tpr``, ``fpr``, ``precision`` and ``auroc``, each a float scalar; ``(K,)`` with ``average=None``."""
        if not self.scores:
            shape = () if self.average is not None or self.num_classes is None else (self.num_classes,)
            return {name: torch.full(shape, torch.nan) for name in NAMES}
        scores, keep, poisoned = (dim_zero_cat(part) for part in (self.scores, self.keep, self.poisoned))
        if self.num_classes is None:
            return _rates(scores, ~keep, poisoned)
        classes = dim_zero_cat(self.classes)
        parts = [
            _rates(scores[own], ~keep[own], poisoned[own])
            for own in (classes == label for label in range(self.num_classes))
        ]
        return {name: averaged(torch.stack([part[name] for part in parts]), self.average) for name in NAMES}


def _rates(scores: Tensor, flagged: Tensor, poisoned: Tensor) -> dict[str, Tensor]:
    found, wronged = (flagged & poisoned).sum(), (flagged & ~poisoned).sum()
    return {
        "tpr": found / poisoned.sum(),
        "fpr": wronged / (~poisoned).sum().clamp(min=1),
        "precision": found / flagged.sum(),
        "auroc": _auroc(scores, poisoned),
    }


def _auroc(scores: Tensor, positive: Tensor) -> Tensor:
    """Return the area under the ROC curve as Mann and Whitney count it, exact with ties."""
    if scores.isnan().any():
        return torch.tensor(torch.nan, device=scores.device)
    poisons, clean = scores[positive].contiguous(), scores[~positive].sort().values
    below, not_above = (torch.searchsorted(clean, poisons, right=right).double() for right in (False, True))
    wins = (below + not_above).sum() / 2
    return (wins / (len(poisons) * len(clean))).float()
