"""Checkpoint files beside a defence that changes weights: those that are older, and one for when it fails."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_backdoor._lightning import rank_zero_info, rank_zero_warn
from lightning_backdoor.files import atomic_file
from lightning_backdoor.responses.weight_copies import put_weights

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["save_training", "tell_earlier_files", "warn_of_treated_files"]

SHOWN = 20
CLOCK = 0.01  # seconds that the time of a file may lie behind the clock


def warn_of_treated_files(trainer: Trainer, method: str, since: float, until: float) -> None:
    """Name the checkpoints that were saved in this fit before the last treatment was over, up to 20 of them.

    Args:
        trainer: The running Trainer, at the end of training.
        method: Name of the defence that treated the model.
        since: When the fit began, in seconds since the epoch: older files in the folders of checkpoint callbacks belong
            to other runs.
        until: When the last round or epoch of repair was judged.
    """
    if files := _files(trainer, since, until):
        rank_zero_warn(
            f"{method}: saved before the treatment of the model was over, so these checkpoints may hold the backdoor, "
            f"whatever their score: {files}. Use the last one, or the model as it is now."
        )


def tell_earlier_files(trainer: Trainer, method: str, since: float) -> None:
    """Name those that were saved before training starts again: checkpoint callbacks forget them and record anew."""
    if files := _files(trainer, since, math.inf):
        rank_zero_info(f"{method}: saved before training starts again, and maybe with the backdoor: {files}.")


def _files(trainer: Trainer, since: float, until: float) -> str:
    """Names of the files, or nothing; on the first process alone."""
    if not trainer.is_global_zero:
        return ""
    files = sorted({path for saver in trainer.checkpoint_callbacks for path in _saved_by(saver, since, until)})
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return f"{', '.join(files[:SHOWN])}{more}"


def _saved_by(saver: Any, since: float, until: float) -> set[str]:
    """Files that a checkpoint callback knows or that appeared in its folder, but for those that its next one replaces.

    These are "last", and the only file of a callback that monitors nothing and keeps one.
    """
    best, last = getattr(saver, "best_model_path", ""), getattr(saver, "last_model_path", "")
    only = getattr(saver, "monitor", None) is None and getattr(saver, "save_top_k", None) == 1
    known, folder = {*getattr(saver, "best_k_models", {}), best}, getattr(saver, "dirpath", None)
    if folder is not None and Path(folder).is_dir():
        known |= {str(path) for path in Path(folder).glob("*.ckpt") if _changed(path) >= since}
    return {path for path in known if _changed(Path(path)) < until - CLOCK} - {"", last} - ({best} if only else set())


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # gone meanwhile
        return 0.0


def save_training(
    trainer: Trainer,
    pl_module: LightningModule,
    exception: Exception,
    *,
    title: str,
    name: str,
    before: dict[str, Any] | None,
    report_dir: str | None,
) -> None:
    """After a defense has failed, save what was trained, and say where in a note to the exception.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
        exception: What the defense raised.
        title: Name of the defense for readers.
        name: Name of the defense in file names.
        before: Weights from before a treatment, which the module gets back; ``None`` outside of one.
        report_dir: The user's ``report_dir``; without it the file is written beside logs or checkpoints, if there are
            any.
    """
    if before is not None:
        put_weights(trainer, pl_module, before)
    when = "from before the repair" if before is not None else "as they were trained"
    told = f"{title} failed after epoch {trainer.current_epoch}. The module has its weights {when}"
    if report_dir is not None or trainer.loggers or trainer.checkpoint_callbacks:
        path = Path(report_dir or trainer.default_root_dir) / f"trained-before-{name}-failed.ckpt"
        try:
            _save_weights(trainer, pl_module, path)
        except (OSError, RuntimeError) as error:  # the user has to know of the first exception
            told = f"{told}; no file of them could be written to {path.parent}: {error}"
        else:
            told = f'{told}, and so has the file {path}: module.load_state_dict(torch.load("{path}")["state_dict"])'
    if hasattr(exception, "add_note"):  # Python 3.11
        exception.add_note(f"{told}.")
    else:
        rank_zero_warn(f"{told}.")


def _save_weights(trainer: Trainer, pl_module: LightningModule, path: Path) -> None:
    """Write the module's state where ``load_state_dict(torch.load(path)["state_dict"])`` finds it.

    No process waits for another: one of them has failed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu() for name, value in pl_module.state_dict().items() if torch.is_tensor(value)}
    with atomic_file(path) as file:
        torch.save({"state_dict": state, "epoch": trainer.current_epoch, "global_step": trainer.global_step}, file)
