"""Defences of which the benchmark changes one part."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.data import cifar10
from benchmarks.protocols import Setting
from benchmarks.training import train_network
from benchmarks.variants import RandomReset
from tests.benchmarks.helpers import pack


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_reset_treats_as_many_units_once(tmp_path: Path) -> None:
    pack(tmp_path, "train", 260, 0)
    train = cifar10(tmp_path, "train")
    labels, keep = train.tensors[1], torch.arange(len(train)) >= 20
    callback = RandomReset({"network.0.0": 2, "network.1.0": 3}, labels, keep)
    train_network(train, [callback], Setting(images=260, epochs=1), 0, None)
    (only,) = callback.history
    assert Counter(layer for layer, *_ in only.units) == {"network.0.0": 2, "network.1.0": 3}
    assert only.removed == 20
    assert len(only.accuracies) == 2, "before the round and after it"
    assert torch.equal(callback.verdict.keep, keep)
