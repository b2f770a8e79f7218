"""``python -m examples.evidence.repair``: what does each part of D-BR add, and what if other scores choose the samples?

Starts from the undefended network of ``python -m examples.evidence run`` before its last epoch. With the poisons as
suspects: unlearn only, relearn only, both. Then both with the 5 % most and the 20 % least suspicious by FCT (of
``python -m examples.evidence.consistency``), loss, confidence and susceptibility, and with D-BR's own choice. One JSON
line per finished row in ``repair.jsonl``; a run that was interrupted goes on with the first missing one.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from examples.evidence import rows
from examples.evidence.cells import ATTACKS
from examples.evidence.cost import measured
from examples.evidence.data import packed_cifar10, per_class
from examples.evidence.protocols import Setting
from examples.evidence.run import accuracy, checkpoint, labels_of, restored, train_network
from examples.evidence.table import repair_table
from lightning_backdoor import DBRCallback, Verdict, attacks, baselines, functional
from lightning_backdoor.callbacks.suspects import split_of

RESULTS = Path(__file__).with_name("repair.jsonl")


class UnlearnOnly(DBRCallback):
    """D-BR that learns nothing anew."""

    def _attach(self) -> None:
        split = split_of(self.verdict, self.reading.seed)
        split = replace(split, trusted=torch.zeros_like(split.trusted))
        self._run.attach(self._training_set, self._curation, split)


def verdict_by(scores: Tensor, labels: Tensor, suspect: Tensor | None = None) -> Verdict:
    """Suspect the 5 % with the largest scores (or ``suspect``), trust the 20 % of every class with the smallest."""
    if suspect is None:
        _, suspect = functional.split_by_rank(scores)
    trusted = functional.select_trusted(scores, labels, ~suspect, 0.2)
    return Verdict(scores, ~suspect, torch.inf, "given", labels, trusted=trusted, suspect=suspect)


@torch.no_grad()
def answers(network: torch.nn.Module, images: Tensor) -> Tensor:
    """Logits (N, 10) of uint8 images (N, 3, 32, 32)."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([network(part).float() for part in images.split(500)])


def scores_of(network: torch.nn.Module, images: Tensor, labels: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Scores of the training images, larger is more suspicious."""

    def susceptibility() -> Tensor:
        denoised = functional.local_median(images), functional.nl_means(images)
        return functional.susceptibility_scores(answers(network, images), [answers(network, x) for x in denoised])

    return {
        "loss": lambda: -F.cross_entropy(answers(network, images), labels, reduction="none"),
        "confidence": lambda: answers(network, images).softmax(dim=1).amax(dim=1),
        "susceptibility": susceptibility,
    }


def treatments(attack: str, dataset: Any, setting: Setting, cache: Path) -> dict[str, Callable[[], pl.Callback]]:
    """Name of each row, and what makes its callback."""
    poisoned = attacks.poisoned_mask(dataset)
    images = torch.stack([dataset[i][0] for i in range(len(dataset))])
    labels = labels_of(dataset)
    network = restored(checkpoint(cache, setting, attack, 0), setting)
    fct = cache / f"fct-{attack}-{setting.model}-copy-200-200-{len(dataset)}.pt"
    chosen = {"FCT": lambda: torch.load(fct, weights_only=True), **scores_of(network, images, labels)}
    truth = verdict_by(torch.rand(len(dataset), generator=torch.Generator().manual_seed(0)), labels, poisoned)
    return {  # each with a fifth of every class to learn anew
        "true poisons: unlearn only": lambda: UnlearnOnly(verdict=truth),
        "true poisons: relearn only": lambda: baselines.FineTuneTrusted(verdict=truth, epochs=10),
        "true poisons: both": lambda: DBRCallback(verdict=truth),
        **{
            name: lambda score=score: DBRCallback(verdict=verdict_by(score(), labels), trusted=0.2)
            for name, score in chosen.items()
        },
        "split units": lambda: DBRCallback(trusted=0.2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--attacks", nargs="+", default=["badnets-5%", "sig-80%"])
    options = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    torch.set_num_threads(2)
    clean = per_class(packed_cifar10(options.data, "train"), options.images // 10)
    test = packed_cifar10(options.data, "test")
    setting = Setting(images=len(clean))
    for attack in options.attacks:
        dataset = ATTACKS[attack].train(clean, 0)
        poisoned = attacks.poisoned_mask(dataset)
        for name, make in treatments(attack, dataset, setting, options.cache).items():
            known = {**rows.identity(setting, attack, 0), **rows.poison(int(poisoned.sum()), len(dataset)), "row": name}
            if rows.key(known, "row") in {rows.key(row, "row") for row in rows.read(options.results)}:
                continue
            callback = make()
            with measured("cpu") as meter:
                shared = checkpoint(options.cache, setting, attack, 0)
                network = train_network(dataset, [callback], setting, 0, shared)
            suspect, trusted = callback.verdict.suspect, callback.verdict.trusted
            found = {
                "clean_accuracy": accuracy(network, test),
                "asr": accuracy(network, ATTACKS[attack].test(test)),
                "suspects": int(suspect.sum()),
                "poisons_among_suspects": int((suspect & poisoned).sum()),
                "poisons_among_trusted": int((trusted & poisoned).sum()),
                "epochs_undone": sum(callback.history[-1].undone),
                **meter.row(len(dataset), setting.epochs - 1),
            }
            rows.append(options.results, {**known, **found, **rows.circumstances("examples.evidence.repair", "cpu")})
    print(repair_table(rows.read(options.results)))


if __name__ == "__main__":
    main()
