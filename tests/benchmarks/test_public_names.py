"""Examples and benchmark use what every user can: the public names of the library."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_backdoor

ROOT = Path(__file__).parents[2]
PUBLIC = {"lightning_backdoor": {*lightning_backdoor.__all__, "__version__"}}
PUBLIC |= {
    f"lightning_backdoor.{room}": set(getattr(lightning_backdoor, room).__all__)
    for room in ("attacks", "baselines", "callbacks", "functional", "metrics", "report", "responses")
}
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
MOST_LINES = 99  # of an example


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """Module and name of everything that a module imports; an empty name for a module as a whole."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def private(path: Path) -> list[str]:
    """Private attributes that a module reads or sets; names of classes and functions of its own may be private."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    return sorted({name for name in names if name.startswith("_") and not name.endswith("__")})


def siblings(path: Path) -> list[str]:
    """Examples and parts of the benchmark that an example imports."""
    others = {"benchmarks", "examples", *(other.stem for other in EXAMPLES)}
    return sorted({module for module, _ in imported(path) if module.partition(".")[0] in others})


def inner(path: Path) -> list[str]:
    """What a module imports of the library beyond its public names."""
    ours = [(module, name) for module, name in imported(path) if module.partition(".")[0] == "lightning_backdoor"]
    return [f"{module}.{name}" for module, name in ours if name not in PUBLIC.get(module, set())]


def test_examples_and_benchmark_import_public_names_alone() -> None:
    paths = [*EXAMPLES, *(ROOT / "benchmarks").rglob("*.py")]
    assert len(paths) > 30
    assert {path.name: found for path in paths if (found := inner(path))} == {}


def test_changed_defences_are_made_of_public_parts() -> None:
    assert private(ROOT / "benchmarks" / "variants.py") == []


def test_a_private_attribute_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("callback._detector = defence.response\nclass _Own: __slots__ = ()\nprint(callback.__dict__)\n")
    assert private(path) == ["_detector"]


def test_an_inner_name_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("from lightning_backdoor import audit_nothing\nfrom lightning_backdoor.surgery import find_units\n")
    assert inner(path) == ["lightning_backdoor.audit_nothing", "lightning_backdoor.surgery.find_units"]
    path.write_text("from lightning_backdoor import measure\nfrom lightning_backdoor.attacks import BadNets\n")
    assert inner(path) == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_needs_no_other_file(path: Path) -> None:
    assert siblings(path) == []
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_an_example_that_needs_another_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("import quickstart\nfrom examples.quickstart import digits\nfrom benchmarks import data\n")
    assert siblings(path) == ["benchmarks", "examples.quickstart", "quickstart"]
    path.write_text("from sklearn.datasets import load_digits\n")
    assert siblings(path) == []


def test_the_benchmark_needs_no_example() -> None:
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert "examples" not in {module.partition(".")[0] for module, _ in imported(path)}, path
