"""What gentle denoising takes out of the images of each label, put on images of other labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_backdoor.detection.common_pattern import resized
from lightning_backdoor.functional.denoising import local_median
from lightning_backdoor.scanning.estimate_asr import drawn
from lightning_backdoor.scanning.isolation import isolated_eval
from lightning_backdoor.scanning.scan import raise_on_all_ranks
from lightning_backdoor.scanning.scanner import DatasetScanner

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Turned", "turned_by_patterns"]

Turned = tuple[Tensor, list[int], int]
"""Rates ``(K, K)``, the K labels, and the smallest number of images behind a rate."""

MEMBERS = 64  # of each label, whose mean is taken
FEWEST = 20  # samples of a label, at least, and images behind its rates
TIMES = 3.0  # as strong as in the images of the label: denoising takes out a part of a trigger
IMAGES = 256, 32  # on which it is put: so many, and as few where there are many labels
SHOWN = 2**15  # of these images, over all labels
TOGETHER = 32  # labels whose patterns are held at once
DESCRIPTION = "patterns of whole classes"


def turned_by_patterns(
    trainer: Trainer,
    pl_module: LightningModule,
    data: DatasetScanner,
    *,
    labels: Tensor,
    ordinary: Tensor,
    seed: int = 0,
) -> Turned:
    """Put on images what a local median takes out of the mean image of each label, and see which label they get.

    It is what UltraClean measures of single images, of a whole label: natural images of a class share little that a
    gentle denoising takes out, and a trigger in all of them adds up. The same of images of all labels is subtracted.
    Reads at most 64 images of each label, and shows the network 256 for each (fewer where there are over 128 labels).
    Weights, buffers, random streams and logs stay as they are; every process calls it and gets the same result.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule.
        data: The training set.
        labels: Labels as given, long ``(N,)``, -1 where there is none.
        ordinary: Samples that stand out in no other way, bool ``(N,)``: labels with fewer than 20 are left out, and
            labels that so many of the images have or get as they are that fewer than 20 are left to be turned.
        seed: Of the choice of images.

    Returns:
        Share of the images of other labels that get a label, of those that do not get it as they are: for the pattern
        of each label (rows) and each label that is given (columns); the labels; the smallest number of images that
        such a share is of.
    """
    ordinary = ordinary & (labels >= 0) & ~data.unread
    present, counts = torch.unique(labels[ordinary], return_counts=True)
    names = present[counts >= FEWEST]
    if len(names) < 2:
        return torch.zeros(len(names), len(names)), names.tolist(), 0
    usual = drawn(ordinary, min(IMAGES[0], max(IMAGES[1], SHOWN // len(names))), seed)
    with isolated_eval(trainer, pl_module), raise_on_all_ranks(trainer, DESCRIPTION):
        common = _taken_out(data, usual, pl_module.device)
    given: list[Tensor] = []
    for some in names.split(TOGETHER):
        with isolated_eval(trainer, pl_module), raise_on_all_ranks(trainer, DESCRIPTION):
            members = [drawn(ordinary & (labels == label), MEMBERS, seed) for label in some.tolist()]
            patterns = [_taken_out(data, one, pl_module.device) for one in members]
            patterns = [TIMES * (one - resized(common[None], one.shape[1:])[0]) for one in patterns]
        unchanged = [] if given else [torch.zeros_like(common)]
        given.append(_given(trainer, pl_module, data, [*unchanged, *patterns], usual))
    return _rates(torch.cat(given, dim=1), labels[usual], names)


def _taken_out(data: DatasetScanner, positions: Tensor, device: torch.device) -> Tensor:
    """What a local median takes out of images in the mean, float ``(C, H, W)``."""
    images = data.images(positions.tolist()).to(device)
    return (images.float() - local_median(images)).mean(dim=0)


def _given(
    trainer: Trainer, pl_module: LightningModule, data: DatasetScanner, patterns: list[Tensor], usual: Tensor
) -> Tensor:
    """The label that every image gets with each of the P patterns, long ``(B, P)``."""

    def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
        images = data.layout.images(batch)
        shown = data.pixels.to_pixels(images).to(pl_module.device).float()
        given = []
        for pattern in patterns:
            changed = shown + resized(pattern[None], shown.shape[2:])
            pixels = changed.round().clamp(0, 255).to(torch.uint8)
            version = data.layout.with_images(batch, data.pixels.to_model(pixels, like=images))
            given.append(data.logits(trainer, pl_module, version).argmax(dim=1))
        return {"given": torch.stack(given, dim=1)}

    return data.scan(trainer, pl_module, step, description=DESCRIPTION, positions=usual)["given"].cpu()


def _rates(given: Tensor, shown: Tensor, names: Tensor) -> Turned:
    """From the labels that images of the labels ``(B,)`` get as they are and with K patterns, long ``(B, 1 + K)``."""
    free = (shown[:, None] != names) & (given[:, :1] != names)
    counts = free.sum(dim=0)
    enough = (counts >= FEWEST).nonzero().squeeze(1)
    columns = [(given[free[:, place]][:, 1 + enough] == names[place]).float().mean(dim=0) for place in enough.tolist()]
    rates = torch.stack(columns, dim=1) if columns else torch.zeros(0, 0)
    return rates, names[enough].tolist(), int(counts[enough].min()) if columns else 0
