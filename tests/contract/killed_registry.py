"""Trainings that die in the middle: ``python -m tests.contract.killed_registry FOLDER NAME...``.

Every training is a fork of one process that has imported everything and computed nothing.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from lightning_backdoor.scanning import measure_fct as distinguish
from lightning_backdoor.scanning import scan
from tests.callbacks.helpers import state_of
from tests.contract.problem import EPOCHS, fit
from tests.contract.registry import Entry, of


def die(*args: Any, **kwargs: Any) -> None:
    """What a scheduler does, or a kernel without memory: no exception, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_call(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which kills the process instead of running for the n-th time."""
    calls = iter(range(1, sys.maxsize))

    def deadly(*args: Any, **kwargs: Any) -> Any:
        return die() if next(calls) == number else function(*args, **kwargs)

    return deadly


class DieInRepair(Callback):
    """Kills the process in the middle of the first epoch that is the defence's own."""

    def __init__(self, entry: Entry) -> None:
        self.epoch = EPOCHS if entry.kind == "repair" else 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            die()


class DieInLook(Callback):
    """Kills the process in the middle of the first scan at the end of an epoch after the first one."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch > 0:
            scan._Table.append = die_at_call(2, scan._Table.append)  # type: ignore[method-assign]


def moments(entry: Entry) -> dict[str, tuple[list[Any], Any]]:
    """Callbacks before the defence, and a patch, that kill the process at some moment."""
    nothing = mock.patch.object(sys, "argv", sys.argv)
    found: dict[str, tuple[list[Any], Any]] = {
        "scan": ([DieInLook()], nothing),
        "report": ([], mock.patch.object(Path, "replace", die)),
    }
    if entry.kind in ("repair", "own"):
        found["own epochs"] = ([DieInRepair(entry)], nothing)
    if entry.name in ("DBRCallback", "DSTCallback"):
        repulsion = die_at_call(2, distinguish.center_repulsion_loss)
        found["detector"] = ([], mock.patch.object(distinguish, "center_repulsion_loss", repulsion))
    return found


def train(entry: Entry, folder: Path, before: list[Any], ckpt: Path | None, result: Path | None) -> None:
    """One fit that keeps its last checkpoint (and a report) in a folder; what it ends with goes into a file."""
    later = {"warmup_epochs": 2} if "warmup_epochs" in entry.acting else {}  # there is a checkpoint before the look
    callback = entry.make(**later, report_dir=folder / "report" if folder.name.endswith("report") else None)
    keeper = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    run = fit([*before, callback, keeper], ckpt=ckpt, enable_checkpointing=True)
    if result is not None:
        end = {"weights": state_of(run.module), "state": callback.state_dict()}
        torch.save({**end, "counts": (run.trainer.current_epoch, run.trainer.global_step)}, result)


def in_child(work: Callable[[], None]) -> int:
    """Do it in a fork, and return the signal that ended it, 0, or a negative number after an error."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main(folder: Path, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for slow_to_import in ("faiss", "kornia.geometry.transform", "matplotlib.figure"):
        importlib.import_module(slow_to_import)
    ends: dict[str, Any] = {}
    for entry in map(of, names):
        whole = folder / entry.name
        ends[entry.name] = in_child(lambda e=entry, w=whole: train(e, w, [], None, w.with_suffix(".pt")))
        for moment, (before, patch) in moments(entry).items():
            name = f"{entry.name} {moment}"
            place, last = folder / name, folder / name / "last.ckpt"

            def killed(e: Entry = entry, p: Path = place, b: list[Any] = before, patched: Any = patch) -> None:
                with patched:
                    train(e, p, b, None, None)

            def resumed(e: Entry = entry, p: Path = place, path: Path = last) -> None:
                train(e, p, [], path if path.exists() else None, p.with_suffix(".pt"))

            died = in_child(killed)
            left = [path.name for path in (place / "report").glob("*")]
            ends[name] = {"died": died, "left": left, "checkpoint": last.exists(), "resumed": in_child(resumed)}
    (folder / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
