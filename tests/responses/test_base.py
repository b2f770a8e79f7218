"""What all responses share: they say how to make them again, and with whom they can be on one Trainer."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from torch.utils.data import Subset

from lightning_backdoor import DBRCallback, DSTCallback, NONECallback, UltraCleanCallback
from lightning_backdoor.baselines import RandomFilter, abl, finetune_trusted
from lightning_backdoor.errors import TrainerError
from lightning_backdoor.responses import Continue, Recipe, Report, ResetUnits, Response, Restart, TwoStage, Unlearn
from tests.contract.problem import WARNS, fit, planted

pytestmark = WARNS

NAMES: dict[str, Any] = {
    cls.__name__: cls
    for cls in (
        Continue,
        Recipe,
        Report,
        ResetUnits,
        Restart,
        TwoStage,
        Unlearn,
        UltraCleanCallback,
        abl.IsolateThenUnlearn,
        finetune_trusted.LearnTrusted,
    )
}
RESPONSES: list[Response] = [
    Continue(),
    Continue(at_once=True, halfway=True),
    Report(at_once=True),
    ResetUnits(),
    ResetUnits(rounds=2, finetune_epochs=3, extra_epochs=4, lr=0.5, reset_fraction=0.25, reset="prune"),
    ResetUnits(by_quota=True, drop=False, residual_mode="reference", paper_loop=True, seed=5),
    Restart(last_detection=True),
    Restart(last_detection=False, every=2, at_most=1),
    TwoStage(Recipe(classifier_epochs=3, lr=0.25)),
    Unlearn(),
    Unlearn(epochs=3, extra_epochs=2, lr=0.5, at_once=True, repeats=True, relearn=False, paper_loop=True, seed=7),
    abl.IsolateThenUnlearn(gamma=0.25, epochs=3, extra_epochs=2, lr=None, seed=1),
    finetune_trusted.LearnTrusted(epochs=4),
]


def settings(response: Response) -> dict[str, Any]:
    """What a constructor has set, but for counters that are objects of their own."""
    plain = (bool, int, float, str, tuple, Recipe, type(None))
    return {name: value for name, value in vars(response).items() if isinstance(value, plain)}


@pytest.mark.parametrize("response", RESPONSES, ids=repr)
def test_a_response_says_how_to_make_an_equal_one(response: Response) -> None:
    again = eval(repr(response), NAMES)
    assert type(again) is type(response)
    assert settings(again) == settings(response)
    assert repr(again) == repr(response)


def test_what_is_at_its_default_is_left_out() -> None:
    assert [repr(response) for response in (Unlearn(seed=0), ResetUnits(rounds=None))] == ["Unlearn()", "ResetUnits()"]


def test_a_defense_shows_the_settings_of_its_response() -> None:
    text = "UltraCleanCallback(response=Unlearn(epochs=3))"
    assert repr(UltraCleanCallback(response=Unlearn(epochs=3))) == text
    assert repr(eval(text, NAMES)) == text


def test_a_response_that_keeps_nothing_is_shown_all_the_same() -> None:
    class Own(Response):
        name = "own"

        def __init__(self, strength: float) -> None:
            self.doubled = 2 * strength

    assert repr(Own(1.0)) == "Own()"


STAGES = Recipe(classifier_epochs=1)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize(
    "callback",
    [
        DSTCallback(response=TwoStage(STAGES)),
        DBRCallback(response=TwoStage(STAGES)),
        UltraCleanCallback(response=TwoStage(STAGES), rule="fraction"),
        NONECallback(response=TwoStage(STAGES)),
    ],
    ids=lambda callback: callback.title,
)
def test_two_stages_beside_another_defense_are_refused_with_an_argument_that_exists(callback: Any, first: bool) -> None:
    other = RandomFilter(warmup_epochs=1, response="continue")
    name = type(callback).__name__
    takes = "verdict" in inspect.signature(type(callback)).parameters
    remedy = rf"pass its verdict: {name}\(verdict=" if takes else r"train on what it keeps: `callback.verdict.subset\("
    with pytest.raises(
        TrainerError, match=f"cannot share a Trainer with RandomFilter. Fit with that one first.*{remedy}"
    ):
        fit([callback, other] if first else [other, callback])


@pytest.mark.parametrize("cls", [UltraCleanCallback, NONECallback])
def test_two_stages_on_what_another_defense_keeps(cls: Any) -> None:
    """The remedy, word by word."""
    dataset, callback = planted(), RandomFilter(warmup_epochs=1, response="continue")
    fit([callback], dataset, epochs=2)
    kept = Subset(dataset, callback.verdict.keep.nonzero().flatten().tolist())
    rule = {"rule": "fraction"} if cls is UltraCleanCallback else {"rule": "paper"}
    second = cls(response=TwoStage(STAGES), **rule)
    fit([second], kept, epochs=2)
    assert len(second.verdict) == len(kept) < len(dataset)
    assert second.history[-1].losses
