"""Law 6: two processes give the same verdict as one, draw what is kept between them, and go back together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks.ddp_ultraclean import SAMPLES, main
from tests.callbacks.helpers import LIGHTNING_WARNS
from tests.processes import two_processes

pytestmark = LIGHTNING_WARNS


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_decide_and_train_as_one(tmp_path: Path) -> None:
    with two_processes("tests.callbacks.ddp_ultraclean", tmp_path):
        main(1, tmp_path)

    def load(name: str, processes: int, rank: int) -> Any:
        return torch.load(tmp_path / f"{name}-{processes}-{rank}.pt", weights_only=True)

    one, first, second = load("fixed", 1, 0), load("fixed", 2, 0), load("fixed", 2, 1)
    for rank in (first, second):
        assert torch.equal(rank["scores"], one["scores"])
        assert torch.equal(rank["keep"], one["keep"])
    assert int((~one["keep"]).sum()) == int(0.2 * SAMPLES)

    first, second = load("learning", 2, 0), load("learning", 2, 1)
    assert torch.equal(first["keep"], second["keep"])
    assert torch.equal(first["scores"], second["scores"])
    assert first["counts"] == second["counts"] == (2, 2 * 4, 2), "51 kept: 26 on each rank, four batches"
    parameters = [name for name in first["weights"] if "running" not in name]
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in parameters)
    kept = set(first["keep"].nonzero().flatten().tolist())
    assert [epoch for epoch, _ in first["epochs"]] == [0, 1, 0, 1]
    for mine, theirs in list(zip(first["epochs"], second["epochs"], strict=True))[2:]:
        assert len(mine[1]) == len(theirs[1]) == 26
        assert set(mine[1]) | set(theirs[1]) == kept
