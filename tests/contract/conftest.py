"""At the end of a run, say how many cells of the contract hold for each callback."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest

from tests.contract.tally import COUNTS

_OUTCOMES: defaultdict[str, Counter[str]] = defaultdict(Counter)
_TITLES = {
    "test_composition": "compositions",
    "test_faults": "faults survived",
    "test_bad_input": "bad inputs",
    "test_fuzz": "fuzz tests",
    "test_fuzz_units": "fuzz tests",
    "test_killed": "faults survived",
    "test_an_error_in_one_process_is_told_in_all": "faults survived",
}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    outcome = yield
    report = outcome.get_result()
    if not item.module.__name__.startswith("tests.contract.") or (report.when != "call" and not report.failed):
        return
    title = _TITLES.get(item.originalname, _TITLES.get(item.module.__name__.rpartition(".")[2]))
    entry = getattr(item, "callspec", None) and item.callspec.params.get("entry")
    if title is None and entry is None:
        return
    result = "expected failures" if hasattr(report, "wasxfail") else report.outcome
    _OUTCOMES[title or f"cells of {entry.name}"][result] += 1


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _OUTCOMES:
        return
    terminalreporter.section("contract")
    for title, counts in sorted(_OUTCOMES.items()):
        terminalreporter.line(f"{title:32} {', '.join(f'{n} {result}' for result, n in sorted(counts.items()))}")
    for title, n in sorted(COUNTS.items()):
        terminalreporter.line(f"{title:32} {n}")
