"""Checkpoint files beside a defence that changes weights: those that are older, and one for when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_backdoor.files import atomic_file
from lightning_backdoor.trainer.compat import rank_zero_info, rank_zero_warn

__all__ = ["save_weights", "tell_earlier_files", "warn_of_earlier_files"]

SHOWN = 20


def warn_of_earlier_files(trainer: Any, method: str, since: float) -> None:
    """Name the checkpoints that were saved in this fit before the model was treated, up to 20 of them.

    Args:
        trainer: The running Trainer.
        method: Name of the defence that treats the model.
        since: When the fit began, in seconds since the epoch: files in the folders of checkpoint callbacks that are
            older belong to other runs.
    """
    if files := _earlier_files(trainer, since):
        rank_zero_warn(
            f"{method}: saved before the model was treated, so these checkpoints may hold the backdoor: {files}. Use "
            "one that is saved later, for example the last one: a score that was recorded before the treatment is true "
            "of the untreated model."
        )


def tell_earlier_files(trainer: Any, method: str, since: float) -> None:
    """The same where training starts again: checkpoint callbacks then forget what they have saved and record anew."""
    if files := _earlier_files(trainer, since):
        rank_zero_info(f"{method}: saved before training starts again, and maybe with the backdoor: {files}.")


def _earlier_files(trainer: Any, since: float) -> str:
    """Their names, or nothing; on the first process alone."""
    if not trainer.is_global_zero:
        return ""
    files = sorted({path for saver in trainer.checkpoint_callbacks for path in _saved_by(saver, since)})
    more = f" and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return f"{', '.join(files[:SHOWN])}{more}"


def _saved_by(saver: Any, since: float) -> set[str]:
    """Files that a checkpoint callback knows or that appeared in its folder, without those that its next one replaces.

    These are "last", and the only file of a callback that monitors nothing and keeps one.
    """
    best, last = getattr(saver, "best_model_path", ""), getattr(saver, "last_model_path", "")
    only = getattr(saver, "monitor", None) is None and getattr(saver, "save_top_k", None) == 1
    known, folder = {*getattr(saver, "best_k_models", {}), best}, getattr(saver, "dirpath", None)
    if folder is not None and Path(folder).is_dir():
        known |= {str(path) for path in Path(folder).glob("*.ckpt") if _changed(path) >= since}
    return known - {"", last} - ({best} if only else set())


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # gone meanwhile
        return 0.0


def save_weights(trainer: Any, pl_module: Any, path: Path) -> None:
    """Write the module's state where ``load_state_dict(torch.load(path)["state_dict"])`` finds it.

    No process waits for another: one of them has failed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu() for name, value in pl_module.state_dict().items() if torch.is_tensor(value)}
    with atomic_file(path) as file:
        torch.save({"state_dict": state, "epoch": trainer.current_epoch, "global_step": trainer.global_step}, file)
