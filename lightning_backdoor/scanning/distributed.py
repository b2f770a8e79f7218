"""What the processes of a fit do together: exchange tensors, and fail."""

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
    """Make an error in one process an error in every process, so that none waits for one that is gone.

    Every process must enter, and do its part without waiting for another one.

    Args:
        trainer: The running Trainer.
        what: What is done inside, for example ``"UltraClean scan"``.

    Raises:
        BackdoorDefenseError: Another process failed; its own error goes on there, and is told here.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = all_gather(trainer, torch.tensor([failure is not None])).flatten()
    if bool(failed.any()):
        first = int(failed.int().argmax())
        told = trainer.strategy.broadcast(f"{type(failure).__name__}: {failure}", src=first)
        if failure is not None:
            raise failure
        raise BackdoorDefenseError(f"{what} failed in the process of rank {first}: {told}")
