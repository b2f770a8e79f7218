"""One pass over training samples, with the same results on any number of processes, isolated from the training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from lightning_backdoor.errors import BackdoorDefenseError, DataError, ModelError
from lightning_backdoor.scanning.isolation import isolated_eval

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["all_gather", "progress", "raise_on_all_ranks", "scan", "scan_read", "shard"]

PATIENCE_S = 2.0  # shorter passes show nothing

Show = Callable[[int], Any]

Step = Callable[[Tensor, Any], dict[str, Tensor]]

GATHER_BYTES = 2**26  # at most this much per process travels through the device at once
DEVICE_SHARE = 0.1  # of the free memory of a GPU that the rows of one scan may take; more go to the CPU


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
        RuntimeError: In place of a StopIteration, by which Lightning would end the fit without a word.
    """
    failure: Exception | None = None
    try:
        yield
    except StopIteration as error:
        failure = RuntimeError(
            f"{what} failed with a StopIteration, from `next` of an iterator that had ended. If the traceback leads to "
            "your own code (dataset, `collate_fn`, `batch_fn`, `forward_fn`), write `next(iterator, None)` there."
        )
        failure.__traceback__ = error.__traceback__  # as its `__cause__`, contextlib would let the StopIteration pass
    except Exception as error:
        failure = error
    failed = all_gather(trainer, torch.tensor([failure is not None])).flatten()
    if bool(failed.any()):
        first = int(failed.int().argmax())
        quoted = trainer.strategy.broadcast(f"{type(failure).__name__}: {failure}", src=first)
        if failure is not None:
            raise failure
        raise BackdoorDefenseError(f"{what} failed in the process of rank {first}: {quoted}")


@contextmanager
def progress(trainer: Trainer, description: str, total: int) -> Iterator[Show]:
    """Yield ``advance(n)``, which shows progress once the pass has run for two seconds.

    A tqdm bar gets a second line, a rich display gets one more task, any other bar a message every 10 %. Nothing is
    shown on ranks other than 0 or when the Trainer's progress bar is off.

    Args:
        trainer: Its ``progress_bar_callback`` decides about the form.
        description: What is computed, for example ``"UltraClean: scanning"``.
        total: Number of samples of this rank.
    """
    started, done, show = time.monotonic(), 0, cast("Show | None", None)
    with ExitStack() as stack:

        def advance(count: int) -> None:
            nonlocal done, show
            done += count
            if show is None:
                if time.monotonic() - started < PATIENCE_S:
                    return
                show = stack.enter_context(_display(trainer, description, total))
                count = done
            show(count)

        yield advance


@contextmanager
def _display(trainer: Trainer, description: str, total: int) -> Iterator[Show]:
    bar: Any = trainer.progress_bar_callback
    if bar is None or getattr(bar, "is_disabled", False) or not trainer.is_global_zero:
        yield _nothing
    elif getattr(bar, "progress", None) is not None:
        # Lightning finds its tasks by their position, so a finished task is hidden and never removed.
        task = bar.progress.add_task(description, total=total)
        try:
            yield lambda count: bar.progress.update(task, advance=count, refresh=True)
        finally:
            bar.progress.update(task, visible=False, refresh=True)
    elif _is_tqdm(bar):
        with tqdm(desc=description, total=total, leave=False, position=1, unit="img", dynamic_ncols=True) as line:
            yield line.update
    else:
        yield _messages(description, total)


def _is_tqdm(bar: Any) -> bool:
    return any(cls.__name__ == "TQDMProgressBar" for cls in type(bar).__mro__)


def _messages(description: str, total: int) -> Show:
    done, shown = 0, 0

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        tenth = 10 * done // max(total, 1)
        if tenth > shown:
            shown = tenth
            rank_zero_info(f"{description}: {10 * tenth} % ({done} of {total})")

    return advance


def _nothing(count: int) -> None:
    """Show nothing."""


def shard(n: int, trainer: Trainer) -> list[int]:
    """The dataset positions below ``n`` that this process scans: every ``world_size``-th one."""
    return list(range(trainer.global_rank, n, trainer.world_size))


def scan(
    trainer: Trainer, pl_module: LightningModule, loader: DataLoader[Any], step: Step, *, description: str
) -> dict[str, Tensor]:
    """Call ``step`` on every batch and return its per-sample results in the order of the dataset.

    Runs inside :func:`~lightning_backdoor.scanning.isolation.isolated_eval`, so the training stays bit-identical.
    Memory beyond the returned tensors does not depend on the number of samples (several processes need the results
    twice while they are put in order). Every process must call it; all receive the same tensors, or all raise.

    Args:
        trainer: The running Trainer.
        pl_module: The module that ``step`` calls.
        loader: Yields ``(indices, batch)``: dataset positions ``(B,)`` and the batch as the user's collate made it, on
            the CPU, before all transfer hooks. ``loader.dataset`` holds this process's samples (see :func:`shard`).
        step: ``step(indices, batch)`` returns tensors ``(B, ...)`` on any device. Sends what it needs through
            :func:`~lightning_backdoor.scanning.isolation.prepare_batch` itself.
        description: Label of the progress display.

    Returns:
        CPU tensors ``(N, ...)``, dtypes as ``step`` gave them. Row i belongs to the i-th smallest dataset position of
        all processes together: for a whole dataset, to sample i.

    Raises:
        BackdoorDefenseError: The scan failed in another process, and how.
        DataError: No samples, a position seen twice or not at all, or a batch whose results do not match its positions
            in number.
        ModelError: A result holds NaN.
    """
    positions, results, expected = scan_read(trainer, pl_module, loader, step, description=description)
    if len(positions) != expected:
        raise DataError(
            f"`loader` must yield every sample of its dataset, got {len(positions)} of {expected}. "
            "Does `collate_fn` drop samples? Make it keep them all."
        )
    return results


def scan_read(
    trainer: Trainer,
    pl_module: LightningModule,
    loader: DataLoader[Any],
    step: Step,
    *,
    description: str,
    stay: bool = False,
) -> tuple[Tensor, dict[str, Tensor], int]:
    """As :func:`scan` of what ``loader`` yields, be it all or not.

    With ``stay``, results ``(N, D)`` that ``step`` made on a GPU remain there, if there is one process and they fit
    into a tenth of the GPU's free memory.

    Returns:
        Dataset positions in rising order, long ``(M,)``; results; the number of samples that were to be read.
    """
    with isolated_eval(trainer, pl_module):
        table = _Table(len(cast("Sized", loader.dataset)), alone=trainer.world_size == 1)
        with raise_on_all_ranks(trainer, description):
            _fill(table, trainer, loader, step, description)
        positions, columns, expected = _gather(trainer, table)
    order = positions.argsort()
    if bool((positions[order].diff() == 0).any()):
        raise DataError(
            "`loader` must yield every dataset position once, got repeated ones. Give each rank `shard(n, trainer)`."
        )
    in_order = bool((order == torch.arange(len(order))).all())
    columns = {key: column if stay and column.ndim > 1 else column.cpu() for key, column in columns.items()}
    results = {key: column if in_order else column[order] for key, column in columns.items()}
    for key, column in results.items():
        _refuse_nan(key, column, positions[order])
    return positions[order], results, expected


class _Table:
    """Per-sample results of one process, allocated at the first batch and filled row by row.

    Results on a GPU stay there while the pass runs, if the process is alone and they fit: no batch waits for a copy.
    """

    def __init__(self, rows: int, *, alone: bool) -> None:
        self.alone = alone
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
            size, fits = len(self.positions), self.alone and _fit(values.values(), len(self.positions))
            self.columns = {
                key: torch.empty((size, *value.shape[1:]), dtype=value.dtype, device=value.device if fits else "cpu")
                for key, value in values.items()
            }
        self.positions[rows] = positions
        for key, column in self.columns.items():
            column[rows] = values[key]
        self.filled = rows.stop

    @property
    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Row shape and dtype of every column: a process without samples gets it from another one."""
        return {key: (tuple(column.shape[1:]), column.dtype) for key, column in self.columns.items()}


def _fit(values: Iterable[Tensor], rows: int) -> bool:
    """Whether so many rows like these may stay on the GPU where they are."""
    there = [value for value in values if value.device.type != "cpu"]
    size = sum(rows * math.prod(value.shape[1:]) * value.element_size() for value in there)
    return bool(there) and size <= DEVICE_SHARE * _free_memory(there[0].device)


def _free_memory(device: torch.device) -> int:
    """Bytes that a GPU has free; 0 for devices that do not tell."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _fill(table: _Table, trainer: Trainer, loader: Iterable[Any], step: Step, description: str) -> None:
    with progress(trainer, description, total=len(table.positions)) as advance:
        for indices, batch in loader:
            positions = torch.as_tensor(indices, dtype=torch.long, device="cpu")
            table.append(positions, step(positions, batch))
            advance(len(positions))


def _gather(trainer: Trainer, table: _Table) -> tuple[Tensor, dict[str, Tensor], int]:
    """Bring all processes' rows together."""
    sizes = all_gather(trainer, torch.tensor([[table.filled, len(table.positions)]])).reshape(-1, 2)
    counts, expected = sizes[:, 0].tolist(), int(sizes[:, 1].sum())
    if sum(counts) == 0:
        got = f"{expected} that `collate_fn` drops" if expected else "an empty dataset"
        raise DataError(f"`loader` must yield at least one sample, got {got}. Pass a training set with images.")
    own = {key: column[: table.filled] for key, column in table.columns.items()}
    positions = table.positions[: table.filled]
    if len(counts) == 1:
        return positions, own, expected
    layout = trainer.strategy.broadcast(table.layout, src=next(rank for rank, count in enumerate(counts) if count))
    columns = {
        key: _gather_rows(trainer, own.get(key, torch.empty(0, *shape, dtype=dtype)), counts)
        for key, (shape, dtype) in layout.items()
    }
    return _gather_rows(trainer, positions, counts), columns, expected


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
    bad = torch.cat([part.reshape(len(part), -1).isnan().any(dim=1) for part in torch.split(column, 2**14)]).cpu()
    if bool(bad.any()):
        raise ModelError(
            f"The model must give a number for every training image, got NaN in {key!r} for {int(bad.sum())} of "
            f"{len(bad)} (first positions: {positions[bad][:5].tolist()}). If it is a few, look for NaN in these "
            "images; if it is all of them, training has diverged: lower the learning rate."
        )
