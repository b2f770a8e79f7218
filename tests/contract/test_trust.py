"""Files and names from strangers run no code, and nothing is asked of the network."""

from __future__ import annotations

import ast
import pickle
import socket
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets import ImageFolder

import lightning_backdoor
from lightning_backdoor import Verdict
from lightning_backdoor.errors import ArgumentError
from tests.callbacks.helpers import loader_of, make_trainer
from tests.callbacks.test_ultraclean_resume import SaveAll
from tests.contract.problem import BATCH, EPOCHS, WARNS, assert_settled, fit, net_of
from tests.contract.registry import Entry, every_defense, every_kind_of_defense, of
from tests.contract.sources import TO_TENSOR, write_folder
from tests.contract.test_loaders import Reader
from tests.test_verdict import Evil

pytestmark = WARNS

PACKAGE = Path(lightning_backdoor.__file__).parent
EXAMPLES, BENCHMARKS = PACKAGE.parent / "examples", PACKAGE.parent / "benchmarks"
UNSAFE = {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal", "yaml"}
"""Modules that run what a file says."""
NETWORK = {"socket", "urllib", "http", "requests", "httpx", "aiohttp", "huggingface_hub", "ftplib", "webbrowser"}
"""Modules that ask the network."""


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call in a module with the name of what is called."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [(ast.unparse(node.func), node) for node in nodes if isinstance(node, ast.Call)]


def imported(path: Path) -> set[str]:
    """First names of the modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_files_are_read_by_safe_loaders_alone() -> None:
    loads = 0
    for path in [*PACKAGE.rglob("*.py"), *EXAMPLES.rglob("*.py"), *BENCHMARKS.rglob("*.py")]:
        assert not imported(path) & UNSAFE, path
        for name, call in calls(path):
            assert name not in ("eval", "exec", "__import__", "torch.jit.load", "torch.hub.load"), path
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert keywords.get("allow_pickle", "False") == "False", path
            if name == "load_from_checkpoint" or name.endswith(".load_from_checkpoint") or name == "torch.load":
                loads += 1
                assert keywords.get("weights_only") == "True", f"{path}:{call.lineno}"
    assert loads >= 5, "they were found"


def test_no_module_of_the_package_knows_the_network() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not imported(path) & NETWORK, path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (["a list"], "got list"),
        ({"scores": torch.zeros(2)}, r"got a dict with scores"),
        ({"scores": torch.zeros(2), "keep": torch.ones(2) > 0, "threshold": 0.0, "rule": "", "more": 1}, "more"),
        (
            {"scores": "a", "keep": torch.ones(2) > 0, "threshold": 0.0, "rule": ""},
            "`scores` must be a tensor, got str",
        ),
        ({"scores": torch.zeros(2), "keep": torch.ones(2) > 0, "threshold": "0", "rule": ""}, "`threshold`.*got '0'"),
    ],
)
def test_a_file_that_is_no_verdict_is_refused_in_words(content: Any, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "verdict.pt")
    with pytest.raises(ArgumentError, match=words):
        Verdict.load(tmp_path / "verdict.pt")


@pytest.mark.case("39")
@every_defense
def test_a_checkpoint_that_would_run_code_is_refused(entry: Entry, tmp_path: Path) -> None:
    saver = SaveAll(tmp_path)
    fit([entry.make(), saver])
    state = torch.load(saver.paths[0], weights_only=True)
    state["callbacks"][entry.make().state_key]["verdict"] = {"scores": Evil(str(tmp_path / "ran"))}
    torch.save(state, tmp_path / "evil.ckpt")
    module, trainer = net_of(), make_trainer([entry.make()], EPOCHS)
    with pytest.raises(pickle.UnpicklingError):
        fit([], module=module, trainer=trainer, ckpt=tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()
    assert_settled(trainer, module)


class Attributes(HTMLParser):
    """Names of all attributes on a page, and what the sources of its pictures begin with."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.pictures: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names |= {name for name, _ in attrs}
        if tag == "img":
            self.pictures.add((dict(attrs)["src"] or "").partition(";")[0])


@pytest.mark.parametrize("name", ["UltraCleanCallback", "NONECallback", "DBRCallback"])
def test_names_of_folders_and_files_cannot_run_in_the_report(name: str, tmp_path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    data = ImageFolder(str(write_folder(tmp_path / "images", f"{evil}{{1}}/{evil}{{0}}.png".format)), TO_TENSOR)
    trainer = make_trainer([of(name).make(report_dir=tmp_path)], EPOCHS)
    trainer.fit(Reader(data), loader_of(data, BATCH))
    page = (tmp_path / "report.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;0" in page, "the class"
    reader = Attributes(page)
    assert {"src", "href", "title"} <= reader.names, "files are linked by their names"
    assert not {name for name in reader.names if name.startswith("on")}
    assert reader.pictures == {"data:image/png"}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"the network was asked: {args[-1:]}")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)


@every_kind_of_defense
@pytest.mark.usefixtures("no_network")
def test_a_fit_with_its_report_asks_nothing_of_the_network(entry: Entry, tmp_path: Path) -> None:
    with socket.socket() as sentinel, pytest.raises(AssertionError, match="the network was asked"):
        sentinel.connect(("127.0.0.1", 9))
    callback = entry.make(report_dir=tmp_path)
    run = fit([callback])
    assert entry.acted(callback, run.trainer)
    page = (tmp_path / "report.html").read_text()
    assert "http:" not in page
    assert "https:" not in page
