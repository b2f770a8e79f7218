"""The comparison of treatments: each has a row of its own, begins with the shared checkpoint, and is measured once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks import rows, treatments
from benchmarks.finetune import STICKER
from benchmarks.networks import NETWORKS
from benchmarks.protocols import Setting
from lightning_backdoor import Verdict
from lightning_backdoor.responses import Detection, Event, Response

SETTING = Setting("tiny", 128, 2, "adamw-signs", treatments.DIGITS)


def tiny(classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, classes))


def some(*_: object) -> tuple[TensorDataset, TensorDataset]:
    images = torch.arange(128, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32).contiguous()
    data = TensorDataset(images, torch.arange(128) % 10)
    return data, data


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *names: str) -> list[rows.Row]:
    monkeypatch.setitem(NETWORKS, "tiny", tiny)
    monkeypatch.setattr(treatments, "CASES", [(SETTING, STICKER)])
    monkeypatch.setattr(treatments, "loaded", some)
    results = folder / "treatments.jsonl"
    told = ["--cache", str(folder / "cache"), "--results", str(results), "--threads", "1", "--only"]
    monkeypatch.setattr(sys, "argv", ["treatments", *told, *(f"/{name}/" for name in names)])
    treatments.main()
    return rows.read(results)


@pytest.mark.filterwarnings("ignore:.*[Ll]ightning")
@pytest.mark.filterwarnings("ignore:.*num_workers")
@pytest.mark.filterwarnings("ignore:Given ends with a model")
def test_treatments_begin_with_what_was_trained_without_a_defense_and_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("undefended", "second guess", "project", "turn down")
    found = run(monkeypatch, tmp_path, *names)
    assert [row["defence"] for row in found] == list(names)
    assert [row["epochs_shared_with_undefended"] for row in found] == [0, 1, 1, 1]
    assert len(run(monkeypatch, tmp_path, *names, "perfect")) == 5
    assert "| tiny, digits, 128, 2 | sticker-5% | perfect |" in capsys.readouterr().out


@pytest.mark.parametrize("name", treatments.TREATMENTS)
def test_every_treatment_can_be_made(name: str) -> None:
    labels = torch.arange(4)
    assert isinstance(treatments.TREATMENTS[name](labels, labels), Response)


def test_removed_samples_get_the_labels_that_are_given_in_the_dataset_alone() -> None:
    labels, true = torch.zeros(4, dtype=torch.long), torch.arange(4)
    verdict = Verdict(torch.zeros(4), torch.tensor([True, False, True, False]), 0.5, "truth", labels.clone())
    event = Event(1, 2, 2)
    treatments.Relabeled(labels, true).respond(None, Detection(verdict, 2), event)
    assert labels.tolist() == [0, 1, 0, 3]
    assert verdict.labels.tolist() == [0, 0, 0, 0]
