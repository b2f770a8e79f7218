"""How the library hangs together, in numbers: depth of inheritance, Optionals, hooks, private names, files per path."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

import lightning_backdoor
from lightning_backdoor import UltraCleanCallback
from lightning_backdoor.callbacks import Defense
from tests.contract.problem import WARNS, fit
from tests.contract.registry import public_callbacks

pytestmark = WARNS
ROOT = Path(lightning_backdoor.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
CALLBACKS = public_callbacks()


def trees() -> list[ast.Module]:
    return [ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES]


def ours(cls: type) -> list[type]:
    """The classes of this library among those that a class derives from, but for the name of Lightning's own."""
    found = [base for base in cls.__mro__ if base.__module__.startswith("lightning_backdoor.")]
    return [base for base in found if base.__module__ != "lightning_backdoor._lightning"]


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_has_one_base_of_ours_at_most(name: str) -> None:
    assert len(ours(CALLBACKS[name])) <= 2, ours(CALLBACKS[name])


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_constructor_declares_fourteen_arguments_at_most(name: str) -> None:
    init: Any = CALLBACKS[name].__init__
    declared = [p for p in inspect.signature(init).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert len(declared) <= 14, [p.name for p in declared]


def test_the_base_of_defenses_is_short() -> None:
    """Docstrings and blank lines included: when a detection is due, and hooks that are forwarded."""
    source, _ = inspect.getsourcelines(Defense)
    print(len(source), "lines of", Defense.__name__)
    assert len(source) <= 170


def test_few_asserts_stand_for_types() -> None:
    found = [
        node
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert) and ast.unparse(node.test).endswith(" is not None")
    ]
    assert len(found) <= 10, [ast.unparse(node) for node in found]


def test_there_is_one_protocol_of_hooks() -> None:
    """No second one of ``at_*`` methods; how a trigger is shown ``at_test`` is no hook."""
    names = [node.name for tree in trees() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert not [name for name in names if name.startswith("at_") and name != "at_test"]


def test_few_files_lie_between_fit_and_a_verdict() -> None:
    seen: set[str] = set()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT)):
            seen.add(str(Path(frame.f_code.co_filename).relative_to(ROOT)))

    callback = UltraCleanCallback(warmup_epochs=1, rule="fraction", response="continue")
    sys.setprofile(note)
    try:
        fit([callback])
    finally:
        sys.setprofile(None)
    assert callback.verdict is not None
    print(len(seen), *sorted(seen), sep="\n")
    assert len(seen) <= 30, sorted(seen)
