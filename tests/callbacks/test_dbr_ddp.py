"""Law 6 for D-BR: two processes train one detector, decide, and change phases as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.ddp_dbr import main
from tests.callbacks.helpers import LIGHTNING_WARNS
from tests.processes import two_processes

pytestmark = LIGHTNING_WARNS


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_decide_and_repair_as_one(tmp_path: Path) -> None:
    with two_processes("tests.callbacks.ddp_dbr", tmp_path):
        main(1, tmp_path)

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
