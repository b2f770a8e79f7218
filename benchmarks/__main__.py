"""``python -m benchmarks run|table|results|plot``: measure every cell once, and show what was measured.

``run`` goes through the cells of a protocol (``--protocol``), one JSON line per finished cell in ``results.jsonl``; a
run that was interrupted goes on with the first missing cell, and ``run --list`` says which there are. ``table`` prints
the rows, ``results`` writes ``RESULTS.md`` and ``plot`` its figures.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import command, rows
from benchmarks.data import cifar10, dataset_name, per_class
from benchmarks.plot import draw
from benchmarks.protocols import PROTOCOLS, Cell, hours
from benchmarks.results import page
from benchmarks.run import run_cell
from benchmarks.sections import ABLATIONS
from benchmarks.table import markdown

RESULTS = Path(__file__).with_name("results.jsonl")
REFERENCE = {"random": "ultraclean", "random-reset": "NONE"}


def cells(options: argparse.Namespace) -> list[Cell]:
    """The cells of the protocol that were asked for, in its order, with the changes that were asked for."""
    changes = {name: getattr(options, name) for name in ("images", "epochs") if getattr(options, name) is not None}
    changes["dataset"] = dataset_name(options.data)
    found = [replace(cell, setting=replace(cell.setting, **changes)) for cell in PROTOCOLS[options.protocol].cells]
    if options.seed is not None:
        found = [replace(cell, seed=options.seed) for cell in found]
    words = options.only or [""]
    return [cell for cell in dict.fromkeys(found) if any(word in cell.name for word in words)]


def listing(wanted: Iterable[Cell], done: Iterable[tuple[object, ...]]) -> str:
    """One line per cell, and how many are missing."""
    known, lines, left = set(done), [], []
    for cell in wanted:
        finished = rows.cell_key(cell) in known
        left += [] if finished else [cell]
        lines.append(f"{'done' if finished else f'{cell.seconds:,.0f} s':>8}  {cell.name} ({cell.setting})")
    return "\n".join([*lines, f"{len(left)} of {len(lines)} cells are missing: about {hours(left):.1f} hours."])


def run(options: argparse.Namespace) -> None:
    """Run the missing cells."""
    command.begin(options)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    everything, test = (cifar10(options.data, split) for split in ("train", "test"))
    for cell in cells(options):
        done = {rows.key(row): row for row in rows.read(options.results)}
        if rows.cell_key(cell) in done:
            continue
        like = replace(cell, defence=REFERENCE.get(cell.defence, ""))
        reference = done.get(rows.cell_key(like), {})
        if cell.defence in REFERENCE and reference.get("removed", 0) == 0:
            continue
        train = per_class(everything, cell.setting.images // 10)
        if len(train) != cell.setting.images:
            raise SystemExit(f"There are {len(train):,} training images, not {cell.setting.images:,}; pass --images.")
        row = run_cell(
            cell, train, test, reference=reference, cache=options.cache, device=device, workers=options.workers
        )
        rows.append(options.results, row)
        print(f"{cell.name:45} accuracy {row['clean_accuracy']:.3f} ASR {row['asr']:.3f}", flush=True)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("action", choices=["run", "table", "results", "plot"])
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="mini", help="two CPU cores, or one GPU")
    parser.add_argument("--list", action="store_true", help="say which cells have run and which have not; run none")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--workers", type=int, default=0, help="processes of the training loader")
    parser.add_argument("--images", type=int, help="training images, the same number of each class")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, help="in place of the seeds of the protocol")
    parser.add_argument("--only", nargs="*", help="only cells whose model/attack/defence/seed-N/ contains one of these")
    options = parser.parse_args()
    found = rows.latest(rows.read(options.results))
    folder = options.results.parent
    if options.action == "run" and options.list:
        print(listing(cells(options), map(rows.key, found)))
    elif options.action == "run":
        run(options)
    elif options.action == "table":
        print(markdown(found))
    elif options.action == "plot":
        print(*draw(found, folder / "figures", rows.read(folder / "fractions.jsonl")), sep="\n")
    else:
        path = folder / "RESULTS.md"
        path.write_text(page(found, {name: rows.read(folder / f"{name}.jsonl") for name in ABLATIONS}))
        print(path)


if __name__ == "__main__":
    main()
