"""``python -m benchmarks.stages``: whose labels should the features of D-ST learn from?

The first stage of D-ST without any labels (CTL), with all labels (supervised) and with those of trusted images alone,
by the paper's positives and by those of the authors' code, all by contrast alone; and with the cross-entropy of trusted
images beside it. None of them readmits; D-ST's row of ``python -m benchmarks run`` does. One JSON line per
finished row in ``stages.jsonl``; a run that was interrupted goes on with the first missing one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import TensorDataset

from benchmarks import rows
from benchmarks.ablation import Variants, ablation, expected
from benchmarks.cases import Case
from benchmarks.table import stages_table
from lightning_backdoor import DSTCallback
from lightning_backdoor.responses import Recipe, TwoStage

RESULTS = Path(__file__).with_name("stages.jsonl")
BY_DEFAULT = ("badnets-5%", "sig-80%")


def contrastive(labels: Literal["all", "none"], classifier_epochs: int | None = None, **scan: Any) -> DSTCallback:
    """D-ST whose first stage uses all labels, or none, by contrast alone; the second stage is unchanged."""
    recipe = Recipe(classifier_epochs, feature_labels=labels, supervised_features=False, reassign_uncertain=False)
    return DSTCallback(response=TwoStage(recipe), **scan)


VARIANTS: dict[str, Callable[[], DSTCallback]] = {
    "no labels (CTL)": lambda: contrastive("none"),
    "all labels (supervised)": lambda: contrastive("all"),
    "trusted labels (SS-CTL)": lambda: DSTCallback(supervised_features=False, reassign_uncertain=False),
    "trusted labels, positives of the authors' code": lambda: DSTCallback(
        supervised_features=False, reassign_uncertain=False, reference_mask=True
    ),
    "trusted labels, and their cross-entropy": lambda: DSTCallback(reassign_uncertain=False),
}


def first_stage(case: Case, make: Callable[[], DSTCallback], test: TensorDataset) -> rows.Row:
    """What a training comes to, and how well neighbours agree in its features."""
    callback = make()
    row = case.trained([callback], test)
    agreement = callback.history[-1].agreement
    return {**row, "neighbour_agreement": agreement[-1][1] if agreement else None}


def wanted() -> list[rows.Row]:
    """What tells apart the rows of a finished run."""
    return expected(BY_DEFAULT, VARIANTS)


def variants(case: Case, test: TensorDataset) -> Variants:
    """All rows."""
    return {name: partial(first_stage, case, make, test) for name, make in VARIANTS.items()}


if __name__ == "__main__":
    ablation(__doc__, RESULTS, variants, stages_table, attacks_by_default=BY_DEFAULT)
