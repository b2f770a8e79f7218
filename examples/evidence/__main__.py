"""``python -m examples.evidence run|table``: measure every cell once, and print what was measured.

One JSON line per finished cell in ``results.jsonl``; a run that was interrupted goes on with the first missing cell.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from examples.evidence.cells import grid
from examples.evidence.data import packed_cifar10, per_class
from examples.evidence.run import run_cell
from examples.evidence.table import markdown

RESULTS = Path(__file__).with_name("results.jsonl")
REFERENCE = {"random": "ultraclean", "random-reset": "NONE"}


def rows(path: Path) -> list[dict[str, Any]]:
    """Finished cells; a line that an interruption cut short does not count."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def run(options: argparse.Namespace) -> None:
    """Run the missing cells."""
    torch.set_num_threads(options.threads)
    options.cache.mkdir(exist_ok=True)
    train = per_class(packed_cifar10(options.data, "train"), options.images // 10)
    test = packed_cifar10(options.data, "test")
    for attack, defence in grid():
        done = {(row["attack"], row["defence"], row["seed"]): row for row in rows(options.results)}
        if (attack, defence, options.seed) in done:
            continue
        if options.only and not any(word in f"{attack}/{defence}/" for word in options.only):
            continue
        reference = done.get((attack, REFERENCE.get(defence, ""), options.seed), {})
        if defence in REFERENCE and reference.get("removed", 0) == 0:
            continue
        row = run_cell(
            train, test, attack, defence,
            epochs=options.epochs, seed=options.seed, reference=reference, cache=options.cache,
        )  # fmt: skip
        row["command"] = "python -m examples.evidence " + " ".join(sys.argv[1:])
        with options.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{attack:12} {defence:18} accuracy {row['clean_accuracy']:.3f} ASR {row['asr']:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of cifar10_<split>.npz")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="folder for shared checkpoints")
    parser.add_argument("--images", type=int, default=20_000, help="training images, the same number of each class")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="run only cells whose attack/defence/ contains one of these words")
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    if options.action == "run":
        run(options)
    else:
        print(markdown(rows(options.results)))


if __name__ == "__main__":
    main()
