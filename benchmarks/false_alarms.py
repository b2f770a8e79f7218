"""``python -m benchmarks.false_alarms``: how often clean data are taken for poisoned, on sets without any group.

Every set is made of class centres and noise: Gaussian, rectified (most values are zero, as behind a ReLU) or
heavy-tailed, with a few factors that all units share, or with all of that. There is no second group in any class, so
that a subpopulation in any label is a false alarm. Printed is, for each kind of noise, in how many sets there is one,
by the gates alone and with the test of both halves; one row for each kind of noise is added to ``--results``.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import rows
from lightning_backdoor import functional

SHAPES = (
    (2, 100, 96), (2, 500, 96), (5, 60, 128), (10, 25, 256), (10, 25, 512), (10, 200, 128), (10, 50, 512),
    (20, 30, 512), (43, 25, 512), (43, 60, 96), (100, 25, 512), (100, 50, 128),
)  # fmt: skip
"""Classes, samples of each, units."""
NORMS = (8.0, 12.0, 22.0)
"""Of the class centres; noise of a unit has a standard deviation of about one."""

Noise = Callable[[int, int, torch.Generator], Tensor]


def gaussian(samples: int, units: int, generator: torch.Generator) -> Tensor:
    """Independent and normal."""
    return torch.randn(samples, units, generator=generator)


def heavy(samples: int, units: int, generator: torch.Generator) -> Tensor:
    """Student's t with three degrees of freedom."""
    spread = torch.randn(3, samples, units, generator=generator).square().mean(dim=0)
    return gaussian(samples, units, generator) / spread.sqrt()


def correlated(samples: int, units: int, generator: torch.Generator) -> Tensor:
    """Five factors in all units beside noise of each."""
    factors = torch.randn(samples, 5, generator=generator) @ torch.randn(5, units, generator=generator)
    return gaussian(samples, units, generator) + factors / 2


def all_together(samples: int, units: int, generator: torch.Generator) -> Tensor:
    """Heavy-tailed factors beside noise."""
    factors = heavy(samples, 3, generator) @ torch.randn(3, units, generator=generator)
    return gaussian(samples, units, generator) + factors / 2


NOISES: dict[str, tuple[Noise, bool]] = {
    "Gaussian": (gaussian, False),
    "rectified": (gaussian, True),
    "heavy-tailed": (heavy, False),
    "heavy-tailed, rectified": (heavy, True),
    "correlated": (correlated, False),
    "correlated, heavy-tailed, rectified": (all_together, True),
}
"""Kinds of noise, and whether values are rectified after one has been taken off."""


def made(noise: str, shape: tuple[int, int, int], norm: float, seed: int) -> tuple[Tensor, Tensor]:
    """Values ``(N, U)`` and labels ``(N,)`` of a set without groups."""
    classes, each, units = shape
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(each)
    centers = torch.nn.functional.normalize(torch.randn(classes, units, generator=generator), dim=1)
    draw, rectified = NOISES[noise]
    values = norm * centers[labels] + draw(len(labels), units, generator)
    return (values - 1).relu() if rectified else values, labels


def alarms(values: Tensor, labels: Tensor) -> tuple[int, int]:
    """Labels with a subpopulation, by the gates alone and with the test."""
    bare = functional.find_subpopulations(values, labels, false_alarm_rate=math.inf)
    tested = functional.find_subpopulations(values, labels) if bare else []
    return len(bare), len(tested)


def judged(case: tuple[str, tuple[int, int, int], float, int]) -> tuple[str, int, int]:
    """The kind of noise of a set, and its alarms."""
    torch.set_num_threads(1)
    return case[0], *alarms(*made(*case))


def cases(repeats: int) -> list[tuple[str, tuple[int, int, int], float, int]]:
    """The grid, as many times as is asked for, each time with other seeds."""
    grid = [(seed, *rest) for seed, rest in enumerate(product(range(repeats), SHAPES, NORMS, NOISES))]
    return [(noise, shape, norm, seed) for seed, _, shape, norm, noise in grid]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help=f"of the grid, of {len(cases(1))} sets each")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "false_alarms.jsonl")
    options = parser.parse_args()
    started, wanted = time.perf_counter(), cases(options.repeats)
    counts: dict[str, list[int]] = defaultdict(lambda: [0] * 5)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for noise, bare, tested in pool.imap_unordered(judged, wanted):
            found = 1, bare > 0, bare, tested > 0, tested
            counts[noise] = [a + b for a, b in zip(counts[noise], found, strict=True)]
            if time.perf_counter() - started > options.budget:
                print("The time is spent: the table is of a part of the sets.")
                break
        pool.terminate()
    about = {"seconds": round(time.perf_counter() - started), **rows.circumstances("benchmarks.false_alarms", "cpu")}
    for noise, row in counts.items():
        names = "sets", "alarms_gates_alone", "labels_gates_alone", "alarms_with_test", "labels_with_test"
        rows.append(options.results, {"noise": noise, **dict(zip(names, row, strict=True)), **about})
    print("| noise | sets | alarms: gates alone | in labels | with the test | in labels |")
    print("|---|---:|---:|---:|---:|---:|")
    for noise, row in counts.items():
        print(f"| {noise} | {' | '.join(map(str, row))} |")
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    print(f"| all | {' | '.join(map(str, total))} |\n\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
