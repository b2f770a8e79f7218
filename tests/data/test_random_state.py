"""Random streams that come back as they were."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from lightning_backdoor.data.random_state import isolated_rng, seed_all


def test_isolated_rng_gives_all_streams_back_and_takes_a_seed() -> None:
    def draw() -> tuple[float, ...]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    with isolated_rng(1):
        expected = draw()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    undisturbed = draw()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    with isolated_rng(1):
        assert draw() == expected
    with pytest.raises(KeyError), isolated_rng():  # noqa: PT012
        draw()
        raise KeyError
    assert draw() == undisturbed


def test_a_seed_does_not_wait_for_cuda_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.manual_seed`` leaves one behind, which would overwrite the user's CUDA seed later."""

    def refuse(*args: Any) -> None:
        raise AssertionError("CUDA was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with isolated_rng(3):
        seed_all(2**64 - 1)
