"""``python -m benchmarks.kinds``: what a clean kind of image costs that one class has, or all have, under each defence.

A share of a class (``7``), or of all, is of another kind: with a watermark, as a line drawing, by another camera, with
a black border, without color; images of the next class under the same label; shots of five things. All labels are
right. One row for each kind, share and defence, with and without ``approved=`` the images of the kind: accuracy on all
test images and on those of the kind, what is found, and its diagnosis. Rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from benchmarks import command, rows
from benchmarks.explained import largest, percent, right, told, trained
from benchmarks.samples import KINDS, clean_images
from benchmarks.table import table as markdown
from lightning_backdoor import DBRCallback, NONECallback, UltraCleanCallback
from lightning_backdoor.callbacks import Defense

LABEL, THINGS = 7, 5
IN_ALL, TWO_CLASSES, SHOTS = "camera-in-all", "two-classes", "near-duplicates"
CASES = (*KINDS, IN_ALL, TWO_CLASSES, SHOTS)
SHARES = (20, 40, 90)
DEFENCES: dict[str, Callable[..., Defense] | None] = {
    "none": None, "UltraClean": UltraCleanCallback, "NONE": NONECallback, "D-BR": DBRCallback,
}  # fmt: skip
IDENTITY = ("source", "case", "share", "defence", "approved", "seed")


@dataclass(frozen=True)
class Made:
    """A training set, which of its samples are of the kind, and test images of the kind."""

    train: TensorDataset
    kind: Tensor
    test: TensorDataset
    test_kind: TensorDataset


def _in_kind(name: str, images: Tensor) -> Tensor:
    return KINDS[name](images.float()).clamp(0, 255).round().to(torch.uint8)


def made(name: str, share: float, train: TensorDataset, test: TensorDataset, seed: int) -> Made:
    """The training and test sets of a case, a share of the label being of the kind."""
    if name == TWO_CLASSES:
        return _two_classes(share, train, test)
    (images, labels), (test_images, test_labels) = train.tensors, test.tensors
    images, kind = images.clone(), torch.zeros(len(labels), dtype=torch.bool)
    every = torch.unique(labels).tolist() if name == IN_ALL else [LABEL]
    for label in every:
        mine = (labels == label).nonzero().squeeze(1)
        kind[mine[: round(share * len(mine))]] = True
    shown = torch.isin(test_labels, torch.tensor(every))
    if name == SHOTS:
        copied = kind.nonzero().squeeze(1)
        noise = torch.randn(len(copied), *images.shape[1:], generator=torch.Generator().manual_seed(seed))
        things = images[copied[:THINGS]].float()[torch.arange(len(copied)) % THINGS]
        images[copied] = (things + 4 * noise).clamp(0, 255).round().to(torch.uint8)
        return Made(TensorDataset(images, labels), kind, test, TensorDataset(test_images[shown], test_labels[shown]))
    look = name.removesuffix("-in-all")
    images[kind] = _in_kind(look, images[kind])
    seen = TensorDataset(_in_kind(look, test_images[shown]), test_labels[shown])
    return Made(TensorDataset(images, labels), kind, test, seen)


def _two_classes(share: float, train: TensorDataset, test: TensorDataset) -> Made:
    """Images of the next class have the label, too, so many that they are a share of it; the others are left out."""
    (images, labels), (test_images, test_labels) = train.tensors, test.tensors
    own, other = ((labels == label).nonzero().squeeze(1) for label in (LABEL, LABEL + 1))
    size = min(len(own), len(other))  # of the label
    count = round(share * size)
    kept = torch.cat([(~torch.isin(labels, torch.tensor([LABEL, LABEL + 1]))).nonzero().squeeze(1),
                      own[: size - count], other[:count]]).sort().values  # fmt: skip
    kind, second = labels[kept] == LABEL + 1, test_labels == LABEL + 1
    named = [torch.where(one == LABEL + 1, LABEL, one) for one in (labels[kept], test_labels)]
    seen = TensorDataset(test_images[second], named[1][second])
    return Made(TensorDataset(images[kept], named[0]), kind, TensorDataset(test_images, named[1]), seen)


def run(
    source: str, identity: rows.Row, data: tuple[TensorDataset, TensorDataset], *, epochs: int, device: str
) -> rows.Row:
    """Train and measure; the row of a case, a share and a defence."""
    started, make = time.perf_counter(), DEFENCES[identity["defence"]]
    found = made(identity["case"], identity["share"] / 100, *data, identity["seed"])
    approved: dict[str, Any] = {"approved": found.kind.nonzero().squeeze(1)} if identity["approved"] else {}
    callbacks = [] if make is None else [make(**approved)]
    network = trained(source, found.train, epochs, [*callbacks], device, seed=identity["seed"])
    verdict = callbacks[0].verdict if callbacks else None
    removed = torch.zeros_like(found.kind) if verdict is None else ~verdict.keep
    history = callbacks[0].history if callbacks else []
    return {
        **identity,
        "images": len(found.kind),
        "epochs": epochs,
        "accuracy": right(network, found.test),
        "accuracy_of_kind": right(network, found.test_kind),
        "kind": int(found.kind.sum()),
        "removed": int((removed & found.kind).sum()),
        "removed_others": int((removed & ~found.kind).sum()),
        "unlearned": sum(event.suspects for event in history if event.response == "unlearn"),
        "findings": [told(finding, found.kind) for finding in (() if verdict is None else verdict.findings)],
        "seconds": round(time.perf_counter() - started),
        **rows.circumstances("benchmarks.kinds", device),
    }


def table(found: list[rows.Row]) -> str:
    """Rows as a table, with the diagnosis of the largest finding of each."""
    left, lines = ["images", "kind", "share", "defence", "approved"], []
    for row in found:
        most = largest(row)
        cells = [f"{row['source']} {row['images']:,}", row["case"], f"{row['share']} %", row["defence"]]
        cells += ["yes" if row["approved"] else "", percent(row["accuracy"]), percent(row["accuracy_of_kind"])]
        cells += [f"{row['removed']} of {row['kind']}", str(row["removed_others"]), str(row["unlearned"])]
        lines.append([*cells, str(most.get("diagnosis", ""))])
    head = [*left, "accuracy", "on the kind", "removed", "others", "unlearned", "diagnosis"]
    return markdown(head, lines, left=[*left, "diagnosis"])


def wanted(options: argparse.Namespace, done: list[rows.Row]) -> list[rows.Row]:
    """What identifies the rows that are asked for and not there, those that approve last (with no defence, none)."""
    source = "digits" if options.digits else "cifar10"
    known = {tuple(row[name] for name in IDENTITY) for row in done}
    every = [
        dict(zip(IDENTITY, (source, case, share, defence, approved, options.seed), strict=True))
        for approved in (False, True)
        for case in options.only
        for share in options.shares
        for defence in options.defences
        if not (approved and DEFENCES[defence] is None)
    ]
    return [one for one in every if tuple(one.values()) not in known]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--digits", action="store_true", help="1,400 digits, about a minute per row on a core")
    made.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of cifar10_<split>.npz")
    made.add_argument("--images", type=int, default=5000, help="of CIFAR-10")
    made.add_argument("--epochs", type=int, default=10)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--only", nargs="*", choices=CASES, default=list(CASES), help="names of kinds")
    made.add_argument("--shares", nargs="*", type=int, default=list(SHARES), help="of the class, in percent")
    made.add_argument("--defences", nargs="*", choices=list(DEFENCES), default=list(DEFENCES))
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "kinds.jsonl")
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--show", action="store_true", help="print what is there, and end")
    return made


def main() -> None:
    options = parser().parse_args()
    command.quiet(options.threads)
    data: tuple[TensorDataset, TensorDataset] | None = None
    for identity in [] if options.show else wanted(options, rows.read(options.out)):
        if data is None:
            data = clean_images("digits" if options.digits else "cifar10", options.data, options.images)
        row = run(identity["source"], identity, data, epochs=options.epochs, device=options.device)
        rows.append(options.out, row)
        print(table([row]).splitlines()[-1], row["seconds"], "s", flush=True)
    print(table(rows.read(options.out)))


if __name__ == "__main__":
    main()
