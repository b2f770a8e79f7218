"""What cannot be curated is refused by name, and nothing changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pytorch_lightning.utilities import CombinedLoader
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from lightning_backdoor._lightning import limited
from lightning_backdoor.errors import ArgumentError, DataError, TrainerError
from lightning_backdoor.loading.loader_filter import require_enough
from tests.loading.recording import (
    BATCH,
    KEEP,
    LIGHTNING_WARNS,
    N,
    Points,
    Pruner,
    Recording,
    fit,
    loader,
    make_trainer,
)

pytestmark = LIGHTNING_WARNS


def only(count: int) -> Tensor:
    return torch.arange(N) < count


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(Points())


class Endless(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


class Unsized(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return Points()[index]


class Hoarder(DataLoader[Any]):
    """Makes its iterator early and keeps it, as fast loaders do."""

    def __init__(self) -> None:
        super().__init__(Points(), batch_size=BATCH)
        self.iterator = super().__iter__()

    def __iter__(self) -> Any:
        return self.iterator


class Unchanged(PrefetchLoader):
    """For vectors instead of images."""

    def __iter__(self) -> Any:
        return iter(self.loader)


REFUSED = {
    "iterable": (
        lambda: DataLoader(Stream(), batch_size=8),
        r"DataLoader over the Stream.*Load the data into a map-style",
    ),
    "list of batches": (
        lambda: [next(iter(loader()))],
        r"must be a torch DataLoader.*got (Tensor|list).*map-style Dataset",
    ),
    "two loaders": (lambda: [loader(), loader()], r"several map-style DataLoaders.*ConcatDataset"),
    "combined": (
        lambda: CombinedLoader({"a": loader(), "b": loader()}),
        r"several map-style DataLoaders.*ConcatDataset",
    ),
    "timm, iterable": (
        lambda: Unchanged(DataLoader(Stream(), batch_size=8), device=torch.device("cpu")),
        r"Unchanged over the Stream.*Load the data into a map-style",
    ),
    "endless": (lambda: loader(sampler=Endless()), r"finite and have a length, got Endless.*Give it `__len__`"),
    "unsized": (lambda: loader(Unsized(), sampler=range(4)), r"Unsized without `__len__`.*Add `__len__`"),
    "hoarder": (Hoarder, r"Hoarder keeps a running iterator in `iterator`.*persistent_workers=True"),
}


@pytest.mark.case("19")
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:.*`IterableDataset` has `__len__`")
def test_loaders_that_cannot_be_curated(kind: str) -> None:
    make, words = REFUSED[kind]
    module = Recording()
    with pytest.raises(DataError, match=words):
        fit(make(), module=module)
    assert module.batches == {}


@pytest.mark.case("20")
@pytest.mark.parametrize(
    ("keep", "settings", "options", "error", "words"),
    [
        (only(0), {}, {}, DataError, r"All 64 training samples would be removed\. Lower `max_removed`"),
        (
            only(7),
            {"drop_last": True},
            {},
            DataError,
            r"7 of 64 .*less than one batch.*`max_removed`.*`drop_last=False`",
        ),
        (
            only(16),
            {},
            {"limit_train_batches": 0.25},
            TrainerError,
            r"`limit_train_batches=0.25` of the 2 .*at least 0.5",
        ),
        (
            torch.ones(60, dtype=torch.bool),
            {},
            {},
            DataError,
            r"60 samples, but this one has 64\. Resume with the dataset",
        ),
        (only(60)[:60], {}, {}, DataError, r"60 samples, but this one has 64\. Resume with the dataset"),
        (
            torch.ones(N),
            {},
            {},
            ArgumentError,
            r"`keep` must be a bool tensor of shape \(N,\), got torch.float32 \(64,\)",
        ),
        (
            only(9)[None],
            {},
            {},
            ArgumentError,
            r"`keep` must be a bool tensor of shape \(N,\), got torch.bool \(1, 64\)",
        ),
    ],
)
def test_masks_that_leave_nothing_or_do_not_fit(
    keep: Tensor, settings: Any, options: Any, error: type[Exception], words: str
) -> None:
    class Careful(Pruner):
        """Catches the refusal and checks that the Trainer is as before."""

        refusal = ""

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            try:
                super().on_train_epoch_end(trainer, pl_module)
            except error as refused:
                self.refusal = str(refused)

    pruner = Careful({0: KEEP, 1: keep})
    module = fit(loader(shuffle=True, **settings), pruner, **options)
    assert_words(words, pruner.refusal)
    assert torch.equal(pruner.loader_filter.keep, KEEP)  # type: ignore[union-attr]
    for epoch in (1, 2, 3):  # the earlier mask stays in force
        assert set(module.drawn(epoch)) <= set(KEEP.nonzero().squeeze(1).tolist())
    assert module.validated == [0, 1, 2, 3]


def assert_words(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=words):
        raise ValueError(message)


def test_the_batch_limit_that_is_proposed_leaves_a_batch() -> None:
    for batches in range(1, 201):
        left, whole = (DataLoader(range(count)) for count in (batches, 3 * batches))  # type: ignore[arg-type]
        with pytest.raises(TrainerError) as refused:
            require_enough(torch.ones(3 * batches), whole, left, 0.5 / batches)
        (proposed,) = re.findall(r"at least (\S+),", str(refused.value))
        assert limited(batches, float(proposed)) >= 1
        assert float(proposed) < 1 / batches + 0.001


def test_a_batch_limit_that_was_nothing_before_is_lightnings_affair() -> None:
    module = fit(pruner=Pruner({0: only(16)}), limit_train_batches=1)
    assert module.planned == [1, 1, 1, 1]


@pytest.mark.case("20")
@pytest.mark.parametrize(("norm", "expected"), [(True, 48), (False, 49)])
def test_a_lone_last_sample_is_left_out_where_batch_norm_needs_two(norm: bool, expected: int) -> None:
    module = fit(pruner=Pruner({1: only(49)}), module=Recording(norm))
    assert sum(module.drawn(2).values()) == sum(module.drawn(3).values()) == expected
    assert module.planned == [8, 8, -(-expected // BATCH), -(-expected // BATCH)]
    assert set(module.drawn(2)) | set(module.drawn(3)) <= set(range(49))


def test_one_kept_sample_is_no_batch_for_batch_norm() -> None:
    with pytest.raises(DataError, match="1 of 64 training samples would be kept, less than one batch"):
        fit(pruner=Pruner({0: only(1)}), module=Recording(norm=True))
    assert fit(pruner=Pruner({0: only(1)})).sizes(3) == [1]


@pytest.mark.case("27")
def test_a_dataset_that_changes_its_size_at_a_reload() -> None:
    class Growing(Recording):
        calls = 0

        def train_dataloader(self) -> Any:
            self.calls += 1
            return loader(Points(N + (self.calls > 2)), shuffle=True)

    module = Growing()
    with pytest.raises(DataError, match="64 samples, but this one has 65"):
        make_trainer([Pruner({0: KEEP})], reload_dataloaders_every_n_epochs=1).fit(module)
    assert sorted(module.batches) == [0, 1]
