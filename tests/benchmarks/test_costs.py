"""Rows of costs: what is counted, and the table."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.cost import measured
from benchmarks.costs import costs_table

ROW: dict[str, Any] = {
    "source": "digits", "images": 1400, "epochs": 12, "attack": "badnets-5%", "defence": "undefended", "seed": 0,
    "clean_accuracy": 0.97, "asr": 1.0, "poisons": 70, "cpu_seconds": 10.0, "epoch_equivalents": 11.5,
    "versions": {"commit": "abc1234"}, "label": "before",
}  # fmt: skip
DEFENDED = {
    **ROW, "defence": "ultraclean", "asr": 0.0, "cpu_seconds": 15.0, "epoch_equivalents": 19.25, "removed": 71,
    "removed_others": 1, "events": ["epoch 6", "epoch 12 of run 2"],
}  # fmt: skip


def test_the_table_has_ratios_to_the_undefended_run_with_the_same_label() -> None:
    last = costs_table([ROW, DEFENDED]).splitlines()[-1]
    told = "abc1234 | 19.2 | 1.50 | 70 of 70 | 1 | 97.0 / 100.0 | 97.0 / 0.0 | epoch 6, epoch 12 of run 2 |"
    assert last == f"| digits 1,400 | badnets-5% | ultraclean | before | {told}"
    assert "| 19.2 | – | 70 of 70 | 1 | – |" in costs_table([ROW, {**DEFENDED, "label": "after"}])


def test_networks_of_a_kind_are_counted() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    with measured("cpu", nn.Sequential) as meter:
        network(torch.zeros(5, 2))
        with torch.no_grad():
            network(torch.zeros(3, 2))
    assert (meter.forward, meter.backward) == (8, 5)
