"""Counts for the summary that a run of the contract ends with: cells by callback, fuzz cases, numbered cases.

Where tests run in several processes, a count travels with the report of its test to the process that prints it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest

COUNTS: Counter[str] = Counter()
"""What the test that is running has counted itself."""

_COUNTED: Counter[str] = Counter()
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


def title_of(item: Any) -> str | None:
    """The line of the summary that a test of the contract counts for."""
    if not item.module.__name__.startswith("tests.contract."):
        return None
    title = _TITLES.get(item.originalname, _TITLES.get(item.module.__name__.rpartition(".")[2]))
    entry = getattr(item, "callspec", None) and item.callspec.params.get("entry")
    return title or (f"cells of {entry.name}" if entry else None)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    """Where the test has run: give its report what there is to count."""
    outcome = yield
    report = outcome.get_result()
    report.user_properties = list(report.user_properties)  # not those of the other phases of the test
    if (title := title_of(item)) and (report.when == "call" or report.failed):
        report.user_properties.append(("contract", title))
    report.user_properties += [("contract count", [name, n]) for name, n in COUNTS.items()]
    COUNTS.clear()


def pytest_runtest_logreport(report: Any) -> None:
    """Where the summary is printed: count what has arrived."""
    for name, value in report.user_properties:
        if name == "contract":
            _OUTCOMES[value]["expected failures" if hasattr(report, "wasxfail") else report.outcome] += 1
        elif name == "contract count":
            _COUNTED[value[0]] += value[1]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the lines."""
    if not _OUTCOMES:
        return
    terminalreporter.section("contract")
    for title, counts in sorted(_OUTCOMES.items()):
        terminalreporter.line(f"{title:32} {', '.join(f'{n} {result}' for result, n in sorted(counts.items()))}")
    for title, n in sorted(_COUNTED.items()):
        terminalreporter.line(f"{title:32} {n}")
