"""Which part of a tuple is the position of a sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from lightning_backdoor.data.views import Key, find_key
from lightning_backdoor.errors import DataError
from lightning_backdoor.loading.samplers import Kept, dry_count

N = 40


def batches(name: Any) -> list[list[Any]]:
    return [[name(8 * i + j) for j in range(8)] for i in range(5)]


@pytest.mark.parametrize(
    ("name", "slot", "like"),
    [
        (lambda i: (i, 8 if i % 3 else 16), 0, (None, 8)),
        (lambda i: (i % 4 == 1, i, "x"), 1, (False, None, "x")),
        (lambda i: (i % 2, i), 1, (0, None)),
        (lambda i: [i, {"size": 3}], 0, (None, {"size": 3})),
        (lambda i: (torch.tensor(i), 224), 0, (None, 224)),
    ],
)
def test_the_position_is_what_differs_most(name: Any, slot: int, like: tuple[Any, ...]) -> None:
    key = find_key(batches(name), range(N))
    assert key == Key(slot, like)
    assert key(3) == (*like[:slot], 3, *like[slot + 1 :])


@pytest.mark.parametrize("sampler", [batches(int), batches(torch.tensor), torch.arange(8).split(2), [], [[]], [3]])
def test_positions_alone_have_no_key(sampler: Any) -> None:
    assert find_key(sampler, range(N)) is None


def test_a_sampler_of_torch_draws_nothing_from_the_users_streams() -> None:
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    own = generator.get_state()
    for inner in (RandomSampler(range(N)), RandomSampler(range(N), generator=generator), SequentialSampler(range(N))):
        assert find_key(BatchSampler(inner, 4, drop_last=False), range(N)) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(generator.get_state(), own)


def test_what_cannot_be_copied_is_let_alone() -> None:
    assert find_key((batch for batch in batches(lambda i: (i, 8))), range(N)) is None


@pytest.mark.parametrize("name", [lambda i: (i, i), lambda i: (f"{i}.png", 3 + N), lambda i: (i, 8) if i % 2 else (i,)])
def test_tuples_without_a_clear_position_are_refused(name: Any) -> None:
    with pytest.raises(
        DataError, match=r"must yield dataset positions, or tuples with one.*\(position, whatever else\)"
    ):
        find_key(batches(name), range(N))


def test_a_list_of_batches_is_counted() -> None:
    kept = Kept(torch.arange(N) >= 8)
    assert dry_count(batches(int), lambda batch: kept.part(batch) or None, None) == 4


def test_a_mask_is_about_positions() -> None:
    kept = Kept(torch.arange(4) != 2, slot=1)
    assert kept.part([("a", 1), ("b", 2), ("c", 3)]) == [("a", 1), ("c", 3)]
    assert kept.allows(3)
    with pytest.raises(DataError, match="must yield dataset positions"):
        Kept(torch.arange(4) != 2).allows((1, 2))
