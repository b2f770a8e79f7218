"""The benchmark of fine-tuning: its data, its cells, and that a run in processes goes on and ends by its budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import finetune, rows
from benchmarks.data import SIGNS
from benchmarks.protocols import Cell
from lightning_backdoor import DBRCallback
from lightning_backdoor.events import Event
from tests.benchmarks.helpers import pack, row


def packed(folder: Path) -> Path:
    """Small sets in the form of the large ones, packed for the benchmark."""
    source = folder / "source"
    source.mkdir()
    pack(source, "train", 300, 0)
    pack(source, "test", 40, 1)
    labels = np.repeat(np.arange(3), (24, 120, 48))
    track = np.concatenate([np.arange(count) // 6 for count in (24, 120, 48)])
    pixels = np.broadcast_to(np.arange(192, dtype=np.uint8)[:, None, None, None], (192, 32, 32, 3))
    np.savez(source / "gtsrb.npz", x=pixels, y=labels, track=track)
    return folder / "packed"


def main(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> None:
    told = ["--data", str(folder / "packed"), "--cache", str(folder / "cache"), "--device", "cpu", "--threads", "1"]
    results = ["--results", str(folder / "finetune.jsonl")]
    monkeypatch.setattr(sys, "argv", ["finetune", *told, *results, *arguments])
    finetune.main()


def test_no_track_is_trained_on_and_tested_and_the_largest_class_is_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "IMAGES", 100)
    folder = packed(tmp_path)
    finetune.pack(tmp_path / "source", folder)
    train, test = (finetune.loaded(folder, SIGNS, split) for split in ("train", "test"))
    (trained, labels), (tested, _) = train.tensors, test.tensors
    assert trained.shape == (100, 3, 32, 32)
    assert trained.dtype == torch.uint8
    tracks = [set((images[:, 0, 0, 0] // 6).tolist()) for images in (trained, tested)]
    assert tracks[0]
    assert tracks[1]
    assert not tracks[0] & tracks[1]
    assert labels.bincount().argsort(descending=True).tolist() == [0, 1, 2]
    assert len(finetune.trained_on(finetune.TRANSFORMER, folder)) == 300


def test_the_sticker_is_at_one_of_four_places() -> None:
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(64)
    painted = finetune.FourPlaces()(images)
    changed = (painted != images).any(dim=1)
    places = {tuple(one.nonzero().amin(dim=0).tolist()) for one in changed}
    assert places == {(4, 5), (4, 21), (20, 5), (20, 21)}
    assert (changed.sum(dim=(1, 2)) == 36).all()
    assert torch.equal(finetune.FourPlaces()(images[5]), painted[5])


def test_every_cell_has_a_key_of_its_own_and_what_it_is_compared_with() -> None:
    keys = [rows.cell_key(cell) for cell in finetune.CELLS]
    assert len(set(keys)) == len(keys)
    for cell in finetune.CELLS:
        perfect = Cell(cell.setting, cell.attack, finetune.PERFECT)
        assert Cell(cell.setting, "clean", finetune.UNDEFENDED) in finetune.CELLS
        assert cell.attack == "clean" or perfect in finetune.CELLS


def test_the_table_shows_a_restart_and_what_a_cell_is_compared_with() -> None:
    known = {"model": "vit", "recipe": "adamw", "images": 10_000, "epoch_equivalents": 1.0}
    found = [
        row("badnets-5%", "NONE", 0.70, 0.02, fell_back=True, tpr=1.0, fpr=0.001, **known),
        row("badnets-5%", "perfect", 0.71, 0.03, **known),
        row("clean", "undefended", 0.72, 0.01, asr_under={"badnets-5%": 0.015}, **known),
    ]
    *_, none, perfect = finetune.markdown(found).splitlines()
    assert "| NONE | 0 | 70.0 | 2.0 | 71.0 | 1.5 | 100.0 | 0.10 | restarted |" in none
    assert "| perfect | 0 | 71.0 | 3.0 | 71.0 | 1.5 | – | – |  |" in perfect


def test_a_row_says_what_a_defense_did() -> None:
    defense: Any = DBRCallback()
    repair = Event(3, 0, 5, suspects=5, response="unlearn", accuracies=(0.9,), flagged_label_rates=(0.8,))
    again = Event(4, 0, 5, response="fallback", restarts=True)
    after = Event(5, 0, 5, response="fallback", accuracies=(0.9,), flagged_label_rates=(0.02,))
    defense.history.extend([repair, again, after])
    found = finetune.outcome(defense)
    assert found == {
        "repaired": True,
        "responses": ["unlearn", "fallback", "fallback"],
        "fell_back": True,
        "flagged_label_rates": [0.8, None, 0.02],
    }


@pytest.mark.slow
def test_a_run_in_processes_goes_on_and_ends_by_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune.pack(tmp_path / "source", packed(tmp_path))
    small = [
        "--images",
        "200",
        "--epochs",
        "1",
        "--processes",
        "2",
        "--only",
        "badnets-5%/undefended",
        "badnets-5%/NONE",
    ]
    main(monkeypatch, tmp_path, *small, "--budget", "0")
    assert "The time is spent; 2 cells are missing." in capsys.readouterr().out
    main(monkeypatch, tmp_path, *small)
    found = rows.read(tmp_path / "finetune.jsonl")
    assert {one["defence"] for one in found} == {"undefended", "NONE"}
    assert all(one["side_by_side"] == 2 for one in found)
    capsys.readouterr()
    main(monkeypatch, tmp_path, *small, "--list")
    assert capsys.readouterr().out.strip() == ""
