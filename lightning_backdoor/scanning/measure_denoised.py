"""UltraClean's measurement: every training image through the network as it is and denoised in two ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_backdoor.data.pixels import check_finite
from lightning_backdoor.data.store import RowStore
from lightning_backdoor.errors import DataError
from lightning_backdoor.functional.denoising import local_median, nl_means, susceptibility_scores
from lightning_backdoor.scanning.scanner import DatasetScanner

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["DENOISERS", "DenoisedScan"]

DENOISERS: tuple[Callable[[Tensor], Tensor], ...] = (local_median, nl_means)
_HALF = torch.finfo(torch.half).max


class DenoisedScan:
    """Scans a training set, and stores the denoised images for the next scan.

    Args:
        data: The training set.
        world_size: Number of processes; each one keeps the denoised images of its own share.
        cache_bytes: Denoised images beyond this size go to a temporary file.
        softmax: Compare probabilities instead of logits.
    """

    def __init__(self, data: DatasetScanner, *, world_size: int, cache_bytes: int, softmax: bool) -> None:
        self.data = data
        self.world_size = world_size
        self.softmax = softmax
        rows = math.ceil(len(data) / world_size)
        self._stores = [RowStore(rows, cache_bytes // len(DENOISERS)) for _ in DENOISERS]

    def run(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """Measure every training sample.

        Returns:
            ``labels`` long ``(N,)``; ``susceptibility`` float ``(N,)``, the paper's score; ``responses`` half
            ``(N, 2 D)``, the penultimate features and how far each moved under denoising (twice the original minus both
            denoised ones); ``movement`` float ``(N,)``, the mean square of the latter.
        """

        def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
            data = self.data
            images = data.layout.images(batch)
            check_finite(images, indices)
            versions = [
                data.layout.with_images(batch, data.pixels.to_model(pixels, like=images))
                for pixels in self._denoised(indices // self.world_size, images, pl_module.device)
            ]
            labels = data.labels(batch).clone()  # transfer hooks may change a batch in place
            logits, features = data.outputs(trainer, pl_module, batch)
            moved = [data.outputs(trainer, pl_module, version) for version in versions]
            outputs = [logits, *(output for output, _ in moved)]
            if self.softmax:
                outputs = [output.softmax(dim=1) for output in outputs]
            shift = len(moved) * features - torch.stack([version for _, version in moved]).sum(dim=0)
            return {
                "labels": labels,
                "right": logits.argmax(dim=1) == labels.to(logits.device),
                "susceptibility": susceptibility_scores(outputs[0], outputs[1:]),
                "movement": shift.square().mean(dim=1),
                "responses": torch.cat([features, shift], dim=1).clamp(-_HALF, _HALF).half(),
            }

        found = self.data.scan(trainer, pl_module, step, description="UltraClean scan")
        if len(torch.unique(found["labels"])) < 2:
            raise DataError(
                "The training set must hold at least two classes to tell a poisoned one from the others, got "
                f"{len(self.data)} samples of class {int(found['labels'][0])}. Train without this callback."
            )
        return found

    def close(self) -> None:
        """Delete the stored images."""
        for store in self._stores:
            store.close()

    def _denoised(self, rows: Tensor, images: Tensor, device: torch.device) -> list[Tensor]:
        """The denoised versions of a batch, uint8 ``(B, C, H, W)`` each, computed on the device the first time.

        Where images differ in size, those of the size of the first batch are stored.
        """
        channels = () if images.ndim == 4 else (1,)
        fits = all(store.fits((*channels, *images.shape[1:])) for store in self._stores)
        if fits and all(store.has(rows) for store in self._stores):
            return [store.read(rows) for store in self._stores]
        pixels = self.data.pixels.to_pixels(images).to(device)
        if not fits:
            return [denoise(pixels) for denoise in DENOISERS]
        for store, denoise in zip(self._stores, DENOISERS, strict=True):
            store.write(rows, denoise(pixels))
        return [store.read(rows) for store in self._stores]
