"""``RESULTS.md``: everything that was measured, as one page."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping

from benchmarks.architectures import ARCHITECTURES, architectures
from benchmarks.cells import ADAPTIVE, CLEAN_MODEL, FURTHER, RATES, STANDARD
from benchmarks.legend import legend
from benchmarks.missing import missing, missing_ablations
from benchmarks.older import older
from benchmarks.protocols import PROTOCOLS, Setting
from benchmarks.published import PUBLISHED, pair, published, published_detection
from benchmarks.rows import Row, setting_of
from benchmarks.sections import ABLATIONS
from benchmarks.table import (
    DEFENCES,
    by_setting,
    grouped,
    is_void,
    marked,
    number,
    percent,
    table,
    void_trainings,
)

MORE = "More published attacks"
KINDS = {
    "The standard attacks": STANDARD,
    MORE: FURTHER,
    "Attacks that know a defence": ADAPTIVE,
    "Further rates": RATES,
}
TOLD = ("perfect", "random", "random-reset", "fine-tune")
"""Rows that are told which images are poisoned, or how many, and detect none."""
IF_FOUND = ("ultraclean", "NONE", "ultraclean+NONE", "D-BR", "D-ST")
"""Defences that change nothing where they find nothing."""
NAMED = 8  # commits, at most


def page(rows: list[Row], ablations: Mapping[str, list[Row]]) -> str:
    """The whole page, from the rows of ``results.jsonl`` and those of the files that ``ABLATIONS`` names."""
    parts = [INTRODUCTION.format(count=len(rows), code=which_code(rows)), f"## What the names stand for\n\n{legend()}"]
    for setting, found in by_setting(rows).items():
        parts += [
            f"## {found[0]['dataset']}, {setting}",
            circumstances(found),
            f"### Clean accuracy / attack success rate\n\n{headline(found)}",
            *filter(None, [older(found)]),
            *_above(found),
            f"### Detection\n\n{detection(found)}",
            f"### On clean data\n\n{CLEAN}\n\n{on_clean_data(found)}",
            f"### Cost\n\n{COST}\n\n{cost(found)}",
        ]
    parts.append(f"## Architectures\n\n{ARCHITECTURES}\n\n{architectures(rows)}")
    parts.append(f"## Beside published figures\n\n{PUBLISHED}\n\n{published(rows)}\n\n{published_detection()}")
    for name, section in ABLATIONS.items():
        found = ablations.get(name, [])
        parts.append(f"## {section.heading}\n\n{section.told}")
        parts += [f"{where(found)} {circumstances(found)}", section.table(found)] if found else ["Not run."]
    parts += ["## Not run", *(missing(protocol, rows) for protocol in PROTOCOLS.values())]
    return "\n\n".join([*parts, missing_ablations(rows, ablations)]) + "\n"


def where(rows: list[Row]) -> str:
    """Data and settings of the rows of an ablation."""
    return "; ".join(f"{found[0]['dataset']}, {setting}" for setting, found in by_setting(rows).items()) + "."


def circumstances(rows: list[Row]) -> str:
    """Hardware, versions, how many rows are of which commit, and seeds."""
    hardware = sorted({row["hardware"] for row in rows if "hardware" in row})
    versions = {
        f"{name} {version}" for row in rows for name, version in row.get("versions", {}).items() if name != "commit"
    }
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    return (
        f"Hardware: {'; '.join(hardware) or '–'}. Versions: {', '.join(sorted(versions)) or '–'}. "
        f"Commits: {commits(rows)}. Seeds: {seeds}."
    )


def which_code(rows: list[Row]) -> str:
    """How many rows say which code measured them, and what it means that others do not."""
    named = sum(commit_of(row) is not None for row in rows)
    told = f"Which code: {named} of the {len(rows)} rows name the commit that measured them"
    dirty = " (`-dirty`: with changes that were not committed)."
    return told + dirty + (f"\n{UNNAMED}" if named < len(rows) else "")


def commits(rows: list[Row]) -> str:
    """How many rows are of which commit: those with the most rows by name, the others together."""
    counts = Counter(map(commit_of, rows))
    unknown = counts.pop(None, 0)
    parts = [f"{commit} ({count})" for commit, count in counts.most_common(NAMED)]
    if others := counts.most_common()[NAMED:]:
        parts.append(f"{len(others)} others ({sum(count for _, count in others)})")
    return ", ".join([*parts, *([f"not recorded ({unknown})"] if unknown else [])])


def commit_of(row: Row) -> str | None:
    """The commit of the code that measured a row, ``None`` if the row does not say."""
    found: str | None = row.get("versions", {}).get("commit")
    return found


def headline(rows: list[Row]) -> str:
    """Defences down, attacks across; a table for each kind of attack."""
    cells, void = grouped(rows), void_trainings(rows)
    tables = []
    for kind, names in KINDS.items():
        attacks = [name for name in dict.fromkeys(attack for attack, _ in cells) if name in names]
        lines = []
        for defence in DEFENCES:
            found = [cells.get((attack, defence), []) for attack in attacks]
            if any(found):
                lines.append([defence, *(marked(pair(cell), is_void(cell, void)) if cell else "–" for cell in found)])
        if lines and kind == MORE and setting_of(rows[0]) == Setting():  # the figures are of the default
            tables.append("![Attack success rate under more attacks](figures/asr-more.png)")
        if lines:
            tables.append(f"{kind}:\n\n{table(['defence', *attacks], lines, left=('defence',))}")
    return "\n\n".join(tables)


def beside_clean_model(rows: list[Row]) -> str:
    """What each defence leaves above the ASR of a clean model, mean over seeds, under the attacks that took."""
    cells, void = grouped(rows), void_trainings(rows)
    took = [
        attack for attack, defence in cells if defence == "undefended" and not is_void(cells[attack, defence], void)
    ]
    asr = {group: statistics.fmean(row["asr"] for row in cell) for group, cell in cells.items() if group[0] in took}
    lines = []
    for defence in DEFENCES:
        above = {
            attack: 100 * (asr[attack, defence] - asr[attack, CLEAN_MODEL])
            for attack in took
            if {(attack, defence), (attack, CLEAN_MODEL)} <= set(asr)
        }
        if above and defence != CLEAN_MODEL:
            most = max(above, key=lambda attack: above[attack])
            within = sum(points <= 1 for points in above.values())
            lines.append([defence, f"{len(above)}", f"{within}", f"{above[most]:.1f}", most])
    head = ["defence", "attacks", "1 point above at most", "largest difference, points", "under"]
    return table(head, lines, left=("defence", "under"))


def _above(rows: list[Row]) -> list[str]:
    tested = any(row["defence"] == CLEAN_MODEL for row in rows)
    return [f"### Above a clean model\n\n{ABOVE}\n\n{beside_clean_model(rows)}"] if tested else []


def detection(rows: list[Row]) -> str:
    """One line for each attack and each defence that looks for poisons."""
    void, lines = void_trainings(rows), []
    for (attack, defence), cell in grouped(rows).items():
        looks = defence not in (*TOLD, CLEAN_MODEL)
        if attack != "clean" and looks and any(row.get("tpr") is not None for row in cell):
            rates = [percent((row.get(name) for row in cell), 2) for name in ("tpr", "fpr")]
            auroc = number((row.get("auroc") for row in cell), 3)
            lines.append([marked(attack, is_void(cell, void)), defence, f"{len(cell)}", *rates, auroc])
    return table(["attack", "defence", "seeds", "TPR", "FPR", "AUROC"], lines, left=("attack", "defence"))


def on_clean_data(rows: list[Row]) -> str:
    """What each defence does where nothing is poisoned."""
    lines, plain = [], {row["seed"]: row for row in rows if (row["attack"], row["defence"]) == ("clean", "undefended")}
    for (attack, defence), cell in grouped(rows).items():
        if attack == "clean" and defence != CLEAN_MODEL:
            gained = [
                row["clean_accuracy"] - plain[row["seed"]]["clean_accuracy"] for row in cell if row["seed"] in plain
            ]
            accuracy, change = percent(row["clean_accuracy"] for row in cell), percent(gained)
            removed = percent((row["removed"] / row["images"] for row in cell), 2)
            lines.append([defence, f"{len(cell)}", accuracy, change, removed])
    head = ["defence", "seeds", "clean accuracy", "change, points", "removed, %"]
    return table(head, lines, left=("defence",))


def cost(rows: list[Row]) -> str:
    """Medians over all cells of each defence, as multiples of the undefended run under the same attack and seed."""
    plain = {(row["attack"], row["seed"]): row for row in rows if row["defence"] == "undefended"}
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in sorted((row for row in rows if row["defence"] != CLEAN_MODEL), key=_cost_place):
        cells.setdefault((row["defence"], _outcome(row)), []).append(row)
    lines = []
    for (defence, outcome), cell in cells.items():
        beside = [(row, plain[row["attack"], row["seed"]]) for row in cell if (row["attack"], row["seed"]) in plain]
        seconds = [whole_seconds(row, base) / base["seconds"] for row, base in beside if comparable_time(row, base)]
        epochs = [row["epoch_equivalents"] for row in cell if row.get("epoch_equivalents") is not None]
        memory = [row["peak_memory_mb"] for row in cell if row.get("peak_memory_mb") is not None]
        figures = [_median(seconds, 2), _median(epochs, 1), _median(memory, 0)]
        lines.append([defence, outcome, f"{len(cell)}", *figures])
    left = ["defence", "found"]
    return table([*left, "cells", "seconds, ratio", "epoch-equivalents", "peak MB"], lines, left=left)


def acted(row: Row) -> bool:
    """Whether a defence removed, suspected or reset anything."""
    return row["removed"] > 0 or bool(row.get("units"))


def whole_seconds(row: Row, undefended: Row) -> float:
    """Seconds of a row with those that it did not spend because the undefended run had spent them."""
    shared = row.get("epochs_shared_with_undefended", 0) / row["epochs"]
    return float(row["seconds"] + shared * undefended["seconds"])


def comparable_time(row: Row, undefended: Row) -> bool:
    """Whether two rows are from hardware of the same description, both with their compute recorded."""
    recorded = all(found.get("epoch_equivalents") is not None for found in (row, undefended))
    return recorded and row.get("hardware") == undefended.get("hardware")


def _outcome(row: Row) -> str:
    if row["defence"] not in IF_FOUND:
        return "–"
    return "something" if acted(row) else "nothing"


def _cost_place(row: Row) -> tuple[int, bool]:
    return DEFENCES.index(row["defence"]), not acted(row)


def _median(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):,.{digits}f}" if values else "–"


INTRODUCTION = """# What was measured

Written by `python -m benchmarks results` from the {count} rows of `results.jsonl` and those of the ablations
beside it; do not edit it. All rates are in per cent; several seeds are given as mean ± standard deviation.
A cell is *void* where the attack did not take: the undefended model obeys the trigger in less than half of the images.
– stands for what was not measured; names with `-paper` are the papers' methods (below the tables: which rows are not).
Defences that act when training ends (NONE, D-BR, most baselines) go on from the undefended run before its last epoch,
and draw the batches of that epoch anew: where they do nothing, that alone is what changes (see *On clean data*).

{code}

![Attack success rate by defence and attack](figures/asr.png)

![Attack success rate by poison rate](figures/rates.png)"""
UNNAMED = """The others are older, and were measured while the defences were still being changed. So the rows of one
defence may come from several versions of it, of which none has to be the one that is here now: a new run may come to
better or to worse figures. When each of these rows was added is in the history of the file."""
ABOVE = """How many of the attacks that took, and that a clean model was tested with, a defence brings to an ASR of at
most one point above that of the clean model; and the attack of which it leaves most."""
CLEAN = """The change is against the undefended run of the same seed, and what is removed a share of all images."""
COST = """Medians over the cells of a defence; those of a defence that changes nothing where it finds nothing are told
apart by whether it found something (removed images, suspected them or reset units), rightly or not. Seconds as a
multiple of the undefended run with the same attack, seed and hardware; defences that act at the end go on from the
undefended run, and its share is counted as theirs. Some rows shared the machine with other work. An epoch-equivalent is
the work of one epoch of ordinary training on all images, where a backward pass counts as two forward passes: it is
counted in images that went through the network, without the denoising. Peak memory is that of the process, data and
libraries included; on a GPU that of tensors."""
