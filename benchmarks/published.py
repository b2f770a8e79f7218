"""Figures that others have published, and which of our cells they may be compared with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from string import ascii_lowercase

from benchmarks.data import JPEG, ORIGINAL
from benchmarks.protocols import Setting
from benchmarks.rows import Row
from benchmarks.table import DEFENCES, by_setting, percent, table

CHEN = "Chen et al. 2022 (D-BR, D-ST), CIFAR-10, ResNet-18"
BENCH = "BackdoorBench leaderboard (2025-06), CIFAR-10, PreActResNet-18"
LISTING = "Listing of NONE (2022), CIFAR-10"
MEAN = "mean of 8 to 10 attacks"
CHEN_SETTING = Setting("resnet18", 50_000, 200, "D-BR", ORIGINAL)
BENCH_SETTING = Setting("preact-resnet18", 50_000, 100, "BackdoorBench", ORIGINAL)
DATASETS = (ORIGINAL, JPEG)

BASE = "their ten per cent are of the images that are not of the target class, ours of all"
BEST = "the authors' code keeps the epoch that is best on the test set"
NORM = "their network has no norm before its pooling, ours has one"
PATCH = "their patch is a picture file, ours the grid of badnets"


@dataclass(frozen=True)
class Figure:
    """A published result.

    Attributes:
        source: Paper or leaderboard, data and network.
        theirs: The attack by their name.
        defence: The defence by our name.
        accuracy: Clean accuracy in per cent.
        asr: Attack success rate in per cent.
        attack: The same attack by our name, ``None`` if we have none.
        setting: Where the two can be compared, ``None`` for nowhere.
        instead: An attack like it, to be shown where the same one was not run.
        differences: In what ours is known to differ from it, in the same setting, too.
    """

    source: str
    theirs: str
    defence: str
    accuracy: float
    asr: float
    attack: str | None = None
    setting: Setting | None = None
    instead: str | None = None
    differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Line:
    """An attack of a published table: accuracy and ASR by the defences of the table, and what we have beside it."""

    theirs: str
    pairs: tuple[tuple[float, float], ...]
    attack: str | None
    instead: str | None = None
    differences: tuple[str, ...] = ()


def _figures(source: str, setting: Setting, defences: Sequence[str], lines: Iterable[_Line]) -> list[Figure]:
    best = {"D-BR": (BEST,)} if source == CHEN else {}
    return [
        Figure(
            source, line.theirs, defence, *pair, line.attack, setting, line.instead,
            (*line.differences, *best.get(defence, ())),
        )
        for line in lines
        for defence, pair in zip(defences, line.pairs, strict=True)
    ]  # fmt: skip


CHEN_LINES = (
    _Line(
        "BadNets all-to-one 10 %", ((91.64, 100), (92.83, 0.40), (92.77, 0.03), (89.36, 0.19)),
        "badnets-10%", "badnets-5%", (BASE,),
    ),
    _Line(
        "BadNets all-to-all 10 %", ((92.79, 88.01), (92.61, 0.56), (89.22, 2.05), (79.91, 78.16)),
        "all-to-all-10%", None, ("their trigger is a white square, ours the grid of badnets",),
    ),
    _Line(
        "Trojan 10 %", ((91.91, 100), (92.21, 0.76), (93.72, 0.00), (90.18, 0.23)),
        "trojan-10%", None, (BASE, "their square has other colours"),
    ),
    _Line(
        "Blend-Strip 10 %", ((92.09, 99.97), (92.40, 0.06), (93.59, 0.00), (58.46, 0.22)), "stripe-10%", None, (BASE,)
    ),
    _Line(
        "Blend-Kitty 10 %", ((92.69, 99.99), (92.11, 0.14), (91.82, 0.00), (79.20, 2.27)),
        "flower-10%", None, (BASE, "their picture is Hello Kitty, ours a flower"),
    ),
    _Line(
        "SIG 10 % of a class", ((92.88, 99.69), (92.73, 0.24), (90.07, 0.00), (79.94, 98.84)),
        "sig-10%", "sig-80%", ("their waves have an amplitude of 60 at test time, ours 40 as in training",),
    ),
    _Line(
        "CL 10 % of a class", ((93.20, 93.34), (92.08, 0.00), (90.46, 6.40), (84.39, 0.31)),
        None, "label-consistent-40%", ("their steps are taken otherwise, and not clipped",),
    ),
)  # fmt: skip
BENCH_LINES = (
    _Line("BadNet 10 %", ((91.32, 95.03), (29.41, 4.68), (82.63, 5.41)), "badnets-10%", "badnets-5%", (PATCH, NORM)),
    _Line("BadNet 1 %", ((93.14, 74.73), (11.66, 0.86), (81.78, 2.21)), "badnets-1%", None, (PATCH, NORM)),
    _Line("BadNet 0.1 %", ((93.61, 1.23), (11.63, 0.00), (84.59, 1.52)), "badnets-0.1%", None, (PATCH, NORM)),
    *(
        _Line(
            theirs, pairs, attack, instead,
            ("their picture is Hello Kitty with a weight of 0.2, ours noise with 0.15", NORM),
        )
        for theirs, pairs, attack, instead in (
            ("Blended 10 %", ((93.47, 99.92), (14.77, 7.70), (83.33, 79.49)), "blended-10%", "blended-5%"),
            ("Blended 1 %", ((93.76, 94.88), (10.99, 0.00), (79.92, 47.94)), "blended-1%", None),
            ("Blended 0.1 %", ((93.80, 56.11), (11.67, 0.00), (83.12, 5.32)), "blended-0.1%", None),
        )
    ),
)  # fmt: skip
_MEAN = f"{MEAN}, not one of ours"

FIGURES = (
    *_figures(CHEN, CHEN_SETTING, ("undefended", "D-BR", "D-ST", "ABL"), CHEN_LINES),
    *_figures(BENCH, BENCH_SETTING, ("undefended", "D-BR", "D-ST"), BENCH_LINES),
    Figure(BENCH, f"5 %, {MEAN}", "AC", 90.2, 92.9, differences=(_MEAN,)),
    Figure(BENCH, f"5 %, {MEAN}", "ABL", 62.0, 48.6, differences=(_MEAN,)),
    Figure(BENCH, f"5 %, {MEAN}", "fine-tune", 92.9, 64.9, differences=(_MEAN,)),
    Figure(LISTING, "not known", "NONE", 94.01, 0.69, differences=("attack, network and recipe are not known",)),
)

DETECTION = (
    ("AGPD (2025), CIFAR-10, PreActResNet-18, mean of 12 attacks, 10 %", "AC", 6.6, 1.9),
    ("AGPD (2025), CIFAR-10, PreActResNet-18, mean of 12 attacks, 10 %", "spectral", 10.7, 2.6),
    ("AGPD (2025), CIFAR-10, PreActResNet-18, mean of 12 attacks, 10 %", "STRIP", 51.2, 10.7),
    ("AGPD (2025), CIFAR-10, PreActResNet-18, mean of 12 attacks, 10 %", "ABL", 43.5, 7.1),
    ("FLARE (2025), CIFAR-10, BadNets all-to-one", "AC", 0.0, 0.15),
    ("FLARE (2025), CIFAR-10, no poison", "AC", None, 0.49),
)
"""Source, defence by our name, TPR and FPR in per cent: other attacks or networks than ours throughout."""

PUBLISHED = """Clean accuracy / ASR in per cent. A figure is comparable where data, network, epochs, recipe and attack
are the authors' as far as they are known (protocol `full` with `--data cifar10`); *not comparable* where one of them
differs, which letters name, and then our figure in the nearest setting that was run is given for orientation. The
tables of UltraClean and of NONE were not at hand."""


def published(rows: list[Row]) -> str:
    """The figures of others beside ours, one table for each source, and below it why they cannot be compared."""
    tables = []
    for source, figures in groupby(FIGURES, key=lambda figure: figure.source):
        lines, letters = [], dict[str, str]()
        for figure in figures:
            paper = f"{figure.defence}-paper"
            beside = [_shown(*ours(figure, rows, figure.defence), letters)]
            beside.append(_shown(*ours(figure, rows, paper), letters) if paper in DEFENCES else "–")
            lines.append([figure.theirs, figure.defence, f"{figure.accuracy:g} / {figure.asr:g}", *beside])
        head = ["attack", "defence", "theirs", "ours", "ours, `from_paper()`"]
        tables.append(f"{source}:\n\n{table(head, lines, left=[name for name in head if name != 'theirs'])}")
        if letters:
            tables.append(f"Not comparable: {'; '.join(f'({letter}) {why}' for why, letter in letters.items())}.")
    return "\n\n".join(tables)


def published_detection() -> str:
    """Detection rates of others."""
    lines = [
        [source, defence, "–" if tpr is None else f"{tpr:.1f}", f"{fpr:.2f}"] for source, defence, tpr, fpr in DETECTION
    ]
    told = "Detection rates of others, in per cent; not comparable, for the attacks or the networks are not ours:"
    return f"{told}\n\n{table(['source', 'defence', 'TPR', 'FPR'], lines, left=('source', 'defence'))}"


def ours(figure: Figure, rows: Iterable[Row], defence: str) -> tuple[str, tuple[str, ...]]:
    """Our accuracy / ASR beside a published figure, or ``"not run"``; and why the two cannot be compared, if so."""
    if figure.setting is None:
        return "", figure.differences
    known = list(rows)
    for attack in (figure.attack, figure.instead):
        found = by_setting(row for row in known if (row["attack"], row["defence"]) == (attack, defence))
        for setting in (replace(near, dataset=data) for near in (figure.setting, Setting()) for data in DATASETS):
            if setting in found:
                other = (f"ours is under {attack}",) if attack != figure.attack else ()
                return pair(found[setting]), (*figure.differences, *_differences(setting, figure.setting), *other)
    return "not run", ()


def pair(rows: list[Row]) -> str:
    """Clean accuracy / ASR in per cent."""
    return f"{percent(row['clean_accuracy'] for row in rows)} / {percent(row['asr'] for row in rows)}"


def _shown(figure: str, reasons: Iterable[str], letters: dict[str, str]) -> str:
    """A cell of the table; ``letters`` of the reasons so far, which grow."""
    named = [letters.setdefault(reason, ascii_lowercase[len(letters)]) for reason in reasons]
    return f"not comparable ({', '.join(sorted(named))}): {figure}".removesuffix(": ") if named else figure


def _differences(here: Setting, theirs: Setting) -> list[str]:
    trained = [f"our networks are trained otherwise: {here}"] if replace(here, dataset=theirs.dataset) != theirs else []
    return trained + ([f"our data are {here.dataset}"] if here.dataset != theirs.dataset else [])
