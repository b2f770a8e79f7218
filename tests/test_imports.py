"""Which room may use which, how long a module may be, and what importing the package loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_backdoor

ROOT = Path(lightning_backdoor.__file__).parent
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))

ALLOWED = {
    "functional": {"functional", "errors"},
    "surgery": {"surgery", "functional", "errors"},
    "data": {"data", "functional", "errors"},
    "attacks": {"attacks", "functional", "errors"},
    "metrics": {"metrics", "functional", "errors"},
    "trainer": {"trainer", "data", "surgery", "functional", "files", "errors"},
    "report": {"report", "verdict", "functional", "files", "errors"},
    "baselines": {"baselines", "callbacks", "trainer", "data", "functional", "verdict", "errors"},
    "verdict": {"files", "errors"},
    "files": set(),
    "errors": set(),
}
KNOWS_THE_TRUTH = {"attacks", "metrics"}
KNOWS_LIGHTNING = {"trainer", "callbacks"}


def imported(path: Path) -> set[str]:
    """Full names of everything that a module imports, wherever in the module it does."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def outside(rooms: set[str]) -> list[Path]:
    return [path for path in MODULES if room(path) not in rooms]


def rooms_used(path: Path) -> set[str]:
    ours = (name.split(".") for name in imported(path) if name.startswith("lightning_backdoor."))
    return {parts[1] for parts in ours}


def test_every_room_is_known() -> None:
    assert {room(path) for path in MODULES} == {*ALLOWED, "callbacks", "__init__"}


@pytest.mark.parametrize("path", [path for path in MODULES if room(path) in ALLOWED], ids=str)
def test_rooms_use_only_what_they_may(path: Path) -> None:
    assert rooms_used(path) <= ALLOWED[room(path)]


@pytest.mark.parametrize(
    "path", [path for path in MODULES if room(path) not in {*KNOWS_THE_TRUTH, "__init__"}], ids=str
)
def test_only_the_monitor_knows_the_truth(path: Path) -> None:
    if path != Path("callbacks/monitor.py"):
        assert not rooms_used(path) & KNOWS_THE_TRUTH


@pytest.mark.parametrize(
    "path", [path for path in MODULES if room(path) not in {*KNOWS_LIGHTNING, "__init__"}], ids=str
)
def test_lightning_stays_in_its_rooms(path: Path) -> None:
    packages = {name.split(".")[0] for name in imported(path)}
    assert not packages & {"lightning", "pytorch_lightning", "lightning_fabric"}


def test_importing_the_package_needs_no_optional_dependency() -> None:
    """As if they were not installed: a module that is ``None`` cannot be imported (torchmetrics uses matplotlib)."""
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['faiss', 'pandas', 'cv2', 'sklearn']))\n"
        "import lightning_backdoor\n"
        "print(lightning_backdoor.Verdict.__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert found.stdout.strip() == "Verdict", found.stderr


def test_optional_dependencies_are_imported_where_they_are_used() -> None:
    for path in MODULES:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        for node in tree.body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"faiss", "pandas", "matplotlib"}, path
