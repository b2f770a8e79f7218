"""Rows of clean kinds of image: what is in a training set, what is asked for, and the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from benchmarks.kinds import CASES, IDENTITY, IN_ALL, LABEL, SHOTS, TWO_CLASSES, made, parser, table, wanted

ROW: dict[str, Any] = {
    "source": "digits", "case": "border", "share": 40, "defence": "NONE", "approved": False, "seed": 0, "images": 1400,
    "accuracy": 0.98, "accuracy_of_kind": 0.5, "kind": 54, "removed": 53, "removed_others": 1, "unlearned": 0,
    "findings": [{"samples": 54, "diagnosis": "right labels"}, {"samples": 2, "diagnosis": "unclear"}],
}  # fmt: skip


def images(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    shown = torch.randint(0, 200, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return TensorDataset(shown, torch.arange(count) % 10)


@pytest.mark.parametrize("name", CASES)
def test_a_share_of_a_label_is_of_the_kind_and_has_the_right_label(name: str) -> None:
    train, test = images(300), images(50)
    found = made(name, 0.4, train, test, 0)
    labels = found.train.tensors[1]
    every = range(10) if name == IN_ALL else [LABEL]
    assert torch.unique(labels[found.kind]).tolist() == list(every)
    assert all(int((found.kind & (labels == label)).sum()) == 12 for label in every)
    assert all(int((labels == label).sum()) == 30 for label in every)
    assert len(found.test_kind) == (50 if name == IN_ALL else 5)
    assert set(found.test_kind.tensors[1].tolist()) == set(every)
    assert (LABEL + 1 in found.test.tensors[1].tolist()) == (name != TWO_CLASSES)
    if name == SHOTS:
        shown = found.train.tensors[0][found.kind].float()
        assert float((shown[0] - shown[5]).abs().mean()) < 10 < float((shown[0] - shown[1]).abs().mean())
    elif name != TWO_CLASSES:
        changed = (found.train.tensors[0] != train.tensors[0]).flatten(1).any(dim=1)
        assert torch.equal(changed, found.kind)


def test_rows_that_are_there_are_not_made_again() -> None:
    options = parser().parse_args(["--digits", "--only", "border", "--shares", "40", "--defences", "none", "NONE"])
    every = wanted(options, [])
    assert [(one["defence"], one["approved"]) for one in every] == [("none", False), ("NONE", False), ("NONE", True)]
    assert all(tuple(one) == IDENTITY for one in every)
    assert wanted(options, [ROW]) == [every[0], every[2]]


def test_the_table_has_the_largest_finding() -> None:
    last = table([ROW]).splitlines()[-1]
    assert last == "| digits 1,400 | border | 40 % | NONE |  | 98 | 50 | 53 of 54 | 1 | 0 | right labels |"
    assert table([{**ROW, "findings": [], "approved": True}]).endswith("| 53 of 54 | 1 | 0 |  |")
