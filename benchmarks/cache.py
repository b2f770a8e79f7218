"""What several cells need and one of them makes: networks before their last epoch, and scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset, TensorDataset

from benchmarks import model
from benchmarks.protocols import Setting
from benchmarks.training import Snapshot, train_network
from lightning_backdoor import functional

T = TypeVar("T")
EARLY = 3  # epochs: strong backdoors are learned, most of the classes are not


def checkpoint(cache: Path, setting: Setting, attack: str, seed: int) -> Path:
    """Where the undefended training under ``attack`` is kept as it was before its last epoch."""
    usual = Setting()
    other = "" if setting.dataset == usual.dataset else f"-{setting.dataset}"
    if (setting.model, setting.recipe) != (usual.model, usual.recipe):
        other += f"-{setting.model}-{setting.recipe}"
    return cache / f"{attack}-{setting.images}-{setting.epochs}-{seed}{other}.ckpt"


def early(shared: Path) -> Path:
    """Where the same training is kept as it was after ``EARLY`` epochs."""
    return shared.with_suffix(f".after-{EARLY}.ckpt")


def undefended(
    dataset: Dataset[Any],
    setting: Setting,
    attack: str,
    seed: int,
    cache: Path,
    *,
    at_first: bool = False,
    device: str = "cpu",
) -> Path:
    """Checkpoint of the undefended training before its last epoch, or early in it; trained now if it is not there."""
    path, epochs = checkpoint(cache, setting, attack, seed), setting.epochs - 1
    if at_first:
        path, epochs = early(path), EARLY
    if not path.exists():
        train_network(dataset, [Snapshot(path, epochs, stop=True)], setting, seed, None, device=device)
    return path


def clean_model(
    train: TensorDataset, setting: Setting, seed: int, cache: Path, device: str = "cpu"
) -> functional.PixelModel:
    """The classifier that an attacker has: trained on clean data; pixels in ``[0, 1]``."""
    path = undefended(train, setting, "clean", seed, cache, device=device)
    return functional.PixelModel(restored(path, setting), std=1 / 255)


def restored(path: Path, setting: Setting) -> model.Classifier:
    """The network of a checkpoint, for evaluation, on the CPU."""
    network = model.Classifier(steps=1, network=setting.model, recipe=setting.recipe)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    return network.eval()


def kept(path: Path, make: Callable[[], T]) -> T:
    """What a file holds; it is made now if the file is not there."""
    if not path.exists():
        made = make()
        unfinished = path.with_name(f".{path.name}.tmp")
        torch.save(made, unfinished)
        unfinished.replace(path)  # an interrupted write leaves no file of this name
    found: T = torch.load(path, weights_only=True)
    return found
