"""Every case has a test or a reason, counts arrive where they are printed, and the cases that nothing else covers."""

from __future__ import annotations

import ast
import json
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_backdoor.errors import ModelError
from tests.callbacks.helpers import make_trainer
from tests.callbacks.test_ultraclean_resume import SaveAll
from tests.contract import tally
from tests.contract.cases import CASES, NOT_COVERED
from tests.contract.problem import EPOCHS, WARNS, assert_settled, fit, net_of
from tests.contract.registry import Entry, every_defense, of
from tests.contract.tally import COUNTS

pytestmark = WARNS
TESTS = Path(__file__).parents[1]


def marked(path: Path) -> list[str]:
    """Numbers in ``@pytest.mark.case(...)`` of the tests of a file."""
    nodes = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)
    ]
    calls = [mark for node in nodes for mark in node.decorator_list if isinstance(mark, ast.Call)]
    return [
        ast.literal_eval(arg) for call in calls if ast.unparse(call.func) == "pytest.mark.case" for arg in call.args
    ]


def test_every_case_has_a_test_or_a_reason() -> None:
    found = {number for path in TESTS.rglob("test_*.py") for number in marked(path)}
    assert CASES.keys() == {*map(str, range(1, 72)), "24b"}
    assert found | NOT_COVERED.keys() == CASES.keys()
    assert not found & NOT_COVERED.keys()
    assert all(CASES.values())
    assert all(NOT_COVERED.values())
    COUNTS["cases covered, of 72"] = len(found)


def test_counts_travel_with_the_report_of_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, outcomes, lines = Counter[str](), defaultdict[str, Counter[str]](Counter), list[str]()
    monkeypatch.setattr(tally, "_COUNTED", counted)
    monkeypatch.setattr(tally, "_OUTCOMES", outcomes)
    properties = [("contract", "cells of A"), ("contract count", ["fuzz cases", 3])]
    report = pytest.TestReport("a", ("a", 0, "a"), {}, "passed", None, "call", user_properties=properties)
    for _ in range(2):
        tally.pytest_runtest_logreport(pytest.TestReport._from_json(json.loads(json.dumps(report._to_json()))))
    printer = SimpleNamespace(section=lines.append, line=lines.append)
    tally.pytest_terminal_summary(printer)
    assert [line.split() for line in lines] == [
        ["contract"], ["cells", "of", "A", "2", "passed"], ["fuzz", "cases", "6"],
    ]  # fmt: skip


@pytest.mark.case("40")
@every_defense
def test_a_derived_class_finds_the_state_and_two_of_one_key_are_refused(entry: Entry, tmp_path: Path) -> None:
    saver = SaveAll(tmp_path)
    expected = entry.make()
    fit([expected, saver])
    derived = type("Derived", (entry.cls,), {})(**entry.acting)
    assert derived.state_key == expected.state_key
    fit([derived], ckpt=saver.paths[-1])
    assert torch.equal(derived.verdict.scores, expected.verdict.scores)
    with pytest.raises(RuntimeError, match=f"two callbacks of the same .*{entry.cls.method}|same type"):
        make_trainer([entry.make(), entry.make()])


class Uncopyable:
    """Something that belongs to one process, an open connection perhaps."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("there can be only one")


@pytest.mark.case("66")
@pytest.mark.parametrize("name", ["DBRCallback", "DSTCallback"])
def test_a_module_that_cannot_be_copied_is_named(name: str) -> None:
    callback, module = of(name).make(), net_of()
    module.connection = Uncopyable()
    trainer = make_trainer([callback], EPOCHS)
    with pytest.raises(ModelError, match=r"`Net` must be copied to train a detector.*there can be only one"):
        fit([], module=module, trainer=trainer)
    assert_settled(trainer, module)
    assert callback.verdict is None
