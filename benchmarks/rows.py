"""Rows of the result files: what identifies one, what every one says, reading and appending."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from benchmarks.model import RECIPE
from benchmarks.protocols import Cell, Setting
from lightning_backdoor import __version__

Row = dict[str, Any]
NAMES = 1
"""Counts up where the name of an attack or defence comes to mean something else; see :mod:`benchmarks.older`."""
IDENTITY = ("dataset", "images", "model", "recipe", "epochs", "attack", "seed")
"""What tells two rows apart, beside the defence."""


def key(row: Row, defence: str = "defence") -> tuple[Any, ...]:
    """What a finished row is known by; ``defence`` is the field that says what was done against the attack."""
    full = {"recipe": RECIPE, **row}
    return tuple(full.get(name) for name in (*IDENTITY, defence))


def identity(setting: Setting, attack: str, seed: int) -> Row:
    """The fields of :func:`key`, but for the defence."""
    return {
        "dataset": setting.dataset,
        "images": setting.images,
        "model": setting.model,
        "recipe": setting.recipe,
        "epochs": setting.epochs,
        "attack": attack,
        "seed": seed,
    }


def cell_key(cell: Cell) -> tuple[Any, ...]:
    """The key that the row of a cell has."""
    return key({**identity(cell.setting, cell.attack, cell.seed), "defence": cell.defence})


def setting_of(row: Row) -> Setting:
    """The setting of a row."""
    return Setting(row["model"], row["images"], row["epochs"], row.get("recipe", RECIPE), row["dataset"])


def poison(poisons: int, images: int) -> Row:
    """How many images are poisoned, and their share of all."""
    return {"poisons": poisons, "rate": round(poisons / images, 6)}


@cache
def commit() -> str | None:
    """The commit of the code that runs, with ``-dirty`` if library or benchmark differ from it; without git none.

    The environment variable ``BENCHMARK_COMMIT`` goes first: on another machine there may be a copy of the files alone.
    """
    told = os.environ.get("BENCHMARK_COMMIT")
    if told:
        return told
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True, check=True)
        code = ["diff", "--quiet", "HEAD", "--", ":/lightning_backdoor", ":/benchmarks/**/*.py"]
        changed = subprocess.run([*git, *code], capture_output=True, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + "-dirty" * bool(changed)


def circumstances(module: str, device: str) -> Row:
    """Versions, hardware and command, in which absolute paths are cut to their last name."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    threads = f"{torch.get_num_threads()} CPU threads, {platform.machine()}"
    return {
        "versions": {
            "lightning_backdoor": __version__,
            "commit": commit(),
            "torch": torch.__version__,
            "pytorch_lightning": pl.__version__,
        },
        "hardware": torch.cuda.get_device_name() if device == "cuda" else threads,
        "names": NAMES,
        "command": " ".join(["python -m", module, *words]),
    }


def latest(found: list[Row]) -> list[Row]:
    """The rows of cells, of each the last one: two runs at once may have measured the same."""
    return list({key(row): row for row in found}.values())


def read(path: Path) -> list[Row]:
    """Finished rows; a line that an interruption cut short does not count."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def append(path: Path, row: Row) -> None:
    """Add a row, on a line of its own even after one that was cut short."""
    cut = path.exists() and not path.read_text().endswith("\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(row) + "\n")
