"""The rounds of NONE in words and numbers for the user."""

from __future__ import annotations

from lightning_backdoor.callbacks.learned import little_learned
from lightning_backdoor.callbacks.rounds import OWN_LABEL, Round, reset_units
from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.scanning.scanner import DatasetScanner
from lightning_backdoor.verdict import Verdict

__all__ = ["evidence", "last_word", "sentence"]

MEANING = (
    "It measures how far the image drives the most compromised units of the model out of the range that they have on "
    "other images; above 0.5 it belongs to a second population inside its class."
)
MEANING_PAPER = "It adds up how strongly the image drives the most compromised unit of every layer."


def sentence(rounds: list[Round], total: int) -> str:
    """Say what the latest round found, or what came out of it.

    Args:
        rounds: All rounds so far, at least one.
        total: Samples of the training set.
    """
    latest = rounds[-1]
    if latest.again:
        return (
            f"at the end of training: accuracy on training images {latest.accuracy:.1%}; of {latest.again:,} removed "
            f"images {latest.flagged_label_rate or 0.0:.1%} are given their label{_outcome(latest)}."
        )
    if not latest.units and latest.no_room:
        given = (
            ""
            if latest.flagged_label_rate is None
            else f", {latest.flagged_label_rate:.1%} of all that are removed given their label"
        )
        return (
            f"looked at {total:,} training images: {latest.removed:,} removed{given}, no unit reset, since no epoch is "
            "left for fine-tuning: the backdoor may still be there. Allow some (`extra_epochs`), or train anew without "
            "the removed images."
        )
    if not latest.units and not latest.removed and latest.flagged_label_rate is not None:
        return (
            f"looked again at {total:,} training images: nothing new was found; of the images removed before "
            f"{latest.flagged_label_rate:.1%} are given their label{_outcome(latest)}."
        )
    if not latest.units:
        unmet = ", but no unit that they drive can be reset: the backdoor may still be there" if latest.removed else ""
        little = "" if latest.removed else little_learned(latest.accuracy)
        return f"looked at {total:,} training images: {latest.removed:,} removed, no unit reset{unmet}.{little}"
    layers = len({layer for layer, *_ in latest.units})
    units = f"{len(latest.units):,} units of {layers} layers reset"
    if latest.accuracy_after is None:
        return f"looked at {total:,} training images: {latest.removed:,} removed, {units}; fine-tuning follows."
    accuracy = f"accuracy on training images {latest.accuracy:.1%} -> {latest.accuracy_after:.1%}"
    flagged_label_rate = ""
    if latest.flagged_label_rate is not None and latest.flagged_label_rate_after is not None:
        flagged_label_rate = f", of removed images given their label {latest.flagged_label_rate:.1%} -> {latest.flagged_label_rate_after:.1%}"
    return f"after fine-tuning: {accuracy}{flagged_label_rate}{_outcome(latest)}."


def _outcome(round_: Round) -> str:
    """What followed from a round that is over, for the end of a sentence."""
    if round_.readmitted:
        return "; the model gives the removed images their label without having seen them, so all of this was undone"
    if round_.undone:
        return "; the rounds cost too much accuracy, so the weights went back: the backdoor may still be there"
    if not round_.remains:
        return ""
    rate = (round_.flagged_label_rate if round_.accuracy_after is None else round_.flagged_label_rate_after) or 0.0
    if rate > OWN_LABEL:
        return (
            "; the backdoor may still be there, or these may be clean images of one kind or have true labels "
            "(clean-label attack): look at the report"
        )
    return "; part of the backdoor may still be there"


def last_word(latest: Round, verdict: Verdict) -> str:
    """Say that a fit ends with a model that still gives removed images their label; else nothing.

    What was said of the latest round already, that it was undone or had no epochs, is not said again.

    Args:
        latest: The latest round.
        verdict: The verdict at the end.
    """
    if not latest.remains or latest.undone or latest.no_room:
        return ""
    rate = (latest.flagged_label_rate if latest.accuracy_after is None else latest.flagged_label_rate_after) or 0.0
    return (
        f"ends with a model that gives {rate:.1%} of the {len(verdict.removed):,} removed images their label"
        f"{_outcome(latest)}. To be sure, train anew without them."
    )


def evidence(rounds: list[Round], data: DatasetScanner, *, rule: str, seconds: float, max_removed: float) -> Evidence:
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
        num_flagged_before_cap=max(0 if round_.readmitted else round_.num_flagged_before_cap for round_ in rounds),
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
