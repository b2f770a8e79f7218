"""The pages in ``docs`` hold code that runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.contract.problem import WARNS, clean, fit, planted

pytestmark = WARNS
PAGE = Path(__file__).parents[1] / "docs" / "write_your_own_defense.md"


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the code of the page defines."""
    if not PAGE.exists():
        pytest.skip("an installed package has no docs")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 60
    defined: dict[str, Any] = {"__name__": "lowest_loss"}
    exec(compile(code, "lowest_loss.py", "exec"), defined)
    return defined


def test_the_defense_of_the_page_removes_and_trains_anew(page: dict[str, Any], tmp_path: Path) -> None:
    callback = page["LowestLossCallback"](fraction=0.125, warmup_epochs=2, report_dir=tmp_path)
    run = fit([callback], planted())
    assert len(callback.verdict.removed) == 12
    assert callback.history[0].restarts
    assert [epoch for epoch, _ in run.module.epochs()] == [0, 1, 0, 1, 2]
    kept = callback.verdict.keep.nonzero().flatten().tolist()
    assert run.module.epochs()[-1][1] == kept
    assert (tmp_path / "report.html").exists()
    assert repr(callback).startswith("LowestLossCallback(fraction=0.125, warmup_epochs=2, report_dir=")


def test_with_a_report_alone_it_changes_nothing(page: dict[str, Any]) -> None:
    run = fit([page["LowestLossCallback"](warmup_epochs=2, response="report")], clean())
    assert [len(positions) for _, positions in run.module.epochs()] == [96, 96, 96]


@pytest.mark.parametrize("response", ["continue", "reset", "unlearn"])
@pytest.mark.filterwarnings("ignore:Lowest loss (after fine-tuning|ends with|looked at)")
def test_it_goes_with_the_other_responses(page: dict[str, Any], response: str) -> None:
    callback = page["LowestLossCallback"](fraction=0.125, warmup_epochs=1, response=response)
    fit([callback], planted())
    assert callback.history[0].response == response
    assert callback.history[0].removed == 12
    assert len(callback.verdict.removed) >= 12, "nothing comes back"
