"""Phases of an epoch: what is drawn, in which order, on how many processes, and how the loss is turned around."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_backdoor.errors import ArgumentError, DataError
from lightning_backdoor.functional import forgetting_loss
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


LABELS = torch.tensor([0, 1, 1])  # of the first batch
ALL_LABELS = torch.zeros(40, dtype=torch.long).scatter(0, phases().positions_of(0), LABELS)
LOGITS = torch.tensor([[4.0, 1.0, 0.0], [2.0, 3.0, 1.0], [5.0, 0.0, 1.0]])  # the last one is forgotten


def gradients(
    ascent: Ascent, batches: int = 1, loss: Any = F.cross_entropy, logits: torch.Tensor = LOGITS, running: Any = None
) -> torch.Tensor:
    """Gradient of the loss at the logits of a batch."""
    head, running = ascent._head or torch.nn.Identity(), running or trainer()
    for i in range(batches):
        ascent.at_batch_start(running, phases(), ALL_LABELS, i)
    logits = logits.clone().requires_grad_()
    value = loss(head(logits).float(), LABELS)
    ascent.at_backward(running, value)
    assert bool(value.isfinite())
    value.backward()
    ascent.release()
    assert logits.grad is not None
    return logits.grad


def forget(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The bounded loss, literally."""
    chance = logits.softmax(dim=1)[range(len(labels)), labels]
    return -torch.log(1 - chance)[:2].sum() / len(labels)


@pytest.mark.parametrize(("accumulate", "scale"), [(1, None), (4, None), (2, 1024.0)])
def test_bounded_ascent_is_descent_on_the_chance_of_any_other_label_for_those_that_obey(
    accumulate: int, scale: float | None
) -> None:
    logits = LOGITS.clone().requires_grad_()
    (forget(logits, LABELS) * (scale or 1.0) / accumulate).backward()
    found = gradients(Ascent(torch.nn.Identity(), bounded=True), running=trainer(accumulate, scale))
    torch.testing.assert_close(found, logits.grad)
    assert not found[2].any()


def test_forgetting_loss_literally_and_where_the_label_has_all_the_probability() -> None:
    torch.testing.assert_close(forgetting_loss(LOGITS, LABELS), forget(LOGITS, LABELS))
    sure = torch.tensor([[300.0, 0.0, 0.0]], requires_grad=True)
    forgetting_loss(sure, torch.tensor([0])).backward()
    torch.testing.assert_close(sure.grad, torch.tensor([[1.0, -0.5, -0.5]]))
    with pytest.raises(ArgumentError, match="K >= 2"):
        forgetting_loss(torch.zeros(3, 1), LABELS)


@pytest.mark.parametrize("infinite", [torch.inf, -torch.inf])
def test_forgetting_is_finite_beside_an_infinite_logit_of_a_sample_that_has_lost_its_label(infinite: float) -> None:
    logits, labels = torch.tensor([[2.0, 0.0, 0.0], [1.0, 3.0, 0.0]]), torch.tensor([0, 0])
    overflown = logits.clone()
    overflown[1] = torch.tensor([0.0, 5.0, infinite])
    found = []
    for values in (logits.requires_grad_(), overflown.requires_grad_()):
        loss = forgetting_loss(values, labels)
        loss.backward()
        found.append((loss.detach(), values.grad))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=0.3),
        lambda logits, labels: F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 3).float()),
        lambda logits, labels: F.cross_entropy(logits, labels) + torch.inf,
    ],
    ids=["smoothed", "binary", "infinite"],
)
def test_bounded_ascent_forgets_whatever_the_loss_of_the_user(loss: Any) -> None:
    usual = gradients(Ascent(torch.nn.Identity(), bounded=True))
    torch.testing.assert_close(gradients(Ascent(torch.nn.Identity(), bounded=True), loss=loss), usual)


def test_a_very_sure_model_still_feels_the_ascent_in_half_precision() -> None:
    sure = torch.tensor([[25.0, 0.0, 0.0], [0.0, 25.0, 0.0], [25.0, 0.0, 0.0]], dtype=torch.float16)
    found = gradients(Ascent(torch.nn.Identity(), bounded=True), logits=sure, running=trainer(1, 1024.0))
    expected = torch.tensor([[2.0, -1.0, -1.0], [-1.0, 2.0, -1.0], [0.0, 0.0, 0.0]]) * 1024 / 6
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)


def test_one_logit_of_two_classes_and_maps_of_one_pixel_are_logits() -> None:
    def one(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())

    single = torch.tensor([[-2.0], [1.0], [-3.0]])
    found = gradients(Ascent(torch.nn.Identity(), bounded=True), loss=one, logits=single)
    probabilities = torch.tensor([[2.0], [1.0], [0.0]]).sigmoid()
    torch.testing.assert_close(found, probabilities * torch.tensor([[-1.0], [1.0], [0.0]]) / 3)
    maps = gradients(
        Ascent(torch.nn.Identity(), bounded=True),
        loss=lambda logits, labels: F.cross_entropy(logits[:, :, 0, 0], labels),
        logits=LOGITS[:, :, None, None],
    )
    torch.testing.assert_close(maps[:, :, 0, 0], gradients(Ascent(torch.nn.Identity(), bounded=True)))


@pytest.mark.parametrize("bounded", [True, False])
def test_without_a_head_or_bounds_the_whole_loss_changes_its_sign(bounded: bool) -> None:
    head = None if bounded else torch.nn.Identity()
    descent = gradients(Ascent(head, bounded=bounded), batches=3)
    climb = gradients(Ascent(head, bounded=bounded), batches=1)
    assert torch.equal(climb, -descent)


def test_gradients_of_trusted_samples_stay_after_those_of_suspects() -> None:
    logits = LOGITS.clone().requires_grad_()
    F.cross_entropy(logits, LABELS).backward()
    assert torch.equal(gradients(Ascent(torch.nn.Identity(), bounded=True), batches=3), logits.grad)


def test_a_compiled_model_is_seen_and_nothing_stays_in_its_code() -> None:
    network = torch.nn.Sequential(torch.nn.Identity())
    compiled = torch.compile(network, backend="eager")
    compiled(LOGITS)
    ascent, running, found = Ascent(network[0], bounded=True), trainer(), []
    for i in range(4):  # suspects, suspects, trusted, trusted
        ascent.at_batch_start(running, phases(), ALL_LABELS, i)
        logits = LOGITS[: 2 if i == 1 else 3].clone().requires_grad_()
        loss = F.cross_entropy(compiled(logits), LABELS[: len(logits)])
        assert len(ascent._logits) == (i < 2)
        ascent.at_backward(running, loss)
        loss.backward()
        found.append(logits.grad)
    torch.testing.assert_close(found[0], gradients(Ascent(torch.nn.Identity(), bounded=True)))
    assert torch.equal(found[2], found[3])


def test_only_steps_that_hold_suspects_are_clipped() -> None:
    def norm(
        batches: int, bounded: bool, accumulate: int = 1, scale: float | None = None, fused: bool = False
    ) -> float:
        def optimizer(parameter: torch.Tensor) -> torch.optim.Optimizer:
            made = torch.optim.SGD([parameter], lr=1.0)
            made._step_supports_amp_scaling = fused  # type: ignore[attr-defined]
            return made

        ascent, weight = Ascent(None, bounded=bounded), torch.zeros(1, requires_grad=True)
        weight.grad = torch.tensor([50.0])
        for i in range(batches):
            ascent.at_batch_start(trainer(accumulate), phases(), ALL_LABELS, i)
        ascent.at_step(trainer(accumulate, scale), optimizer(weight))
        return float(weight.grad)

    assert norm(1, True) == pytest.approx(MAX_NORM, rel=1e-5)
    assert norm(3, True) == 50.0
    assert norm(3, True, accumulate=3) == pytest.approx(MAX_NORM, rel=1e-5)
    assert norm(1, False) == 50.0
    assert norm(1, True, scale=4.0) == pytest.approx(MAX_NORM, rel=1e-5), "unscaled before"
    assert norm(1, True, scale=4.0, fused=True) == pytest.approx(4 * MAX_NORM, rel=1e-5), "unscales by itself, later"


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
