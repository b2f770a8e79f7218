"""What the rounds of NONE found and did, one after the other, in words and numbers for the user."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.trainer.training_set import TrainingSet
from lightning_backdoor.verdict import Verdict

__all__ = ["Round", "evidence", "reset_units", "sentence", "shares", "unfinished"]

STILL_OBEYED = 0.1  # of the removed samples get their label after a round: reason for another one
MOST_KEPT = 0.75  # of the share before it: beyond that another one would not help

MEANING = (
    "It measures how far the image drives the most compromised units of the model out of the range that they have on "
    "other images; above 0.5 it belongs to a second population inside its class."
)
MEANING_PAPER = "It adds up how strongly the image drives the most compromised unit of every layer."


@dataclass(frozen=True)
class Round:
    """One look at the units and what followed from it, in plain values that a checkpoint can hold.

    Attributes:
        epochs: Epochs trained before it.
        removed: Samples that it removed from training.
        wanted: Samples that the rule pointed at in all, before ``max_removed`` limited it.
        modes: Label and separation of every second mode that it found.
        units: Layer, unit, class and score of every unit that it reset.
        unconfident: Classes without a confident sample, which were given another threshold.
        accuracy: Share of the samples in training that got their label before it, in ``[0, 1]``.
        obeyed: Share of the removed samples that got their label before it; ``None`` without any.
        accuracy_after: The same after fine-tuning; ``None`` while it lasts.
        obeyed_after: The same after fine-tuning.
        undone: Whether the weights went back because accuracy had suffered.
        shared: Whether most labels share the second mode, as under an all-to-all attack.
        readmitted: Whether the samples came back, because the model gives them their label without having seen them.
    """

    epochs: int
    removed: int
    wanted: int
    modes: tuple[tuple[int, float], ...]
    units: tuple[tuple[str, int, int, float], ...]
    unconfident: tuple[int, ...]
    accuracy: float
    obeyed: float | None
    accuracy_after: float | None = None
    obeyed_after: float | None = None
    undone: bool = False
    shared: bool = False
    readmitted: bool = False

    def state_dict(self) -> dict[str, Any]:
        """Plain values that load with ``weights_only=True``."""
        return asdict(self)

    def judged(self, predicted: Tensor, verdict: Verdict, max_loss: float, training: Tensor | None = None) -> Round:
        """The round after its fine-tuning, and whether it has to be undone.

        Samples of a shared mode come back if the model, which has not trained on them, gives most of them their label:
        an all-to-all attack changes labels.

        Args:
            predicted: The model's classes, long ``(N,)``.
            verdict: A verdict with labels.
            max_loss: Accuracy that the round may cost, in ``[0, 1]``.
            training: As in :func:`shares`.
        """
        after, obeyed = shares(predicted, verdict, training)
        readmitted = self.shared and obeyed is not None and obeyed > after / 2
        undone = readmitted or self.accuracy - after > max_loss
        return replace(self, accuracy_after=after, obeyed_after=obeyed, undone=undone, readmitted=readmitted)


def shares(predicted: Tensor, verdict: Verdict | None, training: Tensor | None = None) -> tuple[float, float | None]:
    """Share of the samples in training and of the removed ones (``None`` without any) that the model gives their label.

    Args:
        predicted: The model's classes, long ``(N,)``.
        verdict: A verdict with labels.
        training: Samples that no defence has removed, bool ``(N,)``. ``None``: those that the verdict keeps.
    """
    assert verdict is not None
    assert verdict.labels is not None
    right, removed = predicted == verdict.labels, ~verdict.keep
    kept = float(right[verdict.keep if training is None else training].float().mean())
    return kept, float(right[removed].float().mean()) if bool(removed.any()) else None


def unfinished(treated: list[Round]) -> bool:
    """Whether over a tenth of the removed samples still get their label, and the last of several rounds has helped.

    The first one may have met too few of the units that obey. Where labels are true, as under a clean-label attack, the
    samples get them whatever is reset.

    Args:
        treated: Rounds that reset units, one after the other.
    """
    if not treated or treated[-1].obeyed is None or treated[-1].obeyed_after is None:
        return False
    helped = len(treated) == 1 or treated[-1].obeyed_after < MOST_KEPT * treated[-1].obeyed
    return helped and treated[-1].obeyed_after > STILL_OBEYED


def reset_units(rounds: list[Round]) -> set[tuple[str, int]]:
    """Layer and number of every unit that was reset, in one round or in several."""
    return {(layer, unit) for round_ in rounds for layer, unit, *_ in round_.units}


def sentence(rounds: list[Round], total: int) -> str:
    """Say what the latest round found, or what came out of it.

    Args:
        rounds: All rounds so far, at least one.
        total: Samples of the training set.
    """
    latest = rounds[-1]
    if not latest.units:
        return f"looked at {total:,} training images: {latest.removed:,} removed, no unit reset."
    layers = len({layer for layer, *_ in latest.units})
    units = f"{len(latest.units):,} units of {layers} layers reset"
    if latest.accuracy_after is None:
        return f"looked at {total:,} training images: {latest.removed:,} removed, {units}; fine-tuning follows."
    obeyed = ""
    if latest.obeyed is not None and latest.obeyed_after is not None:
        obeyed = f", of removed images given their label {latest.obeyed:.1%} -> {latest.obeyed_after:.1%}"
    undone = (
        "; this cost too much accuracy, so the weights went back: the backdoor may still be there"
        if latest.undone
        else ""
    )
    accuracy = f"accuracy on training images {latest.accuracy:.1%} -> {latest.accuracy_after:.1%}"
    return f"after fine-tuning: {accuracy}{obeyed}{undone}."


def evidence(rounds: list[Round], data: TrainingSet, *, rule: str, seconds: float, max_removed: float) -> Evidence:
    """What the report shows beside the verdict that all rounds together led to.

    Args:
        rounds: All rounds so far, at least one.
        data: Where the images come from.
        rule: The user's ``rule``.
        seconds: Duration of the latest look.
        max_removed: The user's ``max_removed``.
    """
    modes = [f"{label} (separation {apart:.1f})" for round_ in rounds for label, apart in round_.modes]
    facts: dict[str, str | int | float] = {
        "looks after": ", ".join(f"epoch {round_.epochs}" for round_ in rounds),
        "seconds of the last look": round(seconds, 1),
        "images read with": data.transform.description,
        "units reset": len(reset_units(rounds)),
    }
    if rule == "auto":
        facts["classes with a second mode"] = ", ".join(modes) or "none"
    if rounds[-1].unconfident:
        facts["classes without a confident image"] = ", ".join(map(str, rounds[-1].unconfident))
    for number, round_ in enumerate(rounds, 1):
        if round_.accuracy_after is not None:
            facts[f"round {number}"] = sentence([round_], len(data)).rstrip(".")
    names = getattr(data.loader.dataset, "classes", None)
    rows = [
        (number, layer, unit, str(names[label]) if names is not None and label < len(names) else label, round(score, 2))
        for number, round_ in enumerate(rounds, 1)
        for layer, unit, label, score in round_.units
    ]
    head = ("round", "layer", "unit", "class", "score")
    return Evidence(
        images=data.images,
        facts=facts,
        score_meaning=MEANING if rule == "auto" else MEANING_PAPER,
        wanted=max(round_.wanted for round_ in rounds),
        max_removed=max_removed,
        treatment=_treatment(rounds),
        tables={"Units that were reset": (head, rows)} if rows else {},
    )


def _treatment(rounds: list[Round]) -> str:
    """What happened to the model, for a reader of the report."""
    treated = [round_ for round_ in rounds if round_.units]
    if not treated:
        return ""
    units = reset_units(treated)
    layers = len({layer for layer, _ in units})
    text = f"{len(units):,} units of {layers} layers were reset, and the model was fine-tuned."
    if treated[-1].readmitted:
        return f"{text} This was undone: the model gave the removed images their label without having seen them."
    return f"{text} The last of this cost too much accuracy and was undone." if treated[-1].undone else text
