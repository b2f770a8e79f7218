"""How far an attack succeeds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_backdoor.errors import ArgumentError

__all__ = ["AttackSuccessRate", "RecoveredAccuracy"]


class _Agreement(Metric):
    """Fraction of predictions that equal the given labels; ``nan`` before the first sample."""

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    hits: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("hits", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def _count(self, preds: Tensor, labels: Tensor) -> None:
        preds, labels = (part.squeeze(1) if part.shape[1:] == (1,) else part for part in (preds, labels))
        single = preds.is_floating_point() and preds.ndim == 1
        classes = (preds > 0).long() if single else preds.argmax(dim=1) if preds.ndim == 2 else preds
        if classes.shape != labels.shape or labels.ndim != 1:
            raise ArgumentError(
                "`preds` must be class indices of shape (N,) or logits of shape (N, K), with labels of shape (N,), "
                f"got {tuple(preds.shape)} and {tuple(labels.shape)}."
            )
        if single and labels.numel() and int(labels.max()) > 1:
            raise ArgumentError(
                f"`preds` of one float for each image are logits of two classes, got labels up to {int(labels.max())}. "
                "Pass class indices as integers, or all logits."
            )
        self.hits += (classes == labels).sum()
        self.total += labels.numel()

    def compute(self) -> Tensor:
        """Return the fraction, a float in ``[0, 1]``."""
        return self.hits / self.total


class AttackSuccessRate(_Agreement):
    """Fraction of triggered test images that get the attacker's label.

    Feed it the items of :func:`lightning_backdoor.attacks.triggered`, which leaves out the images of the target class,
    as the published numbers do. Lower is better for the defender.

    Example:
        >>> import torch
        >>> asr = AttackSuccessRate()
        >>> asr.update(torch.tensor([0, 0, 0, 2]), torch.tensor([0, 0, 0, 0]))
        >>> asr.compute()
        tensor(0.7500)
    """

    higher_is_better = False

    def update(self, preds: Tensor, attack_labels: Tensor) -> None:
        """Add a batch.

        Args:
            preds: For triggered images, class indices ``(N,)``, logits ``(N, K)``, or of a binary model the logit of
                class 1, float ``(N,)`` or ``(N, 1)``.
            attack_labels: Labels that the attacker wants, whole numbers, shape ``(N,)`` or ``(N, 1)``.

        Raises:
            ArgumentError: If they do not fit together.
        """
        self._count(preds, attack_labels)


class RecoveredAccuracy(_Agreement):
    """Fraction of triggered test images that get their true label in spite of the trigger.

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
