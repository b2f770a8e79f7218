"""How the loss of suspects is turned around, and how far a step may go."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional import forgetting_loss
from lightning_backdoor.responses.ascent import MAX_NORM, Ascent
from tests.loading.test_batch_schedule import phases


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
        ascent.prepare_batch(running, phases(), ALL_LABELS, i)
    logits = logits.clone().requires_grad_()
    value = loss(head(logits).float(), LABELS)
    ascent.turn_loss(running, value)
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


@pytest.mark.case("57")
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
        ascent.prepare_batch(running, phases(), ALL_LABELS, i)
        logits = LOGITS[: 2 if i == 1 else 3].clone().requires_grad_()
        loss = F.cross_entropy(compiled(logits), LABELS[: len(logits)])
        assert len(ascent._logits) == (i < 2)
        ascent.turn_loss(running, loss)
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
            ascent.prepare_batch(trainer(accumulate), phases(), ALL_LABELS, i)
        ascent.limit_step(trainer(accumulate, scale), optimizer(weight))
        return float(weight.grad)

    assert norm(1, True) == pytest.approx(MAX_NORM, rel=1e-5)
    assert norm(3, True) == 50.0
    assert norm(3, True, accumulate=3) == pytest.approx(MAX_NORM, rel=1e-5)
    assert norm(1, False) == 50.0
    assert norm(1, True, scale=4.0) == pytest.approx(MAX_NORM, rel=1e-5), "unscaled before"
    assert norm(1, True, scale=4.0, fused=True) == pytest.approx(4 * MAX_NORM, rel=1e-5), "unscales by itself, later"
