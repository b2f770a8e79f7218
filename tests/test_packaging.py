"""What the package index gets: one wheel that needs no compiler, with the version in one place."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path

import pytest
import yaml

import lightning_backdoor

ROOT = Path(__file__).parents[1]
if not (ROOT / "pyproject.toml").exists():
    pytest.skip("an installed package has no sources", allow_module_level=True)
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as the build backend makes it."""
    backend = pytest.importorskip("hatchling.build")
    folder, before = tmp_path_factory.mktemp("wheel"), Path.cwd()
    os.chdir(ROOT)  # a backend builds what is in the present folder
    try:
        return folder / backend.build_wheel(str(folder))
    finally:
        os.chdir(before)


def test_the_wheel_runs_everywhere_without_a_compiler(wheel: Path) -> None:
    assert wheel.name == f"lightning_backdoor-{lightning_backdoor.__version__}-py3-none-any.whl"


def test_the_wheel_holds_the_package_its_types_and_its_license(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_backdoor").rglob("*.py")}
    kept = {name for name in held if ".dist-info/" not in name}
    assert kept == sources | {"lightning_backdoor/py.typed"}
    assert [name for name in held if name.endswith("licenses/LICENSE")]


def test_the_version_is_in_one_place() -> None:
    assert 'dynamic = ["version"]' in PROJECT
    assert not re.search(r"^version\s*=", PROJECT, flags=re.MULTILINE)
    assert "version:" not in (ROOT / "CITATION.cff").read_text(encoding="utf-8").replace("cff-version:", "")


def test_the_citation_names_the_papers_of_the_methods() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert [reference["year"] for reference in citation["references"]] == [2023, 2022, 2022]
