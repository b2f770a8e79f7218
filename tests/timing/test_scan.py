"""How much longer a scan takes than a plain evaluation pass over the same loader (printed, not asserted)."""

from __future__ import annotations

import time
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_backdoor.data.views import scan_loader
from lightning_backdoor.scanning.isolation import prepare_batch
from lightning_backdoor.scanning.outputs import call_model
from lightning_backdoor.scanning.scan import scan
from tests.scanning.helpers import LIGHTNING_WARNS, Trap, make_trainer

pytestmark = [*LIGHTNING_WARNS, pytest.mark.benchmark]


class Model(Trap):
    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("test_resnet", num_classes=10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits


def test_scan_against_plain_evaluation(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(2)
    n, module, trainer = 512, Model(), make_trainer([])
    loader = DataLoader(TensorDataset(torch.randn(n, 3, 32, 32), torch.arange(n) % 10), batch_size=128)
    trainer.strategy.connect(module)
    trainer._data_connector.attach_datamodule(module)
    module.trainer = trainer
    trainer.training = True

    def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"logits": call_model(module, prepare_batch(trainer, module, batch)[0])}

    def plain() -> Tensor:
        module.eval()
        with torch.no_grad():
            return torch.cat([module(images) for images, _ in loader])

    def timed(call: Any) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    def ours() -> dict[str, Tensor]:
        view = scan_loader(loader, range(n), seed=0)
        return scan(trainer, module, view, step, description="benchmark")

    plain()
    ratios = sorted(timed(ours) / timed(plain) for _ in range(3))
    benchmark.pedantic(ours, rounds=3)
    with capsys.disabled():
        print(
            f"\nscan / plain evaluation pass, {n} images: {ratios[1]:.2f} (min {ratios[0]:.2f}, max {ratios[-1]:.2f})"
        )
