"""Law 6: two processes give the verdicts of one, and train the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.baselines.ddp_baselines import callbacks, main
from tests.callbacks.helpers import LIGHTNING_WARNS
from tests.processes import two_processes

pytestmark = LIGHTNING_WARNS


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_decide_and_train_as_one(tmp_path: Path) -> None:
    with two_processes("tests.baselines.ddp_baselines", tmp_path):
        main(1, tmp_path)

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
