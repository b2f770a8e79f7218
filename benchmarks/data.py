"""CIFAR-10 for the benchmark: the original, or packed JPEG files, decoded once to uint8 tensors."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.datasets import CIFAR10

JPEG, ORIGINAL, SIGNS = "CIFAR-10 (JPEG)", "CIFAR-10", "GTSRB"
DOWNLOADED = "cifar10"
"""In the place of a folder: the original, which torchvision keeps below ``data`` and downloads if need be."""


def dataset_name(source: Path) -> str:
    """What rows call the images of a folder, or of ``DOWNLOADED``."""
    return ORIGINAL if source == Path(DOWNLOADED) else JPEG


def unpacked(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images uint8 (N, 32, 32, 3), labels (N,) and class names of ``cifar10_<split>.npz`` ("train" or "test")."""
    packed = np.load(folder / f"cifar10_{split}.npz")
    jpeg, offsets = packed["jpeg"], packed["offsets"]
    pixels = [np.asarray(Image.open(io.BytesIO(jpeg[a:b].tobytes()))) for a, b in pairwise(offsets)]
    return np.stack(pixels), packed["labels"].astype(np.int64), packed["classes"].tolist()


def cifar10(source: Path, split: str) -> TensorDataset:
    """The ``"train"`` or ``"test"`` images, uint8 (3, 32, 32), and labels, of a folder or of ``DOWNLOADED``."""
    if dataset_name(source) == ORIGINAL:
        original = CIFAR10("data", train=split == "train", download=True)
        images, labels = original.data, np.asarray(original.targets, dtype=np.int64)
    else:
        images, labels, _ = unpacked(source, split)
    return TensorDataset(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels))


def per_class(dataset: TensorDataset, count: int) -> TensorDataset:
    """The first ``count`` images of each class, in the order of the dataset."""
    images, labels = dataset.tensors
    chosen = torch.cat([(labels == label).nonzero().squeeze(1)[:count] for label in labels.unique()]).sort().values
    return TensorDataset(images[chosen], labels[chosen])
