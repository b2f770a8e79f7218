"""``python -m benchmarks.costs``: what a defense costs where there is something to find, and where there is not.

Every defense without arguments, on digits, traffic signs or CIFAR-10, clean and with poisons. A row has the work in
epoch-equivalents (:mod:`benchmarks.cost`), seconds of the processor and of the clock, and what came of it: accuracy,
attack success rate, what was removed, and after which epochs. One JSON line per finished row in ``costs.jsonl``; a run
that was interrupted goes on with the first missing one. Rows of several commits (``--label``) stand side by side in the
table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import TensorDataset

from benchmarks import command, digits, model, rows
from benchmarks.cost import measured
from benchmarks.explained import right, trained
from benchmarks.finetune import FourPlaces
from benchmarks.samples import clean_images, drawn, gtsrb, packed_signs
from benchmarks.table import percent, table
from lightning_backdoor import DBRCallback, NONECallback, UltraCleanCallback, attacks
from lightning_backdoor.callbacks import Defense

RESULTS = Path(__file__).with_name("costs.jsonl")
ATTACKS: dict[str, tuple[attacks.Trigger, float]] = {
    "clean": (attacks.BadNets(), 0.0),
    "badnets-5%": (attacks.BadNets(), 0.05),
    "badnets-1%": (attacks.BadNets(), 0.01),
    "sticker-5%": (FourPlaces(), 0.05),
    "sticker-1%": (FourPlaces(), 0.01),
}
"""Trigger and share of all images; of clean data the trigger is that of the tested images."""
DEFENSES: dict[str, Callable[[], Defense]] = {
    "ultraclean": UltraCleanCallback,
    "NONE": NONECallback,
    "D-BR": DBRCallback,
}
UNDEFENDED = "undefended"
IDENTITY = ("source", "images", "epochs", "attack", "defence", "seed")


def run(
    source: str, train: TensorDataset, test: TensorDataset, attack: str, defence: str, *, epochs: int, seed: int
) -> rows.Row:
    """Train once, and return the row."""
    trigger, rate = ATTACKS[attack]
    poisoned = attacks.poison(train, trigger, 0, rate, seed=seed) if rate else None
    callbacks: list[pl.Callback] = [] if defence == UNDEFENDED else [DEFENSES[defence]()]
    kind = model.Classifier if source == "cifar10" else digits.Classifier
    with measured("cpu", kind) as meter:
        began = time.process_time()
        network = trained(source, train if poisoned is None else poisoned, epochs, callbacks, "cpu", seed=seed)
        spent = time.process_time() - began
    row: rows.Row = {
        "source": source,
        "images": len(train),
        "epochs": epochs,
        "attack": attack,
        "defence": defence,
        "seed": seed,
        "clean_accuracy": right(network, test),
        "asr": right(network, attacks.triggered(test, trigger, 0)),
        "poisons": 0 if poisoned is None else int(poisoned.poisoned.sum()),
        "cpu_seconds": round(spent, 1),
        **meter.row(len(train), 0),
    }
    for callback in callbacks:
        assert isinstance(callback, Defense)
        gone = ~callback.verdict.keep if callback.verdict is not None else torch.zeros(len(train), dtype=torch.bool)
        truth = torch.zeros_like(gone) if poisoned is None else poisoned.poisoned
        row["removed"], row["removed_others"] = int(gone.sum()), int((gone & ~truth).sum())
        row["events"] = [event.when for event in callback.history]
    return {**row, **rows.circumstances("benchmarks.costs", "cpu")}


def costs_table(found: list[rows.Row]) -> str:
    """One line for each row of a defense; times as multiples of the undefended run with the same label."""
    plain = {_place(row): row for row in found if row["defence"] == UNDEFENDED}
    lines = []
    for row in found:
        if row["defence"] == UNDEFENDED:
            continue
        alone = plain.get(_place(row))
        ratio = "–" if alone is None else f"{row['cpu_seconds'] / alone['cpu_seconds']:.2f}"
        lines.append([
            f"{row['source']} {row['images']:,}", row["attack"], row["defence"], row["label"],
            str(row["versions"]["commit"]), f"{row['epoch_equivalents']:.1f}", ratio,
            f"{row['removed'] - row['removed_others']} of {row['poisons']}", f"{row['removed_others']}",
            "–" if alone is None else _outcome(alone), _outcome(row), ", ".join(row["events"]),
        ])  # fmt: skip
    head = ["data", "attack", "defence", "label", "commit", "epoch-equivalents", "CPU seconds, ratio",
            "poisons removed", "others", "undefended", "defended", "scans and treatments after"]  # fmt: skip
    return table(head, lines, left=("data", "attack", "defence", "label", "commit", "scans and treatments after"))


def _place(row: rows.Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in (*IDENTITY, "label") if name != "defence")


def _outcome(row: rows.Row) -> str:
    return f"{percent([row['clean_accuracy']])} / {percent([row['asr']])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="folder of cifar10_<split>.npz and gtsrb.npz"
    )
    parser.add_argument("--source", choices=("digits", "gtsrb", "cifar10"), default="digits")
    parser.add_argument("--images", type=int, default=10_000, help="of CIFAR-10, or about so many of GTSRB")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="now", help="told beside the rows, such as `before` and `after`")
    parser.add_argument(
        "--only",
        nargs="*",
        default=["clean", "badnets-5%", "badnets-1%"],
        help="attacks: " + ", ".join(ATTACKS).replace("%", "%%"),
    )
    parser.add_argument("--defences", nargs="*", default=[UNDEFENDED, "ultraclean"], help=f"or {', '.join(DEFENSES)}")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="print the table of what is there, and end")
    options = parser.parse_args()
    command.quiet(options.threads)
    if not options.show:
        fill(options)
    print(costs_table(rows.read(options.out)))


def data_of(options: argparse.Namespace) -> tuple[TensorDataset, TensorDataset]:
    """Clean images to train on and to test on; of traffic signs 2,000 of tracks that none is trained on."""
    if options.source != "gtsrb":
        return clean_images(options.source, options.data, options.images)
    found, packed = gtsrb(options.data, options.images, options.seed), packed_signs(options.data)
    labels, track = torch.from_numpy(packed["y"]).long(), torch.from_numpy(packed["track"]).long()
    others = (~torch.isin(labels * (1 + int(track.max())) + track, found.group)).nonzero().flatten()
    rows_of = others[drawn(len(others), 0)[:2000]]
    images = torch.from_numpy(packed["x"][rows_of.numpy()]).permute(0, 3, 1, 2).contiguous()
    return TensorDataset(found.images, found.labels), TensorDataset(images, labels[rows_of])


def fill(options: argparse.Namespace) -> None:
    """Make the rows that are missing."""
    train, test = data_of(options)
    done = {(*(row[name] for name in IDENTITY), row["label"]) for row in rows.read(options.out)}
    for attack in options.only:
        for defence in options.defences:
            place = (options.source, len(train), options.epochs, attack, defence, options.seed, options.label)
            if place in done:
                continue
            row = run(options.source, train, test, attack, defence, epochs=options.epochs, seed=options.seed)
            rows.append(options.out, {**row, "label": options.label})
            print(options.label, attack, defence, row["epoch_equivalents"], row["cpu_seconds"], "s", flush=True)


if __name__ == "__main__":
    main()
