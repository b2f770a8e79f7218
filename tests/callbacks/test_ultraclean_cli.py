"""UltraClean by flag and by YAML, and as text."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch.cli
import pytest
import pytorch_lightning as pl
import pytorch_lightning.cli
import torch
from torch.utils.data import DataLoader

from lightning_backdoor import UltraCleanCallback
from lightning_backdoor.baselines import BaselineArguments, RepairArguments
from lightning_backdoor.callbacks.options import DetectorArguments, ScanArguments
from lightning_backdoor.functional import local_median
from tests.callbacks.helpers import LIGHTNING_WARNS, Net, Pictures

pytest.importorskip("jsonargparse")
pytestmark = [*LIGHTNING_WARNS, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
CLIS = [pytorch_lightning.cli, lightning.pytorch.cli]


class PlainData(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(Pictures(), batch_size=16)


class OtherNet(lightning.pytorch.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(192, 4)

    def forward(self, images: Any) -> Any:
        return self.net(images.flatten(1) / 255)

    def training_step(self, batch: Any, _: int) -> Any:
        return torch.nn.functional.cross_entropy(self(batch["image"].float()), batch["label"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class OtherData(lightning.pytorch.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(Pictures(), batch_size=16)


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fit"])


def cli_of(package: Any, arguments: list[str], **kwargs: Any) -> Any:
    module, data = (Net, PlainData) if package is pytorch_lightning.cli else (OtherNet, OtherData)
    settings = {"save_config_callback": None, "seed_everything_default": 0, **kwargs}
    return package.LightningCLI(module, data, args=arguments, **settings)


def defense_of(cli: Any) -> UltraCleanCallback:
    (found,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, UltraCleanCallback)]
    return found


YAML = """
trainer:
  max_epochs: 1
  callbacks:
    - class_path: lightning_backdoor.UltraCleanCallback
      init_args:
        max_removed: 0.1
        mean: [0.5, 0.5, 0.5]
        std: [0.2, 0.2, 0.2]
        eval_transform:
          class_path: torchvision.transforms.v2.CenterCrop
          init_args:
            size: 8
        batch_fn: tests.callbacks.test_ultraclean_cli.images_and_labels
        report_dir: {folder}
"""


def images_and_labels(batch: Any) -> Any:
    return batch["image"], batch["label"]


@pytest.mark.parametrize("package", CLIS, ids=["pytorch_lightning", "lightning.pytorch"])
def test_by_yaml(package: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(YAML.format(folder=tmp_path / "report"))
    callback = defense_of(cli_of(package, [*QUIET, f"--config={config}"], run=False))
    assert callback.max_removed == 0.1
    assert list(callback.options.mean) == [0.5, 0.5, 0.5]
    assert callback.options.batch_fn is images_and_labels
    assert type(callback.options.eval_transform).__name__ == "CenterCrop"


def test_images_standardised_one_by_one_by_flag() -> None:
    flags = ["--trainer.callbacks+=lightning_backdoor.UltraCleanCallback", "--trainer.callbacks.mean=per_image"]
    callback = defense_of(cli_of(pytorch_lightning.cli, [*QUIET, *flags], run=False))
    assert (callback.options.mean, callback.options.std) == ("per_image", None)
    assert repr(callback) == "UltraCleanCallback(mean='per_image')"


@pytest.mark.case("69")
def test_help_explains_and_bad_values_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli_of(pytorch_lightning.cli, ["fit", "--trainer.callbacks.help=lightning_backdoor.UltraCleanCallback"])
    said = capsys.readouterr().out
    assert "Epochs of ordinary training before the scan" in said
    assert re.search(r"--trainer\.callbacks\.batch_size BATCH_SIZE\s+Images per forward pass of a scan", said)
    with pytest.raises(SystemExit):
        cli_of(
            pytorch_lightning.cli,
            [
                "fit",
                *QUIET,
                "--trainer.callbacks+=lightning_backdoor.UltraCleanCallback",
                "--trainer.callbacks.rule=best",
            ],
        )
    assert "rule" in capsys.readouterr().err


@pytest.mark.parametrize("shared", [ScanArguments, DetectorArguments, BaselineArguments, RepairArguments])
def test_every_shared_argument_is_explained(shared: type) -> None:
    """Command lines take the help of an argument from the docstring of the TypedDict alone."""
    parsed = pytest.importorskip("docstring_parser").parse(shared.__doc__)
    explained = {parameter.arg_name: parameter.description for parameter in parsed.params}
    assert explained.keys() == shared.__annotations__.keys()
    assert all(explained.values())
    assert " ".join(explained["batch_size"].split()) == (
        "Images per forward pass of a scan; ``None`` takes the loader's, and on a CUDA device four times as many, up "
        "to 512: a scan keeps no activations for a backward pass."
    )


@pytest.mark.parametrize(
    "callback",
    [
        UltraCleanCallback(),
        UltraCleanCallback(warmup_epochs=5, name="first", max_removed=0.1, mean=[0.5], std=(0.2,), seed=3),
        UltraCleanCallback.from_paper(target_class=3, response="continue", report_dir="here"),
    ],
    ids=str,
)
def test_text_makes_an_equal_callback(callback: UltraCleanCallback) -> None:
    twin = eval(repr(callback))  # our own text
    assert repr(twin) == repr(callback)
    assert twin.options == callback.options
    own = {key: value for key, value in vars(callback).items() if not key.startswith("_")}
    assert own == {key: value for key, value in vars(twin).items() if not key.startswith("_")}


def test_functions_are_named_in_the_text() -> None:
    assert "local_median" in repr(UltraCleanCallback(eval_transform=local_median))
    assert repr(UltraCleanCallback()) == "UltraCleanCallback()"
    assert "jsonargparse" in sys.modules
