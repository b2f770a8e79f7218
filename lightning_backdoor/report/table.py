"""The verdict as rows: the CSV file and the table of classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from lightning_backdoor.verdict import Verdict

__all__ = ["ClassRow", "class_rows", "csv_chunks"]


class ClassRow(NamedTuple):
    """What happened to one class.

    Args:
        label: The label.
        images: Images with this label.
        removed: How many of them were removed.
        median: Median score of the class.
    """

    label: int
    images: int
    removed: int
    median: float


def csv_chunks(verdict: Verdict, rows: int = 100_000) -> Iterator[str]:
    """Yield the verdict as CSV text, some rows at a time.

    The columns are those of :meth:`~lightning_backdoor.Verdict.to_frame`: ``index,label,score,keep,finding`` and the
    masks that the verdict carries. Unknown labels are ``-1``; ``finding`` is empty where a sample is in none; scores
    keep every digit that float32 has.

    Args:
        verdict: The verdict, ``N`` samples.
        rows: Rows per chunk, which bounds the memory.
    """
    masks = {"trusted": verdict.trusted, "suspect": verdict.suspect}
    present = {name: mask for name, mask in masks.items() if mask is not None}
    findings = verdict.finding_indices
    labels = torch.full((len(verdict),), -1) if verdict.labels is None else verdict.labels
    digits = ".17g" if verdict.scores.dtype == torch.float64 else ".9g"
    yield ",".join(["index", "label", "score", "keep", "finding", *present]) + "\n"
    for start in range(0, len(verdict), rows):
        part = slice(start, start + rows)
        found = ["" if index < 0 else index for index in findings[part].tolist()]
        columns = [verdict.keep[part].tolist(), found, *(mask[part].tolist() for mask in present.values())]
        scores = [format(score, digits) for score in verdict.scores[part].tolist()]
        lines = zip(range(start, start + rows), labels[part].tolist(), scores, *columns, strict=False)
        yield "".join(",".join(map(str, line)) + "\n" for line in lines)


def class_rows(verdict: Verdict) -> list[ClassRow]:
    """Count each class: images, removed images, median score.

    Returns:
        One row per label that occurs, most removed first, then by label, without samples whose label is not known.
    """
    if verdict.labels is None:
        return []
    known = verdict.labels >= 0
    scores = verdict.scores[known].double().numpy()
    labels, inverse, counts = np.unique(verdict.labels[known].numpy(), return_inverse=True, return_counts=True)
    removed = np.bincount(inverse[~verdict.keep[known].numpy()], minlength=len(labels))
    by_class = scores[np.lexsort((scores, inverse))]
    first = np.cumsum(counts) - counts
    median = (by_class[first + (counts - 1) // 2] + by_class[first + counts // 2]) / 2
    columns = (labels.tolist(), counts.tolist(), removed.tolist(), median.tolist())
    return sorted((ClassRow(*row) for row in zip(*columns, strict=True)), key=lambda row: (-row.removed, row.label))
