"""The UltraClean scan with cached denoised images, against plain evaluation passes (printed, not asserted)."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_backdoor.scanning.measure_denoised import DenoisedScan
from lightning_backdoor.scanning.scanner import DatasetScanner, ScanOptions, open_scanner
from tests.scanning.helpers import LIGHTNING_WARNS, Trap, make_trainer

pytestmark = [*LIGHTNING_WARNS, pytest.mark.benchmark]


class Images(Dataset[tuple[Tensor, int]]):
    """uint8 images ``(n, 3, 32, 32)`` that are normalised when they are read."""

    def __init__(self, n: int) -> None:
        self.pixels = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index].float() / 127.5 - 1, index % 10


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(images + self.body(images))


class Model(Trap):
    """A ReLU ResNet of 0.3 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        stem = [self.down(3, 24, 1), Block(24), self.down(24, 48, 2), Block(48), self.down(48, 80, 2), Block(80)]
        self.net = nn.Sequential(*stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(80, 10))

    @staticmethod
    def down(before: int, after: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits


def opened(n: int) -> tuple[Trainer, Model, DataLoader[Any], DatasetScanner]:
    """A Trainer as in the middle of fit, and its training set."""
    module, trainer = Model(), make_trainer([])
    loader = DataLoader(Images(n), batch_size=128)
    trainer.strategy.connect(module)
    trainer._data_connector.attach_datamodule(module)
    module.trainer = trainer
    trainer.training = True
    return trainer, module, loader, open_scanner(trainer, module, loader, ScanOptions(mean=(0.5,) * 3, std=(0.5,) * 3))


def prepared(n: int) -> tuple[Trainer, Model, DataLoader[Any], DenoisedScan]:
    """The same with UltraClean's scan."""
    trainer, module, loader, data = opened(n)
    return trainer, module, loader, DenoisedScan(data, world_size=1, cache_bytes=2**31, softmax=False)


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def test_scan_against_three_evaluation_passes(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(2)
    n = 4000
    trainer, module, loader, scanner = prepared(n)

    def plain() -> None:
        module.eval()
        with torch.no_grad():
            for _ in range(3):
                torch.cat([module(images) for images, _ in loader])

    def ours() -> None:
        scanner.run(trainer, module)

    first = timed(ours)
    plain()
    ratios = sorted(timed(ours) / timed(plain) for _ in range(5))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    with capsys.disabled():
        print(
            f"\nUltraClean scan (cached) / three evaluation passes, {n} images, {parameters / 1e6:.2f} M parameters, "
            f"2 threads: {ratios[2]:.2f} (min {ratios[0]:.2f}, max {ratios[-1]:.2f}); first scan {first:.1f} s"
        )
    scanner.close()


MEMORY = """
import gc, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from tests.timing.test_ultraclean import prepared
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
def run(n):
    trainer, module, loader, scanner = prepared(n)
    found = scanner.run(trainer, module)
    held = sum(value.numel() * value.element_size() for value in found.values())
    return held + sum(store._values.nbytes for store in scanner._stores) + loader.dataset.pixels.nbytes
run(256)
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
before = status("VmRSS")
held = run(int(sys.argv[1]))
print(status("VmHWM") - before, held)
"""


def test_memory_beyond_results_and_cache(capsys: pytest.CaptureFixture[str]) -> None:
    """Peak resident memory after a small warm-up scan, less the data, the results and the uint8 cache."""
    lines = []
    for n in (1000, 8000):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MEMORY, str(n)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        grown, held = map(int, done.stdout.split()[-2:])
        lines.append(f"{n} images: {(grown - held) / 2**20:.1f} MB beyond {held / 2**20:.1f} MB")
    with capsys.disabled():
        print("\nUltraClean scan, growth of peak memory: " + "; ".join(lines))
