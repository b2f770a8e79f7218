"""Fits one after the other, errors in between, copies, twins: every public callback survives what Trainers do."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from tests.callbacks.helpers import make_trainer, same_state
from tests.contract.problem import EPOCHS, PACKAGES, WARNS, assert_settled, clean, fit, net_of
from tests.contract.registry import ENTRIES, Entry, every, every_defense, in_turn, public_callbacks

pytestmark = WARNS


def test_every_public_callback_is_in_the_registry() -> None:
    assert {entry.name: entry.cls for entry in ENTRIES} == public_callbacks()


def assert_draws_kept_samples(entry: Entry, callback: Any, module: Any) -> None:
    """In the end a filter trains on what it keeps, each sample once; a repair on what it trusts or unlearns."""
    if entry.kind in ("watch", "own"):
        return
    verdict, (_, last) = callback.verdict, module.epochs()[-1]
    known = [mask for mask in (verdict.trusted, verdict.suspect) if mask is not None]
    allowed = torch.stack(known).any(dim=0) if known else verdict.keep
    assert last == allowed.nonzero().flatten().tolist()


@pytest.mark.case("67")
@every
@pytest.mark.parametrize("package", PACKAGES)
def test_fit(entry: Entry, package: str) -> None:
    callback = entry.make()
    run = fit([callback], package=PACKAGES[package])
    assert entry.acted(callback, run.trainer)
    assert run.trainer.current_epoch == entry.epochs
    assert_draws_kept_samples(entry, callback, run.module)
    assert_settled(run.trainer, run.module, run.loader, run.before)


@pytest.mark.case("67")
@in_turn("package", PACKAGES)
def test_a_callback_that_is_not_in_a_list(entry: Entry, package: str) -> None:
    callback = entry.make()
    run = fit(callback, package=PACKAGES[package])
    assert any(each is callback for each in run.trainer.callbacks)
    assert entry.acted(callback, run.trainer)


@pytest.mark.case("23")
@every
def test_a_second_fit_with_the_same_callback(entry: Entry) -> None:
    callback = entry.make()
    fit([callback])
    first = getattr(callback, "verdict", None)
    run = fit([callback])
    assert entry.acted(callback, run.trainer)
    assert_draws_kept_samples(entry, callback, run.module)
    assert_settled(run.trainer, run.module, run.loader, run.before)
    if entry.kind != "watch":
        assert not bool((callback.verdict.keep & ~first.keep).any()), "removed samples stay removed"


@pytest.mark.case("23")
@every
def test_the_same_trainer_twice(entry: Entry) -> None:
    callback = entry.make()
    run = fit([callback])
    first = getattr(callback, "verdict", None)
    run.trainer.fit_loop.max_epochs = later = run.trainer.current_epoch + EPOCHS
    again = fit([callback], trainer=run.trainer, module=run.module)
    assert entry.acted(callback, again.trainer)
    assert again.trainer.current_epoch >= later
    assert_settled(again.trainer, again.module, again.loader, again.before, epochs=later)
    if entry.kind != "watch":
        assert not bool((callback.verdict.keep & ~first.keep).any())


class Cable(pl.Callback):
    """Raises in the middle of the given epoch, counted by epochs that were begun; once."""

    def __init__(self, epoch: int) -> None:
        self.armed, self.last, self.begun = [True], epoch + 1, list[int]()  # lists: a restart gives numbers back

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.begun.append(trainer.current_epoch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.armed and len(self.begun) == self.last and batch_idx == 1:
            self.armed.clear()
            raise RuntimeError("the cable")


@pytest.mark.case("24", "65")
@every
@pytest.mark.parametrize("epoch", [0, 2, 3])
def test_after_an_error_in_the_middle_everything_is_back_and_the_next_fit_works(entry: Entry, epoch: int) -> None:
    callback = entry.make()
    if epoch == 3 and entry.kind in ("own", "watch"):
        epoch = 1  # these have no fourth epoch
    cable, module = Cable(epoch), net_of()
    trainer = make_trainer([callback, cable], EPOCHS)
    with pytest.raises(RuntimeError, match="the cable"):
        fit([], module=module, trainer=trainer)
    assert_settled(trainer, module)
    run = fit([callback, cable])
    assert entry.acted(callback, run.trainer)
    assert_draws_kept_samples(entry, callback, run.module)
    assert_settled(run.trainer, run.module, run.loader, run.before)


@in_turn("twin_of", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_copies_before_and_after_a_fit(entry: Entry, twin_of: Any) -> None:
    original = entry.make(name="mine")
    callback = twin_of(original)
    expected, run = fit([original]), fit([callback])
    assert callback.state_key == original.state_key
    assert repr(callback) == repr(original) or entry.kind == "watch"
    assert entry.acted(callback, run.trainer)
    assert same_state(expected.module, run.module)
    later = twin_of(callback)
    if entry.kind != "watch":
        assert torch.equal(later.verdict.scores, callback.verdict.scores)
        assert torch.equal(later.verdict.keep, callback.verdict.keep)
    fit([later])


@pytest.mark.case("13")
@every_defense
def test_a_fit_without_training_is_refused_or_silent(entry: Entry) -> None:
    callback = entry.make()
    run = fit([callback], fast_dev_run=2)
    assert callback.verdict is None
    assert all(part.training for part in run.module.modules())


@every
def test_validate_and_test_alone_do_not_wake_it(entry: Entry) -> None:
    callback = entry.make()
    run = fit([], clean())
    trainer = make_trainer([callback], EPOCHS)
    before = {name: value.clone() for name, value in run.module.state_dict().items()}
    trainer.validate(run.module, run.trainer.val_dataloaders, verbose=False)
    trainer.test(run.module, run.trainer.val_dataloaders, verbose=False)
    assert not entry.acted(callback, trainer)
    assert all(torch.equal(value, before[name]) for name, value in run.module.state_dict().items())
    assert_settled(trainer, run.module)
