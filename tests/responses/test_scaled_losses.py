"""Losses that a gradient scaler has multiplied (16-mixed), on the CPU: the scale changes no training of a response."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision

from lightning_backdoor.responses import ascent
from tests.contract.problem import WARNS, Run, fit
from tests.contract.registry import GIVEN, of

pytestmark = [pytest.mark.cpu, *WARNS]

RESPONSES: dict[str, tuple[str, dict[str, Any]]] = {
    "unlearn": ("DBRCallback", {"verdict": GIVEN}),
    "unlearn as in the paper": ("DBRCallback", {"verdict": GIVEN, "paper_loop": True}),
    "two stages": ("DSTCallback", {"verdict": GIVEN}),
    "ABL": ("ABL", {}),
    "reset": ("NONECallback", {}),
}


def trained(name: str, scale: float, **settings: Any) -> Run:
    """A fit in fp16 whose scaler keeps its first scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
    entry = of(name)
    callback = entry.cls(
        **{
            **{
                key: entry.acting[key]
                for key in entry.acting
                if "verdict" not in settings or key in ("epochs", "extra_epochs")
            },
            **settings,
        }
    )
    run = fit([callback], plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert entry.acted(callback, run.trainer)
    assert scaler.get_scale() == scale, "no step was left out"
    return run


def difference(one: Run, other: Run) -> float:
    """Largest difference of a weight."""
    pairs = zip(one.module.parameters(), other.module.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("what", RESPONSES)
def test_the_scale_changes_no_weight_beyond_rounding(what: str) -> None:
    name, settings = RESPONSES[what]
    assert difference(trained(name, 1.0, **settings), trained(name, 2.0**8, **settings)) < 5e-3


def test_a_loss_that_is_put_in_without_the_scale_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ascent, "_precision_scale", lambda trainer: 1.0)
    name, settings = RESPONSES["unlearn"]
    assert difference(trained(name, 1.0, **settings), trained(name, 2.0**8, **settings)) > 8e-3
