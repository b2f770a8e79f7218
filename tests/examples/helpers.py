"""Hand-made rows of the benchmark."""

from __future__ import annotations

from typing import Any

from examples.evidence import rows
from examples.evidence.networks import NAME

OLD = {"dataset": "CIFAR-10 (JPEG)", "images": 20_000, "model": NAME, "epochs": 12, "seed": 0, "poisons": 1000}


def row(attack: str, defence: str, accuracy: float, asr: float, seconds: float = 100, **fields: Any) -> rows.Row:
    """A row as they were before recipe, rate and costs were written down."""
    poisons = {} if attack != "clean" else {"poisons": 0}
    found = {"attack": attack, "defence": defence, "clean_accuracy": accuracy, "asr": asr, "removed": 0}
    return {**OLD, **found, **poisons, "seconds": seconds, **fields}
