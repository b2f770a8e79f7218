"""``python -m benchmarks.repair``: what does each part of D-BR add, and what if other scores choose the samples?

Starts from the undefended network of ``python -m benchmarks run`` before its last epoch. With the poisons as
suspects: unlearn only, relearn only, both. Then both with the 5 % most and the 20 % least suspicious by FCT (of
``python -m benchmarks.consistency``), loss, confidence and susceptibility, and with D-BR's own choice. One JSON
line per finished row in ``repair.jsonl``; a run that was interrupted goes on with the first missing one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from benchmarks import rows
from benchmarks.ablation import Variants, ablation, expected
from benchmarks.cache import restored
from benchmarks.cases import Case
from benchmarks.cells import BEYOND
from benchmarks.consistency import fct_of
from benchmarks.table import repair_table
from benchmarks.training import images_of, labels_of, logits_of
from lightning_backdoor import DBRCallback, Verdict, baselines, functional
from lightning_backdoor.responses import Unlearn

RESULTS = Path(__file__).with_name("repair.jsonl")
BY_DEFAULT = ("badnets-5%", "sig-80%")
ROWS = (
    "true poisons: unlearn only", "true poisons: relearn only", "true poisons: both",
    "FCT", "loss", "confidence", "susceptibility", "split units",
)  # fmt: skip


def verdict_by(scores: Tensor, labels: Tensor, suspect: Tensor | None = None) -> Verdict:
    """Suspect the 5 % with the largest scores (or ``suspect``), trust the 20 % of every class with the smallest."""
    if suspect is None:
        _, suspect = functional.split_by_rank(scores)
    trusted = functional.select_trusted(scores, labels, ~suspect, 0.2)
    return Verdict(scores, ~suspect, torch.inf, "given", labels, trusted=trusted, suspect=suspect)


def scores_of(network: torch.nn.Module, images: Tensor, labels: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Scores of the training images, larger is more suspicious."""

    def susceptibility() -> Tensor:
        denoised = functional.local_median(images), functional.nl_means(images)
        return functional.susceptibility_scores(logits_of(network, images), [logits_of(network, x) for x in denoised])

    return {
        "loss": lambda: -F.cross_entropy(logits_of(network, images), labels, reduction="none"),
        "confidence": lambda: logits_of(network, images).softmax(dim=1).amax(dim=1),
        "susceptibility": susceptibility,
    }


def treatments(case: Case) -> dict[str, Callable[[], pl.Callback]]:
    """Name of each row, those of ``ROWS``, and what makes its callback."""
    images, labels = images_of(case.dataset), labels_of(case.dataset)
    network = restored(case.undefended(), case.setting)
    chosen = {"FCT": lambda: fct_of(case, "copy", repulsion=200), **scores_of(network, images, labels)}
    truth = verdict_by(torch.rand(len(labels), generator=torch.Generator().manual_seed(0)), labels, case.poisoned)
    return {  # each with a fifth of every class to learn anew
        "true poisons: unlearn only": lambda: DBRCallback(verdict=truth, response=Unlearn(relearn=False)),
        "true poisons: relearn only": lambda: baselines.FineTuneTrusted(verdict=truth, epochs=10, extra_epochs=BEYOND),
        "true poisons: both": lambda: DBRCallback(verdict=truth, extra_epochs=BEYOND),
        **{
            name: lambda score=score: DBRCallback(verdict=verdict_by(score(), labels), trusted=0.2, extra_epochs=BEYOND)
            for name, score in chosen.items()
        },
        "split units": lambda: DBRCallback(trusted=0.2, extra_epochs=BEYOND),
    }


def repaired(case: Case, make: Callable[[], Any], test: TensorDataset) -> rows.Row:
    """What a repair comes to."""
    callback = make()
    row = case.trained([callback], test, start=case.undefended(), epochs_done=case.setting.epochs - 1)
    suspect, trusted = callback.verdict.suspect, callback.verdict.trusted
    return {
        **row,
        "suspects": int(suspect.sum()),
        "poisons_among_suspects": int((suspect & case.poisoned).sum()),
        "poisons_among_trusted": int((trusted & case.poisoned).sum()),
        "epochs_undone": sum(callback.history[-1].undone_steps),
    }


def wanted() -> list[rows.Row]:
    """What tells apart the rows of a finished run."""
    return expected(BY_DEFAULT, ROWS)


def variants(case: Case, test: TensorDataset) -> Variants:
    """All rows."""
    return {name: partial(repaired, case, make, test) for name, make in treatments(case).items()}


if __name__ == "__main__":
    ablation(__doc__, RESULTS, variants, repair_table, attacks_by_default=BY_DEFAULT)
