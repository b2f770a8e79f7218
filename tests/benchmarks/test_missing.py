"""What the benchmark says of rows that are not there."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import consistency, fractions, repair, rows, stages, strip, weights
from benchmarks.missing import missing, missing_ablations
from benchmarks.networks import NAME
from benchmarks.protocols import GUESSED, PROTOCOLS, SECONDS_PER_EPOCH, Cell, Protocol, Setting, hours
from benchmarks.sections import ABLATIONS
from tests.benchmarks.helpers import OLD, row

EVIDENCE = Path(rows.__file__).parent
MODULES = (consistency, fractions, repair, stages, strip, weights)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.RESULTS.stem)
def test_rows_that_there_are_were_wanted(module: ModuleType) -> None:
    """But for attacks and settings that somebody asked for beyond those of the default."""
    wanted = {rows.key(row, "row") for row in module.wanted()}
    by_default = {(rows.setting_of(row), row["attack"]) for row in module.wanted()}
    found = [row for row in rows.read(module.RESULTS) if (rows.setting_of(row), row["attack"]) in by_default]
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


def finished(cells: Any) -> list[rows.Row]:
    """Rows of cells, each of which took half an hour."""
    names = (*rows.IDENTITY, "defence")
    return [{**dict(zip(names, rows.cell_key(cell), strict=True)), "seconds": 1800} for cell in cells]


def test_missing_cells_are_told_by_setting_seed_and_defence() -> None:
    mini = PROTOCOLS["mini"]
    done, size, expected = finished(mini.cells), len(mini.cells), hours(mini.cells)
    took = f"All cells together are expected to take {expected:.1f} hours on two CPU cores. The {size} that have run "
    assert missing(mini, done).splitlines() == [
        "### mini: nothing is missing",
        "",
        f"{took}took {size / 2:.1f} hours on the machines that measured them.",
    ]
    left = {("D-ST", 0), ("NONE", 2)}
    some = [r for r in done if (r["defence"], r["seed"]) not in left or r["attack"] not in ("badnets-5%", "clean")]
    lines = missing(mini, some).splitlines()
    assert lines[0].startswith(f"### mini: 3 of {size} cells, about ")
    assert lines[3:] == [
        "",
        f"- {NAME}, 20,000 images, 12 epochs, recipe one-cycle, seed 0:",
        "  - D-ST: clean, badnets-5%",
        f"- {NAME}, 20,000 images, 12 epochs, recipe one-cycle, seed 2:",
        "  - NONE: badnets-5%",
    ]


def test_the_hours_of_a_protocol_are_expected_and_measured_and_guesses_are_marked() -> None:
    cells = (Cell(Setting(), "clean", "undefended"), Cell(Setting("vit-tiny", recipe="adamw"), "clean", "undefended"))
    elsewhere = finished([Cell(Setting(images=500), "clean", "undefended")])
    told = missing(Protocol("both", "some machine", cells), elsewhere).splitlines()
    seconds = 12 * 11.7 + 12 * SECONDS_PER_EPOCH["vit-tiny"][0] * 20_000 / 50_000
    assert told[0] == f"### both: 2 of 2 cells, about {seconds / 3600:.1f} hours on some machine"
    assert told[2] == (
        f"All cells together are expected to take {seconds / 3600:.1f} hours on some machine. "
        "The speeds of vit-tiny are guesses, not measured."
    )
    assert "The 1 that have run took 0.5 hours" in missing(
        Protocol("both", "some machine", cells), elsewhere + finished(cells[:1])
    )
    assert "guesses" not in missing(PROTOCOLS["mini"], [])
    assert {cell.setting.model for cell in PROTOCOLS["full"].cells} == set(GUESSED)


def test_missing_rows_of_ablations_are_told_by_attack() -> None:
    done: dict[str, list[rows.Row]] = {name: section.wanted([]) for name, section in ABLATIONS.items()}
    assert missing_ablations([], done).splitlines() == [
        "### Ablations", "", *(f"- `{name}`: nothing is missing" for name in ABLATIONS)
    ]  # fmt: skip
    done["strip"] = done["strip"][1:]
    done["weights"] = [one for one in done["weights"] if one["row"] not in ("weight 1", "weight 0.1")]
    done["stages"] = [one for one in done["stages"] if one["attack"] != "sig-80%"]
    done["consistency"] = [one for one in done["consistency"] if one["model"] != "vit"]
    told = missing_ablations([], done)
    assert "- `strip`: 1 of 5 rows\n  - badnets-5%: STRIP, 20 draws\n" in told
    assert "- `weights`: 2 of 6 rows\n  - badnets-5%: weight 0.1; weight 1" in told
    assert "- `stages`: 5 of 10 rows\n  - sig-80%: all\n" in told
    assert "- `consistency`: 2 of 24 rows\n  - blended-5%, vit: all\n" in told
    assert told.count("nothing is missing") == 3


def test_combined_wants_every_undefended_training_of_the_default() -> None:
    found = [
        row("blended-5%", "undefended", 0.8, 0.9, seed=1), row("badnets-5%", "undefended", 0.8, 0.9, seed=2),
        row("badnets-5%", "undefended", 0.8, 0.9), row("badnets-1%", "NONE", 0.8, 0.9),
        row("sig-80%", "undefended", 0.8, 0.9, model="vit"), row("clean", "undefended", 0.8, 0.9, seed=10),
    ]  # fmt: skip
    assert missing_ablations(found, {}).splitlines()[2:5] == [
        "- `combined`: 3 of 3 rows", "  - badnets-5%: all", "  - blended-5%: seed 1",
    ]  # fmt: skip
    there = {"combined": [{**OLD, "recipe": "one-cycle", "attack": "badnets-5%", "seed": 2}]}
    assert missing_ablations(found, there).splitlines()[2:5] == [
        "- `combined`: 2 of 3 rows", "  - badnets-5%: seed 0", "  - blended-5%: seed 1",
    ]  # fmt: skip
