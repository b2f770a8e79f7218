"""Baselines by flag: the arguments that a constructor hands on are known to the command line, too."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning.cli

from lightning_backdoor.baselines import STRIP
from tests.callbacks.helpers import LIGHTNING_WARNS
from tests.callbacks.test_ultraclean_cli import QUIET, cli_of

pytest.importorskip("jsonargparse")
pytestmark = [*LIGHTNING_WARNS, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fit"])


def flags(*settings: str) -> list[str]:
    return [
        *QUIET,
        "--trainer.callbacks+=lightning_backdoor.baselines.STRIP",
        *(f"--trainer.callbacks.{setting}" for setting in settings),
        "--trainer.max_epochs=1",
    ]


def test_own_and_common_arguments() -> None:
    cli = cli_of(
        pytorch_lightning.cli, ["fit", *flags("draws=3", "max_removed=0.2", "false_rejection=0.4", "mean=per_image")]
    )
    (callback,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, STRIP)]
    assert repr(callback) == "STRIP(draws=3, false_rejection=0.4, max_removed=0.2, mean='per_image')"
    assert len(callback.verdict) == 64


def test_an_unknown_argument_is_refused(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        cli_of(pytorch_lightning.cli, ["fit", *flags("max_remove=0.2")])
    assert "max_remove" in capsys.readouterr().err
