"""``python -m benchmarks.judged``: what is decided on many small training sets, from what was measured on them.

``judged FOLDER`` reads the files of :mod:`benchmarks.values`. ``judged --train NAMES`` trains the networks itself, in
several processes, and keeps the decisions alone, one row for each case and measurement, in ``--results``; ``clean``
stands for the sixty clean trainings, ``name@3`` for a case with another seed. ``judged --summary`` prints the rows, of
each case and measurement the newest.

A decision is made by the gates alone and with the test of both halves and of near-duplicates.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.samples import Samples
from benchmarks.values import CASES, CLEAN_TRAININGS, case_of, file_name, load, run
from lightning_backdoor import functional

PARTS = {
    "half": ("half", "half_shift"), "end": ("end", "end_shift"), "units": ("units",), "early units": ("units", "early"),
}  # fmt: skip
"""UltraClean's decision half way and at the end, NONE's, and D-BR's, which has early neighbors beside units: of the
model at the end here, not of its copy."""
RESULTS = Path(__file__).parent / "judged.jsonl"


def decided(values: Tensor, found: dict[str, Tensor], pictures: Tensor, name: str, rate: float) -> rows.Row:
    """Poisons and others that a decision removes, and the label and the gate of each subpopulation."""
    agreement = None
    if "early" in found and name != "units":  # NONE measures none
        everything = torch.ones_like(found["poisoned"])
        agreement = functional.neighbor_agreement(found["early"], found["labels"], everything, gpu=False)
    decision = functional.decide(
        values, torch.zeros(len(values)), found["labels"], agreement=agreement, all_to_all=name == "units",
        pictures=pictures, false_alarm_rate=rate,
    )  # fmt: skip
    gone, gates = ~decision.keep, [f"{one.label} {one.gate}" for one in decision.subpopulations]
    return {
        "poisons_removed": int((gone & found["poisoned"]).sum()),
        "others_removed": int((gone & ~found["poisoned"]).sum()),
        "gates": gates,
    }


def judged(case: str, found: dict[str, Tensor], samples: Samples, rate: float) -> Iterator[rows.Row]:
    """One row for each measurement of a case: the decision by the gates alone, and with the test."""
    pictures = functional.thumbnails(samples.images)
    poisoned, kind = found["poisoned"], found["kind"]
    taught = found["end_predicted"][poisoned] == found["labels"][poisoned]
    for name, columns in PARTS.items():
        if all(column in found for column in columns):
            values = torch.cat([found[column] for column in columns if column != "early"], dim=1).half()
            yield {
                "case": case,
                "measured": name,
                "samples": len(values),
                "poisons": int(poisoned.sum()),
                "kind": int(kind.sum()),
                "taught": round(float(taught.float().mean()), 4) if len(taught) else None,
                "gates_alone": decided(values, found, pictures, name, math.inf),
                "with_test": decided(values, found, pictures, name, rate),
            }


def _trained(name: str, options: argparse.Namespace, last: float) -> tuple[str, list[rows.Row], str]:
    if time.time() > last:
        return name, [], "no time left"
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path, seconds = run(name, options.data, Path(folder), options.device, tiny=options.tiny)
            samples = case_of(name, tiny=options.tiny).samples(options.data)
            return name, list(judged(name, load(path), samples, options.rate)), f"{seconds:.1f} s"
    except Exception as error:  # one case that fails must not end the others
        return name, [], repr(error)


def train_all(names: list[str], options: argparse.Namespace) -> None:
    """Train and decide in several processes until the time is spent; cases that have rows are not run again."""
    done = {row["case"] for row in rows.read(options.results)}
    wanted, end = [name for name in names if name not in done], time.time() + options.budget
    about = rows.circumstances("benchmarks.judged", options.device)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        results = pool.imap_unordered(partial(_trained, options=options, last=end - options.reserve), wanted)
        try:
            for _ in wanted:
                name, found, told = results.next(timeout=max(end - time.time(), 0.1))
                print(f"{name:28} {told}", flush=True)
                for row in found:
                    rows.append(options.results, {**row, "rate": options.rate, **about})
        except multiprocessing.TimeoutError:
            print("The time is spent.")
        pool.terminate()


def told(row: rows.Row, rule: str) -> str:
    """A decision as a cell of a table: poisons and others removed, and the gates."""
    found = row[rule]
    return f"{found['poisons_removed']} and {found['others_removed']} ({', '.join(found['gates']) or 'none'})"


def print_table(found: list[rows.Row]) -> None:
    """Print one line per row."""
    print("| case | samples | measured | poisons | clean kind | gates alone: poisons and others | with the test |")
    print("|---|---:|---|---:|---:|---|---|")
    for row in found:
        known = f"{row['case']} | {row['samples']} | {row['measured']} | {row['poisons']} | {row['kind']}"
        print(f"| {known} | {told(row, 'gates_alone')} | {told(row, 'with_test')} |", flush=True)


def print_alarms(found: list[rows.Row]) -> None:
    """Print how many clean trainings raise an alarm in any of the measurements, by case."""
    clean = [row for row in found if not row["poisons"] and row["case"] in CLEAN_TRAININGS]
    print("\n| clean case | trainings | alarms: gates alone | removed | with the test | removed |")
    print("|---|---:|---:|---:|---:|---:|")
    totals = [0] * 5
    for base in dict.fromkeys(row["case"].partition("@")[0] for row in clean):
        mine = [row for row in clean if row["case"].partition("@")[0] == base]
        counts = [len({row["case"] for row in mine})]
        for rule in ("gates_alone", "with_test"):
            counts.append(len({row["case"] for row in mine if row[rule]["gates"]}))
            counts.append(sum(row[rule]["others_removed"] for row in mine))
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
        print(f"| {base} | {' | '.join(map(str, counts))} |")
    print(f"| all | {' | '.join(map(str, totals))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="of the unpacked files of benchmarks.values")
    parser.add_argument("--train", nargs="+", metavar="NAME", help="train and judge these cases")
    parser.add_argument("--summary", action="store_true", help="print the rows of --results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the images of the same run")
    parser.add_argument("--rate", type=float, default=0.01, help="false-alarm rate")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--budget", type=float, default=3600, help="seconds")
    parser.add_argument("--reserve", type=float, default=20, help="seconds before the end when no case begins any more")
    parser.add_argument("--tiny", action="store_true", help="a few images and epochs: does everything work here?")
    options = parser.parse_args()
    if options.train:
        names = [each for name in options.train for each in (CLEAN_TRAININGS if name == "clean" else [name])]
        train_all(names, options)
    if options.summary:
        read = rows.read(options.results)
        found = list({(row["case"], row["measured"]): row for row in read}.values())  # of each the newest
        print_table([row for row in found if row["case"] not in CLEAN_TRAININGS])
        print_alarms(found)
    if options.folder is not None:
        table: list[rows.Row] = []
        for case in CASES:
            path = options.folder / f"{file_name(case)}.npz"
            if not path.exists():
                continue
            measured, samples = load(path), CASES[case].samples(options.data)
            if not measured["labels"].equal(samples.labels):
                raise SystemExit(f"{path} was made of other images than those of {options.data}.")
            table += judged(case, measured, samples, options.rate)
        print_table(table)


if __name__ == "__main__":
    main()
