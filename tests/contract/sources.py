"""Datasets of many libraries with the same few planted images, and loaders of every kind over them."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.utilities import CombinedLoader
from timm.data import create_dataset
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    random_split,
)
from torchvision.datasets import CIFAR10, FakeData, ImageFolder
from torchvision.transforms import v2

from tests.contract.problem import BATCH, IMAGES, planted

TO_TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def arrays() -> tuple[np.ndarray[Any, Any], list[int]]:
    """The planted images as ``(N, H, W, 3)``, and their labels."""
    data = planted()
    return data.images.permute(0, 2, 3, 1).contiguous().numpy(), data.targets.tolist()


def write_folder(root: Path, name: Callable[[int, int], str] = "class{1}/{0:03d}.png".format) -> Path:
    """A folder of PNG files, one folder within it for each class."""
    for i, (image, label) in enumerate(zip(*arrays(), strict=True)):
        path = root / name(i, label)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root


class MadeCIFAR(CIFAR10):
    """torchvision's class over files that were made here, with their own checksums."""

    base_folder = "made"


def made_cifar(root: Path) -> CIFAR10:
    """32×32, as the format wants it."""
    images, labels = arrays()
    large = images.repeat(4, axis=1).repeat(4, axis=2).transpose(0, 3, 1, 2).reshape(IMAGES, -1)
    contents = {"data": {"data": large, "labels": labels}, "meta": {"label_names": list("abcd")}}
    (root / "made").mkdir(parents=True)
    sums = {}
    for name, content in contents.items():
        (root / "made" / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((root / "made" / name).read_bytes()).hexdigest()
    MadeCIFAR.train_list = [["data", sums["data"]]]
    MadeCIFAR.test_list = []
    MadeCIFAR.meta = {"filename": "meta", "key": "label_names", "md5": sums["meta"]}
    return MadeCIFAR(str(root), transform=TO_TENSOR)


class Columns(Dataset[Any]):
    """What the training sees of Hugging Face's ``Dataset``: rows are dicts, lists of rows come from columns."""

    def __init__(self) -> None:
        self.columns = {"pixel_values": planted().images, "labels": planted().targets}

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, key: Any) -> Any:
        return {name: column[key] for name, column in self.columns.items()}

    def __getitems__(self, keys: list[int]) -> list[Any]:
        batch = self[keys]
        return [{name: column[i] for name, column in batch.items()} for i in range(len(keys))]


def channels_first(batch: dict[str, Any]) -> dict[str, Any]:
    """A transform of rows, as users of Hugging Face's library pass to ``with_transform``."""
    images = [torch.tensor(image, dtype=torch.uint8).permute(2, 0, 1) for image in batch["pixel_values"]]
    return {**batch, "pixel_values": images}


def hugging_face() -> Any:
    """The library's own class, where it is installed."""
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    images, labels = arrays()
    table = datasets.table.InMemoryTable(pyarrow.table({"pixel_values": images.tolist(), "labels": labels}))
    return datasets.Dataset(table, fingerprint="made").with_transform(channels_first)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def tensors(n: int = IMAGES) -> TensorDataset:
    return TensorDataset(planted(n).images, planted(n).targets)


def timm_folder(root: Path) -> Any:
    data = create_dataset("", root=str(write_folder(root)))
    data.transform = TO_TENSOR
    return data


DATASETS: dict[str, Callable[[Path], Any]] = {
    "tensors": lambda root: tensors(),
    "ImageFolder": lambda root: ImageFolder(str(write_folder(root)), transform=TO_TENSOR),
    "CIFAR10": made_cifar,
    "FakeData": lambda root: FakeData(IMAGES, (3, 8, 8), 4, transform=TO_TENSOR),
    "timm": timm_folder,
    "Subset": lambda root: Subset(ImageFolder(str(write_folder(root)), TO_TENSOR), torch.randperm(IMAGES).tolist()),
    "ConcatDataset": lambda root: ConcatDataset([Subset(tensors(), range(40)), Subset(tensors(), range(40, IMAGES))]),
    "random_split": lambda root: random_split(tensors(IMAGES + 8), [IMAGES, 8], generator())[0],
    "datasets": lambda root: hugging_face(),
    "columns": lambda root: Columns(),
}


class Neighbors(Sampler[list[int]]):
    """A user's batch sampler: neighbours together, in random order."""

    def __len__(self) -> int:
        return IMAGES // BATCH

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self)).tolist()
        return iter([list(range(BATCH * i, BATCH * (i + 1))) for i in order])


class ForeignLoader(DataLoader[Any]):
    """A loader whose constructor cannot be called again."""

    def __init__(self, secret: str, data: Any) -> None:
        super().__init__(data, batch_size=BATCH, shuffle=secret == "sesame")


def loader(data: Any, **settings: Any) -> DataLoader[Any]:
    return DataLoader(data, **({"batch_size": BATCH} if "batch_sampler" not in settings else {}), **settings)


LOADERS: dict[str, Callable[[Any], Any]] = {
    "shuffle": lambda data: loader(data, shuffle=True),
    "generator": lambda data: loader(data, shuffle=True, generator=generator()),
    "weighted": lambda data: loader(data, sampler=WeightedRandomSampler([1.0] * IMAGES, IMAGES)),
    "weighted, generator": lambda data: loader(
        data, sampler=WeightedRandomSampler([1.0] * IMAGES, IMAGES, generator=generator())
    ),
    "batch sampler": lambda data: loader(data, batch_sampler=BatchSampler(RandomSampler(data), BATCH, False)),
    "own batch sampler": lambda data: loader(data, batch_sampler=Neighbors()),
    "worker": lambda data: loader(data, shuffle=True, num_workers=1),
    "persistent worker": lambda data: loader(data, shuffle=True, num_workers=1, persistent_workers=True),
    "foreign constructor": lambda data: ForeignLoader("sesame", data),
    "last batch dropped": lambda data: loader(data, shuffle=True, drop_last=True),
    "list": lambda data: [loader(data, shuffle=True)],
    "dict": lambda data: {"a": loader(data, shuffle=True)},
    "combined": lambda data: CombinedLoader({"a": loader(data, shuffle=True), "b": [0] * 2}, "max_size_cycle"),
}
"""Over any dataset; those that draw with replacement or drop a batch are in :data:`NOT_EACH_ONCE`."""

NOT_EACH_ONCE = {"weighted", "weighted, generator", "last batch dropped"}


def find_batch(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of a batch of any of these loaders and datasets."""
    if isinstance(batch, dict) and "pixel_values" in batch:
        return batch["pixel_values"], batch["labels"]
    if isinstance(batch, dict):
        return (batch["image"], batch["label"]) if "image" in batch else find_batch(batch["a"])
    return find_batch(batch[0]) if isinstance(batch[0], (list, tuple, dict)) else (batch[0], batch[1])
