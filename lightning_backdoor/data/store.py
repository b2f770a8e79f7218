"""Rows that are computed once and read often: in memory up to a limit, in a temporary file beyond it."""

from __future__ import annotations

import errno
import math
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from lightning_backdoor.errors import DataError

__all__ = ["RowStore"]

_CANNOT_RESERVE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # the file system does not support it


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

        Raises:
            DataError: If the rows differ in shape from those written before, or the file cannot hold them all.
        """
        if self._values is None:
            self._values = self._allocate(tuple(values.shape[1:]))
        if values.shape[1:] != self._values.shape[1:]:
            raise DataError(
                f"All rows must have one shape, got {tuple(values.shape[1:])} after {self._values.shape[1:]}."
            )
        self._values[positions.numpy()] = values.cpu().numpy()
        self.written[positions] = True

    def read(self, positions: Tensor) -> Tensor:
        """Return a copy of the rows at ``positions``, uint8 ``(B, ...)``."""
        if self._values is None or not self.has(positions):
            raise KeyError("rows that were never written")
        return torch.from_numpy(self._values[positions.numpy()])

    def close(self) -> None:
        """Drop all rows and delete the file."""
        self._values = None
        self.written.zero_()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

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
