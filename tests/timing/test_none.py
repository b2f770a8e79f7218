"""What NONE's statistics cost beside a plain evaluation pass and beside loops over stored activations (printed)."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from lightning_backdoor.functional import HyperplaneStatistics
from lightning_backdoor.scanning.measure_units import UnitScan
from lightning_backdoor.surgery import find_units
from tests.scanning.helpers import LIGHTNING_WARNS
from tests.timing.test_ultraclean import opened, timed

pytestmark = [*LIGHTNING_WARNS, pytest.mark.benchmark]


def test_statistics_against_an_evaluation_pass(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(2)
    n = 4000
    trainer, module, loader, data = opened(n)
    scan = UnitScan(data, find_units(module.eval(), data.few(trainer, module)), strong=0.9, weak=0.1)

    def plain() -> None:
        module.eval()
        with torch.no_grad():
            torch.cat([module(images) for images, _ in loader])

    def ours() -> None:
        scan.statistics(trainer, module, 0.9)

    ours()
    plain()
    ratios = sorted(timed(ours) / timed(plain) for _ in range(5))
    with capsys.disabled():
        print(
            f"\nNONE statistics / evaluation pass, {n} images, {sum(scan.sizes)} units of {len(scan.sizes)} layers, "
            f"2 threads: {ratios[2]:.2f} (min {ratios[0]:.2f}, max {ratios[-1]:.2f})"
        )


def loops(activations: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """One number for every channel and class from activations that are held as float64, as the authors hold them."""
    activation_excess = np.zeros((activations.shape[1], probabilities.shape[1]))
    for unit in range(activations.shape[1]):
        for label in range(probabilities.shape[1]):
            unit_shift = activations[probabilities[:, label] > 0.9, unit]
            usual = activations[probabilities[:, label] < 0.1, unit]
            if len(unit_shift) and len(usual):
                activation_excess[unit, label] = unit_shift.max() - (usual.mean() + 3 * usual.std())
    return activation_excess.max(axis=1)


def test_statistics_against_loops_over_stored_activations(capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(2)
    n, units, classes = 10_000, 512, 10
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(n, units, generator=generator)
    probabilities = (8 * torch.randn(n, classes, generator=generator)).softmax(dim=1)
    stored = activations.double().numpy(), probabilities.numpy()

    def ours() -> torch.Tensor:
        statistics = HyperplaneStatistics(units, classes)
        for values, chances in zip(activations.split(128), probabilities.split(128), strict=True):
            statistics.update(values, chances)
        return statistics.scores()

    np.testing.assert_allclose(ours().numpy(), loops(*stored), atol=1e-6)
    ratios = sorted(timed(lambda: loops(*stored)) / timed(ours) for _ in range(3))
    with capsys.disabled():
        print(f"\nNONE statistics, {n} samples, {units} units: loops take {ratios[1]:.0f} times as long")


MEMORY = """
import gc, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from lightning_backdoor.functional import HyperplaneStatistics
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
def run(n):
    statistics = HyperplaneStatistics(512, 10)
    for start in range(0, n, 100):
        statistics.update(torch.randn(100, 512), torch.randn(100, 10).softmax(dim=1))
    statistics.scores()
run(1000)
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
run(int(sys.argv[1]))
print(status("VmHWM") - before)
"""


def test_memory_of_the_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    """Growth of the peak from a thousand to a hundred thousand samples."""
    lines = []
    for n in (1_000, 10_000, 100_000):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MEMORY, str(n)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        lines.append(f"{n}: {int(done.stdout) / 2**20:.1f} MB")
    with capsys.disabled():
        print("\nNONE statistics, growth of peak memory by samples: " + "; ".join(lines))
