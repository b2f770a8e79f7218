"""A repair whose weights are no numbers any more is undone, whatever label such a model seems to give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_backdoor import DBRCallback, NONECallback, Verdict
from tests.callbacks.helpers import LIGHTNING_WARNS, Pictures, fit, same_state

pytestmark = [*LIGHTNING_WARNS, pytest.mark.filterwarnings("ignore:D-BR ends with a model that gives")]
SUSPECT = torch.arange(64) % 16 == 0
GIVEN = Verdict(torch.arange(64).float(), ~SUSPECT, 0.0, "known")


def one_class() -> Pictures:
    """Images that nearly all have label 0, which is what ``argmax`` makes of NaN."""
    data = Pictures()
    data.targets[3:] = 0
    return data


def repair(lr: float, **kwargs: Any) -> tuple[DBRCallback, bool, bool]:
    """The callback, whether all weights are finite, and whether they are those of a training without it."""
    _, undefended = fit([], one_class())
    callback = DBRCallback(verdict=GIVEN, epochs=2, extra_epochs=2, trusted=0.2, lr=lr, fallback=None, **kwargs)
    _, module = fit([callback], one_class())
    finite = all(bool(value.isfinite().all()) for value in module.state_dict().values())
    return callback, finite, same_state(undefended, module)


@pytest.mark.parametrize("paper_loop", [False, True])
def test_an_epoch_that_ends_in_nan_is_undone(paper_loop: bool) -> None:
    callback, finite, unchanged = repair(lr=1e30, paper_loop=paper_loop)
    assert callback.history[0].undone_steps == (True, True)
    assert callback.history[0].accuracies[1:] == (0.0, 0.0)
    assert finite
    assert unchanged


def test_one_that_does_not_is_kept() -> None:
    callback, finite, unchanged = repair(lr=1e-3)
    assert callback.history[0].undone_steps
    assert not any(callback.history[0].undone_steps)
    assert finite
    assert not unchanged


@pytest.mark.filterwarnings("ignore:NONE after fine-tuning.* the weights went back")
def test_a_round_as_published_that_ends_in_nan_is_undone() -> None:
    _, undefended = fit([], one_class())
    callback = NONECallback.from_paper(lr=1e30, finetune_epochs=1)
    _, module = fit([callback], one_class())
    assert callback.history[0].undone
    assert same_state(undefended, module)
