"""What the commands of the benchmark share: their arguments, and how they begin."""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from benchmarks import rows
from benchmarks.data import DOWNLOADED, cifar10, dataset_name, per_class
from benchmarks.protocols import Setting


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every command has."""
    found = argparse.ArgumentParser(description=description)
    told = f"folder of cifar10_<split>.npz (JPEG); {DOWNLOADED}: the original, downloaded"
    found.add_argument("--data", type=Path, default=Path("../shared/data"), help=told)
    told = "folder of networks and scores that several commands share; remove it if you change an attack or a recipe"
    found.add_argument("--cache", type=Path, default=Path(".cache"), help=told)
    found.add_argument("--threads", type=int, default=2)
    return found


def quiet(threads: int, module: str = "") -> None:
    """Note which code runs, use so many threads, and say little: no warning of modules whose names begin so."""
    rows.commit()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=module)
    torch.set_num_threads(threads)


def begin(options: argparse.Namespace) -> None:
    """Say little, note which code runs, and make the cache."""
    quiet(options.threads, "pytorch_lightning")
    options.cache.mkdir(exist_ok=True)


def setting_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of a command that works in one setting of the small network."""
    found = parser(description)
    found.add_argument("--images", type=int, default=20_000, help="training images, the same number of each class")
    found.add_argument("--epochs", type=int, default=12)
    return found


def begin_setting(options: argparse.Namespace) -> tuple[TensorDataset, TensorDataset, Setting]:
    """Clean training images, clean test images, and the setting."""
    begin(options)
    clean = per_class(cifar10(options.data, "train"), options.images // 10)
    setting = Setting(images=len(clean), epochs=options.epochs, dataset=dataset_name(options.data))
    return clean, cifar10(options.data, "test"), setting
