from __future__ import annotations

import os
import re
import stat
import sys
from base64 import b64encode
from html.parser import HTMLParser

import pytest
import torch

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.files import atomic_file
from lightning_backdoor.report import write_report
from lightning_backdoor.report.review import policy
from lightning_backdoor.verdict import Verdict
from tests.report.helpers import evidence, verdict

FILES = {"verdict.csv", "histogram.png", "suspicious.png", "report.html"}


class Reader(HTMLParser):
    """Collects text and tags, and checks that they are balanced."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def own_scripts(page: Reader) -> bool:
    """Whether the only scripts of a page are its rows, which are data, and the one that its policy allows."""
    kinds = [attrs.get("type") for tag, attrs in page.tags if tag == "script"]
    (allowed,) = (attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    return kinds == ["application/json", None] and allowed == policy(reviewing=True)


def written(folder, judged=None, **changes) -> Reader:
    judged = verdict() if judged is None else judged
    return Reader(write_report(folder, judged, method="UltraClean", evidence=evidence(**changes)).read_text("utf-8"))


@pytest.fixture
def no_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.parametrize("channels", [1, 3])
def test_all_files_are_there_and_nothing_else(tmp_path, channels):
    pytest.importorskip("matplotlib")
    written(tmp_path / "new" / "folder", channels=channels)
    assert {file.name for file in (tmp_path / "new" / "folder").iterdir()} == FILES


def test_the_page_is_self_contained(tmp_path):
    page = written(tmp_path)
    links = [attrs[key] for _, attrs in page.tags for key in ("src", "href") if key in attrs]
    assert [link for link in links if not link.startswith("data:image/png;base64,")] == ["verdict.csv"]
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base"}
    assert own_scripts(page)
    assert "url(" not in (tmp_path / "report.html").read_text("utf-8")
    assert sum(tag == "img" for tag, _ in page.tags) >= 24 * 3


def test_the_page_shows_sentences_facts_classes_and_rows(tmp_path):
    judged = verdict(400, 150)
    page = written(tmp_path, judged, facts={"Epoch of the scan": 3, "Seconds": 12.3456})
    assert "150 of 400 training images were removed" in page.text
    for heading in ("What was looked at", "What was found", "What was done", "What to do next"):
        assert heading in page.text
    assert "Epoch of the scan 3" in page.text
    assert "Seconds 12.35" in page.text
    assert "The first 100 removed images" in page.text
    rows = re.findall(r"<tr data[^>]*><td>(\d+)</td><td>dog</td>", (tmp_path / "report.html").read_text("utf-8"))
    assert [int(row) for row in rows] == judged.removed[:100].tolist()
    assert re.search(r"dog 212 150 70\.8 %", page.text)


def test_found_nothing_has_its_own_page(tmp_path):
    page = written(tmp_path, verdict(200, 0))
    assert "Nothing suspicious was found" in page.text
    assert "Threshold none" in page.text
    assert "removed images" not in page.text
    assert not [tag for tag, _ in page.tags if tag in ("script", "input", "button")], "there is nothing to mark"


def test_names_from_strangers_are_escaped(tmp_path):
    evil = "<script>alert('x')</script>"
    hostile = evidence(
        classes=[evil] * 4,
        facts={evil: evil},
        variants=(evil, '" onload="x'),
        score_meaning=evil,
        tables={evil: ([evil], [[evil]])},
        figures={evil: PNG, '" onload="y': PNG},
    )
    judged = Verdict(**{**vars(verdict()), "rule": evil})
    text = write_report(tmp_path, judged, method=evil, evidence=hostile).read_text("utf-8")
    assert own_scripts(Reader(text))
    assert text.count("<script") == 2
    assert "&lt;script&gt;alert" in text
    assert not any("onload" in attrs for _, attrs in Reader(text).tags)


PNG = b"\x89PNG\r\n\x1a\n and so on"


def test_further_tables_and_figures_follow_the_classes(tmp_path):
    head, rows = ["layer", "units", "score"], [["conv<1>", 1200, 0.123456], ["conv2", 7, -2.0]]
    page = written(tmp_path, tables={"Units & layers": (head, rows)}, figures={"The triggers": PNG})
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "Units & layers layer units score conv<1> 1,200 0.1235 conv2 7 −2" in page.text
    assert '<td>conv&lt;1&gt;</td><td class="number">1,200</td><td class="number">0.1235</td>' in text
    order = ["The classes", "Units &amp; layers", "The triggers", "The removed images", "The facts"]
    titles = [text.find(f"<h2>{title}</h2>") for title in order]
    assert titles == sorted(titles)
    assert -1 not in titles
    (picture,) = (attrs for tag, attrs in page.tags if attrs.get("alt") == "The triggers")
    assert picture["src"] == f"data:image/png;base64,{b64encode(PNG).decode()}"


def test_a_long_table_is_cut_and_says_so(tmp_path):
    page = written(tmp_path, tables={"Long": (["n"], [[f"row-{n}"] for n in range(103)])})
    assert "row-99" in page.text
    assert "row-100" not in page.text
    assert "3 more rows." in page.text


def test_without_further_evidence_there_is_no_section(tmp_path):
    headings = sum(tag == "h2" for tag, _ in written(tmp_path).tags)
    assert sum(tag == "h2" for tag, _ in written(tmp_path, tables={"T": (["a"], [])}).tags) == headings + 1


def test_further_evidence_is_checked_before_anything_is_written():
    with pytest.raises(ArgumentError, match=r"`figures` must map titles to PNG bytes, got b'GIF89a'… for 'cat'"):
        evidence(figures={"cat": b"GIF89a"})
    with pytest.raises(ArgumentError, match=r"`tables` .* 'dogs' has 2 columns and a row of 1 cells, \(1,\)"):
        evidence(tables={"dogs": (["a", "b"], [[1]])})


def test_without_matplotlib_the_table_and_the_page_are_written(tmp_path, no_matplotlib):
    page = written(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"verdict.csv", "report.html"}
    assert "pip install 'lightning-backdoor[report]'" in page.text
    assert "The scores" not in page.text


def test_with_matplotlib_there_is_no_note(tmp_path):
    pytest.importorskip("matplotlib")
    assert "pip install" not in written(tmp_path).text


def test_a_verdict_alone_is_enough(tmp_path):
    page = Reader(write_report(tmp_path, verdict(50, 5, labels=False), method="NONE").read_text("utf-8"))
    assert "5 of 50 training images were removed" in page.text
    assert not (tmp_path / "suspicious.png").exists()


def test_a_second_report_replaces_the_first_one(tmp_path):
    pytest.importorskip("matplotlib")
    written(tmp_path)
    written(tmp_path, verdict(30, 0), images=None)
    assert {file.name for file in tmp_path.iterdir()} == FILES - {"suspicious.png"}
    assert len((tmp_path / "verdict.csv").read_text().splitlines()) == 31


def test_a_failure_in_the_middle_leaves_no_partial_file(tmp_path):
    def broken(_):
        raise OSError("the disk of the images is gone")

    with pytest.raises(OSError, match="disk of the images"):
        written(tmp_path, images=broken)
    assert {file.name for file in tmp_path.iterdir()} == {"verdict.csv"}
    assert len((tmp_path / "verdict.csv").read_text().splitlines()) == 201


def test_an_unfinished_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "verdict.csv"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_file(path) as file:
            file.write(b"half of the new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_unfinished_file_cannot_be_guessed_and_ends_with_ordinary_permissions(tmp_path):
    path, names = tmp_path / "verdict.csv", set()
    before = os.umask(0o027)
    try:
        for _ in range(3):
            with atomic_file(path) as file:
                names |= {other.name for other in tmp_path.iterdir() if other != path}
                file.write(b"new")
    finally:
        os.umask(before)
    assert len(names) == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_written_through_a_link_of_the_same_name(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda _: "known")
    planted = tmp_path / ".verdict.csv.known.tmp"
    planted.symlink_to(victim)
    with pytest.raises(FileExistsError), atomic_file(tmp_path / "verdict.csv") as file:
        file.write(b"new")
    assert victim.read_text() == "precious"
    assert planted.is_symlink()


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(ArgumentError, match=r"`report_dir` must be a folder, got .*taken"):
            write_report(folder, verdict(), method="UltraClean")


def test_an_empty_verdict_is_refused(tmp_path):
    empty = Verdict(scores=torch.zeros(0), keep=torch.zeros(0, dtype=torch.bool), threshold=0.0, rule="r")
    with pytest.raises(ArgumentError, match="`verdict` must hold at least one sample"):
        write_report(tmp_path, empty, method="UltraClean")


def test_size_of_the_page_does_not_grow_with_the_dataset(tmp_path):
    pytest.importorskip("matplotlib")
    n = 300_000
    many = Verdict(**{**vars(verdict(n, 50_000)), "labels": torch.arange(n) % 5_000})
    page = written(tmp_path, many, size=300)
    assert (tmp_path / "report.html").stat().st_size < 8_500_000
    assert "4,970 more classes" in page.text
