"""What the benchmark says of rows that are not there."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from examples.evidence import consistency, fractions, repair, rows, stages, strip, weights
from examples.evidence.networks import NAME

EVIDENCE = Path(rows.__file__).parent
MODULES = (consistency, fractions, repair, stages, strip, weights)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.RESULTS.stem)
def test_rows_that_there_are_were_wanted(module: ModuleType) -> None:
    """But for attacks that somebody asked for beyond those of the default."""
    wanted = {rows.key(row, "row") for row in module.wanted()}
    by_default = {row["attack"] for row in module.wanted()}
    found = [row for row in rows.read(module.RESULTS) if row["attack"] in by_default]
    assert len(found) >= 3
    assert {rows.key(row, "row") for row in found} <= wanted
    assert len(wanted) == len(module.wanted())


def test_ablations_say_which_rows_they_want() -> None:
    assert [(row["attack"], row["row"]) for row in strip.wanted()] == [
        (attack, "STRIP, 20 draws")
        for attack in ("badnets-5%", "blended-5%", "sig-80%", "label-consistent-40%", "hidden-trigger-40%")
    ]
    assert len(fractions.wanted()) == 4 * 3
    assert len(weights.wanted()) == 6
    assert len(stages.wanted()) == 2 * 5
    looks = [(row["attack"], row["model"], row["row"]) for row in consistency.wanted()]
    assert len(looks) == 5 * 4 + 2 * 2
    assert ("sig-80%", NAME, "copy, 200 steps, 200 of centre repulsion") in looks
    assert ("blended-5%", "vit", "fresh, 200 steps") in looks


def test_the_repairs_are_those_that_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("restored", "images_of"):
        monkeypatch.setattr(repair, name, lambda *_: None)
    monkeypatch.setattr(repair, "labels_of", lambda _: torch.zeros(40, dtype=torch.long))
    case: Any = SimpleNamespace(dataset=None, setting=None, undefended=str, poisoned=torch.arange(40) < 2)
    assert tuple(repair.treatments(case)) == repair.ROWS
    assert [row["row"] for row in repair.wanted()] == [*repair.ROWS] * 2
