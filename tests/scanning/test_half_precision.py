"""Weights in float16: what a defence trains by its own optimizer stays finite, and learns."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_backdoor.scanning.probe import trained_without
from lightning_backdoor.scanning.scanner import ScanOptions, open_scanner
from tests.contract.problem import IMAGES, WARNS, Net, fit, planted
from tests.contract.registry import of

pytestmark = WARNS


class HalfNet(Net):
    """Takes images of 8 bits to the precision of the weights."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body((images.float() / 255).to(self.head.weight.dtype)).flatten(1))
        return logits


def half_net() -> HalfNet:
    torch.manual_seed(0)
    return HalfNet()


@pytest.mark.parametrize("start", ["copy", "drawn anew"])
def test_a_copy_learns(start: str) -> None:
    labels, found = planted().targets, []

    class Training(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            data = open_scanner(trainer, pl_module, trainer.train_dataloader, ScanOptions())
            initial = {name: value.clone() for name, value in pl_module.state_dict().items()}
            twin, _ = trained_without(
                trainer,
                pl_module,
                data,
                left_out=torch.zeros(IMAGES, dtype=torch.bool),
                initial=initial if start == "copy" else None,
                steps=60,
            )
            assert twin.head.weight.dtype == torch.float16
            found.append(data.predict(trainer, twin, description="answers"))

    fit([Training()], module=half_net(), epochs=1, precision="16-true")
    assert (found[0] == labels).float().mean() > 0.8


@pytest.mark.parametrize("name", ["DBRCallback", "DSTCallback"])
def test_a_defense_trains_to_its_end(name: str) -> None:
    entry = of(name)
    callback = entry.make()
    run = fit([callback], module=half_net(), precision="16-true")
    assert entry.acted(callback, run.trainer)
    assert all(bool(value.isfinite().all()) for value in run.module.state_dict().values())
