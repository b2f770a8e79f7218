"""Samplers under any mask, size, world and epoch; what ``tests/trainer/test_samplers.py`` does not try."""

from __future__ import annotations

from collections import Counter

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, SequentialSampler, SubsetRandomSampler

from lightning_backdoor.detection.decision import add_removed, decide
from lightning_backdoor.loading.samplers import KeepState, Kept, filtered
from tests.contract.tally import COUNTS

fuzz = settings(max_examples=1000, deadline=None, derandomize=True, database=None)
MASKS = st.lists(st.booleans(), min_size=2, max_size=48).filter(any)


def kept_of(mask: list[bool]) -> set[int]:
    return {index for index, stays in enumerate(mask) if stays}


@fuzz
@given(
    mask=MASKS,
    world=st.integers(1, 5),
    size=st.integers(1, 9),
    whole=st.booleans(),
    full=st.booleans(),
    shuffle=st.booleans(),
    single=st.booleans(),
    seed=st.integers(0, 99),
    epochs=st.integers(1, 3),
)
def test_processes_draw_equally_many_batches_in_every_epoch(
    *,
    mask: list[bool],
    world: int,
    size: int,
    whole: bool,
    full: bool,
    shuffle: bool,
    single: bool,
    seed: int,
    epochs: int,
) -> None:
    """``whole`` drops what does not divide by the world, ``full`` drops batches that are not full."""
    COUNTS["fuzz cases"] += 1
    data = range(len(mask))
    state = KeepState(Kept(torch.tensor(mask)), drop_single=single)
    ranks = [
        DistributedSampler(data, world, rank, shuffle=shuffle, seed=seed, drop_last=whole) for rank in range(world)
    ]
    loaders = [filtered(BatchSampler(rank, size, full), state, data) for rank in ranks]
    for epoch in range(epochs):
        drawn = []
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
            drawn.append(list(loader))
            assert len(drawn[-1]) == len(loader)
        assert len({len(batches) for batches in drawn}) == 1, "or one process waits for the others for ever"
        assert len({tuple(map(len, batches)) for batches in drawn}) == 1
        counts = Counter(index for batches in drawn for batch in batches for index in batch)
        assert set(counts) <= kept_of(mask), "no removed sample, ever"
        if full:
            assert all(len(batch) == size for batches in drawn for batch in batches)
        if whole:
            assert all(count == 1 for count in counts.values())
        if not (whole or full or single):
            assert set(counts) == kept_of(mask)
            assert sum(counts.values()) < sum(mask) + world


@fuzz
@given(
    masks=st.integers(2, 40).flatmap(
        lambda n: st.lists(
            st.one_of(st.none(), st.lists(st.booleans(), min_size=n, max_size=n).filter(any)), min_size=2, max_size=6
        ).filter(lambda masks: any(mask is not None for mask in masks))
    ),
    size=st.integers(1, 7),
    which=st.integers(0, 2),
)
def test_a_mask_that_changes_between_epochs_is_that_of_the_next_one(
    masks: list[list[bool] | None], size: int, which: int
) -> None:
    COUNTS["fuzz cases"] += 1
    n = next(len(mask) for mask in masks if mask is not None)
    data, state = range(n), KeepState()
    sampler = [SequentialSampler(data), RandomSampler(data), SubsetRandomSampler(data)][which]
    batches = filtered(BatchSampler(sampler, size, False), state, data)
    for mask in masks:
        state.kept = None if mask is None else Kept(torch.tensor(mask))
        expected = set(data) if mask is None else kept_of(mask)
        announced = len(batches)
        drawn = list(batches)
        assert announced == len(drawn) == -(-len(expected) // size)
        assert sorted(index for batch in drawn for index in batch) == sorted(expected), "each kept one, once"


@fuzz
@given(
    mask=MASKS,
    size=st.integers(1, 7),
    seed=st.integers(0, 2**31 - 1),
    copies=st.integers(1, 3),
)
def test_an_order_depends_on_the_seed_alone(mask: list[bool], size: int, seed: int, copies: int) -> None:
    """Announcing a length, or having announced one before, draws no number that the epoch would have had."""
    COUNTS["fuzz cases"] += 1
    data, orders = range(len(mask)), []
    for asked in range(copies + 1):
        sampler = RandomSampler(data, generator=torch.Generator().manual_seed(seed))
        batches = filtered(BatchSampler(sampler, size, False), KeepState(Kept(torch.tensor(mask))), data)
        for _ in range(asked):
            len(batches)
        orders.append([list(batches), list(batches)])
    assert all(order == orders[0] for order in orders)


@fuzz
@given(
    n=st.integers(40, 80),
    first=st.floats(0.01, 0.6),
    more=st.floats(0.01, 0.9),
    cap=st.floats(0.02, 0.9),
    seed=st.integers(0, 10**6),
)
def test_further_detections_never_bring_a_sample_back_nor_break_the_cap(
    n: int, first: float, more: float, cap: float, seed: int
) -> None:
    assume(more > first)
    COUNTS["fuzz cases"] += 1
    generator = torch.Generator().manual_seed(seed)
    labels, budget = torch.arange(n) % 2, int(cap * n)
    scores, again = torch.rand(2, n, generator=generator)
    one = decide(scores[:, None], scores, labels, fraction=first, by_ranking=True, max_removed=cap)
    assert int((~one.keep).sum()) <= budget
    two = decide(again[:, None], again, labels, fraction=more, by_ranking=True, removed=~one.keep, max_removed=cap)
    both = add_removed(two, one.scores, one.keep, threshold=two.threshold, max_removed=cap)
    assert not bool((both.keep & ~one.keep).any())
    assert int((~both.keep).sum()) <= max(budget, int((~one.keep).sum()))
    new = one.keep & ~both.keep
    assert bool((again[new] >= again[both.keep].max()).all()), "the most suspicious of those that were left"
