"""The two losses of D-ST: semi-supervised contrastive learning of features, then a classifier that unlearns."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_backdoor.errors import ArgumentError

__all__ = ["mixed_cross_entropy", "ss_contrastive_loss"]

BASE_TEMPERATURE = 0.07


def ss_contrastive_loss(
    views: Tensor, labels: Tensor, trusted: Tensor, temperature: float = 0.1, *, reference_mask: bool = False
) -> Tensor:
    """Semi-supervised contrastive loss of D-ST's first stage.

    Equation 2 of `Chen et al., 2022 <https://openreview.net/forum?id=AsH-Tx2U0Ug>`_. Every view is pulled towards the
    other view of its own image. Views of trusted images are also pulled towards those of other trusted images with the
    same label. All other views of the batch are pushed away.

    Args:
        views: Projections of two views of each image, float ``(B, 2, D)``; they are scaled to length one here.
        labels: Labels as given, long ``(B,)``.
        trusted: Images whose label counts, bool ``(B,)``.
        temperature: Positive; small values weigh the nearest views most.
        reference_mask: The positives of the authors' code instead of the paper's: those of a trusted image are all
            images with its label, trusted or not.

    Returns:
        Scalar: the mean over the 2 B views, times ``temperature / 0.07``.

    Raises:
        ArgumentError: The shapes do not fit, or the temperature is not positive.
    """
    size = len(views)
    if views.ndim != 3 or views.shape[1] != 2 or labels.shape != (size,) or trusted.shape != (size,):
        raise ArgumentError(
            f"`views` must have shape (B, 2, D), `labels` and `trusted` (B,), got {tuple(views.shape)}, "
            f"{tuple(labels.shape)} and {tuple(trusted.shape)}."
        )
    if temperature <= 0:
        raise ArgumentError(f"`temperature` must be positive, got {temperature}. The paper uses 0.1.")
    z = F.normalize(views.transpose(0, 1).reshape(2 * size, -1).float(), dim=1)
    same = labels[:, None] == labels
    others = trusted.new_ones(size) if reference_mask else trusted
    positive = (same & trusted[:, None] & others) | torch.eye(size, dtype=torch.bool, device=views.device)
    itself = torch.eye(2 * size, dtype=torch.bool, device=views.device)
    positive = positive.repeat(2, 2) & ~itself
    similar = (z @ z.T / temperature).masked_fill(itself, -torch.inf)
    log_chance = similar - similar.logsumexp(dim=1, keepdim=True)
    per_view = -log_chance.masked_fill(~positive, 0).sum(dim=1) / positive.sum(dim=1)
    return per_view.mean() * temperature / BASE_TEMPERATURE


def mixed_cross_entropy(
    logits: Tensor, labels: Tensor, trusted: Tensor, suspect: Tensor, weight: float = 1e-3
) -> Tensor:
    """Cross-entropy of trusted samples minus a little of that of suspect ones (D-ST's second stage, ``L_MCE``).

    Args:
        logits: Float ``(B, K)``.
        labels: Labels as given, long ``(B,)``.
        trusted: Samples to learn, bool ``(B,)``.
        suspect: Samples to unlearn, bool ``(B,)``.
        weight: Weight of the suspect samples, at least 0.

    Returns:
        Scalar. A group without samples in the batch adds 0. Samples of neither group are left out: infinite logits, as
        half precision produces, would make it and all gradients NaN if multiplied by 0.

    Raises:
        ArgumentError: The weight is negative.
    """
    if weight < 0:
        raise ArgumentError(f"`weight` must be at least 0, got {weight}. The paper uses 0.001.")
    learned = _mean_loss(logits, labels, trusted)
    return learned - weight * _mean_loss(logits, labels, suspect) if weight else learned


def _mean_loss(logits: Tensor, labels: Tensor, group: Tensor) -> Tensor:
    """Mean cross-entropy of the samples of a group, bool ``(B,)``; 0 if it has none."""
    group = group.bool()
    losses = F.cross_entropy(torch.where(group[:, None], logits, 0.0), labels, reduction="none")
    return torch.where(group, losses, 0.0).sum() / group.sum().clamp(min=1)
