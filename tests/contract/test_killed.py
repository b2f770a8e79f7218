"""Trainings that were killed (``kill -9``): the last checkpoint resumes to the same end, and no file is half there."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.killed_registry import moments
from tests.contract.problem import IMAGES
from tests.contract.registry import ENTRIES, Entry
from tests.contract.test_processes import same

pytestmark = [pytest.mark.cpu, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

GROUPS = {
    baselines: [
        entry for entry in ENTRIES if entry.kind != "watch" and ("baselines" in entry.cls.__module__) == baselines
    ]
    for baselines in (False, True)
}
CASES = [
    pytest.param(entry, moment, marks=pytest.mark.slow if baselines else ())
    for baselines, entries in GROUPS.items()
    for entry in entries
    for moment in moments(entry)
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Entry], tuple[dict[str, Any], Path]]:
    """All deaths of a group of defences, and where they took place."""

    @functools.cache
    def group(baselines: bool) -> tuple[dict[str, Any], Path]:
        folder, names = tmp_path_factory.mktemp("killed"), [entry.name for entry in GROUPS[baselines]]
        command = [sys.executable, "-m", "tests.contract.killed_registry", str(folder), *names]
        subprocess.run(command, check=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads((folder / "ends.json").read_text()), folder

    return lambda entry: group(entry in GROUPS[True])


@pytest.mark.parametrize(("entry", "moment"), CASES, ids=lambda part: getattr(part, "name", part))
def test_a_killed_run_resumes_to_the_same_end(entry: Entry, moment: str, killed: Any) -> None:
    ends, folder = killed(entry)
    end = ends[f"{entry.name} {moment}"]
    assert end["died"] == -9
    first = entry.kind == "own" and moment in ("report", "detector")  # D-ST looks before the first epoch
    assert end["checkpoint"] != first
    assert ends[entry.name] == end["resumed"] == 0
    whole, resumed = (
        torch.load(folder / f"{name}.pt", weights_only=True) for name in (entry.name, f"{entry.name} {moment}")
    )
    assert not whole["state"]["verdict"]["keep"].all(), "it acted"
    assert whole["counts"] == resumed["counts"]
    for part in ("weights", "state"):
        assert whole[part].keys() == resumed[part].keys()
        assert all(same(whole[part][key], resumed[part][key]) for key in whole[part]), part
    if moment == "report":
        assert all(name.startswith(".") and name.endswith(".tmp") for name in end["left"]), "no file is half there"
        assert len(end["left"]) == 1
        report = folder / f"{entry.name} report" / "report"
        assert len((report / "verdict.csv").read_text().splitlines()) == IMAGES + 1
        assert (report / "report.html").read_text().rstrip().endswith("</html>")
