"""What stands beside the benchmark on its page: ablations, each with its words, its table and the rows it wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import consistency, fractions, repair, rows, stages, strip, weights
from benchmarks.cache import EARLY
from benchmarks.cells import ATTACKS
from benchmarks.combined import SEEDS, combined_tables
from benchmarks.protocols import Setting
from benchmarks.table import (
    consistency_table,
    fractions_table,
    repair_table,
    stages_table,
    strip_table,
    weights_table,
)


@dataclass(frozen=True)
class Section:
    """An ablation on the page.

    Attributes:
        heading: Its question.
        told: What was done.
        table: Its rows as a table.
        wanted: What tells apart the rows of a finished run, from the rows of the benchmark.
    """

    heading: str
    told: str
    table: Callable[[list[rows.Row]], str]
    wanted: Callable[[list[rows.Row]], list[rows.Row]]


def undefended_cases(found: list[rows.Row]) -> list[rows.Row]:
    """Every undefended training of the default setting is looked at for a combined verdict."""
    plain = [row for row in found if row["defence"] == "undefended" and row["seed"] < SEEDS]
    cases = {(row["attack"], row["seed"]) for row in plain if rows.setting_of(row) == Setting()}
    ordered = sorted(cases, key=lambda case: (list(ATTACKS).index(case[0]), case[1]))
    return [rows.identity(Setting(), attack, seed) for attack, seed in ordered]


FCT = """Feature consistency towards transformations, by a detector from fresh weights and from a copy of the
undefended network (`python -m benchmarks.consistency`). D-BR as published suspects the 5 % that move most, and
trusts the 20 % that move least: their share of poisons beside that of all images.

![FCT of clean and poisoned images](figures/fct.png)"""
COMBINED = """Every training image of an undefended network is measured once, and candidates for a verdict judge by
that (`python -m benchmarks.combined`): single scores and averages of their ranks, with a cut at 5 % or with a
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
tables above it is a false alarm). TPR and FPR are in per cent, what is removed is a number of images."""
FRACTION = f"""The images that move most under denoising leave the training set of a fresh network, by one denoiser or
both (`python -m benchmarks.fractions`). The score is the paper's, on logits, after the first {EARLY} epochs.

![ASR and TPR over the share of removed images](figures/fractions.png)"""
STRIPPED = f"""STRIP's scores of the images of the target class, from the undefended network, {strip.DRAWS} images
blended in (`python -m benchmarks.strip`)."""
REPAIR = """From the undefended network, with the true poisons as suspects, with those that scores choose, and with its
own choice (`python -m benchmarks.repair`)."""
STAGES = """The first stage of D-ST with other labels than those of trusted images, without readmission
(`python -m benchmarks.stages`); D-ST's rows above have readmission."""
WEIGHTS = """The second stage of D-ST, which trains the classifier alone, with other weights of the suspects (the
paper's lambda_p, 0.001), from the features of one first stage (`python -m benchmarks.weights`)."""

ABLATIONS: dict[str, Section] = {
    "combined": Section(
        "Does a verdict from several scores beat each of them?", COMBINED, combined_tables, undefended_cases
    ),
    "consistency": Section("Does FCT tell poisons?", FCT, consistency_table, lambda _: consistency.wanted()),
    "fractions": Section(
        "How much should UltraClean remove, and what does each denoiser add?",
        FRACTION,
        fractions_table,
        lambda _: fractions.wanted(),
    ),
    "strip": Section("What does STRIP see?", STRIPPED, strip_table, lambda _: strip.wanted()),
    "repair": Section("What each part of D-BR adds", REPAIR, repair_table, lambda _: repair.wanted()),
    "stages": Section("Whose labels the features of D-ST learn from", STAGES, stages_table, lambda _: stages.wanted()),
    "weights": Section(
        "How much the classifier of D-ST should unlearn suspects",
        WEIGHTS,
        weights_table,
        lambda _: weights.wanted(),
    ),
}
"""By the name of the file of its rows."""
