"""What the commands of the benchmark share: their arguments, and how they begin."""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import torch


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every command has."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of cifar10_<split>.npz")
    found.add_argument("--cache", type=Path, default=Path(".cache"), help="folder of what several commands share")
    found.add_argument("--threads", type=int, default=2)
    return found


def begin(options: argparse.Namespace) -> None:
    """Say little, and make the cache."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    torch.set_num_threads(options.threads)
    options.cache.mkdir(exist_ok=True)
