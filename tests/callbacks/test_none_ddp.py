"""Law 6 for NONE: two processes measure, decide, reset and fine-tune as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.ddp_none import main
from tests.callbacks.helpers import LIGHTNING_WARNS
from tests.processes import two_processes

pytestmark = LIGHTNING_WARNS


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_decide_and_train_as_one(tmp_path: Path) -> None:
    with two_processes("tests.callbacks.ddp_none", tmp_path):
        main(1, tmp_path)

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
