"""Two processes: equal lengths, every kept sample drawn, no removed one, equal weights, resumes in one or two."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from tests.loading.ddp_loader_filter import ODD, work
from tests.loading.recording import (
    KEEP,
    KEPT,
    LIGHTNING_WARNS,
    SAFE_LOADING,
    N,
    Points,
    Pruner,
    Recording,
    loader,
    make_trainer,
)
from tests.scanning.ddp_scan import free_port

pytestmark = LIGHTNING_WARNS


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(work, (free_port(), str(folder)), nprocs=2)
    first, second = (torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2))
    return first, second, folder


def drawn(case: Any, epoch: int) -> list[int]:
    return [index for batch in case["batches"][epoch] for index in batch]


def both(ranks: tuple[Any, Any, Path], name: str, epoch: int) -> Counter[int]:
    return Counter(drawn(ranks[0][name], epoch) + drawn(ranks[1][name], epoch))


CASES = "shuffle, reload, weighted, own sampler, odd, odd drop last, lone, own distributed, own sharding, own batches"


@pytest.mark.case("28", "29", "31", "33")
@pytest.mark.parametrize("name", CASES.split(", "))
def test_processes_take_equally_many_steps_to_the_same_weights(ranks: Any, name: str) -> None:
    first, second = ranks[0][name], ranks[1][name]
    assert first["planned"] == second["planned"]
    for epoch in range(4):
        assert len(first["batches"][epoch]) == len(second["batches"][epoch]) == first["planned"][epoch]
    for key, value in first["weights"].items():
        if "running" not in key:  # statistics of batch norm are each process's own
            assert torch.equal(value, second["weights"][key])
    assert first["validated"] == second["validated"] == [0, 1, 2, 3]


@pytest.mark.case("28", "33")
@pytest.mark.parametrize("name", ["shuffle", "reload"])
def test_each_kept_sample_once(ranks: Any, name: str) -> None:
    assert both(ranks, name, 0) == Counter(range(N))
    for epoch in (1, 2, 3):
        assert both(ranks, name, epoch) == Counter(KEPT)
        assert len(drawn(ranks[0][name], epoch)) == 24


@pytest.mark.case("29")
def test_draws_with_replacement(ranks: Any) -> None:
    for name in ("weighted", "own sampler"):
        for epoch in (1, 2, 3):
            assert set(both(ranks, name, epoch)) <= KEPT
            assert 36 <= sum(both(ranks, name, epoch).values()) <= 60


@pytest.mark.case("30")
def test_odd_numbers_are_filled_up_or_cut(ranks: Any) -> None:
    kept = set(ODD.nonzero().squeeze(1).tolist())
    for epoch in (1, 2, 3):
        filled = both(ranks, "odd", epoch)
        assert set(filled) == kept
        assert sum(filled.values()) == 38
        assert len(drawn(ranks[0]["odd drop last"], epoch)) == len(drawn(ranks[1]["odd drop last"], epoch)) == 16
        cut = both(ranks, "own distributed", epoch)
        assert set(cut) <= kept
        assert sum(cut.values()) == 36
        assert max(cut.values()) == 1


def test_no_process_is_left_with_a_lone_sample(ranks: Any) -> None:
    for rank in ranks[:2]:
        assert [len(batch) for batch in rank["lone"]["batches"][2]] == [8, 8]


@pytest.mark.case("31", "32")
def test_unknown_sharding_is_filtered_and_filled_up(ranks: Any) -> None:
    for epoch in (1, 2, 3):
        assert both(ranks, "own sharding", epoch).keys() == set(range(20, N))
        assert both(ranks, "own batches", epoch).keys() == set(range(8, N))
        assert [len(drawn(rank["own sharding"], epoch)) for rank in ranks[:2]] == [32, 32]
        assert [len(rank["own batches"]["batches"][epoch]) for rank in ranks[:2]] == [4, 4]


@pytest.mark.case("41")
def test_resumed_in_two_processes(ranks: Any) -> None:
    for epoch in (4, 5):
        assert both(ranks, "resumed", epoch) == Counter(KEPT)


@pytest.mark.case("41")
def test_resumed_in_one_process(ranks: Any) -> None:
    module, pruner = Recording(), Pruner({0: KEEP})
    make_trainer([pruner], max_epochs=6).fit(
        module, loader(shuffle=True), loader(Points(16)), ckpt_path=ranks[2] / "shuffle.ckpt", **SAFE_LOADING
    )
    assert torch.equal(pruner.mask, KEEP)
    assert [set(module.drawn(epoch)) for epoch in (4, 5)] == [KEPT, KEPT]
    assert module.planned == [6, 6]


@pytest.mark.case("34")
@pytest.mark.slow
def test_processes_started_by_lightning(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.loading.ddp_loader_filter", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    for epoch in (1, 2, 3):
        counts = Counter(index for rank in ranks for batch in rank["batches"][epoch] for index in batch)
        assert counts == Counter(KEPT)
    for key, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][key])
