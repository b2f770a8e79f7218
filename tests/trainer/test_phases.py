"""Phases of an epoch: what is drawn, in which order, on how many processes, and how the loss is turned around."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_backdoor.errors import DataError
from lightning_backdoor.functional import forgetting_factors
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


def trainer(accumulate: int = 1) -> Any:
    return SimpleNamespace(accumulate_grad_batches=accumulate)


LABELS = torch.tensor([0, 1, 1])
LOGITS = torch.tensor([[4.0, 1.0, 0.0], [2.0, 3.0, 1.0], [5.0, 0.0, 1.0]])  # the last one is forgotten


def gradients(ascent: Ascent, batches: int = 1, loss: Any = F.cross_entropy) -> tuple[torch.Tensor, torch.Tensor]:
    """Value of the loss and its gradient at the logits of a batch."""
    head = ascent._head or torch.nn.Identity()
    for i in range(batches):
        ascent.at_batch_start(trainer(), phases(), LABELS, i)
    logits = LOGITS.clone().requires_grad_()
    value = loss(head(logits), LABELS)
    ascent.at_backward(value)
    value.backward()
    return value.detach(), logits.grad


@pytest.mark.parametrize("weight", [1.0, 2.0 / 1024])
def test_bounded_ascent_is_descent_on_the_chance_of_any_other_label_for_those_that_obey(weight: float) -> None:
    def forget(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        chance = logits.softmax(dim=1)[range(len(labels)), labels]
        return weight * -torch.log(1 - chance)[:2].sum() / len(labels)

    logits = LOGITS.clone().requires_grad_()
    forget(logits, LABELS).backward()
    ascent = Ascent(torch.nn.Identity(), bounded=True)
    value, found = gradients(ascent, loss=lambda *given: weight * F.cross_entropy(*given))
    assert value > 0, "the logged loss is the user's"
    torch.testing.assert_close(found, logits.grad)
    assert not found[2].any()
    ascent.release()


def test_a_very_sure_model_still_feels_the_ascent() -> None:
    factors = forgetting_factors(torch.tensor([[30.0, 0.0], [12.0, 0.0]]), torch.tensor([0, 0]))
    assert torch.isfinite(factors).all()
    assert (factors < -1e5).all()


@pytest.mark.parametrize("bounded", [True, False])
def test_without_a_head_or_bounds_the_whole_loss_changes_its_sign(bounded: bool) -> None:
    head = None if bounded else torch.nn.Identity()
    _, descent = gradients(Ascent(head, bounded=bounded), batches=3)
    _, climb = gradients(Ascent(head, bounded=bounded), batches=1)
    assert torch.equal(climb, -descent)


def test_gradients_of_trusted_samples_stay_after_those_of_suspects() -> None:
    logits = LOGITS.clone().requires_grad_()
    F.cross_entropy(logits, LABELS).backward()
    _, found = gradients(Ascent(torch.nn.Identity(), bounded=True), batches=3)
    assert torch.equal(found, logits.grad)


def test_only_steps_that_hold_suspects_are_clipped() -> None:
    def norm(batches: int, bounded: bool, accumulate: int = 1) -> float:
        ascent, weight = Ascent(None, bounded=bounded), torch.zeros(1, requires_grad=True)
        weight.grad = torch.tensor([50.0])
        for i in range(batches):
            ascent.at_batch_start(trainer(accumulate), phases(), LABELS, i)
        ascent.at_step(torch.optim.SGD([weight], lr=1.0))
        return float(weight.grad)

    assert norm(1, True) == pytest.approx(MAX_NORM, rel=1e-5)
    assert norm(3, True) == 50.0
    assert norm(3, True, accumulate=3) == pytest.approx(MAX_NORM, rel=1e-5)
    assert norm(1, False) == 50.0
