"""What is said of classes that may carry a signal in all of their images."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_backdoor.events import Event, Signaled
from lightning_backdoor.report.evidence import Evidence, Table
from lightning_backdoor.report.sentences import listed, percent

__all__ = ["signaled", "signals_told", "whole_classes_told", "whole_table"]

TITLE = "Classes that may carry a signal in all of their images"
HEAD = (
    "class",
    "of images of other classes, turned into it",
    "the same of any other class, at most",
    "chance of that among clean classes",
)
HOW = (
    "What a gentle denoising takes out of its images in the mean was put on images of other classes, three times as "
    "strong as it is"
)
ADVICE = (
    "A trigger in all images of a class shows like this, and so does a harmless mark or texture that one class alone "
    "has (one camera, a frame, a watermark). This measurement cannot tell the two apart, and none of these images was "
    "removed for it. Look at images of the class beside others. If nobody can explain what they share, train without "
    "them. If they are fine, pass their positions as `approved`, and it is not said again."
)
NAMED = 3  # classes in a sentence


def signaled(history: Sequence[Event]) -> list[Signaled]:
    """For every label that some event names, what the last one of them says."""
    return list({found[0]: found for event in history for found in event.whole_classes}.values())


def signals_told(found: Sequence[Signaled], classes: Sequence[str] | None) -> tuple[str, str] | tuple[()]:
    """What was measured of these labels, and what to do; empty for none."""
    if not found:
        return ()
    evidence, told = Evidence(classes=classes), []
    for label, rate, others, p_value in found[:NAMED]:
        told.append(
            f"{percent(rate)} of these are then labeled “{evidence.class_name(label)}” (the same of any other class: "
            f"{percent(others)} at most; chance of that among clean classes: {percent(p_value)})"
        )
    names = [f"“{evidence.class_name(label)}”" for label, *_ in found[:NAMED]]
    further = [f"{len(found) - NAMED} more"] if len(found) > NAMED else []
    return f"{listed([*names, *further])} may carry a signal in all images. {HOW}: {'; '.join(told)}.", ADVICE


def whole_classes_told(history: Sequence[Event], classes: Sequence[str] | None) -> str:
    """Say of labels that the latest event is the first to name what was measured and what to do; else nothing."""
    *earlier, latest = history
    known = {found[0] for event in earlier for found in event.whole_classes}
    return " ".join(signals_told([found for found in latest.whole_classes if found[0] not in known], classes))


def whole_table(found: Sequence[Signaled], classes: Sequence[str] | None) -> dict[str, Table]:
    """The figures of these labels, as a table with its title; none for none."""
    evidence = Evidence(classes=classes)
    rows = [
        (evidence.class_name(label), percent(rate), percent(others), percent(p)) for label, rate, others, p in found
    ]
    return {TITLE: (HEAD, rows)} if found else {}
