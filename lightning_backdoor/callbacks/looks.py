"""What the scans of a run found, one after the other, in words and numbers for the user."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning_backdoor.callbacks.learned import little_learned
from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.scanning.measure_denoised import DENOISERS
from lightning_backdoor.scanning.scanner import DatasetScanner

__all__ = ["Look", "evidence", "largest_gap", "sentence"]


@dataclass(frozen=True)
class Look:
    """One scan and what followed from it, in plain values that a checkpoint can hold.

    Attributes:
        epochs: Epochs trained before it, counted from the last rewind.
        run: 1 before the first rewind of this defence, 2 after it, and so on.
        removed: Samples that it removed.
        num_flagged_before_cap: Samples that the rule pointed at in all, before ``max_removed`` limited it.
        rewinds: Whether training started again because of it.
        modes: Label and separation of every second mode that it found.
        accuracy: Share of the samples that the model gave their label, in ``[0, 1]``; ``None`` if that was not asked.
    """

    epochs: int
    run: int
    removed: int
    num_flagged_before_cap: int
    rewinds: bool
    modes: tuple[tuple[int, float], ...]
    accuracy: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain values that load with ``weights_only=True``."""
        return asdict(self)

    @property
    def when(self) -> str:
        """When it took place, for a reader: ``epoch 5``, ``epoch 5 of run 2``."""
        return f"epoch {self.epochs}" if self.run == 1 else f"epoch {self.epochs} of run {self.run}"


def sentence(looks: list[Look], total: int) -> str:
    """Say what the latest look found.

    Args:
        looks: All looks so far, at least one.
        total: Samples of the training set.
    """
    *earlier, latest = looks
    before = sum(look.removed for look in earlier)
    then = "; training starts again on the rest" if latest.rewinds else ""
    if not before:
        little = "" if latest.removed else little_learned(latest.accuracy)
        return f"looked at {total:,} training images: {latest.removed:,} removed{then}.{little}"
    if not latest.removed:
        return f"looked again at {total:,} training images: nothing new was found; {before:,} stay removed."
    return (
        f"looked again at {total:,} training images: {latest.removed:,} more removed, {before + latest.removed:,} in "
        f"all{then}."
    )


def largest_gap(looks: list[Look]) -> float:
    """The largest separation of all modes found so far, 0 without one."""
    return max((standardized_gap for look in looks for _, standardized_gap in look.modes), default=0.0)


def evidence(
    looks: list[Look],
    data: DatasetScanner,
    *,
    meaning: str,
    denoised: bool = False,
    by_modes: bool = False,
    seconds: float,
    max_removed: float,
) -> Evidence:
    """What the report shows beside the verdict that all looks together led to.

    Args:
        looks: All looks so far, at least one.
        data: Where the images come from.
        meaning: One sentence that says what the score measures.
        denoised: Show the images denoised, too.
        by_modes: Whether second modes were looked for at all.
        seconds: Duration of the latest scan.
        max_removed: The user's ``max_removed``.
    """
    modes = [
        f"{label} (separation {standardized_gap:.1f}, found after {look.when})"
        for look in looks
        for label, standardized_gap in look.modes
    ]
    rewound = {look.rewinds for look in looks if look.removed}
    return Evidence(
        images=data.images,
        denoised=(lambda indices: [denoise(data.images(indices)) for denoise in DENOISERS]) if denoised else None,
        facts={
            "scans after": ", ".join(look.when for look in looks),
            "seconds of the last scan": round(seconds, 1),
            "images read with": data.transform.description,
            **({"classes with a second mode": ", ".join(modes) or "none"} if by_modes else {}),
        },
        score_meaning=meaning,
        num_flagged_before_cap=max(look.num_flagged_before_cap for look in looks),
        max_removed=max_removed,
        rewound=rewound.pop() if len(rewound) == 1 else None,  # some of the times is neither yes nor no
    )
