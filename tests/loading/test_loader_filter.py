"""Which samples a Trainer draws after pruning, how long its epochs are, when it validates: loaders of every kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as unified
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from tests.loading.recording import (
    BATCH,
    EPOCHS,
    KEEP,
    KEPT,
    LIGHTNING_WARNS,
    N,
    Points,
    Pruner,
    Recording,
    UnifiedRecording,
    expect_pruned,
    fit,
    loader,
    make_trainer,
    same_weights,
    weights_of,
)

pytestmark = LIGHTNING_WARNS


class Pairs(Sampler[list[int]]):
    """A user's batch sampler: batches of eight neighbours in random order."""

    def __len__(self) -> int:
        return N // BATCH

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(range(BATCH * i, BATCH * (i + 1))) for i in torch.randperm(N // BATCH).tolist()])


class ForeignLoader(DataLoader[Any]):
    """A loader whose constructor cannot be called again."""

    def __init__(self, secret: int) -> None:
        super().__init__(Points(), batch_size=BATCH, shuffle=secret == 7)


def loaders() -> dict[str, Any]:
    return {
        "shuffle": lambda: loader(shuffle=True),
        "sequential": loader,
        "generator": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(5)),
        "batch sampler": lambda: loader(batch_sampler=BatchSampler(RandomSampler(Points()), BATCH, False)),
        "own batch sampler": lambda: loader(batch_sampler=Pairs()),
        "no batching, lists": lambda: loader(
            batch_size=None, sampler=BatchSampler(RandomSampler(Points()), BATCH, False), data=Sliced()
        ),
        "no batching, own lists": lambda: loader(batch_size=None, sampler=Pairs(), data=Sliced()),
        "worker": lambda: loader(shuffle=True, num_workers=1),
        "persistent worker": lambda: loader(shuffle=True, num_workers=1, persistent_workers=True),
        "foreign constructor": lambda: ForeignLoader(7),
    }


class Sliced(Points):
    """Data that are read by lists of positions."""

    def __getitem__(self, index: Any) -> Any:
        return self.x[index], self.y[index], torch.tensor(index)


@pytest.mark.case("1", "2", "4", "5", "6", "7", "8", "9")
@pytest.mark.parametrize("kind", loaders())
def test_only_kept_samples_are_drawn_once_each(kind: str) -> None:
    module = fit(loaders()[kind]())
    expect_pruned(module)
    pruned = 8 if "own" in kind else 6
    assert module.planned == [8, 8, pruned, pruned]
    assert module.validated == [0, 1, 2, 3]


@pytest.mark.case("3")
@pytest.mark.parametrize("generator", [None, 3])
def test_weighted_draws(generator: int | None) -> None:
    own = None if generator is None else torch.Generator().manual_seed(generator)
    module = fit(loader(sampler=WeightedRandomSampler(torch.rand(N) + 0.5, N, generator=own)))
    expect_pruned(module, once=False)
    assert [sum(module.drawn(epoch).values()) for epoch in range(2)] == [N, N]
    assert sum(module.drawn(2).values()) == sum(module.drawn(3).values()) == pytest.approx(0.75 * N, abs=6)
    assert module.planned[2] == len(module.batches[2])
    assert module.validated == [0, 1, 2, 3]


@pytest.mark.case("10")
def test_drop_last_and_accumulation() -> None:
    keep = KEEP.clone()
    keep[0] = False
    module = fit(loader(shuffle=True, drop_last=True), Pruner({1: keep}), accumulate_grad_batches=4)
    assert module.sizes(2) == [8] * 5
    assert set(module.drawn(2)) <= set(keep.nonzero().squeeze(1).tolist())
    assert module.planned == [8, 8, 5, 5]


@pytest.mark.case("11")
@pytest.mark.parametrize(("limit", "planned"), [(0.5, [4, 4, 3, 3]), (7, [7, 7, 6, 6]), (3, [3, 3, 3, 3])])
def test_limit_train_batches(limit: float, planned: list[int]) -> None:
    module = fit(limit_train_batches=limit)
    assert module.planned == [len(module.batches[epoch]) for epoch in range(EPOCHS)] == planned
    expect_pruned(module, once=False)
    assert module.validated == [0, 1, 2, 3]


@pytest.mark.case("12")
@pytest.mark.parametrize(("overfit", "planned"), [(0.5, [4, 4, 3, 3]), (2, [2, 2, 2, 2])])
@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled")
def test_overfit_batches(overfit: float, planned: list[int]) -> None:
    module = fit(loader(), overfit_batches=overfit, validate=False)
    assert module.planned == planned
    expect_pruned(module, once=False)


@pytest.mark.case("13")
def test_fast_dev_run() -> None:
    module = fit(pruner=Pruner({0: KEEP}), fast_dev_run=True)
    assert module.planned == [1]


class CountingData(pl.LightningDataModule):
    def __init__(self, train: Any = None) -> None:
        super().__init__()
        self.calls = 0

    def train_dataloader(self) -> Any:
        self.calls += 1
        return loader(shuffle=True)

    def val_dataloader(self) -> Any:
        return loader(Points(16))


class CountingModule(Recording):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def train_dataloader(self) -> Any:
        self.calls += 1
        return loader(shuffle=True)

    def val_dataloader(self) -> Any:
        return loader(Points(16))


@pytest.mark.case("14", "15")
@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("source", ["datamodule", "module"])
def test_data_sources_are_asked_as_often_as_before(source: str, every: int) -> None:
    module: Any = Recording() if source == "datamodule" else CountingModule()
    data = CountingData() if source == "datamodule" else None
    make_trainer([Pruner()], reload_dataloaders_every_n_epochs=every).fit(module, datamodule=data)
    assert (data or module).calls == (1 if every == 0 else EPOCHS)
    expect_pruned(module)
    assert module.planned == [8, 8, 6, 6]
    assert module.validated == [0, 1, 2, 3]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([torch.zeros(2)] * 20)


@pytest.mark.case("16")
@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize(
    "make",
    [
        lambda: [loader(shuffle=True)],
        lambda: {"a": loader(shuffle=True)},
        lambda: CombinedLoader({"a": loader(shuffle=True)}, "min_size"),
        lambda: CombinedLoader([loader(shuffle=True)], "max_size_cycle"),
        lambda: CombinedLoader({"a": loader(shuffle=True), "unlabelled": [0] * 3}, "max_size_cycle"),
        lambda: CombinedLoader({"a": loader(shuffle=True), "unlabelled": DataLoader(Stream())}, "min_size"),
        lambda: CombinedLoader({"a": loader(shuffle=True), "unlabelled": [0] * 3}, "max_size"),
    ],
    ids=["list", "dict", "min_size", "max_size_cycle", "cycled list", "stream", "max_size"],
)
def test_combined_loaders(make: Any, every: int) -> None:
    train = make()
    flat = list(train.flattened) if isinstance(train, CombinedLoader) else []
    module = fit(train, reload_dataloaders_every_n_epochs=every)
    expect_pruned(module)
    assert module.planned == [8, 8, 6, 6]
    assert module.validated == [0, 1, 2, 3]
    if flat:
        assert [a is b for a, b in zip(train.flattened, flat, strict=True)] == [True] * len(flat)


@pytest.mark.case("17")
@pytest.mark.parametrize("every", [0, 1])
def test_validation_within_the_epoch(every: int) -> None:
    module = fit(val_check_interval=0.5, reload_dataloaders_every_n_epochs=every)
    assert module.validated == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.case("17")
@pytest.mark.parametrize("every", [0, 1])
def test_a_validation_interval_longer_than_the_epoch_is_shortened_aloud(every: int) -> None:
    with pytest.warns(UserWarning, match="`val_check_interval=8` is more than the 6 batches of an epoch"):
        module = fit(val_check_interval=8, reload_dataloaders_every_n_epochs=every)
    assert module.validated == [0, 1, 2, 3]
    assert module.trainer.val_check_interval == 8


@pytest.mark.case("17")
def test_validation_by_steps_over_epochs() -> None:
    module = fit(val_check_interval=7, check_val_every_n_epoch=None)
    assert module.validated == [0, 1, 2, 3]  # steps 7, 14, 21, 28 of 8 + 8 + 6 + 6


@pytest.mark.case("18")
def test_without_validation() -> None:
    module = fit(validate=False, val_check_interval=8)
    expect_pruned(module)


@pytest.mark.case("21")
def test_a_lifted_mask_brings_all_samples_back() -> None:
    module = fit(pruner=Pruner({0: KEEP, 1: None}), limit_train_batches=1.0)
    assert module.planned == [8, 6, 8, 8]
    assert module.drawn(1) == Counter(KEPT)
    assert module.drawn(2) == module.drawn(3) == Counter(range(N))
    assert module.validated == [0, 1, 2, 3]


@pytest.mark.case("22")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("mask", [None, torch.ones(N, dtype=torch.bool)], ids=["never", "keeps all"])
def test_a_callback_that_removes_nothing_changes_no_bit(mask: Any, workers: int) -> None:
    outcomes = []
    for pruner in ([], [Pruner({} if mask is None else {0: mask})]):
        module = fit(loader(shuffle=True, num_workers=workers), pruner, module=None)
        outcomes.append((module.batches, weights_of(module), module.trainer.callback_metrics, torch.rand(3)))
    assert outcomes[0][0] == outcomes[1][0]
    assert same_weights(outcomes[0][1], outcomes[1][1])
    assert outcomes[0][2] == outcomes[1][2]
    assert torch.equal(outcomes[0][3], outcomes[1][3])


def test_both_packages_prune() -> None:
    module = UnifiedRecording()
    make_trainer([Pruner()], package=unified).fit(module, loader(shuffle=True), loader(Points(16)))
    expect_pruned(module)
    assert module.planned == [8, 8, 6, 6]
    assert module.validated == [0, 1, 2, 3]


@pytest.mark.case("26")
def test_one_cycle_ends_early_without_an_error() -> None:
    class OneCycle(Recording):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            self.total = self.trainer.estimated_stepping_batches
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=int(self.total))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    module = fit(module=OneCycle())
    assert (module.total, module.trainer.global_step) == (32, 28)
    expect_pruned(module)


def test_sequential_sampler_keeps_its_order() -> None:
    module = fit(loader(sampler=SequentialSampler(Points())))
    assert [index for batch in module.batches[2] for index in batch] == sorted(KEPT)
