"""Rows that are older than what the name of their attack or defence means now."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from benchmarks.plot import kind_of
from benchmarks.rows import Row

__all__ = ["is_older", "older"]

Told = Callable[[list[Row]], str]


def _none(found: list[Row]) -> str:
    undone, cut = [r for r in found if r.get("undone")], [r for r in found if "max_removed(" in r.get("rule", "")]
    return (
        "are of an older `NONECallback.from_paper()`, which was held back by bounds that the authors do not have: in "
        f"{len(undone)} of them ({_attacks(undone)}) the reset was taken back since it cost accuracy, so that only "
        f"the removal of images was left, and in {len(cut)} ({_attacks(cut)}) `max_removed` cut the removal short"
    )


def _ultraclean(_: list[Row]) -> str:
    return (
        "are of an older `UltraCleanCallback.from_paper()`, which asked the network at half of the epochs; that of the "
        "authors, and of `from_paper()` now, is trained to the end"
    )


def _patch(_: list[Row]) -> str:
    return "have patches of 4x4 pixels, which change an image 2.6 times less than those of 25 to 140 pixels now"


CHANGED: dict[str, tuple[int, Told]] = {
    "NONE-paper": (1, _none),
    "ultraclean-paper": (1, _ultraclean),
    "adap-patch": (1, _patch),
}
"""Defences and kinds of attacks: since which number of ``NAMES`` they mean what they mean now, and what older rows are.
"""


def is_older(row: Row, name: str) -> bool:
    """Whether a row was measured before ``name`` meant what it means now."""
    since, _ = CHANGED.get(name, (0, None))
    return int(row.get("names", 0)) < since


def older(rows: Iterable[Row]) -> str:
    """A sentence for each name of which some rows are older; empty without any."""
    known, told = list(rows), []
    for name, (_, words) in CHANGED.items():
        found = [row for row in known if name in (row["defence"], kind_of(row["attack"])) and is_older(row, name)]
        if found:
            told.append(_counted(f"The {len(found)} rows of {name} ({_attacks(found)}) {words(found)}.", len(found)))
    return " ".join(told)


def _counted(sentence: str, count: int) -> str:
    """The sentence in the singular, if it is about one row."""
    if count > 1:
        return sentence
    for many, one in (("1 rows", "row"), (") are ", ") is "), (") have ", ") has ")):
        sentence = sentence.replace(many, one, 1)
    return sentence


def _attacks(found: list[Row]) -> str:
    return ", ".join(dict.fromkeys(row["attack"] for row in found)) or "none"
