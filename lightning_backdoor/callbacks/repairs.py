"""What a repair by D-BR starts from and leads to, in words and numbers for the user."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.scanning.scanner import DatasetScanner

__all__ = ["Repair", "evidence", "sentence"]

MEANING = {
    "modes": "It says how suspicious the image looks to a detector that was trained to rely on triggers; above 0.5 it "
    "belongs to a second population inside its class.",
    "fct": "It measures how far the features of a detector move when the image is turned and shifted.",
    "given": "It is the score of the verdict that was handed in.",
    "loss": "It is minus the loss of the image after a few epochs: poisoned images are learned fastest.",
}


@dataclass(frozen=True)
class Repair:
    """One look at the samples and the epochs of repair that followed, in plain values that a checkpoint can hold.

    Attributes:
        epochs: Epochs trained before it.
        removed: Samples that it removed from training.
        num_flagged_before_cap: Samples that the rule pointed at in all, before ``max_removed`` limited it.
        modes: Label and separation of every second mode that was found.
        suspects: Samples to be unlearned; 0 if nothing is to be repaired, or by learning alone.
        trusted: Samples to be learned anew.
        accuracy: Share of the watched samples that got their label, before and after every epoch of repair.
        flagged_label_rate: Share of the suspects that got their label, before and after every epoch.
        undone: For every epoch whether the weights went back because accuracy had suffered.
        no_room: Whether nothing was repaired for want of epochs.
        at_end: Share of the images in training and of the removed ones that got their label at the end of training, if
            it went on after the repair.
    """

    epochs: int
    removed: int
    num_flagged_before_cap: int
    modes: tuple[tuple[int, float], ...]
    suspects: int
    trusted: int
    accuracy: tuple[float, ...] = ()
    flagged_label_rate: tuple[float, ...] = ()
    undone: tuple[bool, ...] = ()
    no_room: bool = False
    at_end: tuple[float, float | None] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain values that load with ``weights_only=True``."""
        return asdict(self)

    @property
    def outcome(self) -> tuple[float, float]:
        """Accuracy and obeyed share of the weights that stayed: those of the last epoch that was not undone."""
        last = max((i + 1 for i, undone in enumerate(self.undone) if not undone), default=0)
        return self.accuracy[last], self.flagged_label_rate[last]

    @property
    def remaining(self) -> float | None:
        """Share of the suspects that get their label, as far as was looked last; ``None`` without a repair."""
        if self.at_end is not None:
            return self.at_end[1]
        return self.outcome[1] if self.undone and self.suspects else None


def sentence(repair: Repair, total: int) -> str:
    """Say what the look found, or what came out of the repair.

    Args:
        repair: The latest one.
        total: Samples of the training set.
    """
    if repair.no_room:
        found = f"{repair.suspects:,} are suspect" if repair.suspects else f"{repair.trusted:,} are trusted"
        return (
            f"looked at {total:,} training images: {found}, and no epoch is left for a repair: a backdoor may still be "
            "there. Allow some epochs (`extra_epochs`), or train anew without the suspect images."
        )
    if not repair.suspects and not repair.undone:
        return f"looked at {total:,} training images: nothing stands out, nothing to repair."
    if repair.at_end is not None:
        accuracy, given = repair.at_end
        return (
            f"at the end of training: accuracy on training images {accuracy:.1%}, of suspects given their label "
            f"{given or 0.0:.1%}."
        )
    if not repair.undone:
        return (
            f"looked at {total:,} training images: {repair.suspects:,} will be unlearned, {repair.trusted:,} learned "
            "anew."
        )
    accuracy, flagged_label_rate = repair.outcome
    epochs = f"{len(repair.undone)} epoch{'s' if len(repair.undone) > 1 else ''}"
    back = f"; {sum(repair.undone)} of them cost too much accuracy and were undone" if any(repair.undone) else ""
    suspects = (
        f", of suspects given their label {repair.flagged_label_rate[0]:.1%} -> {flagged_label_rate:.1%}"
        if repair.suspects
        else ""
    )
    return (
        f"after {epochs} of repair: accuracy on training images {repair.accuracy[0]:.1%} -> {accuracy:.1%}{suspects}"
        f"{back}."
    )


def evidence(
    repairs: list[Repair], data: DatasetScanner, *, meaning: str, seconds: float, max_removed: float
) -> Evidence:
    """What the report shows beside the verdict.

    Args:
        repairs: All looks so far, at least one.
        data: Where the images come from.
        meaning: Where the score is from: ``"modes"``, ``"fct"``, ``"given"`` or ``"loss"``.
        seconds: Duration of what was done last.
        max_removed: The user's ``max_removed``.
    """
    modes = [f"{label} (separation {apart:.1f})" for repair in repairs for label, apart in repair.modes]
    latest = repairs[-1]
    facts: dict[str, str | int | float] = {
        "looks after": ", ".join(f"epoch {repair.epochs}" for repair in repairs),
        "seconds of the last step": round(seconds, 1),
        "images read with": data.transform.description,
        "images to unlearn": latest.suspects,
        "images to learn anew": latest.trusted,
        "classes with a second mode": ", ".join(modes) or "none",
    }
    if latest.undone:
        facts["repair"] = sentence(latest, len(data)).rstrip(".")
    rows = [
        (i, f"{accuracy:.1%}", f"{flagged_label_rate:.1%}", "yes" if i and latest.undone[i - 1] else "")
        for i, (accuracy, flagged_label_rate) in enumerate(zip(latest.accuracy, latest.flagged_label_rate, strict=True))
    ]
    head = ("epoch of repair", "accuracy on watched images", "suspects given their label", "undone")
    return Evidence(
        images=data.images,
        facts=facts,
        score_meaning=MEANING[meaning],
        num_flagged_before_cap=max(repair.num_flagged_before_cap for repair in repairs),
        max_removed=max_removed,
        treatment=f"The model was repaired: {sentence(latest, len(data))}" if latest.undone else "",
        tables={"Repair, epoch by epoch": (head, rows)} if latest.undone else {},
    )
