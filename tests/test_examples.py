"""The examples run as their headers say, from a checkout that is on no path."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks import data, rows
from benchmarks.cache import checkpoint
from benchmarks.cells import ATTACKS
from benchmarks.data import cifar10, unpacked
from benchmarks.protocols import Cell, Setting

ROOT = Path(__file__).parents[1]


def pack(folder: Path, split: str, images: int) -> np.ndarray:
    """Write ``cifar10_<split>.npz`` with flat grey images that brighten with their position, and return the greys."""
    files, grays = [], np.linspace(0, 255, images).astype(np.uint8)
    for gray in grays:
        file = io.BytesIO()
        Image.fromarray(np.full((32, 32, 3), gray, np.uint8)).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    np.savez(
        folder / f"cifar10_{split}.npz",
        jpeg=np.frombuffer(b"".join(files), np.uint8),
        offsets=np.cumsum([0, *map(len, files)]),
        labels=np.arange(images, dtype=np.uint8) % 2,
        classes=np.array(["cat", "dog"]),
    )
    return grays


def write_folder(folder: Path, images: int) -> None:
    """Write an image folder of two classes, flat grey images."""
    for number in range(images):
        path = folder / ("cat", "dog")[number % 2] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 36, 3), number % 256, np.uint8)).save(path)


def test_packed_images_come_out_in_order(tmp_path: Path) -> None:
    grays = pack(tmp_path, "train", 6)
    images, labels, classes = unpacked(tmp_path, "train")
    assert images.shape == (6, 32, 32, 3)
    assert np.abs(images[:, 16, 16, 0].astype(int) - grays).max() <= 1
    assert labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert classes == ["cat", "dog"]
    image, label = cifar10(tmp_path, "train")[5]
    assert image.shape == (3, 32, 32)
    assert int(image.min()) >= 254
    assert int(label) == 1


def test_the_original_is_read_by_torchvision_and_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def downloaded(root: str, train: bool, download: bool) -> SimpleNamespace:
        asked.append((root, train, download))
        return SimpleNamespace(data=np.arange(2 * 32 * 32 * 3, dtype=np.uint8).reshape(2, 32, 32, 3), targets=[3, 8])

    monkeypatch.setattr(data, "CIFAR10", downloaded)
    images, labels = cifar10(Path("cifar10"), "test").tensors
    assert asked == [("data", False, True)]
    assert (images.shape, labels.tolist()) == ((2, 3, 32, 32), [3, 8])
    assert images[0, :, 0, 1].tolist() == [3, 4, 5], "red, green and blue of the second pixel"
    original, jpeg = (Setting(dataset=data.dataset_name(Path(name))) for name in ("cifar10", "../shared/data"))
    assert (original.dataset, jpeg) == ("CIFAR-10", Setting())
    assert rows.cell_key(Cell(original, "clean", "NONE")) != rows.cell_key(Cell(jpeg, "clean", "NONE"))
    assert checkpoint(Path(), original, "clean", 0) != checkpoint(Path(), jpeg, "clean", 0)
    assert rows.setting_of(rows.identity(original, "clean", 0)) == original


@pytest.mark.slow
def test_every_attack_of_the_registry_poisons() -> None:
    train = TensorDataset(torch.randint(0, 256, (1000, 3, 32, 32), dtype=torch.uint8), torch.arange(1000) % 10)
    network = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 10)).eval()
    for name, recipe in ATTACKS.items():
        attack = recipe.made(train, lambda: network)
        poisoned = attack.train(train, 0)
        if name != "clean":
            assert poisoned.poisoned.sum() > 0, name
            assert (poisoned.covers.sum() > 0) == (attack.covers > 0), name
        assert len(attack.test(train)) == (100 if attack.sources else 1000 if attack.labels == "all_to_all" else 900)


@pytest.mark.slow
@pytest.mark.parametrize("path", [None, str(ROOT)], ids=["plain", "PYTHONPATH=."])
def test_the_fine_tuning_example_runs(tmp_path: Path, path: str | None) -> None:
    for split, images in {"train": 256, "test": 8}.items():
        write_folder(tmp_path / split, images)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "given.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = "--model test_resnet --weights given.pt --data . --size 32 --epochs 2 --workers 0 --poison 0.05"
    found = subprocess.run(
        [sys.executable, str(ROOT / "examples/finetune_timm.py"), *settings.split()],
        cwd=tmp_path,
        env=environment if path is None else {**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert found.returncode == 0, found.stderr
    shown = dict(line.split(": ") for line in found.stdout.splitlines() if line.endswith("%"))
    assert shown.keys() == {"accuracy", "attack success rate"}
    assert all(0 <= float(value.split()[0]) <= 100 for value in shown.values())
    assert "of 256 images" in found.stdout
    assert (tmp_path / "backdoor_report/report.html").exists()
    saved = torch.load(tmp_path / "finetuned.pt", weights_only=True)
    timm.create_model("test_resnet", num_classes=2).load_state_dict(saved)


def test_the_fine_tuning_example_puts_a_new_head_on_the_weights_of_a_file(tmp_path: Path) -> None:
    given = timm.create_model("test_resnet")
    torch.save(given.state_dict(), tmp_path / "given.pt")
    example = runpy.run_path(str(ROOT / "examples" / "finetune_timm.py"))
    network = example["pretrained"]("test_resnet", 3, str(tmp_path / "given.pt"))
    assert network.get_classifier().out_features == 3
    kept = network.state_dict()
    same = [name for name, value in given.state_dict().items() if torch.equal(value, kept[name])]
    assert len(same) == len(kept) - 2, "all but weight and bias of the head"
    assert len(Path(ROOT / "examples" / "finetune_timm.py").read_text().splitlines()) < 100


@pytest.mark.parametrize("name", ["quickstart", "finetune_timm", "secure_training", "repair_checkpoint"])
def test_an_example_imports_and_its_model_gives_logits(name: str) -> None:
    example = runpy.run_path(str(ROOT / "examples" / f"{name}.py"))
    network = timm.create_model("test_resnet", num_classes=10)
    arguments = {"quickstart": (), "secure_training": ("test_resnet",), "finetune_timm": (network,)}
    model = example["Classifier"](*arguments.get(name, ("test_resnet", 10))).eval()
    kind = torch.float32 if name == "finetune_timm" else torch.uint8
    assert model(torch.zeros(2, 3, 32, 32, dtype=kind)).shape == (2, 10)


def test_the_fine_tuning_example_augments_training_images_alone() -> None:
    transforms = runpy.run_path(str(ROOT / "examples" / "finetune_timm.py"))["transforms"]
    network = timm.create_model("test_resnet")
    image = Image.fromarray(np.arange(40 * 36 * 3, dtype=np.uint8).reshape(40, 36, 3))
    plain, drawn = transforms(network, 32, augment=False), transforms(network, 32, augment=True)
    assert plain(image).shape == drawn(image).shape == (3, 32, 32)
    assert torch.equal(plain(image), plain(image))
    assert any(not torch.equal(drawn(image), plain(image)) for _ in range(8))


def test_the_repair_example_wants_checkpoint_and_data_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["repair_checkpoint.py", "--data", "images"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "examples" / "repair_checkpoint.py"), run_name="__main__")
    assert "--checkpoint and --data belong together" in capsys.readouterr().err


@pytest.mark.slow
def test_the_repair_example_repairs_a_checkpoint_with_its_data(tmp_path: Path) -> None:
    for split, images in {"train": 128, "test": 8}.items():
        write_folder(tmp_path / split, images)
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), tmp_path / "given.pt")
    command = [sys.executable, str(ROOT / "examples/repair_checkpoint.py"), "--checkpoint", "given.pt", "--data", "."]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900)
    assert found.returncode == 0, found.stderr
    assert [line.split()[:2] for line in found.stdout.splitlines() if "->" in line] == [["clean", "accuracy"]]
    assert (tmp_path / "repaired.pt").exists()


@pytest.mark.slow
def test_the_repair_example_repairs_what_it_is_given(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/repair_checkpoint.py")]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900)
    assert found.returncode == 0, found.stderr
    lines = {line[:14].strip(): line.split() for line in found.stdout.splitlines() if "->" in line}
    before, after = (float(lines["ASR"][place]) for place in (1, 3))
    assert before > 90
    assert after < 20
    assert float(lines["clean accuracy"][4]) > 97
    saved = torch.load(tmp_path / "repaired.pt", weights_only=True)
    timm.create_model("test_resnet", num_classes=10).load_state_dict(saved)
    assert (tmp_path / "backdoor_report/report.html").exists()


@pytest.mark.slow
def test_the_secure_training_learns_digits_and_no_backdoor(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/secure_training.py")]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=1800)
    assert found.returncode == 0, found.stderr
    lines = {line[:16].strip(): line.split()[-2:] for line in found.stdout.splitlines()}
    assert float(lines["undefended"][1]) > 90
    assert float(lines["D-ST"][1]) < 15
    assert float(lines["D-ST"][0]) > float(lines["undefended"][0]) - 2
    assert (tmp_path / "backdoor_report/report.html").exists()
