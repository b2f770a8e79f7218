"""Law 6 for D-ST: two processes decide and train as one, in both stages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.callbacks.helpers import LIGHTNING_WARNS
from tests.trainer.ddp_scan import free_port

pytestmark = LIGHTNING_WARNS


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_decide_and_train_as_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.callbacks.ddp_dst", "2", str(tmp_path)]
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
    for process in ranks:
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said[-3000:]
    first, second = (torch.load(tmp_path / f"2-{rank}.pt", weights_only=True) for rank in range(2))
    for name in ("scores", "suspect", "trusted"):
        assert torch.equal(first[name], second[name])
    assert first["history"] == second["history"]
    assert first["steps"] == second["steps"] > 0
    parameters = [name for name in first["weights"] if "running" not in name]
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in parameters)
    start, learned, *gone = first["projections"]
    assert gone == [None, None]
    assert all(torch.equal(learned[name], second["projections"][1][name]) for name in learned)
    assert not torch.equal(start["0.weight"], learned["0.weight"])
