"""Result rows as Markdown tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from benchmarks.cells import ATTACKS
from benchmarks.protocols import Setting
from benchmarks.rows import Row, setting_of

DEFENCES = (
    "undefended", "clean-model", "ultraclean", "NONE", "ultraclean+NONE", "D-BR", "D-ST", "perfect", "random",
    "random-reset", "ultraclean-paper", "NONE-paper", "D-BR-paper", "AC", "spectral", "STRIP", "deep-kNN", "fine-tune",
    "ABL",
)  # fmt: skip
TOOK = 0.5  # undefended ASR below which an attack did not take

Group = tuple[str, str]
"""Attack and defence."""


def markdown(rows: list[Row]) -> str:
    """One line per cell, attacks together; in per cent. Settings other than the first have a table of their own."""
    parts = []
    void = void_trainings(rows)
    for setting, found in by_setting(rows).items():
        lines = []
        seeds = len({row["seed"] for row in found}) > 1
        for row in sorted(found, key=lambda r: (*place((r["attack"], r["defence"])), r["seed"])):
            lines.append([
                marked(row["attack"], _training(row) in void), f"{row['poisons']:,}", row["defence"],
                *([str(row["seed"])] if seeds else []), percent([row["clean_accuracy"]]), percent([row["asr"]]),
                f"{row['removed']:,}", percent([row.get("tpr")], 2), percent([row.get("fpr")], 2),
                number([row.get("auroc")], 3), f"{row['seconds']:.0f}",
            ])  # fmt: skip
        head = ["attack", "poisons", "defence", *(["seed"] if seeds else []), "clean accuracy", "ASR"]
        body = table([*head, "removed, images", "TPR", "FPR", "AUROC", "seconds"], lines, left=("attack", "defence"))
        parts.append(body if setting == Setting() else f"{setting}:\n\n{body}")
    return "\n\n".join(parts)


def repair_table(rows: list[Row]) -> str:
    """Rows of ``repair.jsonl``."""
    lines = [
        [
            row["attack"], row["row"], percent([row["clean_accuracy"]]), percent([row["asr"]]),
            f"{row['poisons_among_suspects']:,} of {row['suspects']:,}", f"{row['poisons_among_trusted']:,}",
            f"{row['epochs_undone']}",
        ]
        for row in rows
    ]  # fmt: skip
    head = ["attack", "D-BR with", "clean accuracy", "ASR", "poisons among suspects", "among trusted", "epochs undone"]
    return table(head, lines, left=("attack", "D-BR with"))


def consistency_table(rows: list[Row]) -> str:
    """Rows of ``consistency.jsonl``."""
    lines = [
        [
            row["attack"], row["model"], row["row"], number([row["auroc"]], 3), number([row["auroc_within_labels"]], 3),
            percent([row["precision_of_suspects"]]), percent([row["poisons_among_trusted"]], 2), percent([row["rate"]]),
        ]
        for row in rows
    ]  # fmt: skip
    left = ["attack", "network", "detector"]
    rates = ["AUROC", "AUROC within labels", "poisons in the top 5 %", "in the lowest 20 %", "in all"]
    return table([*left, *rates], lines, left=left)


def stages_table(rows: list[Row]) -> str:
    """Rows of ``stages.jsonl``."""
    lines = [
        [
            row["attack"], row["row"], percent([row["clean_accuracy"]]), percent([row["asr"]]),
            percent([row["neighbour_agreement"]]),
        ]
        for row in rows
    ]  # fmt: skip
    left = ["attack", "features learn"]
    return table([*left, "clean accuracy", "ASR", "neighbours with the same label"], lines, left=left)


def fractions_table(rows: list[Row]) -> str:
    """Rows of ``fractions.jsonl``."""
    lines = [
        [
            row["attack"], row["denoiser"], f"{100 * row['fraction']:g}", percent([row["tpr"]]),
            percent([row["clean_accuracy"]]), percent([row["asr"]]),
        ]
        for row in sorted(rows, key=lambda row: (row["attack"], row["denoiser"], row["fraction"]))
    ]  # fmt: skip
    left = ["attack", "denoised by"]
    return table([*left, "removed, %", "TPR", "clean accuracy", "ASR"], lines, left=left)


def strip_table(rows: list[Row]) -> str:
    """Rows of ``strip.jsonl``."""
    lines = [
        [row["attack"], f"{row['images_of_target']:,}", number([row["auroc"]], 3), percent([row["tpr"]])]
        for row in rows
    ]
    head = ["attack", "images of the target class", "AUROC", "TPR where 1 % of clean images are rejected"]
    return table(head, lines, left=head[:1])


def weights_table(rows: list[Row]) -> str:
    """Rows of ``weights.jsonl``."""
    lines = [
        [row["attack"], f"{row['weight']:g}", percent([row["clean_accuracy"]]), percent([row["asr"]])]
        for row in sorted(rows, key=lambda row: (row["attack"], row["weight"]))
    ]
    return table(["attack", "weight", "clean accuracy", "ASR"], lines, left=["attack"])


def table(head: Sequence[str], lines: Iterable[Sequence[str]], left: Sequence[str]) -> str:
    """A Markdown table; columns that are not in ``left`` hold numbers."""
    rule = "".join(f"{'---' if name in left else '---:'}|" for name in head)
    return "\n".join([_line(head), f"|{rule}", *map(_line, lines)])


def by_setting(rows: Iterable[Row]) -> dict[Setting, list[Row]]:
    """The rows of each setting, the default first."""
    found: dict[Setting, list[Row]] = {}
    for row in rows:
        found.setdefault(setting_of(row), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0] != Setting(), str(item[0]))))


def grouped(rows: Iterable[Row]) -> dict[Group, list[Row]]:
    """The rows of one setting by attack and defence, over their seeds, in the order of the tables."""
    found: dict[Group, list[Row]] = {}
    for row in rows:
        found.setdefault((row["attack"], row["defence"]), []).append(row)
    return {group: found[group] for group in sorted(found, key=place)}


def place(group: Group) -> tuple[int, float, int]:
    """Where an attack and a defence stand in a table: attacks of one kind by their rate."""
    kinds = list(dict.fromkeys(name.rsplit("-", 1)[0] for name in ATTACKS))
    return kinds.index(group[0].rsplit("-", 1)[0]), ATTACKS[group[0]].rate, DEFENCES.index(group[1])


def void_trainings(rows: Iterable[Row]) -> set[tuple[Setting, str, int]]:
    """Setting, attack and seed where the attack did not take: an undefended success rate below one half."""
    undefended = [row for row in rows if row["defence"] == "undefended" and row["attack"] != "clean"]
    return {_training(row) for row in undefended if row["asr"] < TOOK}


def is_void(rows: Iterable[Row], void: set[tuple[Setting, str, int]]) -> bool:
    """Whether the attack did not take in one of the rows."""
    return any(_training(row) in void for row in rows)


def marked(text: str, void: bool) -> str:
    """``text`` with the mark of a void cell."""
    return f"{text} (void)" if void else text


def percent(values: Iterable[float | None], digits: int = 1) -> str:
    """Mean in per cent; with several values, ± their standard deviation."""
    return number([None if value is None else 100 * value for value in values], digits)


def number(values: Iterable[float | None], digits: int) -> str:
    """Mean; with several values, ± their standard deviation; – if there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{round(statistics.fmean(known), digits) + 0.0:.{digits}f}"  # never -0.0
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def _training(row: Row) -> tuple[Setting, str, int]:
    return setting_of(row), row["attack"], row["seed"]


def _line(entries: Iterable[str]) -> str:
    return f"| {' | '.join(entries)} |"
