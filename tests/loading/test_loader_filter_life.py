"""Joining and leaving: user objects afterwards, second fits, errors, several defences, other callbacks beside ours."""

from __future__ import annotations

import copy
import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import DataLoader

from lightning_backdoor.errors import DataError
from lightning_backdoor.loading.loader_filter import loader_filter_of
from tests.loading.recording import (
    EPOCHS,
    KEEP,
    KEPT,
    LIGHTNING_WARNS,
    N,
    Points,
    Pruner,
    Recording,
    expect_pruned,
    fit,
    loader,
    make_trainer,
)

pytestmark = LIGHTNING_WARNS

LOW = torch.arange(N) >= 8
HIGH = torch.arange(N) < 56


def hooked(trainer: Any) -> bool:
    return "setup_data" in vars(trainer.fit_loop) or "process_dataloader" in vars(trainer.strategy)


@pytest.mark.case("23")
def test_user_objects_come_back_as_they_were() -> None:
    train = loader(shuffle=True, num_workers=1, persistent_workers=True)
    before = dict(vars(train))
    samplers = {name: dict(vars(getattr(train, name))) for name in ("sampler", "batch_sampler")}
    module = fit(train)
    assert dict(vars(train)) == before
    assert {name: dict(vars(getattr(train, name))) for name in samplers} == samplers
    assert sorted(int(i) for batch in train for i in batch[2]) == list(range(N))
    assert not hooked(module.trainer)


def test_a_loader_whose_workers_run_already() -> None:
    train = loader(shuffle=True, num_workers=1, persistent_workers=True)
    running = iter(train)
    expect_pruned(fit(train))
    assert train._iterator is running
    assert sorted(int(i) for batch in train for i in batch[2]) == list(range(N))


def test_the_loader_is_shown_unfiltered_while_fitting_and_let_go_afterwards() -> None:
    class Looking(Pruner):
        seen: Any = None

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            self.seen = self.loader_filter.loader

    train, pruner = loader(shuffle=True), Looking({0: KEEP})
    fit(train, pruner)
    assert pruner.seen is train
    assert pruner.loader_filter.loader is None
    assert torch.equal(pruner.loader_filter.keep, KEEP)


def test_a_combined_loader_gets_its_own_loaders_back() -> None:
    inner = loader(shuffle=True)
    combined = CombinedLoader({"a": inner}, "max_size")
    fit(combined)
    assert combined.flattened[0] is inner
    assert combined.iterables["a"] is inner


def test_a_second_fit_goes_on_without_the_removed_samples() -> None:
    pruner = Pruner({1: KEEP})
    trainer, module = make_trainer([pruner]), Recording()
    trainer.fit(module, loader(shuffle=True))
    trainer.fit_loop.max_epochs = EPOCHS + 2
    module.batches.clear()
    pruner.mask = None  # the Trainer's own memory must do
    trainer.fit(module, loader(shuffle=True))
    assert [set(module.drawn(epoch)) for epoch in sorted(module.batches)] == [KEPT, KEPT]


def test_a_second_trainer_takes_the_mask_from_the_callback() -> None:
    pruner = Pruner({1: KEEP})
    fit(pruner=pruner)
    module = fit(pruner=pruner)
    assert all(set(module.drawn(epoch)) == KEPT for epoch in range(EPOCHS))


def test_a_second_fit_on_other_data_is_refused() -> None:
    trainer, module = make_trainer([Pruner({1: KEEP})]), Recording()
    trainer.fit(module, loader(shuffle=True))
    trainer.fit_loop.max_epochs = EPOCHS + 2
    with pytest.raises(DataError, match=r"64 samples, but this one has 40.*new Trainer"):
        trainer.fit(module, loader(Points(40)))
    assert not hooked(trainer)


class Failing(Recording):
    fails_in = 2

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.current_epoch == self.fails_in:
            raise ZeroDivisionError("the user's mistake")


@pytest.mark.case("24")
def test_an_error_leaves_no_wrapper_behind_and_the_next_fit_works() -> None:
    pruner, module, train = Pruner(), Failing(), loader(shuffle=True)
    trainer = make_trainer([pruner])
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, train)
    assert not hooked(trainer)
    assert pruner.loader_filter.loader is None
    module.fails_in = -1
    module.batches.clear()
    trainer.fit(module, train)
    assert all(set(drawn) == KEPT for drawn in (module.drawn(epoch) for epoch in module.batches))


def test_wrappers_of_others_are_put_back() -> None:
    trainer = make_trainer([Pruner()])
    original, calls = trainer.strategy.process_dataloader, []
    trainer.strategy.process_dataloader = lambda given: calls.append(given) or original(given)
    theirs = trainer.strategy.process_dataloader
    trainer.fit(Recording(), loader(shuffle=True))
    assert vars(trainer.strategy)["process_dataloader"] is theirs
    assert len(calls) == 1


def test_joining_and_leaving_twice_changes_nothing() -> None:
    trainer = make_trainer([])
    loader_filter = loader_filter_of(trainer)
    assert loader_filter_of(trainer) is loader_filter
    for _ in range(2):
        loader_filter.join("a")
    loader_filter.join("b")
    first = vars(trainer.fit_loop)["setup_data"]
    for _ in range(2):
        loader_filter.leave("a")
    assert vars(trainer.fit_loop)["setup_data"] is first
    loader_filter.leave("b")
    loader_filter.leave("b")
    assert not hooked(trainer)
    assert loader_filter.keep is None
    loader_filter.refresh()  # nothing to refresh, nothing to restart
    loader_filter.restart_iterator()


def test_a_trainer_is_not_kept_alive() -> None:
    trainer = make_trainer([])
    loader_filter_of(trainer).join("a")
    loader_filter_of(trainer).leave("a")
    died = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert died() is None


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.case("24b")
def test_masks_of_two_defenses_are_joined(order: int) -> None:
    first, second = Pruner({0: LOW}, "first"), Pruner({1: HIGH}, "second")
    module = fit(pruner=[first, second][::order])
    assert [set(module.drawn(epoch)) for epoch in range(EPOCHS)] == [
        set(range(N)),
        set(range(8, N)),
        set(range(8, 56)),
        set(range(8, 56)),
    ]
    assert module.planned == [8, 7, 6, 6]
    assert torch.equal(first.loader_filter.keep, LOW & HIGH)
    assert not hooked(module.trainer)


def test_one_defense_may_lift_its_mask_and_the_other_stays() -> None:
    module = fit(pruner=[Pruner({0: LOW, 1: None}, "first"), Pruner({0: HIGH}, "second")])
    assert [set(module.drawn(epoch)) for epoch in (1, 2)] == [set(range(8, 56)), set(range(56))]


def test_two_defenses_together_must_leave_something() -> None:
    first, second = Pruner({0: torch.arange(N) < 32}, "first"), Pruner({1: torch.arange(N) >= 32}, "second")
    trainer = make_trainer([first, second])
    with pytest.raises(DataError, match="All 64 training samples would be removed"):
        trainer.fit(Recording(), loader(shuffle=True))
    assert not hooked(trainer)
    assert torch.equal(second.loader_filter.keep, torch.arange(N) < 32)


def test_masks_of_two_datasets_are_refused() -> None:
    loader_filter = loader_filter_of(trainer := make_trainer([]))
    loader_filter.join("a")
    loader_filter.set_keep("a", KEEP)
    loader_filter.join("b")
    with pytest.raises(DataError, match=r"one training dataset, got lengths \[63, 64\].*new Trainer"):
        loader_filter.set_keep("b", KEEP[:63])
    assert torch.equal(loader_filter.keep, KEEP)
    loader_filter.leave("a")
    loader_filter.leave("b")
    assert not hooked(trainer)


def test_a_mask_that_keeps_all_is_no_mask() -> None:
    pruner = Pruner({0: KEEP, 1: torch.ones(N, dtype=torch.bool)})
    module = fit(pruner=pruner)
    assert pruner.loader_filter.keep is None
    assert set(module.drawn(2)) == set(range(N))


def test_the_mask_is_a_copy() -> None:
    loader_filter = loader_filter_of(trainer := make_trainer([]))
    loader_filter.join("a")
    mask = KEEP.clone()
    loader_filter.set_keep("a", mask)
    mask[:] = False
    loader_filter.keep[:] = False
    assert torch.equal(loader_filter.keep, KEEP)
    assert trainer is not None


class Fresh(Recording):
    """Forgets what a tuner tried before the fit."""

    def on_train_start(self) -> None:
        self.batches.clear()
        self.planned.clear()


class FindingData(pl.LightningDataModule):
    batch_size = 2

    def train_dataloader(self) -> Any:
        return DataLoader(Points(), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Points(16), batch_size=self.batch_size)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_batch_size_finder(tmp_path: Any) -> None:
    data, module = FindingData(), Fresh()
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=1, init_val=2)
    make_trainer([Pruner(), finder], default_root_dir=tmp_path).fit(module, datamodule=data)
    expect_pruned(module)
    assert data.batch_size > 2
    assert module.planned[-2:] == [48 / data.batch_size] * 2


def test_learning_rate_finder(tmp_path: Any) -> None:
    module = Fresh()
    finder = LearningRateFinder(num_training_steps=30, update_attr=True)
    trainer = make_trainer([Pruner(), finder], default_root_dir=tmp_path)
    trainer.fit(module, loader(shuffle=True))
    expect_pruned(module, once=False)  # Lightning 2.2 shortens the epoch after its finder
    assert module.drawn(2) == module.drawn(3) == Counter(KEPT)
    assert module.planned == [8, 8, 6, 6]


@pytest.mark.case("25")
def test_weight_averaging_and_accumulation_schedules_and_early_stopping() -> None:
    averaging = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    module = fit(pruner=[Pruner(), averaging, GradientAccumulationScheduler({0: 2, 2: 3})])
    expect_pruned(module)
    stopping = EarlyStopping("loss", patience=1, check_on_train_epoch_end=True, min_delta=10.0)
    module = fit(pruner=[Pruner({0: KEEP}), stopping])
    assert sorted(module.batches) == [0, 1]
    assert set(module.drawn(1)) == KEPT


def test_a_callback_list_can_be_copied_before_the_filter_is_used() -> None:
    pruner = copy.deepcopy(Pruner())
    assert set(fit(pruner=pruner).drawn(3)) == KEPT
