"""The command line: exit codes, one JSON object, checkpoints of several forms, messages of one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.models import register_model
from torch import Tensor, nn

from lightning_backdoor import Verdict
from lightning_backdoor.__main__ import _of_worker, main, weights_in
from lightning_backdoor.errors import ArgumentError
from tests.callbacks.helpers import LIGHTNING_WARNS, DigitNet, Pairs, poisoned_digits, undefended

pytestmark = LIGHTNING_WARNS
RANDOM = "test_resnet.r160_in1k"


class Digits(nn.Module):
    """The network of the digits without its LightningModule; 0..255 by a normalization that timm names."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        net = DigitNet()
        self.body, self.head = net.body, nn.Linear(64, classes)
        self.pretrained_cfg = {
            "input_size": (3, 16, 16), "mean": (0, 0, 0), "std": (1 / 255,) * 3, "crop_pct": 1.0,
            "interpolation": "nearest",
        }  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images / 255).flatten(1))


@register_model
def backdoor_digits(pretrained: bool = False, num_classes: int = 10, **others: Any) -> nn.Module:
    """For :func:`timm.create_model`."""
    return Digits(num_classes)


def written(folder: Path, images: Tensor, labels: Tensor) -> Path:
    """A folder of PNG files, one subfolder per class; names are positions."""
    for place, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        (folder / f"class_{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"class_{label}" / f"{place:04d}.png")
    return folder


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images of four classes, and a checkpoint of random weights for them."""
    folder, data = tmp_path_factory.mktemp("some"), Pairs(40)
    written(folder / "images", data.images, data.targets)
    torch.manual_seed(0)
    torch.save(timm.create_model(RANDOM, num_classes=4).state_dict(), folder / "weights.pt")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Run a command: exit code, standard output, standard error."""

    def running(*arguments: Any) -> tuple[int, str, str]:
        code = main([str(each) for each in arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return running


def on(folder: Path, *others: Any, model: str = RANDOM, checkpoint: str = "weights.pt") -> list[Any]:
    """Arguments of an audit of that folder."""
    named = ["--model", model, "--checkpoint", folder / checkpoint, "--data", folder / "images"]
    return ["audit", *named, "--num-workers", 0, "--accelerator", "cpu", "--quiet", *others]


def test_nothing_is_found_in_random_weights(run: Any, some: Path) -> None:
    code, out, err = run(*on(some, "--image-size", 32))
    assert code == 0
    assert out == "Looked at 40 images: nothing stands out.\n"
    assert "warning: The model gives only" in err


def test_standard_output_is_one_json_object(run: Any, some: Path) -> None:
    code, out, _ = run(*on(some, "--image-size", 32, "--json", "--detectors", "features"))
    record = json.loads(out)
    assert code == 0
    assert record["images"] == 40
    assert record["findings"] == []
    assert "gives only" in record["warnings"][0]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Poisoned digits as files, and the weights that they lead to, as Lightning saves those of a part of a module."""
    folder, data = tmp_path_factory.mktemp("poisoned"), poisoned_digits()
    images, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    written(folder / "images", torch.stack(images), torch.as_tensor(labels))
    weights = {f"net.{name}": value for name, value in undefended(poisoned=True).state_dict().items()}
    torch.save({"state_dict": {**weights, "metric": torch.ones(1)}, "epoch": 6}, folder / "last.ckpt")
    return folder


def test_a_poisoned_checkpoint_is_found_and_the_verdict_is_shown(run: Any, poisoned: Path, tmp_path: Path) -> None:
    arguments = on(poisoned, "--json", "--report-dir", tmp_path, model="backdoor_digits", checkpoint="last.ckpt")
    code, out, err = run(*arguments)
    assert code == 1, err
    record, truth = json.loads(out), poisoned_digits().poisoned
    found = {int(Path(path).stem) for finding in record["findings"] for path in finding["paths"]}
    assert len(found & set(truth.nonzero().flatten().tolist())) >= 0.95 * int(truth.sum())
    first = record["findings"][0]
    assert (first["class"], first["detectors"]) == ("class_0", ["features", "units"])
    assert first["figures"]["standardized_gap"]["value"] > first["figures"]["standardized_gap"]["bound"]
    assert (tmp_path / "report.html").is_file()

    code, out, _ = run("show", tmp_path / "verdict.pt")
    assert code == 0
    assert out.startswith(
        f"Looked at 700 images: {sum(map(len, Verdict.load(tmp_path / 'verdict.pt').findings))} stand out"
    )
    assert f"Finding 0: {first['images']} images labeled “class_0”" in out
    assert "found by features and units" in out
    assert first["paths"][0] in out
    assert "Estimated attack success rate: " in out
    assert first["estimated_asr"] > 0.5 > first["control_asr"]
    code, out, _ = run("show", tmp_path / "verdict.pt", "--json")
    assert json.loads(out)["findings"] == record["findings"]


def test_what_cannot_be_looked_at_is_one_line_and_exit_code_2(run: Any, some: Path, tmp_path: Path) -> None:
    def refused(words: str, *arguments: Any) -> None:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1, err
        assert words in err

    refused("`--checkpoint` must be a file", *on(some, checkpoint="none.pt"))
    refused(
        "`--model` must be the name of a model in timm, got 'resnet1'. Names that hold it: ", *on(some, model="resnet1")
    )
    refused(
        "`--data` must be a folder",
        "audit",
        "--model",
        RANDOM,
        "--checkpoint",
        some / "weights.pt",
        "--data",
        tmp_path / "a",
    )
    refused("it has fc.bias (4,) in place of (7,), fc.weight", *on(some, "--num-classes", 7))
    refused("it lacks ", *on(some, model="test_vit"))
    refused("`max_removed` must be a fraction", *on(some, "--max-removed", 5))
    refused("`verdict` must be a file", "show", tmp_path / "verdict.pt")
    refused("must be a file that `Verdict.save` wrote", "show", some / "weights.pt")
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    refused(
        f"Pass {tmp_path / 'train'}.",
        "audit",
        "--model",
        RANDOM,
        "--checkpoint",
        some / "weights.pt",
        "--data",
        tmp_path,
    )
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "module.pt")
    refused("tensors and plain values alone", *on(some, checkpoint=str(tmp_path / "module.pt")))
    for name in ("empty.pt", "text.pt", "text.safetensors"):
        (tmp_path / name).write_text("" if name == "empty.pt" else "no weights")
    for name in ("empty.pt", "text.pt"):
        refused("is empty, cut off, or of another kind. Save the", *on(some, checkpoint=str(tmp_path / name)))
        refused("which is empty, cut off, or of another kind.", "show", tmp_path / name)
    refused("holds objects that may run code", "show", tmp_path / "module.pt")
    refused("must be a file of safetensors, but", *on(some, checkpoint=str(tmp_path / "text.safetensors")))
    refused("`batch_size` must be", *on(some, "--batch-size", 0))
    torch.save([1], tmp_path / "list.pt")
    refused("must hold a state dict", *on(some, checkpoint=str(tmp_path / "list.pt")))


def test_an_image_that_cannot_be_read_is_named(run: Any, some: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(some, tmp_path / "some")
    image = folder / "images" / "class_1" / "0001.png"
    for data in (image.read_bytes()[:60], b"no image"):
        image.write_bytes(data)
        code, out, err = run(*on(folder))
        assert (code, out) == (2, "")
        assert f"error: `--data` must hold images alone, but {image} cannot be read as one" in err


def test_an_error_of_a_worker_process_is_one_sentence() -> None:
    wrapped = "Caught DataError in worker process 0.\nOriginal Traceback (most recent call last):\n  File x\n"
    assert _of_worker(f"{wrapped}lightning_backdoor.errors.DataError: no image: a.png\n") == "no image: a.png"
    assert _of_worker("two\nlines") == "two\nlines"


def test_a_traceback_is_shown_if_it_is_wanted(run: Any, tmp_path: Path) -> None:
    code, _, err = run("show", tmp_path / "verdict.pt", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_missing_arguments_are_exit_code_2() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["audit", "--model", "resnet18"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "_orig_mod.", "model._orig_mod."])
@pytest.mark.parametrize("holder", [None, "state_dict", "model"])
def test_weights_are_found_under_any_prefix(prefix: str, holder: str | None, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 2)))
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    if prefix:
        weights["teacher.0.weight"] = torch.zeros(3, 2)
    torch.save(weights if holder is None else {holder: weights, "epoch": 3}, tmp_path / "file.pt")
    read = weights_in(tmp_path / "file.pt", model)
    assert read.keys() == model.state_dict().keys()
    assert all(torch.equal(read[name], value) for name, value in model.state_dict().items())


def test_a_file_of_safetensors_is_read(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.Linear(2, 3)
    safetensors.save_file(model.state_dict(), tmp_path / "file.safetensors")
    assert torch.equal(weights_in(tmp_path / "file.safetensors", model)["weight"], model.weight)
    torch.save({}, tmp_path / "empty.pt")
    with pytest.raises(ArgumentError, match="must hold a state dict"):
        weights_in(tmp_path / "empty.pt", model)
