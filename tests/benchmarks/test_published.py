"""What stands beside published figures, and what is not comparable."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import published
from benchmarks.cells import ATTACKS
from benchmarks.data import ORIGINAL
from benchmarks.networks import NAME
from benchmarks.published import BASE, BEST, CHEN, CHEN_SETTING, FIGURES, Figure, ours
from benchmarks.table import DEFENCES
from tests.benchmarks.helpers import row

SAME = {"model": "resnet18", "images": 50_000, "epochs": 200, "recipe": "D-BR", "dataset": ORIGINAL}
SMALL = f"our networks are trained otherwise: {NAME}, 20,000 images, 12 epochs, recipe one-cycle"
JPEG = "our data are CIFAR-10 (JPEG)"
FIGURE = Figure("a paper", "BadNets", "D-BR", 92.0, 0.4, "badnets-10%", CHEN_SETTING, "badnets-5%")


def figure(theirs: str, defence: str, source: str = CHEN) -> Figure:
    """A published figure."""
    (found,) = [f for f in FIGURES if (f.theirs, f.defence, f.source) == (theirs, defence, source)]
    return found


def test_figures_are_comparable_where_nothing_differs() -> None:
    small = row("badnets-10%", "D-BR", 0.79, 0.02)
    assert ours(FIGURE, [], "D-BR") == ("not run", ())
    assert ours(FIGURE, [small | SAME | {"asr": 0.5}, small], "D-BR") == ("79.0 / 50.0", ())
    assert ours(FIGURE, [small, small | SAME | {"defence": "D-ST"}], "D-BR") == ("79.0 / 2.0", (SMALL, JPEG))
    assert ours(FIGURE, [small | SAME | {"dataset": "CIFAR-10 (JPEG)"}, small], "D-BR") == ("79.0 / 2.0", (JPEG,))
    assert ours(FIGURE, [small | {"dataset": ORIGINAL}], "D-BR") == ("79.0 / 2.0", (SMALL,))
    assert ours(FIGURE, [small | SAME | {"images": 500}], "D-BR") == ("not run", ())


def test_known_differences_stay_in_the_same_setting() -> None:
    found = [row("badnets-10%", "D-BR", 0.79, 0.02, **SAME)]
    assert ours(replace(FIGURE, differences=("one", "two")), found, "D-BR") == ("79.0 / 2.0", ("one", "two"))
    nowhere = Figure("a paper", "all", "D-BR", 92.0, 0.4, differences=("a mean",))
    assert ours(nowhere, found, "D-BR") == ("", ("a mean",))


def test_an_attack_like_it_stands_in_where_the_same_was_not_run() -> None:
    like, same = row("badnets-5%", "D-BR", 0.79, 0.02, **SAME), row("badnets-10%", "D-BR", 0.7, 0.0)
    assert ours(FIGURE, [like], "D-BR") == ("79.0 / 2.0", ("ours is under badnets-5%",))
    assert ours(FIGURE, [like, same], "D-BR") == ("70.0 / 0.0", (SMALL, JPEG))
    assert ours(replace(FIGURE, attack=None), [like, same], "D-BR")[0] == "79.0 / 2.0"


def test_what_is_known_of_the_papers() -> None:
    for theirs, defence, pair in (
        ("BadNets all-to-one 10 %", "ABL", (89.36, 0.19)), ("CL 10 % of a class", "ABL", (84.39, 0.31)),
        ("BadNets all-to-one 10 %", "D-BR", (92.83, 0.40)), ("SIG 10 % of a class", "undefended", (92.88, 99.69)),
    ):  # fmt: skip
        assert (figure(theirs, defence).accuracy, figure(theirs, defence).asr) == pair
    assert figure("BadNets all-to-one 10 %", "D-ST").differences == (BASE,)
    assert figure("BadNets all-to-one 10 %", "D-BR").differences == (BASE, BEST)
    assert any("Kitty" in why for why in figure("Blend-Kitty 10 %", "undefended").differences)
    assert BASE not in figure("BadNets all-to-all 10 %", "undefended").differences, "their base is all images, too"
    for found in FIGURES:
        assert found.differences or found.setting, f"{found}: comparable nowhere, and nobody knows why"
        assert found.defence in DEFENCES
        assert {found.attack, found.instead} - {None} <= set(ATTACKS)
        assert found.setting is None or found.setting.dataset == ORIGINAL


def test_reasons_have_letters_and_stand_below_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    mean = Figure("a list", "a mean", "AC", 90.2, 92.9, differences=("not one of ours",))
    known = replace(FIGURE, differences=("one",))
    figures = (known, replace(FIGURE, defence="D-ST"), replace(FIGURE, attack=None), mean)
    monkeypatch.setattr(published, "FIGURES", figures)
    found = [
        row("badnets-10%", "D-BR", 0.79, 0.02), row("badnets-10%", "D-BR-paper", 0.7, 0.0, **SAME),
        row("badnets-10%", "D-ST", 0.75, 0.01, **SAME),
    ]  # fmt: skip
    parts = published.published(found).split("\n\n")
    assert parts[1].splitlines()[2:] == [
        "| BadNets | D-BR | 92 / 0.4 | not comparable (a, b, c): 79.0 / 2.0 | not comparable (a): 70.0 / 0.0 |",
        "| BadNets | D-ST | 92 / 0.4 | 75.0 / 1.0 | – |",
        "| BadNets | D-BR | 92 / 0.4 | not run | not run |",
    ]
    assert parts[2] == f"Not comparable: (a) one; (b) {SMALL}; (c) {JPEG}."
    assert parts[4].splitlines()[2:] == ["| a mean | AC | 90.2 / 92.9 | not comparable (a) | – |"]
    assert parts[5] == "Not comparable: (a) not one of ours."
