"""What grows with the number of training images, in seconds and bytes, up to a million (printed and checked)."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.benchmark

FIXED = 2**25  # bytes that a step may take whatever N is
BYTES = {
    "an epoch of the kept samples": 11 + 8 + 36 + 8,  # mask; torch's order of it, as a tensor and as Python's numbers
    "an epoch of repair": 8 + 8 + 8,
    "verdict, saved and loaded": 2 * 13,
    "NONE's statistics": 0,
    "decision": 2 * 64 + 8 * 16,  # two for each unit; sorts and masks
    "early neighbours": 2 * 64 + 8 * 4,  # two for each feature; labels' agreement and positions
    "report": 220,
}
"""Most bytes of memory for each image, beyond what was there."""
SLACK = 3  # growth of the time for one image from a tenth of the images: others use the machine, too; squares give 10
LONG = 0.5  # seconds below which times say little


def run(n: int) -> Any:
    command = [sys.executable, "-W", "ignore", "-m", "tests.timing.scale", str(n)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_time_and_memory_by_the_number_of_images(capsys: pytest.CaptureFixture[str]) -> None:
    found = [run(n) for n in (10_000, 100_000, 1_000_000)]
    with capsys.disabled():
        for one in found:
            print(f"\n{one['n']:,} images; files in bytes: {one['files']}")
            for title, step in one["steps"].items():
                each = f"{1e6 * step['seconds'] / one['n']:7.2f} µs, {step['peak'] / one['n']:7.1f} bytes"
                print(f"  {title:30} {step['seconds']:7.2f} s, {step['peak'] / 2**20:7.1f} MiB; for each image {each}")
    for one in found:
        for title, most in BYTES.items():
            assert one["steps"][title]["peak"] <= most * one["n"] + FIXED, (one["n"], title)
        assert one["files"]["v.pt"] <= 13 * one["n"] + 2**14
        assert one["files"]["verdict.csv"] <= 32 * one["n"] + 2**10
        assert one["files"]["report.html"] <= 2**19
    for small, large in itertools.pairwise(found):
        for title, step in large["steps"].items():
            if step["seconds"] > LONG:
                before = max(small["steps"][title]["seconds"], LONG)
                assert step["seconds"] <= 10 * SLACK * before, (large["n"], title)
