"""Tensors and errors exchanged between the processes of a fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_backdoor.errors import BackdoorDefenseError

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["all_gather", "raise_on_all_ranks"]


def all_gather(trainer: Trainer, values: Tensor) -> Tensor:
    """Stack a tensor ``(B, ...)`` of every process to ``(world, B, ...)``, bit by bit and for every dtype."""
    if trainer.world_size == 1:
        return values[None]
    parcel = values.reshape(len(values), -1).contiguous().view(torch.uint8).to(trainer.strategy.root_device)
    parcels = trainer.strategy.all_gather(parcel).cpu().contiguous()
    return parcels.view(values.dtype).reshape(-1, *values.shape)


@contextmanager
def raise_on_all_ranks(trainer: Trainer, what: str) -> Iterator[None]:
    """Raise in every process if one raises, so that no process waits for one that has stopped.

    Every process must enter. Inside, no process may wait for another one.

    Args:
        trainer: The running Trainer.
        what: What is done inside, for example ``"UltraClean scan"``.

    Raises:
        BackdoorDefenseError: Another process failed; its own error is raised there, and quoted here.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = all_gather(trainer, torch.tensor([failure is not None])).flatten()
    if bool(failed.any()):
        first = int(failed.int().argmax())
        quoted = trainer.strategy.broadcast(f"{type(failure).__name__}: {failure}", src=first)
        if failure is not None:
            raise failure
        raise BackdoorDefenseError(f"{what} failed in the process of rank {first}: {quoted}")
