"""Hand-made rows of the benchmark."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import rows
from benchmarks.networks import NAME

OLD = {"dataset": "CIFAR-10 (JPEG)", "images": 20_000, "model": NAME, "epochs": 12, "seed": 0, "poisons": 1000}


def row(attack: str, defence: str, accuracy: float, asr: float, seconds: float = 100, **fields: Any) -> rows.Row:
    """A row as they were before recipe, rate and costs were written down."""
    poisons = {} if attack != "clean" else {"poisons": 0}
    found = {"attack": attack, "defence": defence, "clean_accuracy": accuracy, "asr": asr, "removed": 0}
    return {**OLD, **found, **poisons, "seconds": seconds, **fields}


def pack(folder: Path, split: str, images: int, seed: int) -> None:
    """Write ``cifar10_<split>.npz`` with blurred noise in ten colours."""
    generator, files = np.random.default_rng(seed), []
    for place in range(images):
        pixels = generator.integers(0, 60, (32, 32, 3)) + np.array([20 * (place % 10), 90, 190 - 20 * (place % 10)])
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    np.savez(
        folder / f"cifar10_{split}.npz", jpeg=np.frombuffer(b"".join(files), np.uint8),
        offsets=np.cumsum([0, *map(len, files)]), labels=(np.arange(images) % 10).astype(np.uint8),
        classes=np.array([str(label) for label in range(10)]),
    )  # fmt: skip
