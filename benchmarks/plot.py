"""Figures of the results."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.cells import ADAPTIVE, ATTACKS, BASELINES, FURTHER, STANDARD
from benchmarks.figures import blank_figure, own_style
from benchmarks.protocols import Setting
from benchmarks.rows import Row
from benchmarks.table import TOOK, by_setting, grouped, is_void, marked, void_trainings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, DPI = 9, 100  # inches and pixels per inch: as wide as a page, so that no text shrinks
BLUE, RUST, SOFT = "#2f78b7", "#c24a15", "#4a5058"
FEW, HALF, ALL = "#cbe5cf", "#fdf0c4", "#e0702f"  # of the images obey
VOID, HATCH = "#e3e5e8", "#b9bec5"
MISSING = {"facecolor": "none", "edgecolor": VOID, "linewidth": 0.8}
VOID_TOLD = f"void: the attack did not take (undefended below {100 * TOOK:.0f} %)"

GROUPS: dict[str, tuple[str, ...]] = {
    "no defence": ("undefended", "clean-model"),
    "this library": ("ultraclean", "NONE", "ultraclean+NONE", "D-BR", "D-ST"),
    "controls": ("perfect", "random", "random-reset"),
    "as published": ("ultraclean-paper", "NONE-paper", "D-BR-paper"),
    "other defences": BASELINES,
}
"""All defences, in the order of the tables."""

LINES = {
    "undefended": (SOFT, "o", "-"),
    "clean-model": ("#9aa1a9", "v", ":"),
    "ultraclean": (BLUE, "s", "--"),
    "NONE": (RUST, "D", "-"),
    "D-BR": ("#3c8d5a", "^", "-."),
    "D-ST": ("#8a5bb0", "X", "--"),
}
"""Colour, marker and line of the defences in ``rates.png``."""


DENOISERS = {"both": (SOFT, "o", "-", 11), "median": (BLUE, "s", "--", 5), "NLM": (RUST, "D", "-.", 5)}
"""Colour, marker, line and size in ``fractions.png``, where one may lie on another."""


def draw(rows: Iterable[Row], folder: Path, filtered: Iterable[Row] = ()) -> list[Path]:
    """Write ``asr.png``, ``asr-more.png`` and ``rates.png`` of the default setting, as far as there are rows.

    And ``fractions.png`` of the rows of ``fractions.jsonl``, ``filtered``.
    """
    found = by_setting(rows).get(Setting(), [])
    folder.mkdir(exist_ok=True)
    paths = []
    with own_style():
        for name, figure in {
            "asr.png": squares(found, {"The standard attacks": STANDARD}),
            "asr-more.png": squares(
                found, {"More published attacks": FURTHER, "Attacks that know a defence": ADAPTIVE}
            ),
            "rates.png": rates(found, ("badnets", "blended")),
            "fractions.png": fractions(by_setting(filtered).get(Setting(), [])),
        }.items():
            if figure is not None:
                figure.savefig(folder / name, dpi=DPI)
                paths.append(folder / name)
    return paths


def fractions(rows: list[Row]) -> Figure | None:
    """ASR and TPR over the share of images that UltraClean's score removes, a row of axes for each attack."""
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    if not attacks:
        return None
    figure = blank_figure(WIDTH, 0.8 + 2.2 * len(attacks))
    grid = figure.subplots(len(attacks), 2, squeeze=False, sharex=True)
    for pair, attack in zip(grid, attacks, strict=True):
        told = ("asr", f"{attack}: attack success rate, per cent"), ("tpr", "removed poisons, per cent of them")
        for axes, (rate, label) in zip(pair, told, strict=True):
            for name, (color, marker, line, size) in DENOISERS.items():
                found = [row for row in rows if (row["attack"], row["denoiser"]) == (attack, name)]
                points = sorted((100 * row["fraction"], 100 * row[rate]) for row in found)
                style = {"color": color, "marker": marker, "linestyle": line, "markersize": size}
                axes.plot(*zip(*points, strict=True), **style, markerfacecolor="none", label=name)
            axes.set(ylim=(-4, 104))
            axes.set_title(label, fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("removed images, per cent")
    grid[0][0].legend(fontsize=9, title="denoised by")
    figure.set_layout_engine("tight")
    return figure


def squares(rows: list[Row], kinds: Mapping[str, Collection[str]]) -> Figure | None:
    """Mean ASR in per cent, attacks down by their kind and defences across by their group; orange is bad."""
    cells, void = grouped(rows), void_trainings(rows)
    cells = {group: cell for group, cell in cells.items() if any(group[0] in kind for kind in kinds.values())}
    if not cells:
        return None
    down = spread([attack for attack, _ in cells], kinds.values(), 1.1)
    across = spread([defence for _, defence in cells], GROUPS.values(), 0.25)
    bottom, right = max(down.values()) + 0.5, max(across.values()) + 0.5
    figure = blank_figure(WIDTH, 2.3 + 0.27 * bottom)
    axes = figure.add_subplot()
    for attack, y in down.items():
        for defence, x in across.items():
            cell = cells.get((attack, defence))
            square(axes, x, y, mean(cell), void=cell is not None and is_void(cell, void))
    for kind, names in kinds.items():
        if places := [y for name, y in down.items() if name in names]:
            axes.text(-0.4, min(places) - 0.65, kind, fontsize=9.5, weight="bold", va="bottom")
    for group, names in GROUPS.items():
        if places := [x for name, x in across.items() if name in names]:
            axes.plot([min(places) - 0.45, max(places) + 0.45], [bottom + 0.2] * 2, color=SOFT, linewidth=1)
            axes.text(statistics.fmean(places), bottom + 0.4, group, fontsize=9, color=SOFT, ha="center", va="top")
    names = [marked(name, is_void(cells.get((name, "undefended"), []), void)) for name in down]
    axes.set_yticks(list(down.values()), names, fontsize=9)
    axes.set_xticks(list(across.values()), list(across), rotation=40, ha="left", rotation_mode="anchor", fontsize=9)
    axes.xaxis.tick_top()
    axes.set(xlim=(-0.6, right + 0.1), ylim=(bottom + 1.3, -0.8))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, pad=2)
    axes.tick_params("x", pad=17)
    _key_of_squares(axes)
    axes.set_title("Attack success rate: images that obey the trigger, per cent", fontsize=11, pad=12)
    figure.set_layout_engine("tight")
    return figure


def square(axes: Axes, x: float, y: float, rate: float | None, *, void: bool) -> None:
    """One cell: coloured where the attack took, hatched where it did not, empty where nothing was measured."""
    from matplotlib.colors import LinearSegmentedColormap  # noqa: PLC0415  (slow to import)
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    style: dict[str, object]
    if rate is None:
        text, style = "–", MISSING
    elif void:
        text, style = f"{rate:.0f}", {"facecolor": VOID, "edgecolor": HATCH, "hatch": "////", "linewidth": 0}
    else:
        scale = LinearSegmentedColormap.from_list("obey", [FEW, HALF, ALL])
        text, style = f"{rate:.0f}", {"facecolor": scale(rate / 100), "edgecolor": "none"}
    axes.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, **style))
    color = SOFT if rate is None or void else None
    axes.text(x, y, text, ha="center", va="center_baseline", fontsize=9, color=color)


def spread(names: Iterable[str], groups: Iterable[Collection[str]], gap: float) -> dict[str, float]:
    """Where each name stands in a line of unit squares, with a gap between groups."""
    found: dict[str, float] = {}
    known, end = set(names), -gap
    for group in groups:
        members = [name for name in group if name in known]
        end += gap if members else 0
        for name in members:
            found[name], end = end, end + 1
    return found


def rates(rows: list[Row], kinds: Sequence[str]) -> Figure | None:
    """Mean ASR over the poison rate, a column for each kind of attack; below, the few per cent that defences leave."""
    cells, void = grouped(row for row in rows if kind_of(row["attack"]) in kinds), void_trainings(rows)
    shown = [kind for kind in kinds if any(kind_of(attack) == kind for attack, _ in cells)]
    if not shown:
        return None
    figure = blank_figure(WIDTH, 6.4)
    axes = figure.subplots(2, len(shown), squeeze=False, sharex="col", sharey="row")
    for (upper, lower), kind in zip(axes.T, shown, strict=True):
        percents = sorted({100 * ATTACKS[attack].rate for attack, _ in cells if kind_of(attack) == kind})
        for defence in LINES:
            found = {
                100 * ATTACKS[attack].rate: cell
                for (attack, name), cell in cells.items()
                if kind_of(attack) == kind and name == defence
            }
            for line in (upper, lower) if found else ():
                curve(line, defence, found, {percent for percent, cell in found.items() if is_void(cell, void)})
        upper.set_title(kind, fontsize=11)
        upper.set(ylim=(-3, 104))
        lower.set(ylim=(-0.5, 15.5), xscale="log", xlim=(percents[0] / 1.5, percents[-1] * 1.5))
        lower.set_xlabel("poisoned images, per cent")
        lower.set_xticks(percents, [f"{percent:g}" for percent in percents])
        lower.set_yticks([0, 5, 10, 15])
        lower.minorticks_off()
    for line in axes.flat:
        line.spines[["top", "right"]].set_visible(False)
        line.grid(axis="y", color="#e3e5e8", linewidth=0.7)
    axes[0, 0].set_ylabel("attack success rate, per cent")
    axes[1, 0].set_ylabel("the same, 0 to 15 per cent")
    _key_of_rates(figure, {defence for _, defence in cells})
    figure.set_layout_engine("tight", rect=(0, 0, 1, 0.93))
    return figure


def curve(axes: Axes, defence: str, found: Mapping[float, list[Row]], void: Collection[float]) -> None:
    """One defence over the poison rate, a little aside of the others; bars are deviations, hollow points are void."""
    color, marker, line = LINES[defence]
    aside = 1.05 ** (list(LINES).index(defence) - (len(LINES) - 1) / 2)
    percents = sorted(found)
    values = [[100 * row["asr"] for row in found[percent]] for percent in percents]
    bars = [statistics.stdev(several) if len(several) > 1 else float("nan") for several in values]
    means = [statistics.fmean(several) for several in values]
    places = [percent * aside for percent in percents]
    style = {"color": color, "linestyle": line, "linewidth": 1.3, "elinewidth": 1.3, "capsize": 3}
    axes.errorbar(places, means, bars, **style)
    for place, percent, value in zip(places, percents, means, strict=True):
        axes.plot(place, value, marker, color=color, mfc="white" if percent in void else color, markersize=5, zorder=3)


def histograms(found: Mapping[tuple[str, str], tuple[Tensor, Tensor]], score: str, title: str) -> Figure:
    """Scores (N,) of clean and of poisoned images, bool (N,), by the names of their line and of their column."""
    lines, columns = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    figure = blank_figure(WIDTH, 0.8 + 1.35 * len(lines))
    axes = figure.subplots(len(lines), len(columns), squeeze=False)
    for row, line in zip(axes, lines, strict=True):
        row[0].set_ylabel(f"{line}\n\ndensity", fontsize=8.5)
        for place, column in zip(row, columns, strict=True):
            if (line, column) in found:
                histogram(place, *found[line, column])
            else:
                place.axis("off")
    for place, (column, below) in enumerate(zip(columns, axes.T, strict=True)):
        below[0].set_title(column, fontsize=9.5)
        last = max(n for n, line in enumerate(lines) if (line, column) in found)
        axes[last, place].set_xlabel(f"log10 {score}", fontsize=8.5)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper right", ncols=2, frameon=False, fontsize=9)
    figure.text(0.01, 1 - 0.1 / figure.get_figheight(), f"{title}; density is per factor of ten", fontsize=10, va="top")
    figure.set_layout_engine("tight", h_pad=0.5, rect=(0, 0, 1, 1 - 0.25 / figure.get_figheight()))
    return figure


def histogram(axes: Axes, values: Tensor, poisoned: Tensor) -> None:
    """Density of the logarithms of clean and of poisoned images' scores, which are at least 0."""
    logs = values.clamp(min=float(values[values > 0].min())).log10()
    edges = torch.linspace(float(logs.min()), float(logs.max()), 60).tolist()
    for mask, color, name in ((~poisoned, BLUE, "clean images"), (poisoned, RUST, "poisoned images")):
        axes.hist(logs[mask].tolist(), bins=edges, density=True, alpha=0.6, color=color, label=name)
    axes.locator_params(axis="both", nbins=4)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def kind_of(attack: str) -> str:
    """An attack's name without its rate."""
    return attack.rsplit("-", 1)[0]


def mean(cell: list[Row] | None) -> float | None:
    """Mean ASR over seeds, in per cent."""
    return None if not cell else 100 * statistics.fmean(row["asr"] for row in cell)


def _key_of_squares(axes: Axes) -> None:
    from matplotlib.patches import Patch  # noqa: PLC0415

    handles = [
        Patch(facecolor=FEW, label="0 %"), Patch(facecolor=ALL, label="100 %"),
        Patch(facecolor=VOID, edgecolor=HATCH, hatch="////", label=VOID_TOLD),
        Patch(**MISSING, label="– not measured"),
    ]  # fmt: skip
    axes.legend(handles=handles, ncols=4, loc="upper center", frameon=False, fontsize=9, bbox_to_anchor=(0.5, 0))


def _key_of_rates(figure: Figure, defences: Iterable[str]) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415

    handles = [
        Line2D([], [], color=color, marker=marker, linestyle=line, label=name)
        for name, (color, marker, line) in LINES.items()
        if name in defences
    ]
    marks = [
        Line2D([], [], color=SOFT, marker="o", mfc="white", linestyle="", label=VOID_TOLD),
        Line2D(
            [], [], color=SOFT, marker="|", markersize=11, linestyle="", label="standard deviation, of several seeds"
        ),
    ]
    for height, shown in ((1, handles), (0.96, marks)):
        figure.legend(
            handles=shown, ncols=len(shown), loc="upper center", bbox_to_anchor=(0.5, height), frameon=False, fontsize=9
        )
