"""Deep k-NN: drop the samples whose label is not the most frequent one among their neighbours in feature space."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from lightning_backdoor.baselines.scored import (
    BASELINE_DEFAULTS,
    BaselineArguments,
    Scored,
    filter_parts,
    require_features,
)
from lightning_backdoor.callbacks.arguments import require_positive
from lightning_backdoor.callbacks.base import Defense
from lightning_backdoor.errors import ArgumentError

__all__ = ["DeepKNN", "deep_knn_scores"]

ROWS = 1024  # whose neighbours are held at a time


def deep_knn_scores(features: Tensor, labels: Tensor, k: int) -> Tensor:
    """How much more frequent another label is among the k nearest neighbours than the sample's own one.

    From *Deep k-NN Defense against Clean-label Data Poisoning Attacks* (`Peri et al., 2020
    <https://arxiv.org/abs/1909.13374>`_): a sample goes if its score is positive, that is, if its label is not the
    plurality of its neighbours. A tie lets it stay. A sample is no neighbour of its own.

    Args:
        features: Penultimate features, float ``(N, D)``; distances are Euclidean (faiss, exact).
        labels: Labels as given, long ``(N,)``, at least 0.
        k: Neighbours, at least 1 and below N.

    Returns:
        Float ``(N,)`` in ``[-1, 1]``: the largest share of another label minus that of the own one.

    Raises:
        ArgumentError: The shapes do not fit, or ``k`` is out of range.

    Example:
        >>> import torch
        >>> features = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
        >>> deep_knn_scores(features, torch.tensor([0, 1, 1, 1]), k=2)
        tensor([ 1.,  0.,  0., -1.])
    """
    import faiss  # noqa: PLC0415  (loaded when used)

    require_features(features, labels)
    if not 0 < k < len(features):
        raise ArgumentError(f"`k` must be at least 1 and below the number of samples, {len(features)}, got {k}.")
    centerd = (features - features.mean(dim=0)).float().contiguous().numpy()  # small numbers: exact distances
    index = faiss.IndexFlatL2(centerd.shape[1])
    index.add(centerd)
    scores = torch.empty(len(features))
    for rows in torch.split(torch.arange(len(features)), ROWS):
        found = torch.from_numpy(index.search(centerd[rows.numpy()], k + 1)[1])
        itself = found == rows[:, None]
        itself[~itself.any(dim=1), -1] = True  # hidden behind more than k twins: any of them is as near
        near = labels[found[~itself].view(len(rows), k)]
        votes = torch.zeros(len(rows), int(labels.max()) + 1).scatter_add_(1, near, torch.ones(near.shape))
        own = votes.gather(1, labels[rows, None]).squeeze(1)
        other = votes.scatter(1, labels[rows, None], 0.0).amax(dim=1)
        scores[rows] = (other - own) / k
    return scores


class DeepKNN(Defense):
    """Drop samples whose label is not the plurality of their neighbours in feature space, and train on what is left.

    Implements *Deep k-NN* (`Peri et al., 2020 <https://arxiv.org/abs/1909.13374>`_), which was made against clean-label
    poisons. One forward pass, and ``N * N`` distances (exact, on the CPU). Assumes that poisons are fewer than half of
    ``k``. A baseline: **it removes clean samples that the network confuses, and with them rare or hard ones**.

    Differs from the paper: rare classes are not drawn more often to balance the vote.

    Args:
        k: Neighbours; ``None``: as many as a class has samples on average (the paper's normalised k of 1).
        **common: See :class:`~lightning_backdoor.baselines.BaselineArguments`.

    Example:
        >>> DeepKNN(k=50)
        DeepKNN(k=50)
    """

    method: ClassVar[str] = "DeepKNN"
    title: ClassVar[str] = "Deep k-NN"
    shared = BaselineArguments
    shared_defaults = BASELINE_DEFAULTS
    meaning: ClassVar[str] = (
        "It measures how much more frequent another label is than the image's own one among the images with similar "
        "features."
    )

    def __init__(self, *, k: int | None = None, **common: Unpack[BaselineArguments]) -> None:
        self.k = require_positive("k", k)
        self.arguments: dict[str, Any] = {**BASELINE_DEFAULTS, **common}
        super().__init__(**filter_parts(self.arguments, Scored(self._judge, self.meaning, self.arguments)))

    def _judge(self, found: dict[str, Tensor]) -> tuple[Tensor, Tensor, str]:
        labels = found["labels"]
        average = max(len(labels) // len(torch.unique(labels)), 1)
        k = min(self.k or average, len(labels) - 1)
        scores = deep_knn_scores(found["features"], labels, k)
        return scores, scores <= 0, f"neighbours(k={k})"
