"""Samplers over kept samples, fuzzed without Lightning: what is drawn, how often, and how much per process."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_backdoor.data.views import BY_POSITION
from lightning_backdoor.errors import DataError
from lightning_backdoor.loading.samplers import RULES, KeepState, Kept, dry_count, filtered
from tests.gpu import strict

MASKS = st.lists(st.booleans(), min_size=1, max_size=40).filter(any)
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Data:
    """A dataset that must not be copied."""

    def __init__(self, n: int) -> None:
        self.n, self.copied = n, False

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index

    def __deepcopy__(self, memo: Any) -> Any:
        self.copied = True
        return self


class Shuffled(Sampler[int]):
    """A user's sampler: a permutation from numpy's global stream, with an epoch counter of its own."""

    def __init__(self, data: Data) -> None:
        self.data, self.passes = data, 0

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter(np.random.permutation(len(self.data)).tolist())


class Halves(Sampler[list[int]]):
    """A user's batch sampler: pairs a sample of the first half with one of the second."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n // 2

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[i, i + self.n // 2] for i in torch.randperm(self.n // 2).tolist()])


def permutations(data: Data) -> list[Any]:
    n = len(data)
    return [
        SequentialSampler(data),
        RandomSampler(data),
        RandomSampler(data, generator=torch.Generator().manual_seed(4)),
        SubsetRandomSampler(range(n)),
        WeightedRandomSampler(torch.rand(n) + 0.1, n, replacement=False),
        Shuffled(data),
    ]


def test_torchs_own_samplers_have_a_rule_and_name_samples_by_position() -> None:
    assert set(RULES) == set(BY_POSITION)


def batches_of(sampler: Any, data: Data, size: int, drop_last: bool, mask: list[bool] | None, *, single: bool) -> Any:
    kept = None if mask is None else Kept(torch.tensor(mask))
    return filtered(BatchSampler(sampler, size, drop_last), KeepState(kept, drop_single=single), data)


def kept_of(mask: list[bool]) -> set[int]:
    return {index for index, stays in enumerate(mask) if stays}


@fuzz
@given(MASKS, st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 5))
def test_permutations_draw_each_kept_sample_once(
    mask: list[bool], size: int, drop_last: bool, single: bool, which: int
) -> None:
    data = Data(len(mask))
    batches = batches_of(permutations(data)[which], data, size, drop_last, mask, single=single)
    for _ in range(2):
        drawn = list(batches)
        assert len(drawn) == len(batches)
        counts = Counter(index for batch in drawn for index in batch)
        assert set(counts) <= kept_of(mask)
        assert all(count == 1 for count in counts.values())
        lone = single and size > 1 and sum(mask) % size == 1 and len(mask) % size != 1
        left_out = sum(mask) % size if drop_last else int(lone)
        assert sum(counts.values()) == sum(mask) - left_out
        assert not (single and not drop_last and len(mask) % size != 1 and size > 1 and any(len(b) == 1 for b in drawn))


@fuzz
@given(MASKS, st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 99))
def test_processes_share_the_kept_samples_equally(
    mask: list[bool], world: int, shuffle: bool, drop_last: bool, seed: int
) -> None:
    data = Data(len(mask))
    kept, shares = Kept(torch.tensor(mask)), []
    for rank in range(world):
        user = DistributedSampler(data, world, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        sampler = filtered(user, KeepState(kept), data)
        sampler.set_epoch(seed % 5)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler)
    assert len({len(share) for share in shares}) == 1
    counts = Counter(index for share in shares for index in share)
    assert set(counts) <= kept_of(mask)
    if drop_last:
        assert all(count == 1 for count in counts.values())
        assert sum(counts.values()) > sum(mask) - world
    else:
        assert set(counts) == kept_of(mask)
        assert sum(counts.values()) < sum(mask) + world


def test_shares_are_shuffled_anew_in_each_epoch() -> None:
    data, kept = Data(30), Kept(torch.arange(30) % 3 > 0)
    sampler = filtered(DistributedSampler(data, 2, 0, seed=1), KeepState(kept), data)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]


@fuzz
@given(MASKS, st.integers(0, 2**31 - 1))
def test_draws_with_replacement_keep_their_rate_and_lose_nothing_else(mask: list[bool], seed: int) -> None:
    data, n = Data(len(mask)), len(mask)
    share = sum(mask) / n
    for sampler, samples in [
        (WeightedRandomSampler(torch.full((n,), 0.3), 3 * n), 3 * n),
        (RandomSampler(data, replacement=True, num_samples=2 * n), 2 * n),
        (RandomSampler(data, num_samples=5 * n), 5 * n),
    ]:
        torch.manual_seed(seed)
        wrapped = filtered(sampler, KeepState(Kept(torch.tensor(mask))), data)
        drawn = list(wrapped)
        assert len(drawn) == len(wrapped) == max(1, round(samples * share))
        assert set(drawn) <= kept_of(mask)


def test_weights_of_kept_samples_stay_in_proportion() -> None:
    weights = torch.tensor([1.0, 3.0, 50.0, 0.0])
    sampler = WeightedRandomSampler(weights, 8000, generator=torch.Generator().manual_seed(0))
    wrapped = filtered(sampler, KeepState(Kept(torch.tensor([True, True, False, True]))), Data(4))
    counts = Counter(wrapped)
    assert len(wrapped) == round(8000 * 4 / 54)
    assert counts[1] / counts[0] == pytest.approx(3, rel=0.35)
    assert set(counts) == {0, 1}
    assert torch.equal(sampler.weights, weights.double())  # the user's sampler is as it was
    assert sampler.num_samples == 8000


def test_weighted_draws_without_replacement_never_repeat() -> None:
    sampler = WeightedRandomSampler(torch.ones(40), 20, replacement=False)
    wrapped = filtered(sampler, KeepState(Kept(torch.arange(40) % 4 > 0)), Data(40))
    drawn = list(wrapped)
    assert len(drawn) == len(set(drawn)) == 15


@pytest.mark.parametrize("replacement", [True, False])
def test_weights_that_change_between_epochs_are_followed(replacement: bool) -> None:
    sampler = WeightedRandomSampler(torch.ones(40), 20, replacement=replacement)
    wrapped = filtered(sampler, KeepState(Kept(torch.arange(40) % 4 > 0)), Data(40))
    torch.manual_seed(3)
    first = list(wrapped)
    torch.manual_seed(3)
    assert list(wrapped) == first, "nothing changed"
    sampler.weights[:20] = 0  # in place
    assert set(wrapped) <= set(range(20, 40))
    sampler.weights = torch.eye(40)[[1, 2]].sum(0).double()
    assert set(wrapped) == {1, 2}
    sampler.weights = torch.eye(40)[0].double()  # of a removed sample
    assert list(wrapped) == []


def test_a_subset_that_changes_between_epochs_is_followed() -> None:
    sampler = SubsetRandomSampler(range(8))
    wrapped = filtered(sampler, KeepState(Kept(torch.arange(20) % 4 > 0)), Data(20))
    assert sorted(wrapped) == [1, 2, 3, 5, 6, 7]
    sampler.indices = range(8, 16)
    assert sorted(wrapped) == [9, 10, 11, 13, 14, 15]


def test_weights_on_another_device_are_masked_there() -> None:
    with strict.second_device():
        weights = torch.ones(8, device=strict.DEVICE)
        sampler = WeightedRandomSampler(weights, 8)
        assert sampler.weights.device.type == strict.DEVICE.type
        wrapped = filtered(sampler, KeepState(Kept(torch.arange(8) > 3)), Data(8))
        assert set(wrapped) <= {4, 5, 6, 7}


def test_no_possible_draw_is_an_empty_epoch() -> None:
    sampler = WeightedRandomSampler([0.0, 1.0, 1.0], 3)
    assert len(filtered(sampler, KeepState(Kept(torch.tensor([True, False, False]))), Data(3))) == 0
    beyond = RandomSampler(Data(2))
    assert len(filtered(beyond, KeepState(Kept(torch.tensor([False, False, True]))), Data(3))) == 0


@fuzz
@given(MASKS, st.integers(1, 9), st.booleans(), st.integers(0, 5))
def test_without_a_mask_everything_passes_through(mask: list[bool], size: int, drop_last: bool, which: int) -> None:
    data = Data(len(mask))
    outcomes = []
    for wrap in (False, True):
        torch.manual_seed(7)
        np.random.seed(7)
        sampler = permutations(data)[which]
        plain = BatchSampler(sampler, size, drop_last)
        batches = batches_of(sampler, data, size, drop_last, None, single=True) if wrap else plain
        outcomes.append((len(batches), list(batches), torch.rand(1).item(), np.random.rand()))
    assert outcomes[0] == outcomes[1]


@fuzz
@given(st.lists(st.booleans(), min_size=2, max_size=40).filter(lambda m: len(m) % 2 == 0))
def test_own_batches_get_smaller_and_keep_their_pairs(mask: list[bool]) -> None:
    half = len(mask) // 2
    drawn = list(filtered(Halves(len(mask)), KeepState(Kept(torch.tensor(mask))), Data(len(mask))))
    assert sorted(i for batch in drawn for i in batch) == sorted(kept_of(mask))
    assert all(len(batch) == 1 or batch[1] == batch[0] + half for batch in drawn)


def test_own_batches_lose_a_lone_sample_where_batch_norm_needs_two() -> None:
    state = KeepState(Kept(torch.tensor([True, False, True, True])), drop_single=True)
    batches = filtered(Halves(4), state, Data(4))
    assert list(batches) == [[0, 2]]
    assert len(batches) == 1


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array], ids=["list", "tuple", "tensor", "array"])
def test_batches_keep_their_type(kind: Any) -> None:
    class Typed(Halves):
        def __iter__(self) -> Iterator[Any]:
            return (kind(batch) for batch in super().__iter__())

    drawn = list(filtered(Typed(8), KeepState(Kept(torch.tensor([True, False] * 4))), Data(8)))
    assert {type(batch) for batch in drawn} <= {list, tuple, Tensor, np.ndarray}
    assert sorted(int(i) for batch in drawn for i in batch) == [0, 2, 4, 6]
    if kind is not np.array:
        assert {type(batch) for batch in drawn} == {type(kind([1, 2]))}


def test_samplers_of_loaders_without_batches_may_yield_either() -> None:
    data = Data(9)
    state = KeepState(Kept(torch.arange(9) != 4))
    assert list(filtered(SequentialSampler(data), state, data)) == [0, 1, 2, 3, 5, 6, 7, 8]
    assert list(filtered(BatchSampler(SequentialSampler(data), 3, False), state, data)) == [
        [0, 1, 2],
        [3, 5, 6],
        [7, 8],
    ]

    class Mixed(Halves):
        def __iter__(self) -> Iterator[Any]:
            return iter([3, np.int64(4), torch.tensor(5), [4, 0]])

    assert list(filtered(Mixed(8), state, data)) == [3, torch.tensor(5), [0]]


def test_counting_leaves_the_sampler_and_the_random_streams_alone() -> None:
    data = Data(20)
    sampler = Shuffled(data)
    sampler.generator = torch.Generator().manual_seed(3)
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate(), sampler.generator.get_state())
    assert dry_count(sampler, lambda index: index if index < 7 else None, data) == 7
    after = (torch.get_rng_state(), np.random.get_state()[1], random.getstate(), sampler.generator.get_state())
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    assert before[2] == after[2]
    assert torch.equal(before[3], after[3])
    assert sampler.passes == 0
    assert not data.copied


def test_a_sampler_that_cannot_be_copied_is_counted_all_the_same() -> None:
    class Uncopyable(Shuffled):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot pickle a file")

    assert dry_count(Uncopyable(Data(6)), lambda index: index, Data(6)) == 6


def test_an_unknown_sampler_that_falls_short_is_drawn_again() -> None:
    class Coin(Sampler[int]):
        def __init__(self) -> None:
            self.passes = 0

        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Iterator[int]:
            self.passes += 1
            return iter([0, 1, 2, 3] if self.passes == 1 else [0, 1, 1, 1])

    sampler = Coin()
    wrapped = filtered(sampler, KeepState(Kept(torch.tensor([True, False, True, True]))), Data(4))
    assert len(wrapped) == 3
    sampler.passes = 1
    assert list(wrapped) == [0, 0, 0]


def test_processes_agree_on_the_length_of_an_unknown_sampler() -> None:
    wrapped = filtered(
        Shuffled(Data(10)), KeepState(Kept(torch.arange(10) < 6), agree=lambda count: count + 2), Data(10)
    )
    drawn = list(wrapped)
    assert len(drawn) == len(wrapped) == 8
    assert set(drawn) == set(range(6))


def test_a_lifted_mask_and_a_new_one_are_followed() -> None:
    data, state = Data(12), KeepState()
    batches = filtered(BatchSampler(RandomSampler(data), 5, False), state, data)
    lengths = []
    for mask in (None, torch.arange(12) < 6, torch.arange(12) < 3, None):
        state.kept = None if mask is None else Kept(mask)
        drawn = [index for batch in batches for index in batch]
        lengths.append((len(batches), len(drawn), max(drawn) < (12 if mask is None else int(mask.sum()))))
    assert lengths == [(3, 12, True), (2, 6, True), (1, 3, True), (3, 12, True)]


def test_attributes_of_the_users_sampler_are_reached() -> None:
    data = Data(6)
    user = DistributedSampler(data, 2, 1, seed=5)
    wrapped = filtered(user, KeepState(), data)
    assert isinstance(wrapped, DistributedSampler)
    assert (wrapped.rank, wrapped.seed) == (1, 5)
    wrapped.set_epoch(9)
    assert user.epoch == 9
    assert copy.copy(wrapped).rank == 1
    with pytest.raises(AttributeError):
        wrapped.no_such_thing  # noqa: B018


@given(st.integers(2, 30), st.integers(1, 4))
@fuzz
def test_lightnings_wrapper_shards_the_kept_draws(n: int, world: int) -> None:
    data, kept = Data(n), Kept(torch.arange(n) % 3 != 1)
    shares = []
    for rank in range(world):
        torch.manual_seed(2)
        user = DistributedSamplerWrapper(SubsetRandomSampler(range(n)), num_replicas=world, rank=rank, seed=1)
        sampler = filtered(user, KeepState(kept), data)
        assert isinstance(sampler, DistributedSampler)
        shares.append(list(sampler))
        assert len(sampler) == len(shares[-1])
    assert len({len(share) for share in shares}) == 1
    assert {index for share in shares for index in share} == set(kept.positions)


def test_lightnings_wrapper_may_shard_batches() -> None:
    data, kept, shares = Data(12), Kept(torch.arange(12) >= 3), []
    for rank in range(2):
        inner = BatchSampler(SequentialSampler(data), 3, False)
        user = DistributedSamplerWrapper(inner, num_replicas=2, rank=rank, shuffle=False)
        shares.append(list(filtered(user, KeepState(kept), data)))
    assert shares == [[[3, 4, 5], [9, 10, 11]], [[6, 7, 8], [3, 4, 5]]]


def test_a_share_of_nothing_is_nothing() -> None:
    data = Data(4)
    user = DistributedSampler(data, 4, 0, drop_last=True)
    sampler = filtered(user, KeepState(Kept(torch.tensor([True, True, False, False]))), data)
    assert len(sampler) == 0


class NoLength(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


class Endless(Shuffled):
    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


class OneShot(Shuffled):
    def __init__(self, data: Data) -> None:
        super().__init__(data)
        self.rest = iter([0, 1])

    def __iter__(self) -> Iterator[int]:
        return self.rest


def test_a_sampler_without_length_is_refused() -> None:
    for sampler in (NoLength(), BatchSampler(NoLength(), 2, False)):
        with pytest.raises(DataError, match=r"finite and have a length, got .*Give it `__len__`"):
            filtered(sampler, KeepState(), Data(4))


def test_an_endless_sampler_is_refused() -> None:
    wrapped = filtered(Endless(Data(4)), KeepState(Kept(torch.tensor([True, False, True, True]))), Data(4))
    with pytest.raises(DataError, match=r"went on after 1008.*stop after `len\(sampler\)` items"):
        len(wrapped)


def test_a_sampler_that_runs_dry_is_refused() -> None:
    wrapped = filtered(
        OneShot(Data(4)), KeepState(Kept(torch.tensor([True, False, True, True])), agree=lambda _: 9), Data(4)
    )
    with pytest.raises(DataError, match=r"yields nothing when it is iterated a second time.*return a new generator"):
        list(wrapped)


def test_what_is_no_position_is_refused() -> None:
    class Named(Shuffled):
        def __iter__(self) -> Iterator[Any]:
            return iter(["a", "b"])

    for sampler in (BatchSampler(Named(Data(2)), 2, False), BatchSampler(Shuffled(Data(5)), 2, False)):
        with pytest.raises(DataError, match=r"must yield dataset positions below 2, got .*plain integers"):
            len(filtered(sampler, KeepState(Kept(torch.tensor([True, False]))), Data(2)))


@fuzz
@given(MASKS)
def test_masks_are_copied(mask: list[bool]) -> None:
    assume(not all(mask))
    tensor = torch.tensor(mask)
    kept = Kept(tensor)
    tensor[:] = True
    assert kept.mask.tolist() == mask
    assert len(kept) == sum(mask)
