"""Training sets of attacks that no single unit shows, and the table of their rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.hidden import made, table

ROW: dict[str, Any] = {
    "case": "tinted-75", "seed": 2, "defence": "UltraClean", "accuracy": 0.9775, "asr": 0.003, "poisons": 75,
    "removed": 69, "removed_others": 1, "gates": ["look_alikes"], "diagnoses": ["wrong labels"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "poisons", "covers"), [("tinted-75", 75, 0), ("tinted", 0, 0), ("stripes-4%", 56, 56), ("clean", 0, 0)]
)
def test_only_the_labels_or_triggers_of_poisons_differ_from_the_clean_twin(
    name: str, poisons: int, covers: int
) -> None:
    train, test, attacked = made(name, 1)
    twin = made("tinted" if name.startswith("tinted") else "clean", 1)[0]
    assert len(train) == 1400
    assert len(test) == 397
    assert int(train.poisoned.sum()) == poisons
    assert int(train.covers.sum()) == covers
    assert torch.equal(train.labels != twin.labels, train.poisoned)
    assert not bool(train.labels[train.poisoned].any())
    changed = (train.images != twin.images).flatten(1).any(dim=1)
    assert torch.equal(changed, (train.poisoned | train.covers) & (name == "stripes-4%"))
    assert {int(label) for _, label in attacked} == {0}


def test_a_row_of_the_table() -> None:
    told = "| tinted-75 | 2 | UltraClean | 97.8 | 0.3 | 69 of 75 | 1 | look_alikes | wrong labels |"
    assert table([ROW]).endswith(told)
