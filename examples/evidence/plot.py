"""Figures of the results."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from examples.evidence.cells import ADAPTIVE, ATTACKS, FURTHER, STANDARD
from examples.evidence.protocols import OURS, Setting
from examples.evidence.rows import Row
from examples.evidence.table import DEFENCES, by_setting, grouped
from lightning_backdoor.report.figures import blank_figure, own_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#4a5058", "#2f78b7", "#c24a15", "#3c8d5a", "#8a5bb0")


def draw(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Write ``asr.png``, ``rates.png`` and, of more attacks, ``asr-more.png``; of the default setting."""
    found = by_setting(rows).get(Setting(), [])
    folder.mkdir(exist_ok=True)
    more = [row for row in found if row["attack"] in FURTHER | ADAPTIVE]
    with own_style():
        figures = {
            "asr.png": squares([row for row in found if row["attack"] in STANDARD]),
            "rates.png": rates(found),
            **({"asr-more.png": squares(more)} if more else {}),
        }
        for name, figure in figures.items():
            figure.savefig(folder / name, dpi=90)
    return [folder / name for name in figures]


def squares(rows: list[Row]) -> Figure:
    """Mean ASR in per cent, defences down and attacks across; dark is bad."""
    cells = grouped(rows)
    attacks = list(dict.fromkeys(attack for attack, _ in cells))
    defences = [name for name in DEFENCES if any(defence == name for _, defence in cells)]
    figure = blank_figure(1.9 + 0.85 * len(attacks), 1.5 + 0.32 * len(defences))
    axes = figure.add_subplot()
    shown = [[mean(cells.get((attack, defence))) for attack in attacks] for defence in defences]
    axes.imshow(
        [[float("nan") if rate is None else rate for rate in line] for line in shown], "Oranges", vmin=0, vmax=130
    )
    for down, line in enumerate(shown):
        for across, rate in enumerate(line):
            axes.text(across, down, "–" if rate is None else f"{rate:.0f}", ha="center", va="center", fontsize=9)
    axes.set_aspect("auto")
    axes.set_xticks(range(len(attacks)), attacks, rotation=35, ha="right", fontsize=9)
    axes.set_yticks(range(len(defences)), defences, fontsize=9)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("Attack success rate, per cent", fontsize=11)
    figure.set_layout_engine("tight")
    return figure


def rates(rows: list[Row]) -> Figure:
    """Mean ASR over the poison rate, for the attacks that were run at several rates."""
    cells, kinds = grouped(rows), (("badnets", "clean"), ("blended",))  # clean data are tested with BadNets' trigger
    figure = blank_figure(9, 3.4)
    for place, shown in enumerate(kinds):
        axes = figure.add_subplot(1, len(kinds), place + 1)
        for defence, colour in zip(("undefended", *OURS), COLOURS, strict=True):
            points = sorted(
                (100 * ATTACKS[attack].rate, mean(cell))
                for (attack, name), cell in cells.items()
                if name == defence and attack.rsplit("-", 1)[0] in shown
            )
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=defence, markersize=4)
        axes.set(ylim=(-3, 103), title=shown[0], xlabel="poisoned images, per cent")
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlim(-0.03, 13)
        axes.set_xticks([0, 0.1, 0.5, 1, 5, 10], ["0", "0.1", "0.5", "1", "5", "10"])
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("attack success rate, per cent")
    figure.axes[0].legend(frameon=False, fontsize=9)
    figure.set_layout_engine("tight")
    return figure


def histogram(axes: Axes, values: Tensor, poisoned: Tensor) -> None:
    """Density of the logarithms of clean and of poisoned images' scores, which are at least 0."""
    logs = values.clamp(min=float(values[values > 0].min())).log10()
    edges = torch.linspace(float(logs.min()), float(logs.max()), 60).tolist()
    for mask, colour, name in ((~poisoned, "tab:blue", "clean"), (poisoned, "tab:red", "poisoned")):
        axes.hist(logs[mask].tolist(), bins=edges, density=True, alpha=0.6, color=colour, label=name)
    axes.set_yticks([])
    axes.tick_params(labelsize=7)


def mean(cell: list[Row] | None) -> float | None:
    """Mean ASR over seeds, in per cent."""
    return None if not cell else 100 * sum(row["asr"] for row in cell) / len(cell)
