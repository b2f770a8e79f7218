"""``RESULTS.md``: everything that was measured, as one page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby

from examples.evidence.cells import ADAPTIVE, FURTHER, RATES, STANDARD
from examples.evidence.combined import combined_tables
from examples.evidence.protocols import PROTOCOLS, Cell, Protocol, Setting, hours
from examples.evidence.published import DETECTION, FIGURES, ours, pair
from examples.evidence.rows import Row, cell_key, key, setting_of
from examples.evidence.table import (
    DEFENCES,
    by_setting,
    consistency_table,
    fractions_table,
    grouped,
    is_void,
    marked,
    number,
    percent,
    repair_table,
    stages_table,
    strip_table,
    table,
    void_trainings,
    weights_table,
)

MORE = "More published attacks"
KINDS = {
    "The standard attacks": STANDARD,
    MORE: FURTHER,
    "Attacks that know a defence": ADAPTIVE,
    "Further rates": RATES,
}
TOLD = ("random-reset", "fine-tune")
"""Rows that are told which images are poisoned, and detect none."""


def page(rows: list[Row], ablations: Mapping[str, list[Row]]) -> str:
    """The whole page, from the rows of ``results.jsonl`` and those of the files that ``ABLATIONS`` names."""
    parts = [INTRODUCTION.format(count=len(rows))]
    for setting, found in by_setting(rows).items():
        dataset, hardware = (
            "; ".join(sorted({row[name] for row in found if name in row})) for name in ("dataset", "hardware")
        )
        versions = {f"{name} {version}" for row in found for name, version in row.get("versions", {}).items()}
        parts += [
            f"## {dataset}, {setting}",
            f"Hardware: {hardware or '–'}. Versions: {', '.join(sorted(versions)) or '–'}. Seeds: "
            f"{', '.join(str(seed) for seed in sorted({row['seed'] for row in found}))}.",
            f"### Clean accuracy / attack success rate\n\n{headline(found)}",
            f"### Detection\n\n{detection(found)}",
            f"### On clean data\n\n{on_clean_data(found)}",
            f"### Cost\n\n{COST}\n\n{cost(found)}",
        ]
    parts += [f"## Beside published figures\n\n{PUBLISHED}\n\n{published(rows)}\n\n{published_detection()}"]
    for name, (heading, told, made) in ABLATIONS.items():
        found = ablations.get(name, [])
        parts.append(f"## {heading}\n\n{told}\n\n{made(found) if found else 'Not run.'}")
    parts += ["## Not run", *(missing(protocol, rows) for protocol in PROTOCOLS.values())]
    return "\n\n".join(parts) + "\n"


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


def detection(rows: list[Row]) -> str:
    """One line for each attack and each defence that looks for poisons."""
    void, lines = void_trainings(rows), []
    for (attack, defence), cell in grouped(rows).items():
        if attack != "clean" and defence not in TOLD and any(row.get("tpr") is not None for row in cell):
            rates = [percent((row.get(name) for row in cell), 2) for name in ("tpr", "fpr")]
            auroc = number((row.get("auroc") for row in cell), 3)
            lines.append([marked(attack, is_void(cell, void)), defence, f"{len(cell)}", *rates, auroc])
    return table(["attack", "defence", "seeds", "TPR", "FPR", "AUROC"], lines, left=("attack", "defence"))


def on_clean_data(rows: list[Row]) -> str:
    """What each defence does where nothing is poisoned."""
    lines, plain = [], {row["seed"]: row for row in rows if (row["attack"], row["defence"]) == ("clean", "undefended")}
    for (attack, defence), cell in grouped(rows).items():
        if attack == "clean":
            gained = [
                row["clean_accuracy"] - plain[row["seed"]]["clean_accuracy"] for row in cell if row["seed"] in plain
            ]
            accuracy, change = percent(row["clean_accuracy"] for row in cell), percent(gained)
            removed = percent((row["removed"] / row["images"] for row in cell), 2)
            lines.append([defence, f"{len(cell)}", accuracy, change, removed])
    head = ["defence", "seeds", "clean accuracy", "change, points", "removed"]
    return table(head, lines, left=("defence",))


def cost(rows: list[Row]) -> str:
    """Medians over all cells of each defence, as multiples of the undefended run under the same attack and seed."""
    plain = {(row["attack"], row["seed"]): row for row in rows if row["defence"] == "undefended"}
    lines = []
    for defence in DEFENCES:
        cell = [row for row in rows if row["defence"] == defence]
        beside = [(row, plain[row["attack"], row["seed"]]) for row in cell if (row["attack"], row["seed"]) in plain]
        seconds = [whole_seconds(row, base) / base["seconds"] for row, base in beside if comparable_time(row, base)]
        epochs = [row["epoch_equivalents"] for row in cell if row.get("epoch_equivalents") is not None]
        memory = [row["peak_memory_mb"] for row in cell if row.get("peak_memory_mb") is not None]
        if cell:
            figures = [_median(seconds, 2), _median(epochs, 1), _median(memory, 0)]
            lines.append([defence, f"{len(cell)}", *figures])
    return table(["defence", "cells", "seconds, ratio", "epoch-equivalents", "peak MB"], lines, left=("defence",))


def whole_seconds(row: Row, undefended: Row) -> float:
    """Seconds of a row with those that it did not spend because the undefended run had spent them."""
    shared = row.get("epochs_shared_with_undefended", 0) / row["epochs"]
    return float(row["seconds"] + shared * undefended["seconds"])


def comparable_time(row: Row, undefended: Row) -> bool:
    """Whether two rows are from hardware of the same description, both with their compute recorded."""
    recorded = all(found.get("epoch_equivalents") is not None for found in (row, undefended))
    return recorded and row.get("hardware") == undefended.get("hardware")


def published(rows: list[Row]) -> str:
    """The figures of others beside ours, one table for each source."""
    tables = []
    for source, figures in groupby(FIGURES, key=lambda figure: figure.source):
        lines = []
        for figure in figures:
            paper = f"{figure.defence}-paper"
            beside = ours(figure, rows, figure.defence), ours(figure, rows, paper) if paper in DEFENCES else "–"
            lines.append([figure.theirs, figure.defence, f"{figure.accuracy:g} / {figure.asr:g}", *beside])
        head = ["attack", "defence", "theirs", "ours", "ours, `from_paper()`"]
        tables.append(f"{source}:\n\n{table(head, lines, left=[name for name in head if name != 'theirs'])}")
    return "\n\n".join(tables)


def published_detection() -> str:
    """Detection rates of others."""
    lines = [
        [source, defence, "–" if tpr is None else f"{tpr:.1f}", f"{fpr:.2f}", "not comparable"]
        for source, defence, tpr, fpr in DETECTION
    ]
    return table(["source", "defence", "TPR", "FPR", "ours"], lines, left=("source", "defence", "ours"))


def missing(protocol: Protocol, rows: Iterable[Row]) -> str:
    """The cells of a protocol that have no row, those of a setting and seed together."""
    done = {key(row) for row in rows}
    left = [cell for cell in protocol.cells if cell_key(cell) not in done]
    if not left:
        return f"### {protocol.name}: nothing is missing"
    size, time = f"{len(left)} of {len(protocol.cells)} cells", f"about {hours(left):.1f} hours on {protocol.hardware}"
    lines = [f"### {protocol.name}: {size}, {time}", ""]
    for (setting, seed), cells in groupby(sorted(left, key=_place), key=lambda cell: (cell.setting, cell.seed)):
        attacks: dict[str, list[str]] = {}
        for cell in cells:
            attacks.setdefault(cell.defence, []).append(cell.attack)
        lines.append(f"- {setting}, seed {seed}:")
        for some, defences in groupby(attacks, key=lambda defence: ", ".join(attacks[defence])):
            lines.append(f"  - {', '.join(defences)}: {some}")
    return "\n".join(lines)


def _place(cell: Cell) -> tuple[bool, str, int, int]:
    return cell.setting != Setting(), str(cell.setting), cell.seed, DEFENCES.index(cell.defence)


def _median(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):,.{digits}f}" if values else "–"


INTRODUCTION = """# What was measured

Written by `python -m examples.evidence results` from the {count} rows of `results.jsonl` and those of the ablations
beside it; do not edit it. All rates are in per cent; several seeds are given as mean ± standard deviation.
A cell is *void* where the attack did not take: the undefended model obeys the trigger in less than half of the images.
– stands for what was not measured. `perfect` is a filter that knows the truth, `random` one that removes as many images
by chance, `random-reset` drops the poisons and resets as many units by chance; names with `-paper` follow the papers.
Defences that act when training ends (NONE, D-BR, most baselines) go on from the undefended run before its last epoch,
and draw the batches of that epoch anew: on clean data, where they do nothing, that alone makes 0.2 points.

![Attack success rate by defence and attack](figures/asr.png)

![Attack success rate by poison rate](figures/rates.png)"""
COST = """Medians over the cells of a defence. Seconds as a multiple of the undefended run with the same attack, seed
and hardware; defences that act at the end go on from the undefended run, and its share is counted as theirs. Some rows
shared the machine with other work. An epoch-equivalent is the work of one epoch of ordinary training on all images,
where a backward pass counts as two forward passes: it is counted in images that went through the network, without the
denoising. Peak memory is that of the process, data and libraries included; on a GPU that of tensors."""
PUBLISHED = """Clean accuracy / ASR in per cent. A figure is comparable where data, network, epochs, recipe and attack
are the authors' as far as they are known (protocol `full`); *not comparable* where one of them differs, and then our
figure for the same attack in the small setting above is given for orientation. Their ten per cent are of the images
that are not of the target class, ours of all; a photograph of a flower stands for Hello Kitty; our images were JPEG
files. UltraClean's tables were not at hand."""
FCT = """Feature consistency towards transformations, by a detector from fresh weights and from a copy of the
undefended network (`python -m examples.evidence.consistency`). D-BR as published suspects the 5 % that move most, and
trusts the 20 % that move least: their share of poisons beside that of all images.

![FCT of clean and poisoned images](figures/fct.png)"""
COMBINED = """Every training image of an undefended network is measured once, and candidates for a verdict judge by
that (`python -m examples.evidence.combined`): single scores and averages of their ranks, with a cut at 5 % or with a
gate; second modes in the responses of features (UltraClean looks for them) and of units (NONE, D-BR), without and
with what early neighbours say of them (UltraClean asks them); unions of these. The kinds of attack are dealt out to
two halves in turns, in the order of the benchmark, whatever their rate and seed; those that took count, from 1 to 10
% of the data, and each kind has one vote. A candidate is chosen on one half, for its TPR, and reported on the other.
To be chosen it must remove nothing from clean data (which are not held out), and at most 0.1 % of the clean images on
average; among equals the first one of the table is chosen. The bounds of what early neighbours say were set on WaNet
(half A) and clean data; that others may lie beside a mode which splits none of them, on flower and low-frequency
(half B), its guards on TaCT (half A) and digits. For what these add the attacks named here are no test, and no half is
untouched; all other attacks are one. Kinds of one family (flower and flower-added) may stand in both halves. Covers,
triggered images with their own label, are told apart here: to remove one is neither a hit nor a false alarm (in the
tables above it is a false alarm)."""
FRACTION = """The images that move most under denoising leave the training set of a fresh network, by one denoiser or
both (`python -m examples.evidence.fractions`). The score is the paper's, on logits, after 3 of 12 epochs."""
STRIPPED = """STRIP's scores of the images of the target class, from the undefended network, 20 images blended in
(`python -m examples.evidence.strip`)."""
REPAIR = """From the undefended network, with the true poisons as suspects, with those that scores choose, and with its
own choice (`python -m examples.evidence.repair`)."""
STAGES = """The first stage of D-ST with other labels than those of trusted images, without readmission
(`python -m examples.evidence.stages`); D-ST's rows above have readmission."""
WEIGHTS = """The second stage of D-ST, which trains the classifier alone, with other weights of the suspects (the
paper's lambda_p, 0.001), from the features of one first stage (`python -m examples.evidence.weights`)."""

Section = tuple[str, str, Callable[[list[Row]], str]]
ABLATIONS: dict[str, Section] = {
    "combined": ("Does a verdict from several scores beat each of them?", COMBINED, combined_tables),
    "consistency": ("Does FCT tell poisons?", FCT, consistency_table),
    "fractions": ("How much should UltraClean remove, and what does each denoiser add?", FRACTION, fractions_table),
    "strip": ("What does STRIP see?", STRIPPED, strip_table),
    "repair": ("What each part of D-BR adds", REPAIR, repair_table),
    "stages": ("Whose labels the features of D-ST learn from", STAGES, stages_table),
    "weights": ("How much the classifier of D-ST should unlearn suspects", WEIGHTS, weights_table),
}
"""What stands beside the benchmark: the name of the file of its rows, heading, introduction and table."""
