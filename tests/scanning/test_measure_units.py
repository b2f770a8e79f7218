"""NONE's measurement: one pass where the responses of all units can be kept, with the same figures as two."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from lightning_backdoor import NONECallback
from lightning_backdoor.scanning import measure_units
from lightning_backdoor.scanning.measure_units import Measured, UnitScan
from lightning_backdoor.scanning.scanner import DatasetScanner
from tests.contract.problem import WARNS, fit

pytestmark = WARNS


@pytest.mark.parametrize("strong", [0.3, 0.9999], ids=["confident", "a class without a confident sample"])
def test_one_pass_measures_what_two_do(strong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Measured] = []
    passes: list[str] = []
    measure, scan = UnitScan.measure, DatasetScanner.scan

    def noted(self: DatasetScanner, *args: Any, description: str, **kwargs: Any) -> Any:
        passes.append(description)
        return scan(self, *args, description=description, **kwargs)

    def both(self: UnitScan, trainer: Any, module: Any) -> Measured:
        self.strong = strong
        for most in (measure_units.KEPT_BYTES, 0):
            monkeypatch.setattr(measure_units, "KEPT_BYTES", most)
            found.append(measure(self, trainer, module))
            passes.append("")
        return found[0]

    monkeypatch.setattr(DatasetScanner, "scan", noted)
    monkeypatch.setattr(UnitScan, "measure", both)
    fit([NONECallback(response="report")], epochs=4)
    once, twice = found
    for field in fields(Measured):
        one, other = getattr(once, field.name), getattr(twice, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name
    again = ["NONE statistics"] * bool(once.unconfident)
    assert bool(again) == (strong > 0.5)
    assert passes == ["NONE statistics", *again, "", "NONE statistics", *again, "NONE responses", ""]
