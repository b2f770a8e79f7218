"""``python -m benchmarks.strip``: does STRIP see attacks whose trigger covers the image, or is not in the data?

STRIP's scores of all training images of the target class, from the undefended network: it is built for small triggers
that survive blending, unlike those of SIG, clean-label corners (LCBD) and feature collisions (HTBD). One JSON line per
attack in ``strip.jsonl``; a run that was interrupted goes on with the first missing one.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from benchmarks import rows
from benchmarks.ablation import Variants, ablation, expected
from benchmarks.cache import restored
from benchmarks.cases import Case
from benchmarks.cells import TARGET
from benchmarks.scores import auroc
from benchmarks.table import strip_table
from benchmarks.training import images_of, labels_of, logits_of
from lightning_backdoor import baselines

RESULTS = Path(__file__).with_name("strip.jsonl")
DRAWS = 20
REJECTED = 0.01  # of clean images
NAME = f"STRIP, {DRAWS} draws"
BY_DEFAULT = ("badnets-5%", "blended-5%", "sig-80%", "label-consistent-40%", "hidden-trigger-40%")


def separated(case: Case) -> rows.Row:
    """AUROC among the images of the target class, and the poisons beyond the threshold that rejects few clean ones."""
    images, labels = images_of(case.dataset), labels_of(case.dataset)
    network, of_target = restored(case.undefended(), case.setting), labels == TARGET
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:DRAWS]
    mixed = [logits_of(network, baselines.blend(images[of_target], overlay)) for overlay in images[order]]
    scores, poisoned = baselines.strip_scores(torch.stack(mixed, dim=1)), case.poisoned[of_target]
    threshold = scores[~poisoned].quantile(1 - REJECTED)
    return {
        "images_of_target": len(scores),
        "auroc": auroc(scores, poisoned),
        "tpr": float((scores[poisoned] > threshold).float().mean()),
    }


def wanted() -> list[rows.Row]:
    """What tells apart the rows of a finished run."""
    return expected(BY_DEFAULT, [NAME])


def variants(case: Case, _test: TensorDataset) -> Variants:
    """One row."""
    return {NAME: partial(separated, case)}


if __name__ == "__main__":
    ablation(__doc__, RESULTS, variants, strip_table, attacks_by_default=BY_DEFAULT)
