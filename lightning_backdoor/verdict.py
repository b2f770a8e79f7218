"""The record of what a defence found and removed."""

from __future__ import annotations

from dataclasses import MISSING, astuple, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zipfile import is_zipfile

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.files import atomic_file
from lightning_backdoor.relabeling import RelabeledSubset, checked_dataset

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Diagnosis", "Finding", "GateFigure", "ReferenceModel", "Verdict"]

Diagnosis = Literal["wrong labels", "right labels", "unclear"]
ReferenceModel = Literal["unseen", "repaired"]

TRIGGER = 0.3  # excess of an estimated attack success rate over its control from which on there seems to be a trigger

_MASKS = ("keep", "trusted", "suspect", "approved")


@dataclass(frozen=True)
class GateFigure:
    """One figure that a gate compared with its bound.

    Attributes:
        name: What was measured.
        value: The measured value.
        relation: How the value stands to the bound: ``">="``, ``">"``, ``"<="`` or ``"<"``.
        bound: The bound of the gate.
    """

    name: str
    value: float
    relation: str
    bound: float

    @property
    def criterion(self) -> str:
        """The comparison without the value, such as ``standardized_gap>=2.5``."""
        return f"{self.name}{self.relation}{self.bound:g}"


@dataclass(frozen=True)
class Finding:
    """One group of samples that stands out from the rest of its label, and the rule that found it.

    Attributes:
        label: Class index of the samples.
        positions: Their positions in the user's dataset, most suspicious first, long ``(M,)``. Some of them may have
            been kept, where ``max_removed`` or the limit of a label left them in.
        gate: Name of the gate that the group passed; see :func:`~lightning_backdoor.functional.find_subpopulations`.
        figures: What this gate measured, with its bounds.
        units: Columns of the measured values that make up the direction, long ``(U,)``.
        weights: Their weights, float ``(U,)``.
        threshold: Samples of the label whose weighted sum of these columns is larger belong to the group.
        diagnosis: ``"wrong labels"``: the content of the samples belongs to other classes. ``"right labels"``: it
            belongs to their class: a clean-label attack, or a clean kind of image. ``"unclear"``: not known.
        suggested_labels: The label that a model without the group gives each of its samples, long ``(M,)`` in
            the order of ``positions``, -1 where none is known; ``None`` without such a model.
        suggested_confidences: The probability that it gives these labels, in ``[0, 1]``, float ``(M,)``.
        reference_accuracy: Share, in ``[0, 1]``, of other samples that it gives their label.
        reference_confidence: Mean probability, in ``[0, 1]``, of the labels that it gives those.
        estimated_asr: Estimated attack success rate, in ``[0, 1]``: share of training images of other classes that the
            model gives ``label`` when what the group has in common is put on them; ``None`` if it was not estimated.
        control_asr: The same with ordinary samples in the place of the group, for the label that they have: those of
            ``label``, or the upper quartile of other labels, whichever is larger.
        asr_method: How it was put on them: ``"difference"``, ``"blend"`` or ``"paste"``.
        detectors: In an audit, the names of the detectors that found it, first the one that these figures and this
            direction are of.
        reference_model: Which model suggests the labels: ``"unseen"``, one that was trained without the group, or
            ``"repaired"``, one that was fine-tuned without it after the units that the group drives were reset.
            ``"unseen"`` where no labels are suggested, too.
    """

    label: int
    positions: Tensor
    gate: str
    figures: tuple[GateFigure, ...]
    units: Tensor
    weights: Tensor
    threshold: float
    diagnosis: Diagnosis = "unclear"
    suggested_labels: Tensor | None = None
    suggested_confidences: Tensor | None = None
    reference_accuracy: float | None = None
    reference_confidence: float | None = None
    estimated_asr: float | None = None
    control_asr: float | None = None
    asr_method: str | None = None
    detectors: tuple[str, ...] = ()
    reference_model: ReferenceModel = "unseen"

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def own_label_rate(self) -> float | None:
        """Share of the samples that a model without them gives their label; ``None`` where there is none."""
        known = None if self.suggested_labels is None else self.suggested_labels[self.suggested_labels >= 0]
        return None if known is None or not len(known) else float((known == self.label).float().mean())

    @property
    def asr_excess(self) -> float:
        """By how much the estimated attack success rate exceeds its control, in ``[-1, 1]``; 0 if not estimated."""
        return 0.0 if self.estimated_asr is None else self.estimated_asr - (self.control_asr or 0.0)

    @property
    def works_as_trigger(self) -> bool:
        """Whether what the samples have in common seems to work as a trigger, by the estimated attack success rate."""
        return self.asr_excess >= TRIGGER

    def project(self, values: Tensor) -> Tensor:
        """Position of every sample along the direction, float ``(N,)``, for values ``(N, V)`` in the same columns."""
        return values[:, self.units].float() @ self.weights

    def members(self, values: Tensor, labels: Tensor | None = None) -> Tensor:
        """Samples above the threshold, bool ``(N,)``, for values ``(N, V)``; with ``labels``, of the label alone."""
        above = self.project(values) > self.threshold
        return above if labels is None else above & (labels == self.label)

    def without(self, samples: Tensor) -> Finding:
        """The same without some samples, bool ``(N,)``."""
        rest = ~samples[self.positions]
        suggested, sure = (x if x is None else x[rest] for x in (self.suggested_labels, self.suggested_confidences))
        return replace(self, positions=self.positions[rest], suggested_labels=suggested, suggested_confidences=sure)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values that load with ``weights_only=True``."""
        figures = [list(astuple(figure)) for figure in self.figures]
        return {**vars(self), "figures": figures, "detectors": list(self.detectors)}

    @classmethod
    def from_state_dict(cls, record: dict[str, Any]) -> Finding:
        """Read what :meth:`state_dict` returned; fields that have a default may be absent.

        Raises:
            ArgumentError: It is of another kind, or has fields of another release.
        """
        known, held = {field.name for field in fields(cls)}, record.keys() if isinstance(record, dict) else set()
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        size = len(fields(GateFigure))
        if not needed <= held <= known or any(len(figure) != size for figure in record["figures"]):
            differences = (
                ("missing", ", ".join(sorted(needed - held))),
                ("unknown", ", ".join(sorted(map(str, held - known)))),
            )
            told = "; ".join(f"{kind}: {names}" for kind, names in differences if names)
            told = told or f"`figures` must have {size} values each"
            raise ArgumentError(
                f"`findings` have fields of another release ({told}). Read them with the release that wrote them, or "
                "detect again."
            )
        figures = tuple(GateFigure(*figure) for figure in record["figures"])
        return cls(**{**record, "figures": figures, "detectors": tuple(record.get("detectors", ()))})


@dataclass(frozen=True)
class Verdict:
    """What a defence decided on every training sample, keyed by its position in the user's dataset.

    Args:
        scores: Suspicion of each sample, float, shape ``(N,)``. **Larger is more suspicious.**
        keep: Samples that stay in the training set, bool, shape ``(N,)``.
        threshold: Samples with a score above it are removed. Infinite when nothing was removed.
        rule: How the threshold was chosen, for example ``"fraction(0.2)"``.
        labels: Label of each sample as the dataset gives it, long, shape ``(N,)``, or ``None`` if unknown.
        trusted: Samples that count as clean, bool, shape ``(N,)`` (D-BR and D-ST only).
        suspect: Samples that count as poisoned, bool, shape ``(N,)`` (D-BR and D-ST only).
        findings: The groups of samples that stand out, in the order in which they were found; no sample is in two.
        approved: Samples that the user has declared to be fine, bool, shape ``(N,)``; they are always kept.
        paths: File of every sample, ``N`` texts, empty where it has none; ``None`` where no sample has one.

    Raises:
        ArgumentError: If the shapes disagree, a mask is not boolean, or a field is of another type.

    Example:
        >>> import torch
        >>> verdict = Verdict(scores=torch.tensor([0.1, 3.0, 2.0]), keep=torch.tensor([True, False, False]),
        ...                   threshold=1.0, rule="fraction(0.7)")
        >>> verdict.removed
        tensor([1, 2])
    """

    scores: Tensor
    keep: Tensor
    threshold: float
    rule: str
    labels: Tensor | None = None
    trusted: Tensor | None = None
    suspect: Tensor | None = None
    findings: tuple[Finding, ...] = ()
    approved: Tensor | None = None
    paths: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("scores", *_MASKS, "labels"):
            value = getattr(self, name)
            if value is None and name not in ("scores", "keep"):
                continue
            if not isinstance(value, Tensor):
                raise ArgumentError(f"`{name}` must be a tensor, got {type(value).__name__}.")
            if value.shape != self.scores.shape or value.ndim != 1:
                raise ArgumentError(
                    f"`{name}` must have shape (N,) like `scores` {tuple(self.scores.shape)}, got {tuple(value.shape)}."
                )
            if name in _MASKS and value.dtype != torch.bool:
                raise ArgumentError(f"`{name}` must be a boolean mask, got dtype {value.dtype}.")
        if not isinstance(self.threshold, int | float) or not isinstance(self.rule, str):
            raise ArgumentError(
                f"`threshold` must be a number and `rule` a text, got {self.threshold!r} and {self.rule!r}."
            )

        if not isinstance(self.findings, tuple) or not all(isinstance(found, Finding) for found in self.findings):
            raise ArgumentError(
                f"`findings` must be a tuple of `Finding`, got {self.findings!r}. `Verdict.load` reads a saved record."
            )
        if self.approved is not None and bool((self.approved & ~self.keep).any()):
            first = int((self.approved & ~self.keep).nonzero()[0])
            raise ArgumentError(f"`approved` samples must be kept, got one that is removed at position {first}.")
        if self.paths is not None and len(self.paths) != len(self):
            raise ArgumentError(f"`paths` must hold one text per sample, got {len(self.paths)} for {len(self)}.")

    @property
    def removed(self) -> Tensor:
        """Dataset positions of the removed samples, most suspicious first, long, shape ``(M,)``."""
        flagged = (~self.keep).nonzero().squeeze(1)
        return flagged[self.scores[flagged].argsort(descending=True, stable=True)]

    @property
    def finding_indices(self) -> Tensor:
        """Index in ``findings`` of every sample, long ``(N,)``; -1 where it is in none."""
        indices = torch.full((len(self),), -1)
        for index, finding in enumerate(self.findings):
            indices[finding.positions] = index
        return indices

    @property
    def suggested_labels(self) -> Tensor:
        """Label that the findings suggest for every sample, long ``(N,)``; -1 where there is no suggestion."""
        suggested = torch.full((len(self),), -1)
        for finding in self.findings:
            if finding.suggested_labels is not None:
                suggested[finding.positions] = finding.suggested_labels
        return suggested

    def __len__(self) -> int:
        return len(self.scores)

    def subset(self, dataset: Dataset[Any]) -> Subset[Any]:
        """Return the kept samples of a dataset.

        Args:
            dataset: The dataset that the verdict is on: map-style, ``N`` samples. It is not changed.

        Raises:
            ArgumentError: It is not map-style, or has another number of samples.
        """
        return Subset(checked_dataset(dataset, len(self)), self.keep.nonzero().flatten().tolist())

    def relabeled(self, dataset: Dataset[Any]) -> Subset[Any]:
        """Return a dataset in which removed samples have the label that the findings suggest, if they suggest another.

        Kept samples are as they were. A removed sample is left out where no label is suggested, where the suggestion
        is the label that it has (it would be back as it was, with the trigger that it may carry), and where its finding
        has ``"right labels"``.

        Args:
            dataset: The dataset that the verdict is on: map-style, ``N`` samples, not changed. Its items are
                ``(image, label, ...)``, or mappings with the label under ``label``, ``labels``, ``target``, ``targets``
                or ``y``; a new label is of the type of the old one. They are checked when they are read.

        Raises:
            ArgumentError: It is not map-style, or has another number of samples.

        Example:
            >>> import torch
            >>> finding = Finding(0, torch.tensor([1, 2]), "strict", (), torch.tensor([0]), torch.ones(1), 0.5,
            ...                   diagnosis="wrong labels", suggested_labels=torch.tensor([3, -1]))
            >>> verdict = Verdict(torch.arange(3.0), torch.tensor([True, False, False]), 0.5, "known",
            ...                   findings=(finding,))
            >>> list(verdict.relabeled([("cat", 0), ("dog", 0), ("owl", 0)]))
            [('cat', 0), ('dog', 3)]
        """
        new: dict[int, int] = {}
        for finding in self.findings:
            if finding.suggested_labels is not None and finding.diagnosis != "right labels":
                pairs = zip(finding.positions.tolist(), finding.suggested_labels.tolist(), strict=True)
                new.update((place, label) for place, label in pairs if label not in (-1, finding.label))
        new = {place: label for place, label in new.items() if not self.keep[place]}
        positions = sorted({*self.keep.nonzero().flatten().tolist(), *new})
        return RelabeledSubset(checked_dataset(dataset, len(self)), positions, new, self.labels)

    def to_frame(self) -> pd.DataFrame:
        """Return a pandas frame with one row per sample.

        The columns are ``index``, ``path`` (if files are known), ``label``, ``score``, ``keep``, ``finding``,
        ``suggested_label``, ``approved``, and the masks of D-BR and D-ST. Labels that are unknown are ``-1``.
        ``finding`` is the index in ``findings``, missing (``<NA>``) where a sample is in none, and so is
        ``suggested_label`` where none is suggested. Needs the ``report`` extra.
        """
        import pandas as pd  # noqa: PLC0415  (an extra, loaded when used)

        unknown = torch.full((len(self),), -1, dtype=torch.long)
        columns: dict[str, Tensor | None] = {
            "label": unknown if self.labels is None else self.labels,
            "score": self.scores,
            "keep": self.keep,
            "finding": self.finding_indices,
            "suggested_label": self.suggested_labels,
            "approved": torch.zeros_like(self.keep) if self.approved is None else self.approved,
            "trusted": self.trusted,
            "suspect": self.suspect,
        }
        known: dict[str, Any] = {"index": range(len(self))} | ({} if self.paths is None else {"path": self.paths})
        known |= {name: column.numpy() for name, column in columns.items() if column is not None}
        frame = pd.DataFrame(known)
        for name in ("finding", "suggested_label"):
            frame[name] = frame[name].astype("Int64").mask(frame[name] < 0)
        return frame

    def state_dict(self) -> dict[str, Any]:
        """Return the record as tensors and plain values that load with ``weights_only=True``."""
        plain = {name: value for name, value in vars(self).items() if value is not None}
        if self.paths is not None:
            plain["paths"] = list(self.paths)
        return {**plain, "findings": [finding.state_dict() for finding in self.findings]}

    @classmethod
    def from_state_dict(cls, record: dict[str, Any]) -> Verdict:
        """Read what :meth:`state_dict` returned; ``findings`` may be absent, as in records of earlier releases."""
        findings = tuple(Finding.from_state_dict(finding) for finding in record.get("findings", ()))
        paths = record.get("paths")
        return cls(**{**record, "findings": findings, "paths": None if paths is None else tuple(paths)})

    def save(self, path: str | PathLike[str]) -> None:
        """Write the record to ``path``; if it is interrupted, an earlier file stays as it was."""
        with atomic_file(Path(path)) as file:
            torch.save(self.state_dict(), file)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Verdict:
        """Read a record written by :meth:`save`. A file of unknown origin cannot run code (``weights_only=True``).

        Raises:
            ArgumentError: The file holds something else.
            pickle.UnpicklingError: The file would run code.
        """
        try:
            record = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # as many kinds as there are files of another kind
            told = f"`path` must be a file that `Verdict.save` wrote, got {path}, which"
            if type(error).__name__ == "UnpicklingError" and is_zipfile(path):
                raise type(error)(f"{told} holds objects that may run code; it was not read.") from error
            raise ArgumentError(f"{told} is empty, cut off, or of another kind.") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(record, dict) or not {"scores", "keep", "threshold", "rule"} <= record.keys() <= names:
            held = f"a dict with {', '.join(map(str, record))}" if isinstance(record, dict) else type(record).__name__
            raise ArgumentError(f"`path` must be a file that `Verdict.save` wrote, got {held} in {path}.")
        try:
            return cls.from_state_dict(record)
        except ArgumentError as error:
            told = f"`path` must be a file that `Verdict.save` of this release wrote, got {path}: {error}"
            raise ArgumentError(told) from error
