"""Faults around every defence: other answers of a model, dead workers, mixed batches, full disks, hostile names."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, get_worker_info
from torchvision.transforms import v2

from lightning_backdoor.errors import DataError, ModelError
from tests.callbacks.helpers import Pictures, loader_of, make_trainer
from tests.contract.problem import BATCH, EPOCHS, WARNS, Net, Run, assert_settled, fit, net_of, planted
from tests.contract.registry import Entry, every_defense, every_kind_of_defense

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


@pytest.mark.case("53")
@every_kind_of_defense
@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_answers_that_hold_logits_are_understood(entry: Entry, kind: str) -> None:
    torch.manual_seed(0)
    callback = entry.make()
    run = fit([callback], module=Answers(kind))
    assert entry.acted(callback, run.trainer)
    assert_settled(run.trainer, run.module, run.loader, run.before)


@every_kind_of_defense
@pytest.mark.filterwarnings("ignore:No layer's output")
def test_probabilities_are_warned_of_and_understood(entry: Entry) -> None:
    torch.manual_seed(0)
    callback, module = entry.make(), Answers("softmax")
    trainer = make_trainer([callback], EPOCHS)
    with pytest.warns(UserWarning, match="look like probabilities"):
        fit([], module=module, trainer=trainer)
    assert entry.acted(callback, trainer)
    assert_settled(trainer, module)


@every_defense
def test_a_model_that_answers_nothing_finite_is_refused_before_the_first_step(entry: Entry) -> None:
    torch.manual_seed(0)
    callback, module = entry.make(), Answers("not a number")
    trainer = make_trainer([callback], EPOCHS)
    with pytest.raises(ModelError, match="answers NaN or infinity to the first training images"):
        fit([], module=module, trainer=trainer)
    assert trainer.global_step == 0
    assert_settled(trainer, module)


class Fatal(Pictures):
    """A worker that reads one image is killed, as where memory runs out."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if i == 70 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


# The handler of the signal raises wherever the main process is: between opening a socket to the worker and closing it.
@every_kind_of_defense
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_a_worker_that_is_killed_ends_the_fit_and_nothing_else(entry: Entry) -> None:
    callback, module = entry.make(num_workers=1), net_of()
    trainer = make_trainer([callback], EPOCHS)
    with pytest.raises((DataError, RuntimeError), match=r"(A|DataLoader) worker .*(died|killed by signal)"):
        fit([], Fatal(96), module=module, trainer=trainer)
    assert_settled(trainer, module)
    assert callback.verdict is None
    gc.collect()  # what the signal left open is closed under this test's filter
    run = fit([callback])
    assert entry.acted(callback, run.trainer)


def mixing(items: list[Any]) -> dict[str, Tensor]:
    """What a recipe with CutMix and MixUp does to a batch."""
    batch = default_collate(items)
    mix = v2.RandomChoice([v2.CutMix(num_classes=4), v2.MixUp(num_classes=4)])
    images, labels = mix(batch["image"].float(), batch["label"])
    return {**batch, "image": images, "label": labels}


@every_kind_of_defense
def test_batches_with_mixed_labels_are_read_without_mixing_or_refused(entry: Entry) -> None:
    callback, module = entry.make(), net_of()
    trainer = make_trainer([callback], EPOCHS)
    loader = loader_of(planted(), BATCH, collate_fn=mixing)
    own = entry.kind == "own"  # it makes the training steps itself, and says so before the first of them
    refused = pytest.raises(DataError, match="`collate_fn` mixes labels") if own else nullcontext()
    with pytest.warns(UserWarning, match=r"mixes labels \(CutMix or MixUp\)"), refused:
        trainer.fit(module, loader)
    assert entry.acted(callback, trainer) is not own
    assert (trainer.global_step == 0) is own
    assert_settled(trainer, module)


class Growing(pl.Callback):
    """A dataset that takes in further images in every epoch."""

    def __init__(self, data: Pictures) -> None:
        self.data = data

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        more = Pictures(8)
        self.data.images = torch.cat([self.data.images, more.images])
        self.data.targets = torch.cat([self.data.targets, more.targets])


@every_kind_of_defense
def test_a_dataset_that_grows_under_way_is_refused(entry: Entry) -> None:
    data, callback, module = planted(), entry.make(), net_of()
    trainer = make_trainer([Growing(data), callback], EPOCHS)
    with pytest.raises(DataError, match=r"had 96 samples at the start of the fit and has \d+ now"):
        trainer.fit(module, DataLoader(data, batch_size=BATCH, shuffle=True))
    assert_settled(trainer, module)


@contextmanager
def full_disk(path: Path) -> Iterator[Any]:
    """Write a little, and fail."""
    with path.with_suffix(".unfinished").open("wb") as file:
        file.write(b"half")
    path.with_suffix(".unfinished").unlink()
    raise OSError(28, "No space left on device")
    yield


Reported = Callable[[Entry], tuple[Path, Run]]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """A fit with a report, once for each kind of defense, on data whose class names are code: folder and fit."""

    made: dict[str, tuple[Path, Run]] = {}

    def report_of(entry: Entry) -> tuple[Path, Run]:
        if entry.name not in made:
            data, folder = planted(), tmp_path_factory.mktemp(entry.name)
            data.classes = [f"<script>alert('x')</script>{label}" for label in range(4)]
            made[entry.name] = folder, fit([entry.make(report_dir=folder)], data)
        return made[entry.name]

    return report_of


@every_kind_of_defense
def test_a_full_disk_costs_the_report_and_nothing_else(
    entry: Entry, reported: Reported, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, old = reported(entry)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"report.html", "verdict.csv"} <= before.keys()
    monkeypatch.setattr("lightning_backdoor.report.writer.atomic_file", full_disk)
    callback = entry.make(report_dir=folder)
    with pytest.warns(UserWarning, match=r"report in .* is incomplete: OSError: .*No space left on device"):
        run = fit([callback])
    assert entry.acted(callback, run.trainer)
    assert run.trainer.current_epoch == old.trainer.current_epoch
    assert all(torch.equal(a, b) for a, b in zip(old.module.parameters(), run.module.parameters(), strict=True))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "the old report is whole"


@every_kind_of_defense
def test_names_of_classes_cannot_run_in_the_report(entry: Entry, reported: Reported) -> None:
    folder, run = reported(entry)
    page = (folder / "report.html").read_text()
    assert run.trainer.current_epoch == entry.epochs
    assert page.count("<script") == 2, "the rows to mark, and the script of the page"
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
