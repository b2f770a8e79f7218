"""Images are marked as fine on the page, in a real browser, and the table that it gives is taken back."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_backdoor.callbacks.approved import _approval_of
from lightning_backdoor.report import write_report
from lightning_backdoor.report.review import file_link, reviewable
from lightning_backdoor.verdict import Verdict
from tests.browser import BROWSER, Page, browser
from tests.report.helpers import evidence, explained, finding

EVIL = "</script><script>window.hacked = 1</script>\"'&"
in_browser = pytest.mark.skipif(BROWSER is None, reason="there is no browser")


def named(folder: Path) -> Verdict:
    """Three findings in data with files, two of which are there, and hostile names."""
    judged = explained()
    there = folder / 'a "b", #1 %.png'
    there.write_bytes(b"")
    return replace(judged, paths=(str(there), EVIL, *(f"image, {place}.png" for place in range(2, 200))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report."""
    made = tmp_path_factory.mktemp("report")
    hostile = evidence(classes=[EVIL, "dog", "cow", "owl"], callback="UltraCleanCallback")
    write_report(made, named(made), method="UltraClean", evidence=hostile)
    return made


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One browser for all tests."""
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(running: Page, folder: Path) -> Page:
    """The report, freshly opened."""
    running.resize(1280, 900)
    running.open(folder / "report.html")
    return running


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


def visible(page: Page, selector: str) -> int:
    """Elements that can be seen."""
    return int(page.run(f"[...document.querySelectorAll('{selector}')].filter((e) => e.offsetParent !== null).length"))


def boxes(*positions: Any) -> str:
    """JavaScript that clicks the first box of some images."""
    return "".join(f"document.querySelector('[data-position=\"{place}\"]').click();" for place in positions)


@in_browser
def test_marks_are_downloaded_and_read_back(page: Page, folder: Path, tmp_path: Path) -> None:
    page.run(boxes(0, 3) + "document.querySelector('[data-whole=\"1\"]').click();" + boxes(3))
    assert page.run("document.getElementById('marked').textContent") == "31 marked as fine"
    assert page.run("document.querySelector('[data-whole=\"0\"]').indeterminate") is True
    assert page.run("[...document.querySelectorAll('[data-position=\"0\"]')].every((box) => box.checked)") is True
    reviewed = rows_of(page.download(tmp_path, "reviewed.csv", "document.getElementById('download').click()"))
    approved = {int(row["index"]) for row in reviewed if row["approved"] == "True"}
    assert approved == {0, *range(50, 80)}, "all positions of the finding, also those that are not shown"
    whole = {row["index"]: row for row in rows_of(folder / "verdict.csv")}
    assert list(reviewed[0]) == list(whole["0"])
    for row in reviewed:
        assert {**row, "approved": ""} == {**whole[row["index"]], "approved": ""}
    assert {int(row["index"]) for row in reviewed} >= {*range(20), *range(50, 80), *range(90, 95)}
    assert set(_approval_of(tmp_path / "reviewed.csv", 200).samples.nonzero().flatten().tolist()) == approved
    assert page.complaints() == []


@in_browser
def test_filters_show_a_finding_a_label_the_removed(page: Page) -> None:
    def choose(**values: str) -> None:
        for name, value in values.items():
            page.run(f"document.getElementById('by-{name}').value = '{value}'")
        page.run("document.getElementById('by-finding').dispatchEvent(new Event('change', {bubbles: true}))")

    everything = visible(page, "figure.card")
    assert page.run("document.getElementById('shown').textContent") == f"{everything} pictures shown"
    choose(finding="1")
    assert visible(page, "section.finding") == 1
    assert visible(page, "figure.card") == visible(page, 'figure.card[data-finding="1"]') > 0
    choose(finding="1", keep="kept")
    assert visible(page, "figure.card") == visible(page, 'figure.card[data-finding="1"][data-keep="kept"]') > 0
    choose(finding="", keep="removed", label="3")
    assert visible(page, "figure.card") == visible(page, 'figure.card[data-label="3"][data-keep="removed"]') > 0
    assert visible(page, "tr[data-keep]") == 5
    choose(finding="", keep="", label="")
    assert visible(page, "figure.card") == everything


@in_browser
def test_the_keyboard_reaches_and_marks_an_image(page: Page) -> None:
    reached = ""
    for _ in range(60):
        page.press("Tab")
        reached = page.run("document.activeElement.dataset.position || ''")
        if reached:
            break
    page.press(" ")
    assert page.run("document.getElementById('marked').textContent") == "1 marked as fine"
    assert page.run("document.activeElement.getAttribute('aria-label')") == f"image {reached} is fine"


@in_browser
def test_names_run_no_code_and_a_small_screen_is_enough(page: Page) -> None:
    assert page.run("typeof window.hacked") == "undefined"
    assert page.run(f"JSON.parse(document.getElementById('rows').textContent).rows[1][1] === {EVIL!r}") is True
    page.resize(390, 844)
    page.run("document.querySelector('[data-whole=\"0\"]').click()")
    assert page.run("document.documentElement.scrollWidth") == 390
    assert page.run("document.querySelector('.bar-below').offsetHeight") < 60, "one line"
    assert page.complaints() == []


@in_browser
def test_a_file_is_linked_if_it_is_there(page: Page, folder: Path) -> None:
    links = page.run("[...new Set([...document.querySelectorAll('a.file')].map((link) => link.href))]")
    assert links == [(folder / 'a "b", #1 %.png').as_uri()]


def test_links_are_relative_where_the_path_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a b.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert 'href="../data/a%20b.png"' in file_link("data/a b.png", Path("logs"))
    assert 'href="./a%20b.png"' in file_link("data/a b.png", tmp_path / "data")
    assert 'href="file:///' in file_link(str(tmp_path / "data" / "a b.png"), Path("logs"))
    for other in ("data/none.png", "data", "javascript:alert(1)", "\0", "x" * 5000):
        assert "href" not in file_link(other, Path("logs"))
    assert file_link("", Path("logs")) == ""


def test_findings_that_are_too_large_for_a_page_are_approved_by_code(tmp_path: Path) -> None:
    n = 60_000
    group = finding(0, torch.arange(n))
    judged = Verdict(torch.ones(n), torch.zeros(n, dtype=torch.bool), 0.5, "known", findings=(group,))
    assert len(reviewable(judged, torch.arange(10))) == 0
    text = write_report(tmp_path, judged, method="UltraClean").read_text("utf-8")
    assert "<script" not in text
    assert "approved=verdict.findings[0].positions" in text


def test_what_was_approved_before_is_marked(tmp_path: Path) -> None:
    judged = explained()
    judged = replace(judged, approved=judged.keep)
    text = write_report(tmp_path, judged, method="UltraClean").read_text("utf-8")
    assert text.count(",true]") == 6  # the kept ones of the second finding
