"""A finding is unlearned if its labels are wrong to a model that never saw it; else it is left out of training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lightning_backdoor import DBRCallback
from lightning_backdoor.errors import TrainerError
from lightning_backdoor.responses import Session, Unlearn, WithFallback
from tests.callbacks.helpers import LIGHTNING_WARNS, Net, Pictures, fit, loader_of, make_trainer, same_state, state_of
from tests.responses.helpers import MEMBERS, SIZE, Scripts, Uncopied, pictures

pytestmark = [*LIGHTNING_WARNS, pytest.mark.filterwarnings("ignore:.* ends with a model")]


def unlearning(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Unlearn:
    monkeypatch.setattr("lightning_backdoor.responses.explaining.PROBE_STEPS", 120)
    return Unlearn(epochs=2, **options)


def drawn_after(module: Net, epoch: int) -> set[int]:
    return {position for at, _, positions in module.drawn if at >= epoch for position in positions}


@pytest.mark.parametrize("wrong", [True, False])
def test_wrong_labels_are_unlearned_and_others_left_out(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    data, members = pictures(wrong=wrong)
    callback = Scripts(members, unlearning(monkeypatch))
    _, module = fit([callback], epochs=5, dataset=data)
    (finding,), (event,) = callback.verdict.findings, callback.history
    assert finding.diagnosis == ("wrong labels" if wrong else "right labels")
    assert (event.suspects, event.left_out) == ((MEMBERS, 0) if wrong else (0, MEMBERS))
    assert event.treated == wrong
    assert event.failed == (not wrong)
    assert (drawn_after(module, 3) & set(members.tolist()) == set(members.tolist())) == wrong
    assert wrong or not drawn_after(module, 3) & set(members.tolist())


def test_what_is_not_unlearned_is_followed_by_a_training_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data, members = pictures(wrong=False)
    callback = Scripts(members, WithFallback(unlearning(monkeypatch)))
    _, module = fit([callback], epochs=5, dataset=data)
    assert [event.response for event in callback.history] == ["unlearn", "fallback", "fallback"]
    assert len(module.epochs()) == 3 + 5
    assert callback.verdict.findings[0].diagnosis == "right labels"


def test_the_copy_leaves_the_training_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    data, members = pictures(wrong=False)
    kept = torch.ones(SIZE, dtype=torch.bool).index_fill(0, members, False)

    def run(diagnoses: bool) -> dict[str, Tensor]:
        monkeypatch.setattr(Unlearn, "diagnoses", diagnoses)
        monkeypatch.setattr(Unlearn, "respond", Unlearn.respond if diagnoses else lambda self, session, _, event: event)
        callback = Scripts(members, unlearning(monkeypatch))
        _, module = fit([callback], epochs=5, dataset=data)
        assert torch.equal(callback.verdict.keep, kept)
        return state_of(module)

    assert same_state(run(True), run(False))


def test_nothing_is_unlearned_where_no_copy_can_be_trained() -> None:
    data, members = pictures(wrong=True)
    callback = Scripts(members, Unlearn(epochs=2))
    torch.manual_seed(0)
    said = "Scripts unlearns none of 20 suspect images, since it cannot find out whether the labels of 20 .*no copies$"
    with pytest.warns(UserWarning, match=said):
        make_trainer([callback], 5).fit(Uncopied(), loader_of(data))
    (event,) = callback.history
    assert (event.suspects, event.left_out) == (0, MEMBERS)


class Late(Net):
    """Has its head from `configure_model` on, as models that are sharded."""

    def __init__(self) -> None:
        super().__init__()
        del self.head

    def configure_model(self) -> None:
        if not hasattr(self, "head"):
            self.head = torch.nn.Linear(32, 4)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_model_that_is_built_in_configure_model(
    resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a checkpoint that was written without the defense, the weights at the start are not known: new ones."""
    data, members = pictures(wrong=True)
    path = None
    if resumed:
        torch.manual_seed(0)
        (first := make_trainer([], 1)).fit(Late(), loader_of(data))
        first.save_checkpoint(path := tmp_path / "undefended.ckpt")
    callback = Scripts(members, unlearning(monkeypatch))
    torch.manual_seed(0)
    make_trainer([callback], 5).fit(Late(), loader_of(data), ckpt_path=path)
    assert callback.verdict.findings[0].diagnosis == "wrong labels"


def test_what_needs_the_weights_at_the_start_says_so_where_they_are_not_known(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (first := make_trainer([], 1)).fit(Late(), loader_of(Pictures()))
    first.save_checkpoint(path := tmp_path / "undefended.ckpt")
    with pytest.raises(TrainerError, match="built in `configure_model`"):
        make_trainer([DBRCallback(detector="fresh")], 3).fit(Late(), loader_of(Pictures()), ckpt_path=path)


@pytest.mark.parametrize("detected", [True, False])
def test_after_another_restart_the_weights_at_the_start_are_there_for_a_copy(detected: bool) -> None:
    """A detection gives them up; the restart of another defense brings the module back to them."""
    module, response = Net(), Unlearn()
    kept = {name: value + 1 for name, value in state_of(module).items()}
    response._detected, response._initial = detected, None if detected else kept
    response.on_other_restart(cast(Session, SimpleNamespace(module=module)))
    found, expected = response._initial, state_of(module) if detected else kept
    assert found is not None
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
