"""What the measurement of audits counts and prints."""

from __future__ import annotations

import torch

from benchmarks.audited import HEAD, counted, in_findings, table
from lightning_backdoor import Finding, Verdict


def verdict(*positions: int) -> Verdict:
    found = Finding(0, torch.tensor(positions), "strict", (), torch.tensor([0]), torch.ones(1), 0.0)
    keep = torch.ones(6, dtype=torch.bool)
    return Verdict(torch.zeros(6), keep, 0.5, "gate", findings=(found,))


def test_samples_of_any_finding_are_counted() -> None:
    found = in_findings([verdict(0, 1), verdict(1, 4)])
    assert found.tolist() == [True, True, False, False, True, False]
    assert counted(found, torch.tensor([True, True, True, False, False, False])) == (2, 1)


def test_a_row_has_a_cell_for_every_column() -> None:
    passes = {f"{name}_passes": 3.14 for name in ("features", "units", "both")}
    row = {"attack": "clean", "asr": 0.1, "poisons": 0, "callbacks": [1, 2], "audit": [3, 4], "alike": 0.5, **passes}
    assert table([row]).splitlines()[-1] == "| clean | 10.0 | 0 | 1, 2 | 3, 4 | 50.00 % | 3.1 | 3.1 | 3.1 |"
    assert len({line.count("|") for line in table([row]).splitlines()}) == 1
    assert "ASR" in HEAD
