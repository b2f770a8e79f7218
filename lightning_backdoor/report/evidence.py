"""What a report may show beside the verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lightning_backdoor.errors import ArgumentError

__all__ = ["Evidence", "Table"]

Table = tuple[Sequence[str], Sequence[Sequence[str | int | float]]]  # the head, and rows with one cell per column


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Pictures, names and facts that the report shows beside a verdict. Everything is optional.

    Args:
        classes: Class names, indexed by label. Labels without a name, or with an empty one, appear as ``class 7``.
        images: Function from dataset positions to their pixels, uint8, shape ``(n, C, H, W)``. Called several times,
            with at most 64 positions each, and about 540 in all; most of them are of findings.
        denoised: Function from dataset positions to the denoised variants of these images, each uint8,
            shape ``(n, C, H, W)``; one tensor for each name in ``variants``. Called once, with at most 24 positions.
        variants: Names of the denoised variants.
        facts: Rows for the table of facts, as name and value: epoch, seconds, gate statistic...
        score_meaning: One sentence that says what the score measures.
        num_flagged_before_cap: Images that the rule selected before ``max_removed`` limited it; ``None`` if there was
            no limit.
        max_removed: The limit that the user set, as a fraction of the training set.
        rewound: ``True`` if training started again from its first weights, ``False`` if it went on with the weights
            it had, ``None`` if this is not known.
        acted: Whether flagged images left the training set; ``False`` where nothing was changed.
        signals: What is said of classes that may carry a signal in all of their images, and what to do about it; empty
            if there is none.
        treatment: What was done to the model itself, as sentences; empty if nothing was.
        diagnosis_follows: Whether findings without a diagnosis will have one at the end of training.
        figures: More pictures, title to PNG bytes, each shown in a section of its own after the classes.
        callback: Name of the class of the defense, such as ``"UltraCleanCallback"``, for lines of code to copy; empty
            in an audit.
        false_alarm_rate: Chance at most, in ``[0, 1]``, that noise is taken for a finding in a training.
        tables: More tables, title to ``(head, rows)``, shown before these pictures: the first 100 rows of each.

    Raises:
        ArgumentError: A figure is not PNG, or a row has not one cell per column.
    """

    classes: Sequence[str] | None = None
    images: Callable[[Sequence[int]], Tensor] | None = None
    denoised: Callable[[Sequence[int]], Sequence[Tensor]] | None = None
    variants: Sequence[str] = ("local median", "non-local means")
    facts: Mapping[str, str | int | float] = field(default_factory=dict)
    score_meaning: str = ""
    num_flagged_before_cap: int | None = None
    max_removed: float | None = None
    rewound: bool | None = None
    acted: bool = True
    signals: tuple[str, str] | tuple[()] = ()
    treatment: str = ""
    diagnosis_follows: bool = False
    callback: str = ""
    false_alarm_rate: float | None = None
    figures: Mapping[str, bytes] = field(default_factory=dict)
    tables: Mapping[str, Table] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for title, png in self.figures.items():
            if not png.startswith(b"\x89PNG\r\n"):
                raise ArgumentError(
                    f"`figures` must map titles to PNG bytes, got {png[:8]!r}… for '{title}'. "
                    "Save the figure with format='png'."
                )
        for title, (head, rows) in self.tables.items():
            for row in rows:
                if len(row) != len(head):
                    raise ArgumentError(
                        f"`tables` must map titles to a head and rows with one cell per column: '{title}' has "
                        f"{len(head)} columns and a row of {len(row)} cells, {tuple(row)}."
                    )

    def class_name(self, label: int) -> str:
        """Return the name of a label; ``class 7`` where no name is known."""
        name = str(self.classes[label]) if self.classes is not None and 0 <= label < len(self.classes) else ""
        return name or f"class {label}"
