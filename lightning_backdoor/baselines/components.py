"""Principal components of the features of one class."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["principal_components"]


def principal_components(features: Tensor, count: int) -> Tensor:
    """Coordinates of samples along their directions of largest variance, from the smaller of two inner products.

    Args:
        features: Float ``(n, D)``, n at least 1.
        count: Directions wanted, at least 1.

    Returns:
        Double ``(n, min(count, n, D))``, largest variance first, means zero; signs are arbitrary.
    """
    centerd = features.double()
    centerd = centerd - centerd.mean(dim=0)
    if len(centerd) > centerd.shape[1]:
        _, vectors = torch.linalg.eigh(centerd.T @ centerd)
        coordinates: Tensor = centerd @ vectors
    else:
        values, vectors = torch.linalg.eigh(centerd @ centerd.T)
        coordinates = vectors * values.clamp(min=0).sqrt()
    return coordinates.flip(1)[:, :count]
