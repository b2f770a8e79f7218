"""The table of cases is whole, what it names exists, and the cases that nothing else covers."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_backdoor.errors import ModelError
from tests.callbacks.helpers import make_trainer
from tests.callbacks.test_ultraclean_resume import SaveAll
from tests.contract.cases import CASES
from tests.contract.problem import EPOCHS, WARNS, assert_settled, fit, net_of
from tests.contract.registry import Entry, every_defense, of
from tests.contract.tally import COUNTS

pytestmark = WARNS
TESTS = Path(__file__).parents[1]


@cache
def names_in(file: str) -> frozenset[str]:
    """Names of the test functions of a file, methods among them."""
    nodes = ast.walk(ast.parse((TESTS / file).read_text(encoding="utf-8")))
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


def test_all_cases_are_there_and_their_tests_exist() -> None:
    assert CASES.keys() == {*map(str, range(1, 72)), "24b"}
    for number, case in CASES.items():
        assert case.tests or case.why_not, number
        for test in case.tests:
            file, _, name = test.partition("::")
            assert name in names_in(file), f"case {number} names {test}, which is not there"
    COUNTS["cases covered, of 72"] = sum(bool(case.tests) for case in CASES.values())


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


@pytest.mark.parametrize("name", ["DBRCallback", "DSTCallback"])
def test_a_module_that_cannot_be_copied_is_named(name: str) -> None:
    callback, module = of(name).make(), net_of()
    module.connection = Uncopyable()
    trainer = make_trainer([callback], EPOCHS)
    with pytest.raises(ModelError, match=r"`Net` must be copied to train a detector.*there can be only one"):
        fit([], module=module, trainer=trainer)
    assert_settled(trainer, module)
    assert callback.verdict is None
