"""CIFAR-10 for the evidence: packed JPEG files, decoded once to uint8 tensors."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import TensorDataset

NAME = "CIFAR-10 (JPEG)"


def packed_cifar10(folder: Path, split: str) -> TensorDataset:
    """Images uint8 (N, 3, 32, 32) and labels (N,) of ``split`` ("train" or "test") from ``cifar10_<split>.npz``."""
    packed = np.load(folder / f"cifar10_{split}.npz")
    jpeg, offsets = packed["jpeg"], packed["offsets"]
    pixels = [np.asarray(Image.open(io.BytesIO(jpeg[a:b].tobytes()))) for a, b in pairwise(offsets)]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return TensorDataset(images, torch.from_numpy(packed["labels"].astype(np.int64)))


def per_class(dataset: TensorDataset, count: int) -> TensorDataset:
    """The first ``count`` images of each class, in the order of the dataset."""
    images, labels = dataset.tensors
    chosen = torch.cat([(labels == label).nonzero().squeeze(1)[:count] for label in labels.unique()]).sort().values
    return TensorDataset(images[chosen], labels[chosen])
