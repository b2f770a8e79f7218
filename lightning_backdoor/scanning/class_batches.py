"""Which samples the detector of D-BR and D-ST is trained on, step by step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_backdoor.scanning.distributed import raise_on_all_ranks
from lightning_backdoor.scanning.scanner import DatasetScanner

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["order_of_steps"]

LEAST_OF_CLASS = 2  # samples of a class in a batch, on average, for its centre to be more than a sample of it
DRAWN_OF_CLASS = 4  # of some classes, where there are too many for that


def order_of_steps(
    trainer: Trainer, pl_module: LightningModule, data: DatasetScanner, *, steps: int, all_steps: int, seed: int
) -> Tensor:
    """Positions of the samples of all steps: one shuffle after the other.

    Where a batch holds fewer than two samples of a class on average, most centres would be single samples, and the loss
    would turn every image away from every other. The batches of centre repulsion then are of some classes each. That
    takes one more pass over the data, for the labels.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
        data: The training set.
        steps: Steps of ordinary training.
        all_steps: These, and those of centre repulsion after them.
        seed: Seed of the order.
    """
    with raise_on_all_ranks(trainer, "training of the detector"), data.read([]) as loader:
        size = min(int(loader.batch_size or 1), len(data))
    needed = all_steps * size
    generator = torch.Generator().manual_seed(seed)
    shuffles = [torch.randperm(len(data), generator=generator) for _ in range(math.ceil(needed / len(data)))]
    order = torch.cat(shuffles)[:needed]
    repelling = all_steps - steps
    if size < 2 or not repelling or LEAST_OF_CLASS * data.num_classes <= size:
        return order
    labels = data.read_labels(trainer, pl_module)
    if LEAST_OF_CLASS * len(torch.unique(labels)) <= size:  # a head may have more outputs than there are classes
        return order
    read = (~data.unread).nonzero().squeeze(1)
    return torch.cat([order[: steps * size], read[_by_classes(labels[read], size, repelling, generator)]])


def _by_classes(labels: Tensor, size: int, batches: int, generator: torch.Generator) -> Tensor:
    """Positions of batches of some random classes each, with about four samples of each (repeated if it has fewer)."""
    _, counts = torch.unique(labels, return_counts=True)
    classes = torch.split(labels.argsort(stable=True), counts.tolist())
    shares = [len(part) for part in torch.tensor_split(torch.arange(size), max(size // DRAWN_OF_CLASS, 2))]
    drawn = []
    for _ in range(batches):
        chosen = torch.randperm(len(classes), generator=generator)[: len(shares)].tolist()
        for place, share in zip(chosen, shares, strict=True):
            members = classes[place]
            shuffled = members[torch.randperm(len(members), generator=generator)]
            drawn.append(shuffled.repeat(math.ceil(share / len(members)))[:share])
    return torch.cat(drawn)
