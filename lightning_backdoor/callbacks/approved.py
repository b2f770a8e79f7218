"""Samples that the user has declared to be fine: how they are given, and what a verdict says of them."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor._lightning import rank_zero_warn
from lightning_backdoor.callbacks.options import Approved
from lightning_backdoor.data.nesting import paths_of
from lightning_backdoor.data.random_state import isolated_rng
from lightning_backdoor.errors import ArgumentError, DataError
from lightning_backdoor.responses.base import Detection
from lightning_backdoor.scanning.scanner import DatasetScanner
from lightning_backdoor.verdict import Verdict

__all__ = ["approved_samples", "detection_without", "warn_of_other", "with_approved"]

YES, NO = {"true", "1", "yes", "x"}, {"false", "0", "no", ""}
COMPARED = 64  # of the approved samples, at most, whose labels are read at the start of a fit


@dataclass(frozen=True)
class Approval:
    """Samples that are approved, and what is known of the data that this was said of.

    Attributes:
        samples: Bool ``(N,)``.
        labels: Labels, long ``(N,)``; -1 where none is known.
        paths: Position to the file of the sample, where one is known.
        source: Where all of this comes from, for messages.
    """

    samples: Tensor
    labels: Tensor
    paths: dict[int, str]
    source: str


def approved_samples(given: Approved, scanner: DatasetScanner) -> Tensor:
    """The samples that are approved, bool ``(N,)``, from what the user has passed as ``approved``.

    Args:
        given: Dataset positions or a mask; a verdict, or a file that :meth:`~lightning_backdoor.Verdict.save` wrote:
            its approved samples or, if it has no such mask, all that it removed and all of its findings; a CSV file
            like that of a report, in which the user has filled in the column ``approved``.
        scanner: Reads the training set.

    Raises:
        ArgumentError: It is of another type, cannot be read, or holds a position that the dataset has not.
        DataError: It was said of other data: another number of samples, or other labels or files at some positions.
    """
    approval = _approval_of(given, len(scanner))
    require_same_labels(approval, scanner)
    require_same_files(approval, paths_of(scanner.loader.dataset))
    return approval.samples


def _approval_of(given: Approved, size: int) -> Approval:
    if isinstance(given, (str, Path)):
        path = Path(given)
        if not path.is_file():
            raise ArgumentError(f"`approved` must be the path of a file that is there, got {str(path)!r}.")
        if path.suffix.lower() == ".csv":
            return _of_csv(path, size)
        if path.suffix.lower() == ".pt":
            return _of_verdict(Verdict.load(path), size, str(path))
        raise ArgumentError(
            f"`approved` must be a saved verdict (.pt) or a table (.csv) where it is a path, got {str(path)!r}."
        )
    if isinstance(given, Verdict):
        return _of_verdict(given, size, "the verdict")
    return Approval(_mask_of(given, size), torch.full((size,), -1), {}, "the positions")


def _of_verdict(verdict: Verdict, size: int, source: str) -> Approval:
    if len(verdict) != size:
        raise _other_data(source, f"it knows {len(verdict)} samples, the training dataset has {size}")
    samples = verdict.approved
    if samples is None:
        samples = ~verdict.keep | (verdict.finding_indices >= 0)
    labels = torch.full((size,), -1) if verdict.labels is None else verdict.labels
    return Approval(samples, labels, dict(enumerate(verdict.paths or ())), source)


def _mask_of(given: Any, size: int) -> Tensor:
    """Positions, or a mask, as a mask."""
    try:
        values = torch.as_tensor(given).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            "`approved` must be dataset positions, a verdict, or the path of a saved verdict (.pt) or of a reviewed "
            f"table (.csv), got {type(given).__name__}: {error}"
        ) from error
    if values.dtype == torch.bool and values.ndim == 1 and len(values):
        if len(values) != size:
            raise ArgumentError(f"`approved` must be a mask of the {size} training samples, got {len(values)} values.")
        return values.clone()
    if values.numel() and (values.ndim != 1 or values.is_floating_point() or values.is_complex()):
        raise ArgumentError(
            f"`approved` must be whole numbers of shape (M,), got {values.dtype} {tuple(values.shape)}. Pass dataset "
            "positions such as `verdict.findings[0].positions`."
        )
    outside = values[(values < 0) | (values >= size)]
    if len(outside):
        raise ArgumentError(
            f"`approved` must hold positions from 0 to {size - 1}, those of the training set, got {int(outside[0])}."
        )
    samples = torch.zeros(size, dtype=torch.bool)
    samples[values.long()] = True
    return samples


def _of_csv(path: Path, size: int) -> Approval:
    """Read a table with the columns ``index`` and ``approved``; ``label`` and ``path`` and some rows may be missing."""
    paths: dict[int, str] = {}
    samples, labels = torch.zeros(size, dtype=torch.bool), torch.full((size,), -1)
    with io.StringIO(_text_of(path), newline="") as file:
        start, header = 0, file.readline()
        if header.lower().startswith("sep="):  # a spreadsheet's note of the separator
            start, header = file.tell(), file.readline()
        file.seek(start)
        rows = csv.DictReader(file, delimiter=max(",;\t", key=header.count))
        columns = rows.fieldnames or ()
        if lacking := [name for name in ("index", "approved") if name not in columns]:
            raise ArgumentError(
                f"`approved` must be a table with the columns index and approved, but {path} lacks "
                f"{' and '.join(lacking)}; it has {', '.join(columns) or 'none'}. Take the `verdict.csv` of the report."
            )
        if twice := [name for name in ("index", "approved", "label", "path") if columns.count(name) > 1]:
            raise ArgumentError(
                f"`approved` must be a table in which every column has another name, but {path} has two columns "
                f"{twice[0]}. Delete one of them."
            )
        marked: dict[int, bool] = {}
        for row in rows:
            if not any(isinstance(value, str) and value.strip() for value in row.values()):
                continue  # spreadsheets write rows of empty cells
            where = f"line {rows.line_num + (start > 0)} of {path}"
            index, word = _number(row["index"], "index", where), (row["approved"] or "").strip().lower()
            if not 0 <= index < size:
                raise _other_data(where, f"it is on sample {index}, the training dataset has {size}")
            if word not in YES | NO:
                raise ArgumentError(
                    f"`approved` must be true, 1, yes or x in its table, or empty, false, 0 or no; got "
                    f"{row['approved']!r} in {where}."
                )
            if marked.setdefault(index, word in YES) != (word in YES):
                raise ArgumentError(
                    f"`approved` must say one thing of a sample, but sample {index} is approved in one row of {path} "
                    f"and not in another ({where}). Delete one of them."
                )
            samples[index] = word in YES
            if (row.get("label") or "").strip():
                labels[index] = _number(row["label"], "label", where)
            paths[index] = (row.get("path") or "").strip()
    return Approval(samples, labels, paths, str(path))


def _text_of(path: Path) -> str:
    """The text of a table, without the byte order mark that spreadsheets write."""
    data = path.read_bytes()
    try:
        return data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"`approved` must be a table in UTF-8, but {path} is not, or is no text ({error.reason} at byte "
            f"{error.start}). Save it as `CSV UTF-8`."
        ) from error


def _number(text: str | None, column: str, where: str) -> int:
    try:
        return int(text or "")
    except ValueError as error:
        raise ArgumentError(f"`approved` must have whole numbers as {column}, got {text!r} in {where}.") from error


def require_same_labels(approval: Approval, scanner: DatasetScanner) -> None:
    """Compare the labels of the samples that the fit has looked at, and of some that are approved.

    Raises:
        DataError: The training dataset has other labels.
    """
    known = approval.labels >= 0
    positions, labels = scanner.probe
    approved = (approval.samples & known).nonzero().squeeze(1)
    if len(approved):
        spread = torch.arange(min(len(approved), COMPARED)) * len(approved) // min(len(approved), COMPARED)
        with isolated_rng():
            read = scanner.labels_at(approved[spread])
        positions, labels = torch.cat([positions, read[0]]), torch.cat([labels, read[1]])
    other = known[positions] & (approval.labels[positions] != labels)
    if bool(other.any()):
        place = int(positions[other][0])
        raise _other_data(
            approval.source,
            f"sample {place} has label {int(approval.labels[place])} there and {int(labels[other][0])} in the training "
            "dataset",
        )


def require_same_files(approval: Approval, paths: Sequence[str] | None) -> None:
    """Compare the names of the files; folders may have moved.

    Args:
        approval: Samples that are approved.
        paths: File of every sample of the training dataset, empty where it has none; ``None`` where none has.

    Raises:
        DataError: Some samples have other files.
    """
    if paths is None:
        return
    for place, path in approval.paths.items():
        if path and paths[place] and _file_name(path) != _file_name(paths[place]):
            raise _other_data(
                approval.source, f"sample {place} is {path} there and {paths[place]} in the training dataset"
            )


def _file_name(path: str) -> str:
    return path.replace("\\", "/").rpartition("/")[2]


def _other_data(source: str, why: str) -> DataError:
    return DataError(
        f"`approved` is on another dataset than the one of this fit ({source}: {why}). Pass what was reviewed of this "
        "one."
    )


def with_approved(verdict: Verdict, samples: Tensor) -> Verdict:
    """Keep approved samples, whatever was said of them, with the lowest score and in no finding.

    Args:
        verdict: On N samples.
        samples: Those that are approved, bool ``(N,)``.
    """
    approved = samples if verdict.approved is None else samples | verdict.approved
    scores = verdict.scores
    if not bool(approved.all()):
        scores = scores.masked_fill(approved, float(scores[~approved].min()))
    findings = tuple(one.without(approved) for one in verdict.findings)
    return replace(
        verdict,
        scores=scores,
        keep=verdict.keep | approved,
        suspect=None if verdict.suspect is None else verdict.suspect & ~approved,
        findings=tuple(one for one in findings if len(one)),
        approved=approved,
    )


def detection_without(detection: Detection, samples: Tensor) -> Detection:
    """A detection of which the approved samples, bool ``(N,)``, are no part."""
    flagged = int((samples & ~detection.verdict.keep).sum())
    return replace(
        detection,
        verdict=with_approved(detection.verdict, samples),
        num_flagged_before_cap=detection.num_flagged_before_cap - flagged,
    )


def warn_of_other(given: Tensor | None, stored: Tensor | None, title: str) -> None:
    """Say that a resumed run goes on with the approved samples of the checkpoint, where others are given now.

    Args:
        given: Those of now, bool ``(N,)``; ``None``: nothing was passed.
        stored: Those of the checkpoint.
        title: Name of the defense for readers.
    """
    if (given is None) == (stored is None) and (given is None or stored is None or torch.equal(given, stored)):
        return
    counts = [0 if samples is None else int(samples.sum()) for samples in (stored, given)]
    rank_zero_warn(
        f"{title}: the interrupted run approved {counts[0]:,} images, `approved` names {counts[1]:,} now, or others. A "
        "resumed run ends like one that was not interrupted: those of the checkpoint stay in force. For the new ones, "
        "start anew without `ckpt_path`."
    )
