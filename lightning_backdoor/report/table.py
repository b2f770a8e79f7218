"""The verdict as rows: the CSV file and the table of classes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

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

    The columns are those of :meth:`~lightning_backdoor.Verdict.to_frame`. Unknown labels are ``-1``; ``finding`` and
    ``suggested_label`` are empty where there is none; scores keep every digit that float32 has.

    Args:
        verdict: The verdict, ``N`` samples.
        rows: Rows per chunk, which bounds the memory.
    """
    unknown, none = torch.full((len(verdict),), -1), torch.zeros_like(verdict.keep)
    columns: dict[str, Tensor | tuple[str, ...] | None] = {
        "path": verdict.paths,
        "label": unknown if verdict.labels is None else verdict.labels,
        "score": verdict.scores,
        "keep": verdict.keep,
        "finding": verdict.finding_indices,
        "suggested_label": verdict.suggested_labels,
        "approved": none if verdict.approved is None else verdict.approved,
        "trusted": verdict.trusted,
        "suspect": verdict.suspect,
    }
    present = {name: column for name, column in columns.items() if column is not None}
    digits = ".17g" if verdict.scores.dtype == torch.float64 else ".9g"
    yield _lines([["index", *present]])
    for start in range(0, len(verdict), rows):
        part = slice(start, start + rows)
        cells: dict[str, list[object]] = {
            name: list(c[part]) if isinstance(c, tuple) else c[part].tolist() for name, c in present.items()
        }
        cells["score"] = [format(score, digits) for score in verdict.scores[part].tolist()]
        for name in ("finding", "suggested_label"):
            cells[name] = ["" if number == -1 else number for number in cells[name]]
        yield _lines(zip(range(start, start + rows), *cells.values(), strict=False))


def _lines(rows: Iterable[Iterable[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


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
