"""Spectral Signatures: in each class, drop the samples that reach furthest along the direction of largest variance."""

from __future__ import annotations

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
from lightning_backdoor.callbacks.arguments import require_fraction
from lightning_backdoor.callbacks.base import Defense
from lightning_backdoor.detection.decision import select_fraction

__all__ = ["SpectralSignatures", "select_per_class", "spectral_signature_scores"]

MARGIN = 1.5  # times `eps` is removed


def spectral_signature_scores(features: Tensor, labels: Tensor) -> Tensor:
    """Squared length along the top right singular vector of the centred features of the sample's class.

    Algorithm 1 of *Spectral Signatures in Backdoor Attacks* (`Tran et al., 2018 <https://arxiv.org/abs/1811.00636>`_):
    ``((R(x) - mean) . v)^2``. Larger is more suspicious; scores of two classes share no scale.

    Args:
        features: Penultimate features, float ``(N, D)``.
        labels: Labels as given, long ``(N,)``.

    Returns:
        Float ``(N,)``, at least 0.

    Raises:
        ArgumentError: The shapes do not fit.

    Example:
        >>> import torch
        >>> features = torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 6.0]])
        >>> spectral_signature_scores(features, torch.tensor([0, 0, 0, 0]))
        tensor([ 4.,  0.,  4., 16.])
    """
    require_features(features, labels)
    scores = torch.zeros(len(features))
    for label in torch.unique(labels).tolist():
        inside = labels == label
        scores[inside] = principal_components(features[inside], 1)[:, 0].square().float()
    return scores


def select_per_class(scores: Tensor, labels: Tensor, share: float) -> Tensor:
    """Keep all but the ``int(share * n)`` largest scores of every class of n samples.

    Args:
        scores: Float ``(N,)``; larger is more suspicious.
        labels: Labels as given, long ``(N,)``.
        share: Share of the samples of each class to remove, in ``[0, 1)``.

    Returns:
        Samples that stay, bool ``(N,)``.

    Example:
        >>> import torch
        >>> select_per_class(torch.tensor([0.1, 3.0, 9.0, 8.0]), torch.tensor([0, 0, 1, 1]), 0.5)
        tensor([ True, False, False,  True])
    """
    keep = torch.ones(len(scores), dtype=torch.bool)
    for label in torch.unique(labels).tolist():
        inside = labels == label
        keep[inside], _ = select_fraction(scores[inside], share)
    return keep


class SpectralSignatures(Defense):
    """Drop the top ``1.5 * eps`` of every class along its direction of largest variance, and train on what is left.

    Implements *Spectral Signatures in Backdoor Attacks* (`Tran et al., 2018 <https://arxiv.org/abs/1811.00636>`_). One
    forward pass and one small eigenvalue problem per class. Assumes that ``eps`` bounds the poisoned share of every
    class. A baseline: **it removes** ``1.5 * eps`` **of every class whatever the data look like**.

    Args:
        eps: Upper bound on the share of a class that is poisoned, in ``(0, 2/3)``.
        **common: See :class:`~lightning_backdoor.baselines.BaselineArguments`.

    Example:
        >>> SpectralSignatures(eps=0.1, name="first")
        SpectralSignatures(eps=0.1, name='first')
    """

    method: ClassVar[str] = "SpectralSignatures"
    title: ClassVar[str] = "Spectral Signatures"
    shared = BaselineArguments
    shared_defaults = BASELINE_DEFAULTS
    meaning: ClassVar[str] = (
        "It measures how far the features of the image reach along the direction in which its class varies most."
    )

    def __init__(self, *, eps: float = 0.05, **common: Unpack[BaselineArguments]) -> None:
        self.eps = require_fraction("eps", eps)
        require_fraction("1.5 * eps", MARGIN * eps)
        self.arguments: dict[str, Any] = {**BASELINE_DEFAULTS, **common}
        super().__init__(**filter_parts(self.arguments, Scored(self._judge, self.meaning, self.arguments)))

    def _judge(self, found: dict[str, Tensor]) -> tuple[Tensor, Tensor, str]:
        scores = spectral_signature_scores(found["features"], found["labels"])
        keep = select_per_class(scores, found["labels"], MARGIN * self.eps)
        return scores, keep, f"per_class({MARGIN:g} * eps={self.eps:g})"
