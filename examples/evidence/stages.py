"""``python -m examples.evidence.stages``: whose labels should the features of D-ST learn from?

The first stage of D-ST without any labels (CTL), with all labels (supervised) and with those of trusted images alone,
by the paper's positives and by those of the authors' code, all by contrast alone; and with the cross-entropy of trusted
images beside it. None of them readmits; D-ST's row of ``python -m examples.evidence run`` does. One JSON line per
finished row in ``stages.jsonl``; a run that was interrupted goes on with the first missing one.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from examples.evidence import rows
from examples.evidence.cells import ATTACKS
from examples.evidence.cost import measured
from examples.evidence.data import packed_cifar10, per_class
from examples.evidence.protocols import Setting
from examples.evidence.run import accuracy, train_network
from examples.evidence.table import stages_table
from lightning_backdoor import DSTCallback, attacks
from lightning_backdoor.callbacks.neighbourhood import flags_of

RESULTS = Path(__file__).with_name("stages.jsonl")


class OtherLabels(DSTCallback):
    """D-ST whose first stage believes all labels, or none; the second stage is as ever."""

    def __init__(self, *, believed: bool, **arguments: Any) -> None:
        super().__init__(guided=False, readmit=False, **arguments)
        self.believed = believed

    def _attach(self) -> None:
        curation, data, verdict = self._known()
        flags = flags_of(verdict)
        self._run.attach(data, curation, replace(flags, trusted=torch.full_like(flags.trusted, self.believed)))


VARIANTS: dict[str, Callable[[], DSTCallback]] = {
    "no labels (CTL)": lambda: OtherLabels(believed=False),
    "all labels (supervised)": lambda: OtherLabels(believed=True),
    "trusted labels (SS-CTL)": lambda: DSTCallback(guided=False, readmit=False),
    "trusted labels, positives of the authors' code": lambda: DSTCallback(
        guided=False, readmit=False, reference_mask=True
    ),
    "trusted labels, and their cross-entropy": lambda: DSTCallback(readmit=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--attacks", nargs="+", default=["badnets-5%", "sig-80%"])
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    torch.set_num_threads(2)
    clean = per_class(packed_cifar10(options.data, "train"), options.images // 10)
    test = packed_cifar10(options.data, "test")
    setting = Setting(images=len(clean), epochs=options.epochs)
    for attack in options.attacks:
        dataset = ATTACKS[attack].train(clean, 0)
        poisons = int(attacks.poisoned_mask(dataset).sum())
        for name, make in VARIANTS.items():
            known = {**rows.identity(setting, attack, 0), **rows.poison(poisons, len(dataset)), "row": name}
            if rows.key(known, "row") in {rows.key(row, "row") for row in rows.read(options.results)}:
                continue
            callback = make()
            with measured("cpu") as meter:
                network = train_network(dataset, [callback], setting, 0, None)
            agreement = callback.history[-1].agreement
            found = {
                "clean_accuracy": accuracy(network, test),
                "asr": accuracy(network, ATTACKS[attack].test(test)),
                "neighbour_agreement": agreement[-1][1] if agreement else None,
                **meter.row(len(dataset), 0),
            }
            rows.append(options.results, {**known, **found, **rows.circumstances("examples.evidence.stages", "cpu")})
    print(stages_table(rows.read(options.results)))


if __name__ == "__main__":
    main()
