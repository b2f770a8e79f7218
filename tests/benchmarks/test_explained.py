"""Rows of explained findings: what is in a training set, the table, and the figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from benchmarks.explained import CASES, draw, made, table

FINDING: dict[str, Any] = {
    "label": 0, "samples": 70, "true": 70, "diagnosis": "wrong labels", "own_label_rate": 0.01, "confidence": 0.9,
    "reference_accuracy": 0.98, "reference_confidence": 0.95, "estimated_asr": 0.96, "control_asr": 0.02,
    "asr_method": "paste",
}  # fmt: skip
ROW: dict[str, Any] = {
    "source": "digits", "case": "badnets-5%", "defence": "truth", "images": 1400, "accuracy": 0.99, "asr": 0.98,
    "poisons": 70, "removed": 0, "removed_others": 0, "unlearned": 0, "findings": [FINDING],
}  # fmt: skip


def test_a_kind_is_a_share_of_one_class_with_its_label() -> None:
    train = TensorDataset(torch.full((100, 3, 32, 32), 9, dtype=torch.uint8), torch.arange(100) % 10)
    dataset, truth = made(CASES["kind-border-40%"], train)
    labels = torch.stack([dataset[i][1] for i in range(100)])
    assert torch.equal(labels, train.tensors[1])
    assert labels[truth].tolist() == [7] * 4
    assert [int(dataset[i][0][0, 0, 0]) == 0 for i in range(100)] == truth.tolist()


def test_the_table_has_the_largest_finding() -> None:
    small = {**FINDING, "samples": 3, "diagnosis": "unclear"}
    last = table([{**ROW, "findings": [small, FINDING]}]).splitlines()[-1]
    told = "99 | 98 |  | 0 of 70 | 0 | 0 | wrong labels | 1 | 96 | 2 | paste |"
    assert last == f"| digits 1,400 | badnets-5% | truth | {told}"
    assert "| 0 of 70 | 0 | 0 |  |  |  |  |  |" in table([{**ROW, "findings": []}])


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    draw([ROW, {**ROW, "defence": "D-BR"}, {**ROW, "findings": []}], tmp_path / "estimated.png")
    assert (tmp_path / "estimated.png").stat().st_size > 5000
