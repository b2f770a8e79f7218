"""Which of every sample's neighbors had its label early in training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_backdoor.detection.neighbors import neighbor_agreement
from lightning_backdoor.errors import DataError
from lightning_backdoor.scanning.scan import raise_on_all_ranks
from lightning_backdoor.scanning.scanner import DatasetScanner

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["REFERENCES", "EarlyNeighbors", "early_neighbors"]

REFERENCES = 2**13  # samples among which the neighbors of all are searched
_HALF = torch.finfo(torch.half).max


@dataclass(frozen=True)
class EarlyNeighbors:
    """How far the labels of N samples agreed with those of their neighbors early in training; tensors for a checkpoint.

    Attributes:
        agreement: Share of every sample's neighbors that had its label, half ``(N,)``.
        probe: Labels of a few samples, by which a resumed run checks that the dataset is the same.
    """

    agreement: Tensor
    probe: Tensor

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors alone."""
        return asdict(self)

    def require_same_data(self, data: DatasetScanner) -> None:
        """Raise a DataError if it was taken of other samples than those that are about to be trained on."""
        if len(self.agreement) != len(data) or not torch.equal(self.probe, data.probe[1]):
            raise DataError(
                f"The early neighbors are of {len(self.agreement)} samples of another dataset; the training dataset "
                f"has {len(data)}. Resume with the dataset of the interrupted run, or use no `ckpt_path`."
            )


def early_neighbors(trainer: Trainer, pl_module: LightningModule, data: DatasetScanner) -> EarlyNeighbors:
    """Share of every sample's neighbors that have its label, by the features as they are now.

    Neighbors are searched in a random sample of the training set, by the first process: on the device of the features
    where these stay there, else on the CPU. Every process must call it and gets the same answer.
    """

    def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
        labels = data.labels(batch).clone()  # transfer hooks may change a batch in place
        features = data.outputs(trainer, pl_module, batch)[1]
        return {"labels": labels, "features": features.clamp(-_HALF, _HALF).half()}

    found = data.scan(trainer, pl_module, step, description="early look", finite=True, stay=True)
    agreement = torch.empty(0)
    with raise_on_all_ranks(trainer, "early look"):
        if trainer.is_global_zero:
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(data.options.seed))
            references = torch.zeros(len(data), dtype=torch.bool)
            references[order[:REFERENCES]] = True
            agreement = neighbor_agreement(found["features"], found["labels"], references, gpu=False).half()
    return EarlyNeighbors(trainer.strategy.broadcast(agreement, src=0), data.probe[1])
