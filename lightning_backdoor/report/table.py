"""The verdict as rows: the CSV file and the table of classes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_backdoor.verdict import Verdict

__all__ = ["ClassRow", "class_rows", "csv_chunks", "csv_columns", "csv_rows"]


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
    """
    yield _lines([csv_columns(verdict)])
    for part in torch.split(torch.arange(len(verdict)), rows):
        yield _lines(csv_rows(verdict, part))


def csv_columns(verdict: Verdict) -> list[str]:
    """Names of the columns of :func:`csv_chunks`."""
    return ["index", *_columns(verdict)]


def csv_rows(verdict: Verdict, positions: Tensor) -> Iterator[tuple[Any, ...]]:
    """The cells of some samples, in the order of :func:`csv_columns`: numbers and booleans, and scores as text."""
    digits = ".17g" if verdict.scores.dtype == torch.float64 else ".9g"
    cells: dict[str, list[Any]] = {}
    for name, column in _columns(verdict).items():
        if isinstance(column, tuple):
            cells[name] = [column[position] for position in positions.tolist()]
        else:
            cells[name] = column[positions].tolist()
    cells["score"] = [format(score, digits) for score in cells["score"]]
    for name in ("finding", "suggested_label"):
        cells[name] = ["" if number == -1 else number for number in cells[name]]
    return zip(positions.tolist(), *cells.values(), strict=True)


def _columns(verdict: Verdict) -> dict[str, Tensor | tuple[str, ...]]:
    """Every column but the first, by name, ``(N,)``."""
    columns: dict[str, Tensor | tuple[str, ...] | None] = {
        "path": verdict.paths,
        "label": torch.full((len(verdict),), -1) if verdict.labels is None else verdict.labels,
        "score": verdict.scores,
        "keep": verdict.keep,
        "finding": verdict.finding_indices,
        "suggested_label": verdict.suggested_labels,
        "approved": torch.zeros_like(verdict.keep) if verdict.approved is None else verdict.approved,
        "trusted": verdict.trusted,
        "suspect": verdict.suspect,
    }
    return {name: column for name, column in columns.items() if column is not None}


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
