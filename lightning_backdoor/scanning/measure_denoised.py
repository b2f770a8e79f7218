"""UltraClean's measurement: every training image through the network as it is and denoised in two ways."""

from __future__ import annotations

import errno
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from lightning_backdoor.data.nesting import copied
from lightning_backdoor.detection.near_duplicates import thumbnails
from lightning_backdoor.errors import DataError
from lightning_backdoor.functional.denoising import local_median, nl_means, susceptibility_scores
from lightning_backdoor.scanning.scanner import DatasetScanner

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["DENOISERS", "DenoisedScan", "RowStore"]

DENOISERS: tuple[Callable[[Tensor], Tensor], ...] = (local_median, nl_means)
_HALF = torch.finfo(torch.half).max

_CANNOT_RESERVE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # the file system does not support it


class DenoisedScan:
    """Scans a training set, and stores the denoised images for the next scan.

    Images are denoised once, and so taken to be the same at every scan.

    Args:
        data: The training set.
        world_size: Number of processes; each one keeps the denoised images of its own share.
        cache_bytes: Denoised images beyond this size go to a temporary file.
        softmax: Compare probabilities instead of logits.
        pictures: Whether near-duplicates matter, so that small pictures are returned.
    """

    def __init__(
        self, data: DatasetScanner, *, world_size: int, cache_bytes: int, softmax: bool, pictures: bool = False
    ) -> None:
        self.data = data
        self.world_size = world_size
        self.softmax, self.pictures = softmax, pictures
        self._rows, self._cache_bytes = math.ceil(len(data) / world_size), cache_bytes
        self._stores = [RowStore(self._rows, cache_bytes // len(DENOISERS)) for _ in DENOISERS]

    @property
    def room(self) -> int:
        """Bytes of memory that the denoised images leave of ``cache_bytes``, if all have the size of the first one."""
        image = self.data.layout.images(copied(self.data.some))[0]
        denoised = len(DENOISERS) * self._rows * image.numel()
        return self._cache_bytes - denoised * (denoised <= self._cache_bytes)

    def run(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """Measure every training sample.

        Returns:
            ``labels`` long ``(N,)``; ``susceptibility`` float ``(N,)``, the paper's score; ``responses`` half
            ``(N, 2 D)``, the penultimate features and how far each moved under denoising (twice the original minus both
            denoised ones); ``movement`` float ``(N,)``, the mean square of the latter; perhaps ``pictures`` half
            ``(N, 144)``, see :func:`~lightning_backdoor.detection.near_duplicates.thumbnails`.
        """

        def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
            data = self.data
            images = data.layout.images(batch)
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
                **({"pictures": thumbnails(images)} if self.pictures else {}),
            }

        found = self.data.scan(trainer, pl_module, step, description="UltraClean scan", finite=True, stay=True)
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
            stored = [store.read(rows) for store in self._stores]
            # from page-locked memory, or the process would wait until the GPU has done all that it was given before
            return (
                [part.pin_memory().to(images.device, non_blocking=True) for part in stored]
                if images.is_cuda
                else stored
            )
        pixels = self.data.pixels.to_pixels(images).to(device)
        denoised = [denoise(pixels) for denoise in DENOISERS]
        if fits:
            for store, version in zip(self._stores, denoised, strict=True):
                store.write(rows, version)
        return denoised


class RowStore:
    """A table of uint8 rows with a note of which are written.

    Args:
        rows: Number of rows.
        memory_limit: Largest size in bytes that is held in memory; a larger table is a memory-mapped file in a
            temporary directory, which disappears with :meth:`close` or with the process.

    Example:
        >>> import torch
        >>> store = RowStore(4)
        >>> store.write(torch.tensor([2]), torch.full((1, 3), 7, dtype=torch.uint8))
        >>> store.has(torch.tensor([1])), store.read(torch.tensor([2]))
        (False, tensor([[7, 7, 7]], dtype=torch.uint8))
    """

    def __init__(self, rows: int, memory_limit: int = 2**31) -> None:
        self.rows = rows
        self.memory_limit = memory_limit
        self.written = torch.zeros(rows, dtype=torch.bool)
        self._values: np.ndarray | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._arriving: tuple[Tensor, Tensor, torch.cuda.Event] | None = None

    @property
    def on_disk(self) -> bool:
        """Whether the rows are in a file."""
        return self._folder is not None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether rows of this shape can be written: all have the shape of the first ones."""
        return self._values is None or self._values.shape[1:] == shape

    def has(self, positions: Tensor) -> bool:
        """Whether all rows at ``positions``, long ``(B,)``, are written."""
        return bool(self.written[positions].all())

    def write(self, positions: Tensor, values: Tensor) -> None:
        """Write rows ``values``, uint8 ``(B, ...)``, at ``positions``, long ``(B,)``.

        From a GPU they are stored with the next call, so that no process waits for what the GPU does at the moment.

        Raises:
            DataError: If the rows differ in shape from those written before, or the file cannot hold them all.
        """
        if self._values is None:
            self._values = self._allocate(tuple(values.shape[1:]))
        if values.shape[1:] != self._values.shape[1:]:
            raise DataError(
                f"All rows must have one shape, got {tuple(values.shape[1:])} after {self._values.shape[1:]}."
            )
        self._store_arrived()
        host, arrival = _to_host(values)
        if arrival is None:
            self._values[positions.numpy()] = host.numpy()
        else:
            self._arriving = positions, host, arrival
        self.written[positions] = True

    def read(self, positions: Tensor) -> Tensor:
        """Return a copy of the rows at ``positions``, uint8 ``(B, ...)``."""
        if self._values is None or not self.has(positions):
            raise KeyError("rows that were never written")
        self._store_arrived()
        return torch.from_numpy(self._values[positions.numpy()])

    def close(self) -> None:
        """Drop all rows and delete the file."""
        self._values = self._arriving = None
        self.written.zero_()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _store_arrived(self) -> None:
        """Store the rows that are on their way from a GPU."""
        if self._arriving is not None and self._values is not None:
            positions, host, arrival = self._arriving
            arrival.synchronize()
            self._values[positions.numpy()] = host.numpy()
            self._arriving = None

    def _allocate(self, shape: tuple[int, ...]) -> np.ndarray:
        size = self.rows * math.prod(shape)
        if size <= self.memory_limit:
            return np.empty((self.rows, *shape), dtype=np.uint8)
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="lightning_backdoor_", ignore_cleanup_errors=True)
            path = Path(self._folder.name) / "rows.dat"
            with path.open("wb") as file:
                _reserve(file, size)
            return np.memmap(path, dtype=np.uint8, mode="r+", shape=(self.rows, *shape))
        except OSError as error:
            self.close()
            raise DataError(
                f"The denoised images are more than `cache_bytes` and need {size / 2**30:.2f} GiB in a temporary file, "
                f"which '{tempfile.gettempdir()}' cannot hold: {error.strerror}. Free space there, set TMPDIR to a "
                "folder on a larger disk, or raise `cache_bytes` to keep them in memory."
            ) from error


def _to_host(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Values in main memory; from a GPU they are there once the event has come."""
    if not values.is_cuda:
        return values.cpu(), None
    host = values.to("cpu", non_blocking=True)  # into page-locked memory
    arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrival.record(torch.cuda.current_stream(values.device))
    return host, arrival


def _reserve(file: BinaryIO, size: int) -> None:
    """Claim the disk space now: where it runs out later, a write to the memory map kills the process (SIGBUS)."""
    file.truncate(size)
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in _CANNOT_RESERVE:
            raise
