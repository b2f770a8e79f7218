"""One pass over training samples, identical on any number of processes and invisible to the training around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sized
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_backdoor.errors import DataError, ModelError
from lightning_backdoor.trainer.etiquette import unobtrusive
from lightning_backdoor.trainer.processes import all_gather, in_unison
from lightning_backdoor.trainer.progress import progress

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["scan", "shard"]

Step = Callable[[Tensor, Any], dict[str, Tensor]]

GATHER_BYTES = 2**26  # at most this much per process travels through the device at once


def shard(n: int, trainer: Trainer) -> list[int]:
    """The dataset positions below ``n`` that this process scans: every ``world_size``-th one."""
    return list(range(trainer.global_rank, n, trainer.world_size))


def scan(
    trainer: Trainer, pl_module: LightningModule, loader: DataLoader[Any], step: Step, *, description: str
) -> dict[str, Tensor]:
    """Call ``step`` on every batch and return its per-sample results in the order of the dataset.

    Runs inside :func:`~lightning_backdoor.trainer.etiquette.unobtrusive`: the training around it stays bit-identical.
    Memory beyond the returned tensors does not depend on the number of samples (several processes need the results
    twice while they are put in order). Every process must call it; all receive the same tensors, or all raise.

    Args:
        trainer: The running Trainer.
        pl_module: The module that ``step`` calls.
        loader: Yields ``(indices, batch)``: dataset positions ``(B,)`` and the batch as the user's collate made it, on
            the CPU, before all transfer hooks. ``loader.dataset`` holds this process's samples (see :func:`shard`).
        step: ``step(indices, batch)`` returns tensors ``(B, ...)`` on any device. Sends what it needs through
            :func:`~lightning_backdoor.trainer.etiquette.prepare_batch` itself.
        description: Label of the progress display.

    Returns:
        CPU tensors ``(N, ...)``, dtypes as ``step`` gave them. Row i belongs to the i-th smallest dataset position of
        all processes together: for a whole dataset, to sample i.

    Raises:
        BackdoorDefenseError: The scan failed in another process, and how.
        DataError: No samples, a position seen twice, or a batch whose results do not match its positions in number.
        ModelError: A result holds NaN.
    """
    with unobtrusive(trainer, pl_module):
        table = _Table(len(cast("Sized", loader.dataset)))
        with in_unison(trainer, description):
            _fill(table, trainer, loader, step, description)
        positions, columns = _gather(trainer, table)
    order = positions.argsort()
    if bool((positions[order].diff() == 0).any()):
        raise DataError(
            "`loader` must yield every dataset position once, got repeated ones. Give each rank `shard(n, trainer)`."
        )
    in_order = bool((order == torch.arange(len(order))).all())
    results = {key: column if in_order else column[order] for key, column in columns.items()}
    for key, column in results.items():
        _refuse_nan(key, column, positions[order])
    return results


class _Table:
    """Per-sample results of one process, allocated at the first batch and filled row by row."""

    def __init__(self, rows: int) -> None:
        self.positions = torch.empty(rows, dtype=torch.long)
        self.columns: dict[str, Tensor] = {}
        self.filled = 0

    def append(self, positions: Tensor, values: dict[str, Tensor]) -> None:
        for key, value in values.items():
            if value.ndim == 0 or len(value) != len(positions):
                raise DataError(
                    f"Every sample of a batch needs its own result, got {len(positions)} samples and {key!r} of shape "
                    f"{tuple(value.shape)}. Does `collate_fn` drop or merge samples? Make it keep them all."
                )
        rows = slice(self.filled, self.filled + len(positions))
        if rows.stop > len(self.positions):
            raise DataError(f"`loader` must yield {len(self.positions)} samples, the length of its dataset, got more.")
        if not self.columns:
            size = len(self.positions)
            self.columns = {k: torch.empty((size, *v.shape[1:]), dtype=v.dtype) for k, v in values.items()}
        self.positions[rows] = positions
        for key, column in self.columns.items():
            column[rows] = values[key]
        self.filled = rows.stop

    @property
    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Row shape and dtype of every column: what a process without samples must learn from rank 0."""
        return {key: (tuple(column.shape[1:]), column.dtype) for key, column in self.columns.items()}


def _fill(table: _Table, trainer: Trainer, loader: Iterable[Any], step: Step, description: str) -> None:
    with progress(trainer, description, total=len(table.positions)) as advance:
        for indices, batch in loader:
            positions = torch.as_tensor(indices, dtype=torch.long, device="cpu")
            table.append(positions, step(positions, batch))
            advance(len(positions))
    if table.filled != len(table.positions):
        raise DataError(
            f"`loader` must yield every sample of its dataset, got {table.filled} of {len(table.positions)}. "
            "Does `collate_fn` drop samples? Make it keep them all."
        )


def _gather(trainer: Trainer, table: _Table) -> tuple[Tensor, dict[str, Tensor]]:
    """Bring all processes' rows together."""
    counts = all_gather(trainer, torch.tensor([table.filled])).flatten().tolist()
    if sum(counts) == 0:
        raise DataError(
            "`loader` must yield at least one sample, got an empty dataset. Pass a training set with images."
        )
    if len(counts) == 1:
        return table.positions, table.columns
    layout = trainer.strategy.broadcast(table.layout, src=0)
    columns = {
        key: _gather_rows(trainer, table.columns.get(key, torch.empty(0, *shape, dtype=dtype)), counts)
        for key, (shape, dtype) in layout.items()
    }
    return _gather_rows(trainer, table.positions, counts), columns


def _gather_rows(trainer: Trainer, rows: Tensor, counts: list[int]) -> Tensor:
    """Concatenate the processes' rows in portions that fit any device."""
    result = torch.empty((sum(counts), *rows.shape[1:]), dtype=rows.dtype)
    starts = [sum(counts[:rank]) for rank in range(len(counts))]
    portion = max(1, GATHER_BYTES // max(1, math.prod(rows.shape[1:]) * rows.element_size()))
    for first in range(0, max(counts), portion):
        mine = rows[first : first + portion]
        padded = torch.zeros((min(portion, max(counts) - first), *rows.shape[1:]), dtype=rows.dtype)
        padded[: len(mine)] = mine
        for rank, part in enumerate(all_gather(trainer, padded)):
            here = part[: max(0, counts[rank] - first)]
            result[starts[rank] + first : starts[rank] + first + len(here)] = here
    return result


def _refuse_nan(key: str, column: Tensor, positions: Tensor) -> None:
    if not column.is_floating_point():
        return
    bad = torch.cat([part.reshape(len(part), -1).isnan().any(dim=1) for part in torch.split(column, 2**14)])
    if bool(bad.any()):
        raise ModelError(
            f"The model must give a number for every training image, got NaN in {key!r} for {int(bad.sum())} of "
            f"{len(bad)} (first positions: {positions[bad][:5].tolist()}). If it is a few, look for NaN in these "
            "images; if it is all of them, training has diverged: lower the learning rate."
        )
