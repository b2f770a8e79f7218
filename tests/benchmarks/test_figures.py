"""What the figures of the benchmark show of hand-made rows, scores and images."""

from __future__ import annotations

import math
import struct
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.colors import to_hex
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks import attacks, consistency, plot
from benchmarks.cells import ATTACKS, FURTHER, STANDARD
from benchmarks.networks import NAME
from benchmarks.table import DEFENCES
from tests.benchmarks.helpers import row

ROWS = [
    row("badnets-1%", "undefended", 0.8, 0.49),
    row("badnets-1%", "clean-model", 0.8, 0.03),
    row("badnets-1%", "NONE", 0.8, 0.02),
    row("badnets-5%", "undefended", 0.8, 1.0),
    row("badnets-5%", "undefended", 0.8, 0.5, seed=1),
    row("badnets-5%", "NONE", 0.8, 0.0),
]


def cells_of(figure: Any) -> dict[tuple[str, str], tuple[Any, str]]:
    """The patch and the text of each cell, by attack and defence."""
    (axes,) = figure.axes
    down, across = (
        {place: label.get_text() for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)}
        for axis in (axes.yaxis, axes.xaxis)
    )
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    found = {}
    for patch in axes.patches:
        x, y = (round(float(value), 6) for value in (patch.get_x() + 0.47, patch.get_y() + 0.46))
        found[down[y], across[x]] = patch, texts[x, y]
    return found


def test_the_figures_know_every_defence_of_the_tables() -> None:
    assert tuple(chain(*plot.GROUPS.values())) == DEFENCES
    assert set(plot.LINES) <= set(DEFENCES)


def test_void_and_missing_cells_are_not_taken_for_success() -> None:
    found = cells_of(plot.squares(ROWS, {"": STANDARD}))
    assert [name for name in dict.fromkeys(defence for _, defence in found)] == ["undefended", "clean-model", "NONE"]
    assert {attack for attack, _ in found} == {"badnets-1% (void)", "badnets-5%"}
    assert {place for place, (patch, _) in found.items() if patch.get_hatch()} == {
        ("badnets-1% (void)", defence) for defence in ("undefended", "clean-model", "NONE")
    }
    good, text = found["badnets-5%", "NONE"]
    assert (to_hex(good.get_facecolor()), text) == (plot.FEW, "0")
    assert found["badnets-5%", "undefended"][1] == "75"
    missing, text = found["badnets-5%", "clean-model"]
    assert (missing.get_facecolor()[3], text) == (0.0, "–")
    taken = [found | {"asr": 0.5} if found["asr"] == 0.49 else found for found in ROWS]
    assert not any(patch.get_hatch() for patch, _ in cells_of(plot.squares(taken, {"": STANDARD})).values())
    assert plot.squares(ROWS, {"": FURTHER}) is None


def test_groups_stand_apart_in_their_own_order() -> None:
    assert plot.spread(["c", "a", "c", "d"], [("a", "b", "c"), ("e",), ("d",)], 0.5) == {"a": 0, "c": 1, "d": 2.5}
    assert plot.spread(["d"], [("a",), ("d",)], 0.5) == {"d": 0}


def test_rates_are_drawn_where_they_were_measured() -> None:
    figure = plot.rates([*ROWS, row("clean", "undefended", 0.8, 0.02)], ("badnets", "blended"))
    upper, lower = figure.axes
    assert upper.get_title() == "badnets", "there is no panel for what was not measured"
    assert [label.get_text() for label in lower.get_xticklabels()] == ["1", "5"]
    assert (lower.get_xscale(), lower.get_ylim()[1] < 20 < upper.get_ylim()[1]) == ("log", True)
    points = [line for line in upper.lines if line.get_marker() in "ovD" and line.get_linestyle() == "None"]
    told = {
        (line.get_marker(), round(float(line.get_ydata()[0]))): line.get_markerfacecolor() == "white" for line in points
    }
    assert told == {("o", 49): True, ("v", 3): True, ("D", 2): True, ("o", 75): False, ("D", 0): False}
    assert len({float(line.get_xdata()[0]) for line in points}) == 5, "each defence is a little aside"
    bars = [segment for bar in upper.collections for segment in bar.get_segments() if len(segment)]
    heights = [float(segment[1, 1] - segment[0, 1]) for segment in bars]
    assert [height for height in heights if not math.isnan(height)] == pytest.approx([2 * 25 * 2**0.5])
    assert plot.rates(ROWS, ("blended",)) is None


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG file."""
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    return width, height


def test_what_is_left_is_drawn_over_the_share_that_was_removed() -> None:
    removed = [
        row(attack, "", 0.8, asr, denoiser=denoiser, fraction=fraction, tpr=0.5)
        for attack in ("badnets-5%", "sig-80%")
        for denoiser in plot.DENOISERS
        for fraction, asr in ((0.2, 0.25), (0.05, 1.0))
    ]
    figure = plot.fractions(removed)
    titles = [axes.get_title() for axes in figure.axes]
    assert [title.split(":")[0] for title in titles[::2]] == ["badnets-5%", "sig-80%"]
    for axes, values in zip(figure.axes, ([100, 25], [50, 50]) * 2, strict=True):
        assert {line.get_label() for line in axes.lines} == set(plot.DENOISERS)
        for line in axes.lines:
            assert (list(line.get_xdata()), list(line.get_ydata())) == ([5, 20], values), "in the order of the shares"
    assert plot.fractions([]) is None


def test_figures_are_as_wide_as_a_page_and_small(tmp_path: Path) -> None:
    assert plot.draw([], tmp_path) == []
    assert [path.name for path in plot.draw(ROWS, tmp_path)] == ["asr.png", "rates.png"]
    many = [row(attack, defence, 0.8, 0.5) for attack in ATTACKS for defence in DEFENCES]
    paths = plot.draw(many, tmp_path)
    assert [path.name for path in paths] == ["asr.png", "asr-more.png", "rates.png"]
    assert all(size(path)[0] == 900 and 1000 < path.stat().st_size < 300_000 for path in paths)


def test_histograms_are_densities_of_logarithms(tmp_path: Path) -> None:
    poisoned = torch.arange(100) < 20
    values = torch.where(poisoned, 100.0, 1.0) + torch.arange(100) / 1000
    found = {("a", "one"): (values, poisoned), ("a", "two"): (values, poisoned), ("b", "one"): (values, poisoned)}
    figure = plot.histograms(found, "FCT", "Scores")
    first, second, third, empty = figure.axes
    assert [axes.get_title() for axes in (first, second)] == ["one", "two"]
    assert first.get_ylabel().split() == ["a", "density"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "log10 FCT", "log10 FCT", ""]
    assert (third.axison, empty.axison) == (True, False)
    areas = [sum(bar.get_width() * bar.get_height() for bar in group) for group in first.containers]
    assert areas == pytest.approx([1, 1], abs=1e-3)
    assert max(bar.get_x() for bar in first.containers[0] if bar.get_height()) < 0.1
    assert min(bar.get_x() for bar in first.containers[1] if bar.get_height()) > 1.9
    path = tmp_path / "fct.png"
    consistency.draw({("sig-80%", NAME, "fresh", 0): (values, poisoned)}, path)
    assert size(path)[0] == 900


def test_the_sheet_draws_each_form_of_each_kind_of_attack_once(tmp_path: Path) -> None:
    train = TensorDataset(torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8), torch.arange(200) % 10)
    network = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(196, 10)).eval()
    names = ("clean", "badnets-1%", "badnets-5%", "wanet-10%", "sig-80%")
    kinds = attacks.distinct({name: ATTACKS[name] for name in names})
    assert list(kinds) == ["badnets-1%", "wanet-10%", "sig-80%"]
    figure = attacks.sheet(kinds | {"label-consistent-40%": ATTACKS["label-consistent-40%"]}, train, network)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "badnets", "wanet", "wanet on covers", "sig", "label-consistent", "label-consistent at test"
    ]  # fmt: skip
    assert [text.get_text() for text in figure.texts] == ["clean", "triggered", "difference × 10"] * 3
    for axes in figure.axes:
        box = axes.get_position().bounds * torch.tensor([*figure.get_size_inches()] * 2).numpy() * plot.DPI
        assert box == pytest.approx(box.round(), abs=1e-6)
        assert tuple(box[2:]) == pytest.approx((3 * (3 * 32 + 4), 3 * 32)), "a pixel is three by three"
    figure.savefig(tmp_path / "attacks.png")
    assert attacks.FIGURE.is_file(), "the figure of the benchmark is what the command writes by default"


def test_a_strip_has_the_difference_ten_times_around_gray() -> None:
    clean = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    triggered = clean.clone()
    triggered[:, 0] = torch.tensor([103, 90])
    strip = attacks.strip(clean, triggered)
    assert strip.shape == (3, 2, 10)
    assert strip[0].tolist() == [
        [100, 100, 255, 255, 103, 90, 255, 255, 158, 28],
        [100, 100, 255, 255, 100, 100, 255, 255, 128, 128],
    ]


def test_images_at_test_are_of_another_class_than_the_target() -> None:
    labels = torch.arange(200) % 10
    images = labels[:, None, None, None].mul(20).expand(200, 3, 32, 32).to(torch.uint8).contiguous()
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()
    recipe = ATTACKS["label-consistent-40%"].made(TensorDataset(images, labels), lambda: network)
    shown = {form: int(clean[0, 16, 16]) // 20 for form, clean, _ in attacks.forms(recipe, images, labels)}
    assert shown == {"": 0, " at test": 1}
