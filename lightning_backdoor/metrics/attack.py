"""How far an attack succeeds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.metrics.classes import Average, averaged, classes_of, require_classes

__all__ = ["AttackSuccessRate", "RecoveredAccuracy"]


class _Agreement(Metric):
    """Fraction of predictions that equal the given labels; ``nan`` before the first sample.

    Args:
        average: ``"micro"``: of all samples. ``None``: of every class, in a tensor ``(num_classes,)``. ``"macro"``: the
            mean of the classes that have samples.
        num_classes: Number of classes; not for ``"micro"``.
        **kwargs: Of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    hits: Tensor
    total: Tensor

    def __init__(self, *, average: Average = "micro", num_classes: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.average, self.num_classes = average, require_classes(average, num_classes)
        shape = () if self.num_classes is None else (self.num_classes,)
        counts = torch.zeros(shape, dtype=torch.long)
        self.add_state("hits", counts.clone(), dist_reduce_fx="sum")
        self.add_state("total", counts.clone(), dist_reduce_fx="sum")

    def _count(self, preds: Tensor, labels: Tensor, classes: Tensor | None = None) -> None:
        preds, labels = (part.squeeze(1) if part.shape[1:] == (1,) else part for part in (preds, labels))
        single = preds.is_floating_point() and preds.ndim == 1
        predicted = (preds > 0).long() if single else preds.argmax(dim=1) if preds.ndim == 2 else preds
        if predicted.shape != labels.shape or labels.ndim != 1:
            raise ArgumentError(
                "`preds` must be class indices of shape (N,) or logits of shape (N, K), with labels of shape (N,), "
                f"got {tuple(preds.shape)} and {tuple(labels.shape)}."
            )
        if single and labels.numel() and int(labels.max()) > 1:
            raise ArgumentError(
                f"`preds` of one float for each image are logits of two classes, got labels up to {int(labels.max())}. "
                "Pass class indices as integers, or all logits."
            )
        hits = predicted == labels
        if self.num_classes is None:
            self.hits += hits.sum()
            self.total += labels.numel()
            return
        places = classes_of(labels if classes is None else classes, hits, self.num_classes)
        self.hits += torch.bincount(places[hits], minlength=self.num_classes)
        self.total += torch.bincount(places, minlength=self.num_classes)

    def compute(self) -> Tensor:
        """Return the fraction, a float in ``[0, 1]``; with ``average=None`` one for each class, float ``(K,)``."""
        return averaged(self.hits / self.total, self.average)


class AttackSuccessRate(_Agreement):
    """Fraction of triggered test images that get the attacker's label.

    Feed it the items of :func:`lightning_backdoor.attacks.triggered`, which leaves out the images of the target class,
    as the published numbers do. Lower is better for the defender.

    Args:
        average: ``"micro"``: of all images. ``None``: of every class, in a tensor ``(num_classes,)``, ``nan`` where it
            has no image. ``"macro"``: the mean of the classes that have images.
        num_classes: Number of classes, with ``average=None`` or ``"macro"``.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> asr = AttackSuccessRate()
        >>> asr.update(torch.tensor([0, 0, 0, 2]), torch.tensor([0, 0, 0, 0]))
        >>> asr.compute()
        tensor(0.7500)
        >>> by_source = AttackSuccessRate(average=None, num_classes=3)
        >>> by_source.update(torch.tensor([0, 0, 0, 2]), torch.tensor([0, 0, 0, 0]), classes=torch.tensor([1, 1, 2, 2]))
        >>> by_source.compute()
        tensor([   nan, 1.0000, 0.5000])
    """

    higher_is_better = False

    def update(self, preds: Tensor, attack_labels: Tensor, classes: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            preds: For triggered images, class indices ``(N,)``, logits ``(N, K)``, or of a binary model the logit of
                class 1, float ``(N,)`` or ``(N, 1)``.
            attack_labels: Labels that the attacker wants, whole numbers, shape ``(N,)`` or ``(N, 1)``.
            classes: With ``average=None`` or ``"macro"``, the class that each image counts for, whole numbers ``(N,)``:
                its true label for the rate of every source class. ``None``: the attack label.

        Raises:
            ArgumentError: If they do not fit together.
        """
        self._count(preds, attack_labels, classes)


class RecoveredAccuracy(_Agreement):
    """Fraction of triggered test images that get their true label in spite of the trigger.

    Args:
        average: ``"micro"``: of all images. ``None``: of every true class, in a tensor ``(num_classes,)``, ``nan``
            where it has no image. ``"macro"``: the mean of the classes that have images.
        num_classes: Number of classes, with ``average=None`` or ``"macro"``.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> recovered = RecoveredAccuracy()
        >>> recovered.update(torch.tensor([0, 0, 0, 2]), torch.tensor([1, 1, 2, 2]))
        >>> recovered.compute()
        tensor(0.2500)
    """

    higher_is_better = True

    def update(self, preds: Tensor, true_labels: Tensor) -> None:
        """Add a batch.

        Args:
            preds: For triggered images, class indices ``(N,)``, logits ``(N, K)``, or of a binary model the logit of
                class 1, float ``(N,)`` or ``(N, 1)``.
            true_labels: Labels of the images before the attack, whole numbers, shape ``(N,)`` or ``(N, 1)``.

        Raises:
            ArgumentError: If they do not fit together.
        """
        self._count(preds, true_labels)
