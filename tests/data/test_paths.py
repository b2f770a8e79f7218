"""The file of every sample: found in the datasets that name files, in the order of the outermost; no image is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder

from lightning_backdoor.data import paths_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files with the names of images, which cannot be opened as such."""
    for name in ("cat/0.png", "cat/1.png", "dog/2.png", "dog/3.png", "dog/4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    return tmp_path


def names(found: tuple[str, ...] | None) -> str:
    """The stems of paths, ``-`` for a sample without one."""
    assert found is not None
    return "".join(Path(path).stem or "-" for path in found)


class Wrapper(Dataset[Any]):
    """A dataset around another one, as users write them."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        image, label = self.inner[index]
        return {"image": image, "label": label}


class Permuted(Wrapper):
    def __getitem__(self, index: int) -> Any:
        try:
            return self.inner[len(self) - 1 - index]
        except Exception:  # a file that cannot be read
            return None


class Listed(Dataset[Any]):
    """A dataset with one attribute that may name its files."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("an image is opened")


def test_folders_of_torchvision_and_timm(folder: Path) -> None:
    expected = tuple(str(folder / name) for name in ("cat/0.png", "cat/1.png", "dog/2.png", "dog/3.png", "dog/4.png"))
    assert paths_of(ImageFolder(folder)) == expected
    assert paths_of(ImageDataset(str(folder))) == expected


def test_subsets_parts_and_wrappers_lead_to_the_files(folder: Path) -> None:
    images = ImageFolder(folder)
    assert names(paths_of(Subset(images, [3, 0]))) == "30"
    assert names(paths_of(Subset(Subset(images, torch.tensor([4, 3, 2])), np.array([2, 0])))) == "24"
    assert names(paths_of(Wrapper(Subset(images, [3, 0])))) == "30"
    assert names(paths_of(Permuted(images))) == "43210"
    assert names(paths_of(ConcatDataset([Subset(images, [1]), Wrapper(images)]))) == "101234"
    mixed = ConcatDataset([Subset(images, [1]), TensorDataset(torch.zeros(2, 3, 4, 4), torch.zeros(2))])
    assert paths_of(mixed) == (images.samples[1][0], "", "")


@pytest.mark.parametrize(
    "attributes",
    [
        {"paths": ["0.png", "1.png", "2.png"]},
        {"image_paths": np.array(["0.png", "1.png", "2.png"])},
        {"_files": [Path("0.png"), Path("1.png"), Path("2.png")]},
        {"imgs": [("0.png", 1), ("1.png", 1), ("2.png", 0)]},
        {"data": [{"image": f"{index}.png", "label": 0} for index in range(3)]},
        {"df": pd.DataFrame({"label": [0, 1, 2], "path": ["0.png", "1.png", "2.png"]})},
        {"path": pd.Series(["0.png", "1.png", "2.png"], index=[7, 8, 9])},
    ],
    ids=lambda attributes: next(iter(attributes)),
)
def test_fields_that_name_files(attributes: dict[str, Any]) -> None:
    assert names(paths_of(Listed(labels=["a", "b", "c"], **attributes))) == "012"


def test_names_within_a_folder_are_joined_with_it() -> None:
    files = ["0.png", "a/1.png", "/b/2.png"]
    assert paths_of(Listed(img_dir=Path("/data"), files=files)) == ("/data/0.png", "/data/a/1.png", "/b/2.png")
    below = ["data/0.png", "data/1.png", "data/2.png"]
    assert paths_of(Listed(root="data", files=below)) == tuple(below)


def test_tables_of_hugging_face_are_not_decoded(folder: Path) -> None:
    files = sorted(str(file) for file in folder.rglob("*.png"))
    table = datasets.Dataset.from_dict({"image": files, "label": [0, 0, 1, 1, 1]})
    images = table.cast_column("image", datasets.Image())
    assert paths_of(images) == tuple(files)
    assert names(paths_of(images.select([4, 1]).with_transform(lambda batch: batch))) == "41"
    assert names(paths_of(Wrapper(images))) == "01234"
    assert names(paths_of(table.rename_column("image", "file_name"))) == "01234"
    made = datasets.Dataset.from_dict({"image": [Image.new("L", (2, 2))]}, datasets.Features(image=datasets.Image()))
    assert paths_of(made) is None


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"paths": ["0.png"]},
        {"paths": ["0.png", "1.png", "2.png", "3.png"]},
        {"data": torch.zeros(3, 1)},
        {"images": np.zeros((3, 2, 2))},
        {"samples": [(torch.zeros(1), 0)] * 3},
        {"files": ["", "", ""]},
        {"names": ["0.png", "1.png", "2.png"]},
    ],
    ids=str,
)
def test_other_datasets_have_none(attributes: dict[str, Any]) -> None:
    assert paths_of(Listed(**attributes)) is None


def test_whatever_is_strange_has_none(folder: Path) -> None:
    class Failing(Wrapper):
        def __getitem__(self, index: int) -> Any:
            raise OSError("the disk is gone")

    class Unsized(Listed):
        def __len__(self) -> int:
            raise NotImplementedError

    circle = Wrapper(None)
    circle.inner = circle
    for strange in (Failing(ImageFolder(folder)), Unsized(paths=["0.png"]), Failing([1]), circle, None, 7, "text"):
        assert paths_of(strange) is None


def test_a_wrapper_is_left_as_it_was(folder: Path) -> None:
    class Drawing(Wrapper):
        def __getitem__(self, index: int) -> Any:
            torch.rand(3)
            np.random.rand()
            return super().__getitem__(index)

    wrapper = Drawing(ImageFolder(folder))
    before, state, numbers = vars(wrapper).copy(), torch.get_rng_state(), np.random.get_state()[2]
    assert names(paths_of(wrapper)) == "01234"
    assert vars(wrapper) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[2] == numbers
