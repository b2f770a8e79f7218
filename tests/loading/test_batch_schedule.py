"""Phases of an epoch: what is drawn, in which order, on how many processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_backdoor.errors import DataError
from lightning_backdoor.loading.batch_schedule import Phases, require_batches

SUSPECTS, TRUSTED = torch.tensor([3, 5, 8, 11, 12]), torch.arange(20, 40)


def phases(
    parts: tuple[torch.Tensor, ...] = (SUSPECTS, TRUSTED), *, size: int = 4, epoch: int = 0, **kwargs: Any
) -> Phases:
    settings: dict[str, Any] = {"least": (0, 0), "mixed": False, "seed": 0, "rank": 0, "world": 1}
    return Phases(parts, size=size, epoch=lambda: epoch, **{**settings, **kwargs})


def kinds(drawn: list[list[int]]) -> str:
    """``s`` for a batch of suspects, ``t`` for one of trusted samples; a mixed batch fails."""
    flags = [{position < 20 for position in batch} for batch in drawn]
    assert all(len(kind) == 1 for kind in flags), "pure batches"
    return "".join("s" if True in kind else "t" for kind in flags)


@pytest.mark.case("61")
def test_one_phase_after_the_other_and_every_sample_once() -> None:
    some = phases()
    drawn = list(some)
    assert kinds(drawn) == "ssttttt"
    assert len(some) == len(drawn) == 7
    assert sorted(position for batch in drawn for position in batch) == [*SUSPECTS.tolist(), *TRUSTED.tolist()]
    assert [some.phase_of(place) for place in range(8)] == [0, 0, 1, 1, 1, 1, 1, 0]
    assert max(map(len, drawn)) - min(map(len, drawn[:2])) <= 2


@pytest.mark.case("60")
def test_positions_of_a_place_are_those_that_are_drawn_there_in_any_epoch() -> None:
    epoch = [0]
    some = Phases(
        (SUSPECTS, TRUSTED), size=4, least=(0, 0), mixed=True, seed=0, rank=1, world=2, epoch=lambda: epoch[0]
    )
    orders = []
    for epoch[0] in (0, 1, 0):
        orders.append([some.positions_of(place).tolist() for place in range(len(some) + 1)])
        assert orders[-1] == [*list(some), next(iter(some))]
    assert orders[0] == orders[2] != orders[1]


def test_mixed_phases_are_spread_over_the_epoch() -> None:
    some = phases(mixed=True, least=(2, 4), size=8)
    assert kinds(list(some)) == "sttstt"
    assert [some.phase_of(place) for place in range(6)] == [0, 1, 1, 0, 1, 1]


def test_least_cuts_into_smaller_batches_but_not_into_more_than_there_are_samples() -> None:
    assert phases(least=(10, 3)).lengths == [5, 5]
    assert phases(least=(3, 0), size=100).lengths == [3, 1]


def test_shuffles_depend_on_seed_and_epoch_alone() -> None:
    assert list(phases(epoch=1)) == list(phases(epoch=1))
    assert list(phases(epoch=1)) != list(phases(epoch=2))
    assert list(phases(seed=1)) != list(phases(seed=2))


@pytest.mark.case("61")
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_all_processes_change_over_at_the_same_step_and_together_draw_everything(world: int, mixed: bool) -> None:
    ranks = [list(phases(mixed=mixed, rank=rank, world=world)) for rank in range(world)]
    assert len({kinds(drawn) for drawn in ranks}) == 1
    assert {len(drawn) for drawn in ranks} == {len(phases(world=world))}
    assert {position for drawn in ranks for batch in drawn for position in batch} == {
        *SUSPECTS.tolist(),
        *TRUSTED.tolist(),
    }


def test_an_empty_phase_is_left_out() -> None:
    assert kinds(list(phases((torch.zeros(0, dtype=torch.long), TRUSTED)))) == "ttttt"


@pytest.mark.case("59")
def test_loaders_whose_batches_cannot_be_known_are_refused() -> None:
    data: Any = list(range(8))
    with pytest.raises(DataError, match="batch_size=None"):
        require_batches(DataLoader(data, batch_size=None))
    with pytest.raises(DataError, match="in_order=False"):
        require_batches(SimpleNamespace(batch_sampler=[[0]], in_order=False))
    require_batches(DataLoader(data))


@pytest.mark.parametrize("most", [1, 2, 5, 6, 9, 30])
def test_a_limit_is_not_exceeded_where_one_batch_of_each_phase_fits(most: int) -> None:
    """Five suspects and sixteen trusted samples, in batches of four at most."""
    some = phases((torch.arange(5), torch.arange(5, 21)), least=(5, 10), most=most)
    assert len(some) <= max(most, 2), "one batch at least of each"
    drawn = list(some)
    assert len(drawn) == len(some)
    assert all(0 < len(batch) <= 4 for batch in drawn)
    assert min(some.lengths) >= 1
    if most >= 5:
        assert set(range(5)) <= {position for batch in drawn for position in batch}
    if most >= 6:
        assert sorted(position for batch in drawn for position in batch) == list(range(21))


@pytest.mark.parametrize(
    ("suspects", "trusted", "most", "lengths"),
    [(40, 40, 10, [5, 5]), (80, 20, 10, [8, 2]), (400, 4, 20, [19, 1]), (4, 400, 20, [1, 19]), (0, 40, 5, [0, 5])],
)
def test_phases_that_do_not_fit_are_cut_in_proportion(
    suspects: int, trusted: int, most: int, lengths: list[int]
) -> None:
    parts = torch.arange(suspects), torch.arange(suspects, suspects + trusted)
    some = phases(parts, most=most)
    assert some.lengths == lengths
    assert len(list(some)) == most


def test_what_a_limit_leaves_out_is_drawn_in_another_epoch() -> None:
    drawn = {
        position
        for epoch in range(30)
        for batch in phases((torch.arange(8), torch.arange(8, 16)), most=2, epoch=epoch)
        for position in batch
    }
    assert drawn == set(range(16))
