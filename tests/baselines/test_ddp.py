"""Law 6: two processes give the verdicts of one, and train the same model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.baselines.ddp_baselines import callbacks, main
from tests.callbacks.helpers import LIGHTNING_WARNS
from tests.trainer.ddp_scan import free_port

pytestmark = LIGHTNING_WARNS


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_decide_and_train_as_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.baselines.ddp_baselines", "2", str(tmp_path)]
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

    def load(*name: Any) -> Any:
        return torch.load(tmp_path / f"{'-'.join(map(str, name))}.pt", weights_only=True)

    for method in (callback.method for callback in callbacks()):
        one, first, second = load("fixed", method, 1, 0), load("fixed", method, 2, 0), load("fixed", method, 2, 1)
        for rank in (first, second):
            torch.testing.assert_close(rank["scores"], one["scores"], rtol=1e-4, atol=1e-5)
            assert torch.equal(rank["keep"], one["keep"]), method
        assert not one["keep"].all(), method

        first, second = load("learning", method, 2, 0), load("learning", method, 2, 1)
        assert torch.equal(first["scores"], second["scores"]), method
        assert torch.equal(first["keep"], second["keep"]), method
        assert first["counts"] == second["counts"], method
        parameters = [name for name in first["weights"] if "running" not in name]
        assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in parameters), method
