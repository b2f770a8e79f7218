"""How much faster than the authors' per-image loops? Ratios, measured in turns in one run, without a timed assertion.

Run on two threads: ``OMP_NUM_THREADS=2 pytest -n 0 -m benchmark tests/timing/test_denoising.py -s``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter
from torch import Tensor

from lightning_backdoor.functional.denoising import local_median, nl_means
from lightning_backdoor.functional.native import native_kernel

THREADS = 2
JOB = 20_000  # images over which one-time costs are spread
ROUNDS = 5


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(THREADS)
    cv2.setNumThreads(THREADS)
    yield
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])


def photographs(number: int, side: int) -> Tensor:
    """Structure and a little noise, uint8 (number, 3, side, side)."""
    coarse = torch.rand(number, 3, side // 8 + 2, side // 8 + 2) * 220
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    return (smooth + torch.randn(number, 3, side, side) * 4 + 16).clamp(0, 255).to(torch.uint8)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def once() -> float:
    """Return the one-time cost of `nl_means`: compiling in a process that has not done so yet."""
    native_kernel.cache_clear()
    return seconds(lambda: native_kernel(7))


def compare(
    benchmark: Any, name: str, ours: Callable[[], Any], theirs: Callable[[], Any], sizes: tuple[int, int]
) -> None:
    """Time both in turns, store and print the ratio of images per second for a job of 20,000 images."""
    one_time = once() if "nl_means" in name else 0.0
    ours()  # loads libraries
    pairs = [(seconds(ours) / sizes[0], seconds(theirs) / sizes[1]) for _ in range(ROUNDS)]
    ratios = [their / (our + one_time / JOB) for our, their in pairs]
    benchmark.extra_info.update(
        ratio=statistics.median(ratios),
        ratios=ratios,
        one_time_seconds=one_time,
        images_per_second=1 / statistics.median(our for our, _ in pairs),
        reference_images_per_second=1 / statistics.median(their for _, their in pairs),
        threads=THREADS,
    )
    benchmark.pedantic(ours, rounds=1)
    info = benchmark.extra_info
    print(
        f"\n{name}: {info['ratio']:.1f}x (rounds {', '.join(f'{r:.1f}' for r in ratios)}); "
        f"{info['images_per_second']:.0f} against {info['reference_images_per_second']:.0f} images/s, "
        f"one-time cost {one_time:.2f} s over {JOB} images, {THREADS} threads"
    )


@pytest.mark.benchmark
@pytest.mark.parametrize(("side", "ours", "theirs"), [(32, 3000, 200), (224, 64, 12)])
def test_nl_means_against_the_opencv_loop(benchmark: Any, side: int, ours: int, theirs: int) -> None:
    images = photographs(ours, side)
    array = np.ascontiguousarray(images[:theirs].permute(0, 2, 3, 1).numpy())
    compare(
        benchmark,
        f"nl_means {side}x{side}",
        lambda: nl_means(images),
        lambda: [cv2.fastNlMeansDenoisingColored(image, None, 5, 5, 7, 13) for image in array],
        (ours, theirs),
    )


@pytest.mark.benchmark
@pytest.mark.parametrize(("side", "ours", "theirs"), [(32, 5000, 500), (224, 100, 10)])
def test_local_median_against_the_scipy_loop(benchmark: Any, side: int, ours: int, theirs: int) -> None:
    images = photographs(ours, side)
    array = np.ascontiguousarray(images[:theirs].permute(0, 2, 3, 1).numpy())
    compare(
        benchmark,
        f"local_median {side}x{side}",
        lambda: local_median(images),
        lambda: [median_filter(image, size=(2, 2, 3)) for image in array],
        (ours, theirs),
    )
