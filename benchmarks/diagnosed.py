"""``python -m benchmarks.diagnosed FOLDER``: diagnoses on the files of ``python -m benchmarks.values``.

The group is the poisons, or the clean kind of image, as they are: what a perfect detector finds. The model is the one
that was trained without them. It was trained on the ordinary samples that they are compared with.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.values import CASES, file_name, load
from lightning_backdoor import Finding
from lightning_backdoor.functional import diagnose

FIXED_ON = {
    "digits-badnets-5%",
    "digits-tinted-75",
    "signs-sticker-5%",
    "badnets-5%",
    "sig-80%",
    "kind-drawing-40%",
    "kind-watermark-20%",
}
"""Sets that were looked at before the constants of the diagnosis were fixed."""


def findings(found: dict[str, Tensor]) -> list[Finding]:
    """The poisons or the samples of a clean kind, label by label, with their diagnosis."""
    notable, labels = found["poisoned"] | found["kind"], found["labels"]
    groups = []
    for label in torch.unique(labels[notable]).tolist():
        positions = (notable & (labels == label)).nonzero().squeeze(1)
        group = Finding(label, positions, "truth", (), torch.tensor([0]), torch.tensor([1.0]), 0.0)
        predicted, confidence = found["without_predicted"], found["without_confidence"].squeeze(1)
        groups.append(diagnose(group, labels, predicted, confidence, unseen=notable, ordinary=~notable))
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the unpacked files")
    options = parser.parse_args()
    print(
        "| case | constants fixed on it | label | samples | wrong labels in truth | given label | confidence ", end=""
    )
    print("| of ordinary | accuracy on them | diagnosis |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---|")
    for case in CASES:
        path = options.folder / f"{file_name(case)}.npz"
        found = load(path) if path.exists() else {}
        for group in findings(found) if "without_predicted" in found else ():
            wrong = (found["labels"] != found["true"])[group.positions].float().mean()
            known = f"{case} | {'yes' if case in FIXED_ON else ''} | {group.label} | {len(group)} | {wrong:.0%}"
            if group.suggested_confidences is None:
                continue
            sure = float(group.suggested_confidences.mean())
            ordinary = f"{group.reference_confidence:.2f} | {group.reference_accuracy:.0%}"
            print(f"| {known} | {group.own_label_rate:.0%} | {sure:.2f} | {ordinary} | {group.diagnosis} |")


if __name__ == "__main__":
    main()
