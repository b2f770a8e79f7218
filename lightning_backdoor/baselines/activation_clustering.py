"""Activation Clustering: split the features of each class in two, and drop the smaller part where it stands apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_backdoor.baselines.components import principal_components
from lightning_backdoor.baselines.scored import (
    BASELINE_DEFAULTS,
    BaselineArguments,
    Scored,
    filter_parts,
    require_features,
)
from lightning_backdoor.callbacks.arguments import require_fraction, require_positive
from lightning_backdoor.callbacks.base import Defense

__all__ = ["ActivationClustering", "Clusters", "activation_clusters", "select_clusters", "silhouette_score"]

RESTARTS = 10
ITERATIONS = 100
ROWS = 1024  # whose distances to all others are held at a time


@dataclass(frozen=True)
class Clusters:
    """Two clusters in each of the classes of N samples.

    Attributes:
        scores: Float ``(N,)`` in ``[-1, 1]``: how much nearer the centre of the smaller cluster of its class is than
            that of the larger one. Positive inside of the smaller cluster.
        shares: Label to the smaller cluster's share of the class.
        silhouettes: Label to the mean silhouette of the two clusters, in ``[-1, 1]``.
    """

    scores: Tensor
    shares: dict[int, float]
    silhouettes: dict[int, float]


def activation_clusters(features: Tensor, labels: Tensor, *, components: int = 10, seed: int = 0) -> Clusters:
    """Split every class in two by k-means on its reduced features.

    From *Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering* (`Chen et al., 2018
    <https://arxiv.org/abs/1811.03728>`_), which reduces by independent component analysis. Such components are whitened
    principal ones, turned: distances, and with them k-means, are the same, so the latter are used.

    Args:
        features: Penultimate features, float ``(N, D)``.
        labels: Labels as given, long ``(N,)``.
        components: Dimensions that are left, at least 1; fewer where a class has a smaller rank.
        seed: Seed of the starting points of k-means (faiss; the best of 10 starts counts).

    Returns:
        The clusters. A class that cannot be split (one sample, or all alike) has share 0 and scores of -1.

    Raises:
        ArgumentError: The shapes do not fit.
    """
    require_features(features, labels)
    scores, shares, silhouettes = torch.full((len(features),), -1.0), {}, {}
    for label in torch.unique(labels).tolist():
        inside = labels == label
        reduced = _whitened(features[inside], components)
        shares[label] = silhouettes[label] = 0.0
        if not reduced.shape[1]:
            continue
        far, near = _distances_to_centers(reduced, seed)  # of the larger, of the smaller cluster
        scores[inside] = ((far - near) / (far + near).clamp(min=1e-12)).float()
        smaller = far > near
        shares[label] = float(smaller.double().mean())
        silhouettes[label] = silhouette_score(reduced, smaller)
    return Clusters(scores, shares, silhouettes)


def select_clusters(clusters: Clusters, labels: Tensor, *, size: float = 0.35, silhouette: float = 0.1) -> Tensor:
    """Keep all but the smaller clusters of the classes in which it is small enough and stands apart.

    Args:
        clusters: What :func:`activation_clusters` returned.
        labels: Labels as given, long ``(N,)``.
        size: Share of its class below which a cluster counts as small (relative size comparison).
        silhouette: Mean silhouette from which the clusters count as two.

    Returns:
        Samples that stay, bool ``(N,)``.
    """
    chosen = [k for k, share in clusters.shares.items() if 0 < share < size and clusters.silhouettes[k] >= silhouette]
    return ~(torch.isin(labels, torch.tensor(chosen, dtype=labels.dtype)) & (clusters.scores > 0))


def silhouette_score(points: Tensor, second: Tensor) -> float:
    """Mean silhouette of two clusters (Rousseeuw, 1987); 0 for the member of a cluster of one, or without a second one.

    Args:
        points: Float ``(n, d)``.
        second: Members of the second cluster, bool ``(n,)``.
    """
    counts = torch.stack([(~second).sum(), second.sum()])
    if not bool((counts > 0).all()):
        return 0.0
    members = torch.stack([~second, second], dim=1).to(points.dtype)
    sums = torch.cat(
        [torch.cdist(rows, points) @ members for rows in torch.split(points, ROWS)]
    )  # to either cluster, (n, 2)
    own, other = second.long(), 1 - second.long()
    within = sums.gather(1, own[:, None]).squeeze(1) / (counts[own] - 1).clamp(min=1)
    between = sums.gather(1, other[:, None]).squeeze(1) / counts[other]
    silhouettes = (between - within) / torch.maximum(within, between).clamp(min=torch.finfo(points.dtype).tiny)
    return float(silhouettes.masked_fill(counts[own] == 1, 0.0).mean())


def _whitened(features: Tensor, components: int) -> Tensor:
    """Leading principal components that vary, each scaled to a variance of one, ``(n, components)``."""
    found = principal_components(features, components)
    spread = found.square().mean(dim=0).sqrt()
    varies = spread > 1e-6 * features.abs().max().clamp(min=1e-12)
    return found[:, varies] / spread[varies]


def _distances_to_centers(points: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Distances ``(n,)`` to the centre of the larger and of the smaller of two clusters."""
    import faiss  # noqa: PLC0415  (loaded when used)

    kmeans = faiss.Kmeans(
        points.shape[1],
        2,
        niter=ITERATIONS,
        nredo=RESTARTS,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),
    )
    kmeans.train(points.float().contiguous().numpy())
    distances = torch.cdist(points, torch.from_numpy(kmeans.centroids).to(points))
    first = int((distances[:, 0] <= distances[:, 1]).sum())
    larger = 0 if 2 * first >= len(points) else 1
    return distances[:, larger], distances[:, 1 - larger]


class ActivationClustering(Defense):
    """Drop the smaller of two clusters of features in the classes where it stands apart, and train on what is left.

    Implements Activation Clustering (`Chen et al., 2018 <https://arxiv.org/abs/1811.03728>`_) with its two quick tests:
    relative size and silhouette. One forward pass, ``n * n`` distances in a class of n images. Assumes that less than
    ``size`` of a class is poisoned. A baseline: **it may remove a part of clean classes that come in two kinds**.

    Args:
        size: Share of its class below which the smaller cluster is removed, in ``(0, 1)``.
        silhouette: Mean silhouette from which it is, in ``(0, 1)``; the paper names 0.10 to 0.15.
        components: Dimensions to which the features of a class are reduced.
        **common: See :class:`~lightning_backdoor.baselines.BaselineArguments`.

    Example:
        >>> ActivationClustering(size=0.2)
        ActivationClustering(size=0.2)
    """

    method: ClassVar[str] = "ActivationClustering"
    title: ClassVar[str] = "Activation Clustering"
    shared = BaselineArguments
    shared_defaults = BASELINE_DEFAULTS
    meaning: ClassVar[str] = (
        "It measures how much nearer the features of the image are to the smaller of two clusters of its class than to "
        "the larger one."
    )

    def __init__(
        self, *, size: float = 0.35, silhouette: float = 0.1, components: int = 10, **common: Unpack[BaselineArguments]
    ) -> None:
        self.size = require_fraction("size", size)
        self.silhouette = require_fraction("silhouette", silhouette)
        self.components = require_positive("components", components) or 1
        self.arguments: dict[str, Any] = {**BASELINE_DEFAULTS, **common}
        super().__init__(**filter_parts(self.arguments, Scored(self._judge, self.meaning, self.arguments)))

    def _judge(self, found: dict[str, Tensor]) -> tuple[Tensor, Tensor, str]:
        labels, seed = found["labels"], self.arguments["seed"]
        clusters = activation_clusters(found["features"], labels, components=self.components, seed=seed)
        keep = select_clusters(clusters, labels, size=self.size, silhouette=self.silhouette)
        return clusters.scores, keep, f"smaller_cluster(size<{self.size:g}, silhouette>={self.silhouette:g})"
