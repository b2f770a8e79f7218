"""Feature consistency towards transformations: the score of D-BR and D-ST for poisoned samples."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_backdoor.errors import ArgumentError

__all__ = ["center_repulsion_loss", "fct_scores", "select_trusted", "split_by_rank"]


def fct_scores(
    features: Tensor, transformed: Tensor, metric: Literal["mse", "normalized_mse", "cosine"] = "mse"
) -> Tensor:
    """Feature consistency towards transformations (FCT); larger is more suspicious.

    The score of `Chen et al., 2022 <https://openreview.net/forum?id=AsH-Tx2U0Ug>`_. A network that has learned a
    trigger relies on it: a transformation that breaks the trigger moves the features of triggered images further than
    those of clean ones.

    Args:
        features: Penultimate features of the images, float ``(N, D)``.
        transformed: Features of the same images after the transformation, float ``(N, D)``.
        metric: ``"mse"``, the mean squared difference, as the authors compute it; ``"normalized_mse"``, the same of
            features of length one; ``"cosine"``, one minus the cosine of their angle. The first is for features that
            are not negative; on signed ones lengths drift during centre repulsion, so that directions separate better.

    Returns:
        Scores, float ``(N,)``, at least 0.

    Raises:
        ArgumentError: The shapes differ, or the metric is unknown.

    Example:
        >>> import torch
        >>> fct_scores(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        tensor([0., 8.])
    """
    if features.ndim != 2 or features.shape != transformed.shape:
        raise ArgumentError(
            f"`features` and `transformed` must both have shape (N, D), got {tuple(features.shape)} and "
            f"{tuple(transformed.shape)}. Flatten or pool the maps first."
        )
    if metric == "cosine":
        return (1 - F.cosine_similarity(features, transformed, dim=1)).clamp(min=0)
    if metric == "normalized_mse":
        features, transformed = F.normalize(features), F.normalize(transformed)
    elif metric != "mse":
        raise ArgumentError(f'`metric` must be "mse", "normalized_mse" or "cosine", got {metric!r}.')
    return (features - transformed).square().mean(dim=1)


def center_repulsion_loss(features: Tensor, labels: Tensor) -> Tensor:
    """Mean cosine of the angles between the class centres of a batch (the authors' ``L_intra``).

    Minimising it turns the centres away from each other: to 0 for features that are not negative, to ``-1 / K`` for
    signed ones. Poisoned samples, which lie between the target class and their own, are left behind. Lengths are free.

    Args:
        features: Penultimate features, float ``(B, D)``.
        labels: Labels as given, long ``(B,)``; K of them are present.

    Returns:
        Scalar: the mean over the K x K matrix of cosines with zeros on its diagonal. 0 with one class.

    Example:
        >>> import torch
        >>> center_repulsion_loss(torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 0, 1]))
        tensor(0.3536)
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ArgumentError(
            f"`features` must have shape (B, D) and `labels` (B,), got {tuple(features.shape)} and "
            f"{tuple(labels.shape)}."
        )
    present, places = torch.unique(labels, return_inverse=True)
    members = F.one_hot(places, len(present)).to(features.dtype)
    centers = F.normalize(members.T @ features / members.sum(dim=0)[:, None], dim=1)
    cosines = centers @ centers.T
    return (cosines.sum() - cosines.diagonal().sum()) / len(present) ** 2


def split_by_rank(scores: Tensor, trusted: float = 0.2, suspect: float = 0.05) -> tuple[Tensor, Tensor]:
    """Split samples by the rank of their score, so that ties and equal thresholds cannot change the sizes.

    Args:
        scores: Float, shape ``(N,)``; larger is more suspicious.
        trusted: Share with the smallest scores, in ``[0, 1]``; ``int(trusted * N)`` samples.
        suspect: Share with the largest scores, in ``[0, 1]``; ``int(suspect * N)`` samples.

    Returns:
        Two masks, bool ``(N,)``: trusted and suspect. They never overlap; the rest is uncertain.

    Raises:
        ArgumentError: A share is out of range, or both together are more than all samples.

    Example:
        >>> import torch
        >>> split_by_rank(torch.tensor([0.3, 0.1, 0.9, 0.5]), trusted=0.5, suspect=0.25)
        (tensor([ True,  True, False, False]), tensor([False, False,  True, False]))
    """
    if not (0 <= trusted <= 1 and 0 <= suspect <= 1 and trusted + suspect <= 1):
        raise ArgumentError(
            f"`trusted` and `suspect` must be shares of the samples that add up to at most 1, got {trusted} and "
            f"{suspect}. For twenty and five per cent, pass 0.2 and 0.05."
        )
    order = scores.argsort(stable=True)
    n = len(scores)
    masks = torch.zeros(2, n, dtype=torch.bool, device=scores.device)
    masks[0, order[: int(trusted * n)]] = True
    masks[1, order[n - int(suspect * n) :]] = True
    return masks[0], masks[1]


def select_trusted(scores: Tensor, labels: Tensor, considered: Tensor, share: float) -> Tensor:
    """Select the least suspicious samples of every class, so that no class is missing when the model is trained again.

    Lengths of features differ between classes, so the smallest scores of all may come from a few classes alone.

    Args:
        scores: Float, shape ``(N,)``; larger is more suspicious.
        labels: Labels as given, long, shape ``(N,)``.
        considered: Samples that may be selected, bool, shape ``(N,)``.
        share: Share of the samples of each class, in ``(0, 1)``, rounded down; one sample at least.

    Returns:
        Bool ``(N,)``; in a class with fewer considered samples than that, all of these.

    Example:
        >>> import torch
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> select_trusted(torch.tensor([0.3, 0.1, 0.9, 0.5]), labels, torch.ones(4, dtype=torch.bool), 0.5)
        tensor([False,  True, False,  True])
    """
    _, places, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    most = (share * counts.double()).long().clamp(min=1)
    # The considered samples of every label, the least suspicious first: the first of each are selected.
    members = considered.nonzero().squeeze(1)
    members = members[scores[members].argsort(stable=True)]
    members = members[places[members].argsort(stable=True)]
    of = places[members]
    present = torch.zeros_like(counts).scatter_add_(0, of, torch.ones_like(of))
    place = torch.arange(len(of), device=of.device) - (present.cumsum(0) - present)[of]
    trusted = torch.zeros_like(considered)
    trusted[members[place < most[of]]] = True
    return trusted
