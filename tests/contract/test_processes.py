"""Law 6 for every public callback: any number of processes gives the verdict of one, and trains one model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.ddp_registry import BATCH, FAILING, FAILURES, SAMPLES, main
from tests.contract.problem import EPOCHS, WARNS
from tests.contract.registry import Entry, every
from tests.processes import processes

pytestmark = [
    *WARNS,
    pytest.mark.cpu,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]
slow = pytest.mark.slow


def started_by_lightning(count: int, folder: Path, strategy: str) -> None:
    """Processes that Lightning makes out of one."""
    command = [sys.executable, "-m", "tests.contract.ddp_registry", str(count), str(folder), strategy]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=1800, env=environment, cwd=Path(__file__).parents[2])


@pytest.fixture(
    scope="module",
    params=[
        (2, "ddp"),
        *(pytest.param((count, strategy), marks=slow) for strategy in ("ddp_fork", "ddp_spawn") for count in (2, 4)),
        pytest.param((4, "ddp"), marks=slow),
    ],
    ids=lambda param: f"{param[0]} by {param[1]}",
)
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Path]:
    """Everything trained in some processes and in one."""
    (count, strategy), folder = request.param, tmp_path_factory.mktemp("world")
    if strategy == "ddp":
        with processes(count, "tests.contract.ddp_registry", folder):
            main(1, folder)
    else:
        started_by_lightning(count, folder, strategy)
        main(1, folder)
    return count, strategy, folder


def load(world: tuple[int, str, Path], name: str) -> list[Any]:
    """What all processes have."""
    count, _, folder = world
    return [torch.load(folder / f"{name}-{count}-{rank}.pt", weights_only=True) for rank in range(count)]


def same(a: Any, b: Any) -> bool:
    """Whether nested containers are equal bit by bit, but for statistics of batch norm: each process has its own."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if "running" not in str(key))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.case("63")
@every
def test_the_verdict_is_that_of_one_process(entry: Entry, world: tuple[int, str, Path]) -> None:
    one = torch.load(world[2] / f"still-{entry.name}-1-0.pt", weights_only=True)
    for rank in load(world, f"still-{entry.name}"):
        assert rank["metrics"].keys() == one["metrics"].keys()
        assert rank["counts"][0] == one["counts"][0]
        if entry.kind == "watch":
            assert rank["metrics"] == pytest.approx(one["metrics"], abs=1e-6)
            continue
        mine, theirs = rank["states"][-1]["verdict"], one["states"][-1]["verdict"]
        assert len(mine["scores"]) == SAMPLES
        torch.testing.assert_close(mine["scores"], theirs["scores"], rtol=1e-5, atol=1e-6)
        if entry.kind == "own":  # its second look is at features that it has learned in between
            mine, theirs = (end["states"][0]["verdict"] for end in (rank, one))
        assert all(same(mine[name], theirs[name]) for name in mine if name not in ("scores", "threshold"))
        if entry.name == "NONECallback":
            mine, theirs = (end["states"][-1]["history"][0]["units"] for end in (rank, one))
            assert [unit[:2] for unit in mine] == [unit[:2] for unit in theirs]
            assert [unit[3] for unit in mine] == pytest.approx([unit[3] for unit in theirs], abs=1e-6)


@pytest.mark.parametrize("when", ["at-once", "at-the-end"])
def test_a_copy_that_is_trained_for_a_diagnosis_is_that_of_one_process(when: str, world: tuple[int, str, Path]) -> None:
    (one,) = torch.load(world[2] / f"diagnosed-{when}-1-0.pt", weights_only=True)["findings"]
    assert one["diagnosis"] == "wrong labels"
    for rank in load(world, f"diagnosed-{when}"):
        (mine,) = rank["findings"]
        assert torch.equal(mine["suggested_labels"], one["suggested_labels"])
        assert torch.equal(mine["suggested_confidences"], one["suggested_confidences"])
        assert mine["diagnosis"] == one["diagnosis"]


@pytest.mark.parametrize("response", ["report", "unlearn"])
def test_a_copy_that_fails_in_one_process_ends_no_fit(response: str, world: tuple[int, str, Path]) -> None:
    for rank in load(world, f"torn-{response}"):
        (mine,) = rank["findings"]
        assert mine["diagnosis"] == "unclear"


@pytest.mark.case("70")
@every
def test_weights_and_state_are_the_same_everywhere(entry: Entry, world: tuple[int, str, Path]) -> None:
    first, *others = load(world, f"learning-{entry.name}")
    assert first["counts"][0] == entry.epochs
    for other in others:
        assert same(first["weights"], other["weights"])
        assert same(first["states"], other["states"])
        assert first["counts"] == other["counts"]
        assert first["metrics"] == other["metrics"]
    if entry.kind != "watch":
        assert not first["states"][-1]["verdict"]["keep"].all(), "it acted"
    if entry.kind == "own":
        start, learned, *gone = (state["response"]["projection"] for state in first["states"])
        assert not torch.equal(start["0.weight"], learned["0.weight"])
        assert gone == [None, None]


@every
def test_all_take_equally_many_steps_and_share_the_samples(entry: Entry, world: tuple[int, str, Path]) -> None:
    ranks = load(world, f"learning-{entry.name}")
    epochs = [
        [[positions for _, positions in batches] for _, batches in groupby(rank["batches"], key=lambda drawn: drawn[0])]
        for rank in ranks
    ]
    for shares in zip(*epochs, strict=True):
        assert len({tuple(map(len, share)) for share in shares}) == 1, "batches of equal sizes"
    allowed = torch.ones(SAMPLES, dtype=torch.bool)
    if entry.kind != "watch":
        verdict = ranks[0]["states"][-1]["verdict"]
        known = [verdict[name] for name in ("trusted", "suspect") if name in verdict]
        allowed = torch.stack(known).any(dim=0) if known else verdict["keep"]
    kept = set(allowed.nonzero().flatten().tolist())
    lone = math.ceil(len(kept) / len(ranks)) % BATCH == 1  # batch norm cannot learn from a single sample: left out
    for last in range(1, EPOCHS + 1 if entry.kind == "filter" else 2):  # all epochs after a restart
        drawn = {i for epoch in epochs for positions in epoch[-last] for i in positions}
        assert drawn <= kept
        assert len(kept - drawn) <= lone * len(ranks)
    if entry.name in ("DBRCallback", "ABL"):
        orders = [[bool(verdict["suspect"][batch].all()) for batch in epoch[-1]] for epoch in epochs]
        assert all(order == orders[0] for order in orders), "all change phases at the same step"
        assert set(orders[0]) == {True, False}


@pytest.mark.parametrize(("entry", "where"), FAILING, ids=lambda part: getattr(part, "name", part))
def test_an_error_in_one_process_is_told_in_all(entry: Entry, where: str, world: tuple[int, str, Path]) -> None:
    count, strategy, folder = world
    files = sorted(folder.glob(f"said-{count}-*.json"))
    *others, last = (json.loads(file.read_text())[f"{entry.name} {where}"] for file in files)
    error = FAILURES[where][2]
    if strategy != "ddp":  # one process belongs to the user
        assert not others
        assert error in last
        return
    assert last.startswith(error)
    assert len(others) == count - 1
    for other in others:
        assert other.startswith("BackdoorDefenseError: ")
        assert f" failed in the process of rank {count - 1}: {error}" in other
