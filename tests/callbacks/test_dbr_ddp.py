"""Law 6 for D-BR: two processes train one detector, decide, and change phases as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.ddp_dbr import main
from tests.callbacks.helpers import LIGHTNING_WARNS
from tests.trainer.ddp_scan import free_port

pytestmark = LIGHTNING_WARNS


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_decide_and_repair_as_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.callbacks.ddp_dbr", "2", str(tmp_path)]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    ranks = [
        subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            env={**os.environ, **address, "OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    main(1, tmp_path)
    for process in ranks:
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said[-3000:]

    def load(name: str, processes: int, rank: int) -> Any:
        return torch.load(tmp_path / f"{name}-{processes}-{rank}.pt", weights_only=True)

    one, first, second = load("fixed", 1, 0), load("fixed", 2, 0), load("fixed", 2, 1)
    for rank in (first, second):
        torch.testing.assert_close(rank["scores"], one["scores"], atol=1e-6, rtol=1e-5)
        assert torch.equal(rank["suspect"], one["suspect"])
        assert torch.equal(rank["trusted"], one["trusted"])

    first, second = load("learning", 2, 0), load("learning", 2, 1)
    assert torch.equal(first["scores"], second["scores"])
    assert first["history"] == second["history"]
    parameters = [name for name in first["weights"] if "running" not in name]
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in parameters)
    suspect, trusted = first["suspect"], first["trusted"]
    orders = []
    for rank in (first, second):
        repair = [positions for epoch, _, positions in rank["drawn"] if epoch == 2]
        assert all(bool((suspect | trusted)[positions].all()) for positions in repair)
        orders.append([bool(suspect[positions].all()) for positions in repair])
    assert orders[0] == orders[1], "both change phases at the same step"
    assert True in orders[0]
    assert False in orders[0]
