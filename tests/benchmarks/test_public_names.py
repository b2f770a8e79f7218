"""Examples and benchmark use what every user can: the public names of the library."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import lightning_backdoor

ROOT = Path(__file__).parents[2]
PUBLIC = {"lightning_backdoor": {*lightning_backdoor.__all__, "__version__"}}
PUBLIC |= {
    f"lightning_backdoor.{room}": set(getattr(lightning_backdoor, room).__all__)
    for room in ("attacks", "baselines", "functional", "metrics", "report")
}
INNER = {"variants.py"}
"""Modules of the benchmark that change one part of a defence, for which there is no public way."""


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """Module and name of everything that a module imports; an empty name for a module as a whole."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def inner(path: Path) -> list[str]:
    """What a module imports of the library beyond its public names."""
    ours = [(module, name) for module, name in imported(path) if module.partition(".")[0] == "lightning_backdoor"]
    return [f"{module}.{name}" for module, name in ours if name not in PUBLIC.get(module, set())]


def test_examples_and_benchmark_import_public_names_alone() -> None:
    paths = [*(ROOT / "examples").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert len(paths) > 30
    assert {path.name: found for path in paths if (found := inner(path)) and path.name not in INNER} == {}


def test_an_inner_name_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("from lightning_backdoor import audit_nothing\nfrom lightning_backdoor.surgery import find_units\n")
    assert inner(path) == ["lightning_backdoor.audit_nothing", "lightning_backdoor.surgery.find_units"]
    path.write_text("from lightning_backdoor import measure\nfrom lightning_backdoor.attacks import BadNets\n")
    assert inner(path) == []


def test_no_example_needs_the_benchmark() -> None:
    for path in (ROOT / "examples").rglob("*.py"):
        assert not {module.partition(".")[0] for module, _ in imported(path)} & {"benchmarks", "examples"}, path
