"""Bounded unlearning: how the gradient of a cross-entropy turns into one that forgets."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_backdoor.errors import ArgumentError

__all__ = ["forgetting_factors"]


def forgetting_factors(logits: Tensor, labels: Tensor) -> Tensor:
    """What the gradient of each sample's cross-entropy is multiplied with to forget its label.

    Plain ascent on ``-log p``, ``p`` the probability of the label, stands still where a model is sure (its gradient
    vanishes with ``1 - p``) and never ends where it is not. Times ``-p / (1 - p)``, the gradient of ``-log p`` becomes
    that of ``-log (1 - p)``: steep where the model is sure, and small when the label is forgotten. Samples that are
    not given their label any more have a factor of 0.

    Args:
        logits: Float ``(B, K)``.
        labels: Labels to forget, long ``(B,)``.

    Returns:
        Float32 ``(B,)``, at most 0.

    Raises:
        ArgumentError: The shapes do not fit.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        >>> forgetting_factors(logits, torch.tensor([0, 0]))
        tensor([-9.0000,  0.0000])
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ArgumentError(
            f"`logits` must have shape (B, K) and `labels` (B,), got {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    losses = F.cross_entropy(logits.float(), labels, reduction="none").clamp(min=torch.finfo(torch.float32).eps)
    return torch.where(logits.argmax(dim=1) == labels, -1 / losses.expm1(), 0.0)
