"""Law 6 for NONE: two processes measure, decide, reset and fine-tune as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.ddp_none import main
from tests.callbacks.helpers import LIGHTNING_WARNS
from tests.trainer.ddp_scan import free_port

pytestmark = LIGHTNING_WARNS


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_decide_and_train_as_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.callbacks.ddp_none", "2", str(tmp_path)]
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
        torch.testing.assert_close(rank["scores"], one["scores"], atol=1e-6, rtol=1e-6)
        assert torch.equal(rank["keep"], one["keep"])
        assert [unit[:2] for unit in rank["history"][0]["units"]] == [unit[:2] for unit in one["history"][0]["units"]]
        assert rank["history"][0]["units"][0][3] == pytest.approx(one["history"][0]["units"][0][3], abs=1e-6)

    first, second = load("learning", 2, 0), load("learning", 2, 1)
    assert torch.equal(first["keep"], second["keep"])
    assert torch.equal(first["scores"], second["scores"])
    assert first["history"] == second["history"]
    assert first["epoch"] == second["epoch"] == 3
    parameters = [name for name in first["weights"] if "running" not in name]
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in parameters)
    kept = set(first["keep"].nonzero().flatten().tolist())
    assert len(kept) < len(first["keep"])
    assert set(first["epochs"][2][1]) | set(second["epochs"][2][1]) == kept
