"""``python -m benchmarks.judged FOLDER``: what is decided on the files of ``python -m benchmarks.values``.

One row for each case and measurement: how many poisons are removed and how many others, by the gates alone and with the
test of both halves and of near-duplicates.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.values import CASES, file_name, load
from lightning_backdoor import functional

PARTS = {"half": ("half", "half_shift"), "end": ("end", "end_shift"), "units": ("units",)}


def removed(values: Tensor, found: dict[str, Tensor], pictures: Tensor, name: str, rate: float) -> str:
    """Poisons and others that a decision removes, and the label and the gate of each subpopulation."""
    agreement = None
    if "early" in found and name != "units":
        everything = torch.ones_like(found["poisoned"])
        agreement = functional.neighbor_agreement(found["early"], found["labels"], everything, gpu=False)
    decision = functional.decide(
        values, torch.zeros(len(values)), found["labels"], agreement=agreement, all_to_all=name == "units",
        pictures=pictures, false_alarm_rate=rate,
    )  # fmt: skip
    gone, gates = ~decision.keep, ", ".join(f"{one.label} {one.gate}" for one in decision.subpopulations)
    return f"{int((gone & found['poisoned']).sum())} and {int((gone & ~found['poisoned']).sum())} ({gates or 'none'})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the unpacked files")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the images of the same run")
    parser.add_argument("--rate", type=float, default=0.01, help="false-alarm rate")
    options = parser.parse_args()
    print("| case | samples | measured | poisons | clean kind | gates alone: poisons and others | with the test |")
    print("|---|---:|---|---:|---:|---|---|")
    for case in CASES:
        path = options.folder / f"{file_name(case)}.npz"
        if not path.exists():
            continue
        found, samples = load(path), CASES[case].samples(options.data)
        if not found["labels"].equal(samples.labels):
            raise SystemExit(f"{path} was made of other images than those of {options.data}.")
        pictures = functional.thumbnails(samples.images)
        for name, columns in PARTS.items():
            if all(column in found for column in columns):
                values = torch.cat([found[column] for column in columns], dim=1).half()
                told = [removed(values, found, pictures, name, rate) for rate in (math.inf, options.rate)]
                known = f"{len(values)} | {name} | {int(found['poisoned'].sum())} | {int(found['kind'].sum())}"
                print(f"| {case} | {known} | {told[0]} | {told[1]} |", flush=True)


if __name__ == "__main__":
    main()
