"""Bounded unlearning: a loss that lowers the probability of an image's label and vanishes when it is low."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_backdoor.errors import ArgumentError

__all__ = ["forgetting_loss"]


def forgetting_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of ``-log (1 - p)``, with ``p`` the probability of a sample's label; descent on it unlearns the labels.

    The gradient of plain ascent on ``-log p`` vanishes with ``1 - p``, where a model is confident, and has no bound
    elsewhere. This one is large where the model is confident, and small when the label is unlearned. Samples
    that are not given their label any more count as 0.

    Args:
        logits: Float ``(B, K)``, K at least 2.
        labels: Labels to unlearn, long ``(B,)``.

    Returns:
        Float32 scalar, at least 0.

    Raises:
        ArgumentError: The shapes do not fit.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        >>> forgetting_loss(logits, torch.tensor([0, 0]))
        tensor(1.1513)
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        raise ArgumentError(
            f"`logits` must have shape (B, K), K >= 2, and `labels` (B,), got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    given = logits.argmax(dim=1) == labels
    logits = torch.where(given[:, None], logits.float(), 0.0)  # infinite ones would make gradients NaN, even times 0
    others = logits.scatter(1, labels[:, None], -torch.inf)
    losses = logits.logsumexp(dim=1) - others.logsumexp(dim=1)
    return torch.where(given, losses, 0.0).mean()
