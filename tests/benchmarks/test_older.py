"""Rows that are older than what their name means now are told apart on the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import rows
from benchmarks.older import CHANGED, older
from benchmarks.results import page
from tests.benchmarks.helpers import row

OLD = [
    row("clean", "NONE-paper", 0.8, 0.02, undone=True, rule="natural_break"),
    row("sig-80%", "NONE-paper", 0.8, 0.99, undone=True, rule="natural_break, max_removed(0.3)"),
    row("badnets-5%", "NONE-paper", 0.76, 0.02, undone=False, rule="natural_break"),
    row("adap-patch-2%", "undefended", 0.8, 0.06),
    row("badnets-5%", "ultraclean-paper", 0.77, 0.02, rule="fraction(0.2)"),
]
NOW = [found | {"names": rows.NAMES} for found in OLD]


def test_older_rows_are_told_with_what_held_them_back() -> None:
    told = older(OLD)
    assert "The 3 rows of NONE-paper (clean, sig-80%, badnets-5%) are of an older" in told
    assert "in 2 of them (clean, sig-80%) the reset was taken back" in told
    assert "and in 1 (sig-80%) `max_removed` cut" in told
    assert "The 1 rows" not in told
    assert "The row of ultraclean-paper (badnets-5%) is" in told
    assert "The row of adap-patch (adap-patch-2%) has patches of 4x4 pixels" in told
    assert told in page(OLD, {})


def test_rows_of_now_are_not() -> None:
    assert older(NOW) == ""
    assert older([row("clean", "undefended", 0.8, 0.02), row("clean", "NONE", 0.8, 0.02)]) == ""
    assert set(rows.circumstances("x", "cpu")) >= {"names"}
    assert all(since <= rows.NAMES for since, _ in CHANGED.values())


def test_a_row_names_its_command_without_folders_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--data", "/home/me/data", "--weights", "../data/net.pt", "--only", "a/b/"])
    assert rows.circumstances("x", "cpu")["command"] == "python -m x --data data --weights ../data/net.pt --only a/b/"


def test_the_page_in_the_repository_tells_its_own() -> None:
    folder = Path(rows.__file__).parent
    found = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for told in filter(None, (older(found),)):
        assert told in (folder / "RESULTS.md").read_text()
