"""Command lines, loggers and progress bars around every public callback."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch.cli
import pytest
import pytorch_lightning.cli
import torch
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from tests.contract.problem import EPOCHS, WARNS, LoadingNet, UnifiedLoadingNet, assert_settled, fit, planted
from tests.contract.registry import Entry, every_kind, in_turn

pytest.importorskip("jsonargparse")
pytestmark = [*WARNS, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

NO_COMMAND_LINE = {"FineTuneTrusted": "verdict"}
"""Callbacks with an argument that no text can hold, and its name; the command line asks for it."""


class CliNet(LoadingNet):
    """As a command line makes it: without arguments."""

    def __init__(self) -> None:
        super().__init__(data=planted())


class UnifiedCliNet(UnifiedLoadingNet):
    """The same for the other package."""

    def __init__(self) -> None:
        super().__init__(data=planted())


NETS = {pytorch_lightning.cli: CliNet, lightning.pytorch.cli: UnifiedCliNet}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": EPOCHS,
}


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fit"])


def path_of(entry: Entry) -> str:
    room = entry.cls.__module__.split(".")[1]
    return f"lightning_backdoor.{'baselines.' if room == 'baselines' else ''}{entry.name}"


def flags_of(entry: Entry) -> list[str]:
    settings = entry.acting if entry.flags is None else entry.flags
    settings = {key: value for key, value in settings.items() if key not in NO_COMMAND_LINE.values()}
    return [
        *(f"--trainer.{key}={str(value).lower()}" for key, value in QUIET.items()),
        f"--trainer.callbacks+={path_of(entry)}",
        *(f"--trainer.callbacks.{key}={value}" for key, value in settings.items()),
    ]


def yaml_of(entry: Entry) -> str:
    settings = entry.acting if entry.flags is None else entry.flags
    lines = ["trainer:", *(f"  {key}: {str(value).lower()}" for key, value in QUIET.items()), "  callbacks:"]
    lines += [f"    - class_path: {path_of(entry)}", "      init_args:"]
    lines += [f"        {key}: {value}" for key, value in settings.items() if key not in NO_COMMAND_LINE.values()]
    return "\n".join(lines) + "\n"


@pytest.mark.cpu
@pytest.mark.case("69")
@in_turn("by", product(NETS, ["flag", "yaml"]))
def test_by_command_line(entry: Entry, by: tuple[Any, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package, way = by
    (tmp_path / "config.yaml").write_text(yaml_of(entry))
    arguments = flags_of(entry) if way == "flag" else [f"--config={tmp_path / 'config.yaml'}"]

    def start() -> Any:
        return package.LightningCLI(
            NETS[package], args=["fit", *arguments], save_config_callback=None, seed_everything_default=0
        )

    if entry.name in NO_COMMAND_LINE:
        with pytest.raises(SystemExit):
            start()
        assert NO_COMMAND_LINE[entry.name] in capsys.readouterr().err
        return
    cli = start()
    (callback,) = [each for each in cli.trainer.callbacks if isinstance(each, entry.cls)]
    assert entry.acted(callback, cli.trainer)
    if entry.kind != "watch":
        assert repr(callback) == repr(entry.make())
    assert_settled(cli.trainer, cli.model)


LOGGERS = {"csv": CSVLogger, "tensorboard": TensorBoardLogger, "none": None}
BARS = {"csv": TQDMProgressBar, "tensorboard": RichProgressBar, "none": None}


@pytest.mark.case("70", "71")
@in_turn("which", LOGGERS)
def test_loggers_and_progress_bars(entry: Entry, which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logger_cls, bar_cls = LOGGERS[which], BARS[which]
    callback = entry.make(name="mine")
    logger = logger_cls(tmp_path / "logs") if logger_cls else False
    bars = [bar_cls()] if bar_cls else []
    run = fit([callback, *bars], logger=logger, enable_progress_bar=bool(bars), log_every_n_steps=1)
    assert entry.acted(callback, run.trainer)
    assert_settled(run.trainer, run.module, run.loader, run.before)
    found = [path.relative_to(tmp_path) for path in tmp_path.rglob("report.html")]
    if entry.kind == "watch" or not logger:
        assert not found
        return
    (report,) = found
    assert report.parts[-3:-1] == ("lightning_backdoor", f"{entry.cls.method}.mine")
    assert str(Path(logger.log_dir).relative_to(tmp_path)) in str(report)


@pytest.mark.case("40")
@every_kind
def test_two_instances_of_one_class_are_told_apart_by_name(entry: Entry, tmp_path: Path) -> None:
    one, two = entry.make(name="one"), entry.make(name="two")
    assert one.state_key != two.state_key
    if entry.kind == "own":
        with pytest.raises(Exception, match="cannot share a Trainer with DSTCallback"):
            fit([one, two])
        return
    if entry.kind != "watch":
        one.report_dir = two.report_dir = str(tmp_path)
    run = fit([one, two])
    assert entry.acted(one, run.trainer)
    assert entry.acted(two, run.trainer)
    assert_settled(run.trainer, run.module, run.loader, run.before)
    if entry.kind != "watch":
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            f"{entry.cls.method}.{name}" for name in ("one", "two")
        )
        both = one.verdict.keep & two.verdict.keep
        drawn = set(run.module.epochs()[-1][1])
        repaired = [verdict.suspect for verdict in (one.verdict, two.verdict) if verdict.suspect is not None]
        allowed = torch.stack([both, *repaired]).any(dim=0)
        assert drawn <= set(allowed.nonzero().flatten().tolist())
