"""Which room may use which, where Lightning is imported, and what importing the package loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_backdoor

ROOT = Path(lightning_backdoor.__file__).parent
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))

TENSORS = {"functional", "detection"}
"""Tensor code without a trainer, a device or a file."""
MODELS_AND_DATA = {*TENSORS, "surgery", "data"}
TRAINER = ("loading", "scanning", "responses", "callbacks", "baselines")
"""Rooms that act in a running Trainer, each above those before it; loading and scanning use nothing of each other."""

ALLOWED = {
    "errors": set(),
    "files": set(),
    "events": set(),
    "_lightning": set(),
    "relabeling": {"errors"},
    "verdict": {"relabeling", "errors", "files"},
    "functional": {"errors"},
    "detection": {"verdict", "errors"},
    "surgery": {"functional", "errors", "_lightning"},
    "data": {"functional", "errors", "_lightning"},
    "attacks": {"functional", "errors"},
    "metrics": {"functional", "errors"},
    "report": {*TENSORS, "events", "verdict", "files", "errors"},
    "loading": {"data", "errors", "_lightning"},
    "scanning": {*MODELS_AND_DATA, "files", "errors", "_lightning"},
    "responses": {*MODELS_AND_DATA, *TRAINER[:2], "report", "events", "verdict", "files", "errors", "_lightning"},
    "callbacks": {*MODELS_AND_DATA, *TRAINER[:3], "report", "events", "verdict", "files", "errors", "_lightning"},
    "baselines": {*MODELS_AND_DATA, *TRAINER[:4], "report", "events", "verdict", "files", "errors", "_lightning"},
    "audit": {*MODELS_AND_DATA, "scanning", "callbacks", "report", "events", "verdict", "errors", "_lightning"},
    "__main__": {*TENSORS, "audit", "report", "verdict", "errors"},
}
"""Which rooms the modules of a room may use, besides their own."""
ALSO = {
    "functional/__init__.py": {"detection"},  # the promised names of both rooms
    "callbacks/monitor.py": {"attacks", "metrics"},  # it measures a run whose poisons are known, and defends nothing
}
"""Further rooms for single modules."""
KNOWS_THE_TRUTH = {"attacks", "metrics"}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}


def imports(tree: ast.AST) -> set[str]:
    """Full names of everything that is imported in a piece of code, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def for_types_alone(tree: ast.Module) -> ast.Module:
    """The parts of a module that only a type checker reads."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return ast.Module([statement for node in found for statement in node.body], [])


TREES = {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in MODULES}


def room(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def rooms_used(path: Path) -> set[str]:
    """Rooms that a module imports from, also where it does so for types alone, without its own."""
    ours = (name.split(".") for name in imports(TREES[path]) if name.split(".")[0] == "lightning_backdoor")
    return {parts[1] for parts in ours} - {room(path)}


def test_every_room_is_known() -> None:
    assert {room(path) for path in MODULES} == {*ALLOWED, "__init__"}


def test_rooms_have_one_direction() -> None:
    """No room reaches itself through others, and none of the tensor rooms reaches one that acts in a Trainer."""
    reached = {name: set(rooms) for name, rooms in ALLOWED.items()}
    for _ in ALLOWED:
        reached = {name: rooms.union(*(reached[other] for other in rooms)) for name, rooms in reached.items()}
    assert not [name for name, rooms in reached.items() if name in rooms]
    assert not set.union(*(reached[name] for name in (*TENSORS, "report"))) & {*TRAINER, "_lightning"}
    assert not set.union(*ALLOWED.values()) & KNOWS_THE_TRUTH


@pytest.mark.parametrize("path", [path for path in MODULES if room(path) != "__init__"], ids=str)
def test_rooms_use_only_what_they_may(path: Path) -> None:
    assert rooms_used(path) <= ALLOWED[room(path)] | ALSO.get(path.as_posix(), set())


@pytest.mark.parametrize("path", [path for path in MODULES if path != Path("_lightning.py")], ids=str)
def test_one_module_imports_lightning(path: Path) -> None:
    """Others name its classes for type checkers, in rooms that act in a Trainer: either package may be missing."""
    used = {name for name in imports(TREES[path]) if name.split(".")[0] in LIGHTNING}
    typed = imports(for_types_alone(TREES[path]))
    assert used <= (typed if room(path) in TRAINER else set())


def test_importing_the_package_needs_no_optional_dependency() -> None:
    """As if they were not installed: a module that is ``None`` cannot be imported.

    Lightning comes first: its torchmetrics imports matplotlib where it is installed.
    """
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['faiss', 'kornia', 'pandas', 'cv2', 'sklearn', 'timm', 'datasets']))\n"
        "import pytorch_lightning, torchmetrics\n"
        "sys.modules['matplotlib'] = None\n"
        "import lightning_backdoor\n"
        "print(lightning_backdoor.Verdict.__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert found.stdout.strip() == "Verdict", found.stderr


def test_optional_dependencies_are_imported_where_they_are_used() -> None:
    for path, tree in TREES.items():
        at_once = imports(ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], []))
        assert not {name.split(".")[0] for name in at_once} & {"faiss", "pandas", "matplotlib"}, path
