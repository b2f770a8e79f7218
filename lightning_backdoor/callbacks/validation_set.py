"""The loaders that a Trainer validates on, and the images of them that are looked at."""

from __future__ import annotations

import math
from typing import Any

import torch

from lightning_backdoor.errors import DataError

__all__ = ["batch_size", "first_loader", "loaders_in", "positions_used"]


def loaders_in(structure: Any) -> list[Any]:
    """Return the loaders in whatever nest of lists and dicts the user gave."""
    structure = getattr(structure, "iterables", structure)
    if isinstance(structure, dict):
        structure = list(structure.values())
    if isinstance(structure, (list, tuple)):
        return [loader for part in structure for loader in loaders_in(part)]
    return [structure] if hasattr(structure, "dataset") else []


def first_loader(structure: Any) -> Any:
    """Return the first loader.

    Raises:
        DataError: There is none over a map-style dataset.
    """
    loaders = loaders_in(structure)
    if not loaders or not hasattr(loaders[0].dataset, "__len__"):
        raise DataError(
            "BackdoorMonitor needs a map-style validation set in a DataLoader, got "
            f"{type(loaders[0].dataset if loaders else structure).__name__}. Change the validation loader."
        )
    return loaders[0]


def batch_size(loader: Any) -> int:
    """Return the samples per batch, 32 where the loader does not say."""
    return loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 32


def positions_used(trainer: Any, loader: Any) -> list[int]:
    """Return all positions of the dataset, or as many as ``limit_val_batches`` allows, drawn once."""
    size, limit = len(loader.dataset), trainer.limit_val_batches
    whole = isinstance(limit, int)
    wanted = limit * batch_size(loader) * trainer.world_size if whole else math.ceil(limit * size)
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(0))[: int(wanted)]
    positions: list[int] = drawn.sort().values.tolist()
    return positions
