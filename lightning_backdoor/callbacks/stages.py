"""What D-ST found, how it trained and what came of it, in words and numbers for the user."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_backdoor.callbacks.repairs import MEANING
from lightning_backdoor.callbacks.suspects import Judge
from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.scanning.scanner import DatasetScanner

__all__ = ["Training", "evidence", "sentence"]


@dataclass(frozen=True)
class Training:
    """One judgement of the samples and the training that followed from it, in plain values for a checkpoint.

    Attributes:
        removed: Samples that it removed from ordinary training.
        num_flagged_before_cap: Samples that the rule pointed at in all, before ``max_removed`` limited it.
        modes: Label and separation of every second mode that was found.
        suspects: Samples that the classifier was turned away from; 0 if there was nothing to do.
        trusted: Samples whose labels were learned.
        change: Epochs of the contrastive stage.
        losses: Mean loss of every epoch, of both stages.
        agreement: Epoch and share of the neighbours of trusted samples that have their label.
        readmitted: Uncertain samples that became trusted before the second stage.
        doubted: Uncertain samples that became suspect then.
        accuracy: Share of the trusted samples that get their label at the end.
        early: Whether training ended before the second stage.
    """

    removed: int
    num_flagged_before_cap: int
    modes: tuple[tuple[int, float], ...]
    suspects: int
    trusted: int
    change: int = 0
    losses: tuple[float, ...] = ()
    agreement: tuple[tuple[int, float], ...] = ()
    readmitted: int = 0
    doubted: int = 0
    accuracy: float | None = None
    early: bool = False

    def state_dict(self) -> dict[str, Any]:
        """Plain values that load with ``weights_only=True``."""
        return asdict(self)

    def asked(self, agreement: float, more: int, fewer: int) -> Training:
        """The same after the neighbours were asked, who made ``more`` samples trusted and ``fewer`` suspect."""
        return replace(
            self,
            agreement=(*self.agreement, (len(self.losses), agreement)),
            readmitted=more,
            trusted=self.trusted + more,
            doubted=fewer,
            suspects=self.suspects + fewer,
            removed=self.removed + fewer,
        )


def sentence(training: Training, total: int) -> str:
    """Say what the detector found, what the neighbours changed, or what came of the training.

    Args:
        training: The latest one.
        total: Samples of the training set.
    """
    if not training.suspects:
        return f"looked at {total:,} training images: nothing stands out, nothing to do."
    groups = f"{training.trusted:,} trusted, {training.suspects:,} suspect"
    if training.accuracy is not None:
        ended = (
            " It ended before the second stage: the classifier is the one learned beside the first." * training.early
        )
        return (
            f"trained {len(training.losses)} epochs on {total:,} images ({groups}): {training.accuracy:.1%} of the "
            f"trusted ones get their label.{ended}"
        )
    if training.agreement and training.agreement[-1][0] == training.change:
        return (
            f"learned features; of the neighbours of trusted images {training.agreement[-1][1]:.1%} have their label. "
            f"{training.readmitted:,} uncertain images became trusted, {training.doubted:,} suspect: {groups}. The "
            "classifier comes next."
        )
    if not training.change:
        return f"looked at {total:,} training images: {groups}. Ordinary training goes on without the suspect ones."
    return f"looked at {total:,} training images: {groups}. Features are learned first, the classifier next."


def evidence(training: Training, data: DatasetScanner, judge: Judge, seconds: float) -> Evidence:
    """What the report shows beside the verdict.

    Args:
        training: The latest one.
        data: Where the images come from.
        judge: Who told suspects.
        seconds: Duration of what was done last.
    """
    facts: dict[str, str | int | float] = {
        "seconds of the last step": round(seconds, 1),
        "images read with": data.transform.description,
        "images trusted": training.trusted,
        "images suspect": training.suspects,
        "became trusted, by their neighbours": training.readmitted,
        "became suspect, by their neighbours": training.doubted,
        "classes with a second mode": ", ".join(f"{k} (separation {d:.1f})" for k, d in training.modes) or "none",
    }
    agreement = dict(training.agreement)
    rows = [
        (
            epoch,
            "features" if epoch <= training.change else "classifier",
            f"{loss:.4f}",
            f"{agreement[epoch]:.1%}" if epoch in agreement else "",
        )
        for epoch, loss in enumerate(training.losses, start=1)
    ]
    head = ("epoch", "stage", "loss", "neighbours of trusted images with their label")
    return Evidence(
        images=data.images,
        facts=facts,
        score_meaning=MEANING[judge.meaning],
        num_flagged_before_cap=training.num_flagged_before_cap,
        max_removed=judge.max_removed,
        treatment=f"The model was trained in two stages: {sentence(training, len(data))}" if training.losses else "",
        tables={"Training, epoch by epoch": (head, rows)} if rows else {},
    )
