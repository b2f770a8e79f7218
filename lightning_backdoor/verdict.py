"""The record that every defence leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.files import atomic_file

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Verdict"]

_MASKS = ("keep", "trusted", "suspect")


@dataclass(frozen=True)
class Verdict:
    """Judgement on every training sample, keyed by its position in the user's dataset.

    Args:
        scores: Suspicion of each sample, float, shape ``(N,)``. **Larger is more suspicious.**
        keep: Samples that stay in the training set, bool, shape ``(N,)``.
        threshold: Samples with a score above it are removed. Infinite when nothing was removed.
        rule: How the threshold was chosen, for example ``"fraction(0.2)"``.
        labels: Label of each sample as the dataset gives it, long, shape ``(N,)``, or ``None`` if unknown.
        trusted: Samples that count as clean, bool, shape ``(N,)`` (D-BR and D-ST only).
        suspect: Samples that count as poisoned, bool, shape ``(N,)`` (D-BR and D-ST only).

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

    @property
    def removed(self) -> Tensor:
        """Dataset positions of the removed samples, most suspicious first, long, shape ``(M,)``."""
        flagged = (~self.keep).nonzero().squeeze(1)
        return flagged[self.scores[flagged].argsort(descending=True, stable=True)]

    def __len__(self) -> int:
        return len(self.scores)

    def to_frame(self) -> pd.DataFrame:
        """Return a pandas frame with the columns ``index``, ``label``, ``score`` and ``keep`` (plus the masks present).

        Labels that are unknown are ``-1``. Needs the ``report`` extra.
        """
        import pandas as pd  # noqa: PLC0415  (an extra, loaded when used)

        unknown = torch.full((len(self),), -1, dtype=torch.long)
        columns = {
            "index": torch.arange(len(self)),
            "label": unknown if self.labels is None else self.labels,
            "score": self.scores,
            "keep": self.keep,
            "trusted": self.trusted,
            "suspect": self.suspect,
        }
        return pd.DataFrame({name: column.numpy() for name, column in columns.items() if column is not None})

    def state_dict(self) -> dict[str, Any]:
        """Return the record as tensors and plain values that load with ``weights_only=True``."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def save(self, path: str | PathLike[str]) -> None:
        """Write the record to ``path``; interrupted, it leaves whatever was there."""
        with atomic_file(Path(path)) as file:
            torch.save(self.state_dict(), file)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Verdict:
        """Read a record written by :meth:`save`. A file from a stranger cannot run code (``weights_only=True``).

        Raises:
            ArgumentError: The file holds something else.
            pickle.UnpicklingError: The file would run code.
        """
        record = torch.load(path, map_location="cpu", weights_only=True)
        names = {field.name for field in fields(cls)}
        if not isinstance(record, dict) or not {"scores", "keep", "threshold", "rule"} <= record.keys() <= names:
            held = f"a dict with {', '.join(map(str, record))}" if isinstance(record, dict) else type(record).__name__
            raise ArgumentError(f"`path` must be a file that `Verdict.save` wrote, got {held} in {path}.")
        return cls(**record)
