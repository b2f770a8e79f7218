"""``python -m examples.evidence.strip``: does STRIP see attacks whose trigger covers the image, or is not in the data?

STRIP's scores of all training images of the target class, from the undefended network: it is built for small triggers
that survive blending, and papers report that SIG, clean-label corners and feature collisions (HTBD) get past it. One
JSON line per attack in ``strip.jsonl``; a run that was interrupted goes on with the first missing one.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torchmetrics.functional.classification import binary_auroc

from examples.evidence import rows
from examples.evidence.ablation import Case, Variants, ablation
from examples.evidence.cells import TARGET
from examples.evidence.run import answers, images_of, labels_of, restored
from examples.evidence.table import strip_table
from lightning_backdoor import baselines
from lightning_backdoor.baselines.strip import blend

RESULTS = Path(__file__).with_name("strip.jsonl")
DRAWS = 20
REJECTED = 0.01  # of clean images


def separated(case: Case) -> rows.Row:
    """AUROC among the images of the target class, and the poisons beyond the threshold that rejects few clean ones."""
    images, labels = images_of(case.dataset), labels_of(case.dataset)
    generator = torch.Generator().manual_seed(0)
    others = (labels != TARGET).nonzero().squeeze(1)
    overlays = images[others[torch.randperm(len(others), generator=generator)[:DRAWS]]]
    network, of_target = restored(case.shared, case.setting), labels == TARGET
    mixed = [answers(network, blend(images[of_target], overlay)) for overlay in overlays]
    scores, poisoned = baselines.strip_scores(torch.stack(mixed, dim=1)), case.poisoned[of_target]
    threshold = scores[~poisoned].quantile(1 - REJECTED)
    return {
        "images_of_target": len(scores),
        "auroc": float(binary_auroc(scores.argsort().argsort().double() / len(scores), poisoned.long())),
        "tpr": float((scores[poisoned] > threshold).float().mean()),
    }


def variants(case: Case) -> Variants:
    """One row."""
    return {f"STRIP, {DRAWS} draws": partial(separated, case)}


if __name__ == "__main__":
    known = ("badnets-5%", "blended-5%", "sig-80%", "label-consistent-40%", "hidden-trigger-40%")
    ablation(__doc__, RESULTS, variants, strip_table, attacks_by_default=known)
