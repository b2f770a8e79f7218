"""Faults around every defence: models that answer otherwise, disks that are full, hostile names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_backdoor.errors import ModelError
from tests.callbacks.helpers import make_trainer
from tests.contract.problem import EPOCHS, WARNS, Net, assert_settled, fit, planted
from tests.contract.registry import Entry, every_defence

pytestmark = WARNS


class Answers(Net):
    """Wraps its logits for everybody but its own training."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        nan = logits * float("nan")
        return {
            "tuple": (logits, images),
            "dict": {"logits": logits, "hidden": images},
            "softmax": logits.softmax(dim=1),
            "not a number": logits if self.training else nan,
        }[self.kind]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        answer = self(batch["image"])
        logits = answer[0] if self.kind == "tuple" else answer["logits"] if self.kind == "dict" else answer
        logits = logits.log() if self.kind == "softmax" else logits
        self.drawn.append((self.current_epoch, batch_idx, batch["index"].tolist()))
        return torch.nn.functional.nll_loss(logits.log_softmax(dim=1), batch["label"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", 0.0)


@every_defence
@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_answers_that_hold_logits_are_understood(entry: Entry, kind: str) -> None:
    torch.manual_seed(0)
    callback = entry.make()
    run = fit([callback], module=Answers(kind))
    assert entry.acted(callback, run.trainer)
    assert_settled(run.trainer, run.module, run.loader, run.before)


@every_defence
@pytest.mark.filterwarnings("ignore:No layer's output")
def test_probabilities_are_warned_of_and_understood(entry: Entry) -> None:
    torch.manual_seed(0)
    callback, module = entry.make(), Answers("softmax")
    trainer = make_trainer([callback], EPOCHS)
    with pytest.warns(UserWarning, match="look like probabilities"):
        fit([], module=module, trainer=trainer)
    assert entry.acted(callback, trainer)
    assert_settled(trainer, module)


@every_defence
def test_a_model_that_answers_nothing_finite_is_refused_before_the_first_step(entry: Entry) -> None:
    torch.manual_seed(0)
    callback, module = entry.make(), Answers("not a number")
    trainer = make_trainer([callback], EPOCHS)
    with pytest.raises(ModelError, match="answers NaN or infinity to the first training images"):
        fit([], module=module, trainer=trainer)
    assert trainer.global_step == 0
    assert_settled(trainer, module)


@contextmanager
def full_disk(path: Path) -> Iterator[Any]:
    """Write a little, and fail."""
    with path.with_suffix(".unfinished").open("wb") as file:
        file.write(b"half")
    path.with_suffix(".unfinished").unlink()
    raise OSError(28, "No space left on device")
    yield


@every_defence
def test_a_full_disk_costs_the_report_and_nothing_else(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = fit([entry.make(report_dir=tmp_path)])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"report.html", "verdict.csv"} <= before.keys()
    monkeypatch.setattr("lightning_backdoor.report.writer.atomic_file", full_disk)
    callback = entry.make(report_dir=tmp_path)
    with pytest.warns(UserWarning, match=r"report in .* is incomplete: OSError: .*No space left on device"):
        run = fit([callback])
    assert entry.acted(callback, run.trainer)
    assert run.trainer.current_epoch == old.trainer.current_epoch
    assert all(torch.equal(a, b) for a, b in zip(old.module.parameters(), run.module.parameters(), strict=True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before, "the old report is whole"


@every_defence
def test_names_of_classes_cannot_run_in_the_report(entry: Entry, tmp_path: Path) -> None:
    data, evil = planted(), "<script>alert('x')</script>"
    data.classes = [f"{evil}{label}" for label in range(4)]
    run = fit([entry.make(report_dir=tmp_path)], data)
    page = (tmp_path / "report.html").read_text()
    assert run.trainer.current_epoch == entry.epochs
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page
