"""What the pages of the benchmark say of its names."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import legend, run
from benchmarks.__main__ import REFERENCE
from benchmarks.cells import ATTACKS, CALLBACKS, Attack
from benchmarks.plot import kind_of
from benchmarks.table import DEFENCES
from lightning_backdoor import attacks


def line(text: str, name: str) -> str:
    """The line of a name."""
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return found


def test_attacks_are_told_with_the_rates_of_the_cells() -> None:
    told = legend.attacks_legend()
    assert line(told, "sig").endswith("| 10, 80 % of the target class = 1, 8 % of all | – | clean | – |")
    assert "6 periods of a sine from left to right, amplitude 40" in line(told, "sig")
    assert line(told, "badnets").endswith("| 0.1, 0.5, 1, 5, 10 % of all | – | dirty | – |")
    assert line(told, "all-to-all").endswith("| 10 % of all | – | all-to-all | – |")
    assert line(told, "tact").endswith("| 0.3, 2 % of all | 0.3, 2 % of all | dirty | 1 |")
    assert line(told, "adap-patch").endswith("| 0.3, 2 % of all | 0.6, 4 % of all | dirty | – |")
    assert "50 % of 16 pieces of the flower masked" in line(told, "adap-blend")
    kinds = {kind_of(name) for name in ATTACKS if name != "clean"}
    assert set(legend.TRIGGERS) == kinds
    assert len(told.splitlines()) == 2 + len(kinds)


def test_words_follow_the_trigger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legend, "ATTACKS", {"blended-7%": Attack(attacks.Blended(0.4), 0.07, covers=0.01)})
    (told,) = legend.attacks_legend().splitlines()[2:]
    assert "weight 0.4" in told
    assert "| 7 % of all | 1 % of all |" in told


def test_attacks_of_one_kind_differ_by_their_shares_alone() -> None:
    kinds: dict[str, set[object]] = {}
    for name, attack in ATTACKS.items():
        same = repr(attack.trigger), attack.make, attack.rate_of, attack.labels, attack.sources
        kinds.setdefault(kind_of(name), set()).add(same)
        assert name == "clean" or name.endswith(f"-{100 * attack.rate:g}%")
    assert {kind: len(found) for kind, found in kinds.items()} == dict.fromkeys(kinds, 1)


def test_defences_are_told_by_their_calls() -> None:
    told = legend.defences_legend()
    for name, call in {
        "ultraclean": "UltraCleanCallback()",
        "ultraclean+NONE": "UltraCleanCallback()` and `NONECallback(extra_epochs=100)",
        "ultraclean-paper": "UltraCleanCallback(score='paper', rule='fraction')",
        "STRIP": "STRIP(draws=20)",
        "ABL": "ABL(epochs=5, extra_epochs=100)",
    }.items():
        assert line(told, name).startswith(f"| {name} | `{call}` |")
    assert "score on logits, as in two" in line(told, "ultraclean-paper")
    assert "trained to the end" in line(told, "ultraclean-paper")
    assert "20 images are blended in (default: 100)" in line(told, "STRIP")
    assert re.search(r"isolates 1 % of the images .* for 5 epochs \(default: 20\)", line(told, "ABL"))
    assert "a network of the next seed, trained on clean data alone" in line(told, "clean-model")
    assert [line.split(" | ")[0] for line in told.splitlines()[2:]] == [f"| {name}" for name in DEFENCES]
    assert set(legend.NOTES) == set(CALLBACKS)
    assert set(legend.NO_CALLBACKS) == set(DEFENCES) - set(CALLBACKS)


def test_words_for_what_is_no_callback_are_those_of_the_code() -> None:
    labels = torch.arange(200) % 10
    (tuned,) = run._callbacks(
        "fine-tune", [(None, int(label)) for label in labels], torch.zeros(200, dtype=torch.bool), 0, {}
    )
    assert tuned.epochs == 5
    assert int(tuned.external_verdict.trusted.sum()) == 10
    assert "five epochs on 5 % of every class" in line(legend.defences_legend(), "fine-tune")
    for name, like in REFERENCE.items():
        assert f"`{like}`" in legend.NO_CALLBACKS[name]


def test_the_legend_shows_the_sheet_of_pictures() -> None:
    parts = legend.legend().split("\n\n")
    (picture,) = [place for place, part in enumerate(parts) if part.endswith("(figures/attacks.png)")]
    assert "difference from the clean image, ten times enlarged" in parts[picture + 1]
    assert parts[picture - 1] == legend.attacks_legend()
    assert parts[-1] == legend.defences_legend()
