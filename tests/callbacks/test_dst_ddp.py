"""Law 6 for D-ST: two processes decide and train as one, in both stages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.callbacks.helpers import LIGHTNING_WARNS
from tests.processes import two_processes

pytestmark = LIGHTNING_WARNS


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_decide_and_train_as_one(tmp_path: Path) -> None:
    with two_processes("tests.callbacks.ddp_dst", tmp_path):
        pass
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
