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
"""Rates ``(K, K)``, the K labels, and the number of images behind a rate."""

MEMBERS = 64  # of each label, whose mean is taken
FEWEST = 20  # samples of a label, at least
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
        ordinary: Samples that stand out in no other way, bool ``(N,)``: labels with fewer than 20 are left out.
        seed: Of the choice of images.

    Returns:
        Share of the images of other labels that get a label, of those that do not get it as they are: for the pattern
        of each label (rows) and each label that is given (columns); the labels; the number of images.
    """
    ordinary = ordinary & (labels >= 0) & ~data.unread
    present, counts = torch.unique(labels[ordinary], return_counts=True)
    names = present[counts >= FEWEST]
    usual = drawn(ordinary, min(IMAGES[0], max(IMAGES[1], SHOWN // max(len(names), 1))), seed)
    if len(names) < 2:
        return torch.zeros(len(names), len(names)), names.tolist(), len(usual)
    given = []
    for some in names.split(TOGETHER):
        with isolated_eval(trainer, pl_module), raise_on_all_ranks(trainer, DESCRIPTION):
            common = _taken_out(data, usual, pl_module.device)
            members = [drawn(ordinary & (labels == label), MEMBERS, seed) for label in some.tolist()]
            patterns = [_taken_out(data, one, pl_module.device) for one in members]
            patterns = [TIMES * (one - resized(common[None], one.shape[1:])[0]) for one in patterns]
        given.append(_given(trainer, pl_module, data, patterns, usual))
    answers = torch.cat([given[0][:, :1], *(part[:, 1:] for part in given)], dim=1)
    return _rates(answers, labels[usual], names), names.tolist(), len(usual)


def _taken_out(data: DatasetScanner, positions: Tensor, device: torch.device) -> Tensor:
    """What a local median takes out of images in the mean, float ``(C, H, W)``."""
    images = data.images(positions.tolist()).to(device)
    return (images.float() - local_median(images)).mean(dim=0)


def _given(
    trainer: Trainer, pl_module: LightningModule, data: DatasetScanner, patterns: list[Tensor], usual: Tensor
) -> Tensor:
    """The answer to every image as it is, and with each of the P patterns, long ``(B, 1 + P)``."""

    def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
        images = data.layout.images(batch)
        shown = data.pixels.to_pixels(images).to(pl_module.device).float()
        given = []
        for pattern in (torch.zeros_like(patterns[0]), *patterns):
            changed = shown + resized(pattern[None], shown.shape[2:])
            pixels = changed.round().clamp(0, 255).to(torch.uint8)
            version = data.layout.with_images(batch, data.pixels.to_model(pixels, like=images))
            given.append(data.logits(trainer, pl_module, version).argmax(dim=1))
        return {"given": torch.stack(given, dim=1)}

    return data.scan(trainer, pl_module, step, description=DESCRIPTION, positions=usual)["given"].cpu()


def _rates(given: Tensor, shown: Tensor, names: Tensor) -> Tensor:
    """Rates ``(K, K)`` from the answers ``(B, 1 + K)`` to images with the labels ``(B,)``."""
    rates = torch.zeros(len(names), len(names))
    for column, label in enumerate(names.tolist()):
        free = (shown != label) & (given[:, 0] != label)
        if bool(free.any()):
            rates[:, column] = (given[free][:, 1:] == label).float().mean(dim=0)
    return rates
