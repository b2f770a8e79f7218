"""Most images of a clean class have a mark: no defense takes the class away, and each says what it kept."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from lightning_backdoor import UltraCleanCallback
from lightning_backdoor.errors import ArgumentError
from tests.callbacks.helpers import same_state
from tests.contract import test_default_rule as default
from tests.contract.problem import WARNS, assert_settled
from tests.contract.registry import every_kind_of_defense, of
from tests.contract.test_default_rule import Smooth, every_default

pytestmark = WARNS


def marked() -> Smooth:
    """White dots on 45 of the 60 images with label 0."""
    data = Smooth()
    own = (data.targets == 0).nonzero().flatten()
    data.marked = torch.zeros(len(data), dtype=torch.bool)
    data.marked[own[:45]] = True
    data.images[data.marked, :, 1::3, 1::3] = 255
    return data


@every_default
def test_the_class_stays_with_a_warning(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_backdoor.verdict.TRIGGER", 2.0)  # dots may be one to so small a network
    data, callback = marked(), default.MAKE[name]()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run = default.train(callback, data=data)
    kept = [str(one.message) for one in told if "They are most of the label" in str(one.message)]
    assert bool(callback.verdict.keep.all())
    assert callback.verdict.suspect is None or not bool(callback.verdict.suspect.any())
    assert default.begun(run) == [*range(default.EPOCHS)], "there is nothing to restart for, nothing to unlearn"
    assert same_state(default.train(data=data).module, run.module)
    assert_settled(run.trainer, run.module, run.loader, run.before, epochs=default.EPOCHS)
    assert len(kept) == 1, "once, however often it is found"
    assert "keeps 45 of the 60 images with label 0" in kept[0]
    assert "`callback.verdict.findings[0].positions` as `approved`" in kept[0]
    positions = callback.verdict.findings[0].positions
    assert torch.equal(positions.sort().values, data.marked.nonzero().flatten())
    again = default.MAKE[name](approved=positions)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*most of the label")
        default.train(again, data=data)
    assert not again.verdict.findings, "what the message says keeps it quiet"


def test_without_the_limit_it_goes() -> None:
    data, callback = marked(), default.MAKE["UltraClean"](max_removed_of_class=1)
    with pytest.warns(UserWarning, match="takes most images of a label for poisoned: 45 of the 60 with label 0"):
        default.train(callback, data=data)
    assert torch.equal(~callback.verdict.keep, data.marked)


def test_the_limit_is_for_findings_and_not_for_shares_that_the_user_asks_for() -> None:
    for arguments in ({"rule": "fraction"}, {"rule": "fraction", "score": "paper"}):
        assert UltraCleanCallback(**arguments)._procedure.most_of_label == 1
    given = of("FineTuneTrusted").acting["verdict"]
    for name in ("DBRCallback", "DSTCallback"):
        assert of(name).make(verdict=given)._procedure.most_of_label == 1


@every_kind_of_defense
def test_the_argument(entry: Any) -> None:
    callback = entry.cls(max_removed_of_class=0.8)
    assert callback._procedure.most_of_label == 0.8
    assert "max_removed_of_class=0.8" in repr(callback)
    with pytest.raises(
        ArgumentError, match=r"`max_removed_of_class` must be a fraction between 0 and 1, got 50. For 50"
    ):
        entry.cls(max_removed_of_class=50)
