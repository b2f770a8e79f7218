"""Phases of an epoch: what is drawn, in which order, on how many processes, and how the loss is turned around."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_backdoor.errors import DataError
from lightning_backdoor.trainer.ascent import MAX_NORM, Ascent
from lightning_backdoor.trainer.phases import Phases, require_batches

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


def test_one_phase_after_the_other_and_every_sample_once() -> None:
    some = phases()
    drawn = list(some)
    assert kinds(drawn) == "ssttttt"
    assert len(some) == len(drawn) == 7
    assert sorted(position for batch in drawn for position in batch) == [*SUSPECTS.tolist(), *TRUSTED.tolist()]
    assert [some.phase_of(place) for place in range(8)] == [0, 0, 1, 1, 1, 1, 1, 0]
    assert max(map(len, drawn)) - min(map(len, drawn[:2])) <= 2


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


def test_loaders_whose_batches_cannot_be_known_are_refused() -> None:
    data: Any = list(range(8))
    with pytest.raises(DataError, match="batch_size=None"):
        require_batches(DataLoader(data, batch_size=None))
    with pytest.raises(DataError, match="in_order=False"):
        require_batches(SimpleNamespace(batch_sampler=[[0]], in_order=False))
    require_batches(DataLoader(data))


def trainer(accumulate: int = 1, scale: float | None = None) -> Any:
    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    return SimpleNamespace(accumulate_grad_batches=accumulate, precision_plugin=SimpleNamespace(scaler=scaler))


def gradient(ascent: Ascent, where: Any, value: float) -> float:
    weight = torch.tensor(value, requires_grad=True)
    loss = weight * 1.0
    ascent.at_backward(where, loss)
    loss.backward()
    return float(weight.grad)


@pytest.mark.parametrize(
    ("bound", "value", "expected"),
    [(None, 1.0, -1.0), (None, 50.0, -1.0), (math.log(10), 2.3, -1.0), (math.log(10), 2.4, 0.0)],
)
def test_gradients_of_suspects_change_their_sign_up_to_the_loss_of_chance(
    bound: float | None, value: float, expected: float
) -> None:
    ascent = Ascent(bound)
    ascent.at_batch_start(trainer(), phases(), 0)
    assert gradient(ascent, trainer(), value) == expected


def test_gradients_of_trusted_samples_stay() -> None:
    ascent = Ascent(1.0)
    for i in range(3):
        ascent.at_batch_start(trainer(), phases(), i)
    assert gradient(ascent, trainer(), 9.0) == 1.0


def test_the_bound_is_on_the_loss_before_accumulation_and_scaling() -> None:
    where = trainer(accumulate=4, scale=1024.0)
    for value, expected in ((1.9, -1.0), (2.1, 0.0)):
        ascent = Ascent(2.0)
        ascent.at_batch_start(where, phases(), 0)
        assert gradient(ascent, where, value * 1024 / 4) == expected


def test_only_steps_that_hold_suspects_are_clipped() -> None:
    def norm(batches: int, bound: float | None, accumulate: int = 1) -> float:
        ascent, weight = Ascent(bound), torch.zeros(1, requires_grad=True)
        weight.grad = torch.tensor([50.0])
        for i in range(batches):
            ascent.at_batch_start(trainer(accumulate), phases(), i)
        ascent.at_step(torch.optim.SGD([weight], lr=1.0))
        return float(weight.grad)

    assert norm(1, 1.0) == pytest.approx(MAX_NORM, rel=1e-5)
    assert norm(3, 1.0) == 50.0
    assert norm(3, 1.0, accumulate=3) == pytest.approx(MAX_NORM, rel=1e-5)
    assert norm(1, None) == 50.0
