"""Directions of many labels at once: the same as by small literal loops, in few calls of the dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_backdoor.detection import directions as rooms
from lightning_backdoor.detection.directions import (
    discriminant,
    full_precision,
    group_by_label,
    inverse_root,
    sharpened_directions,
    split_labels,
)
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional import decide
from tests.detection import reference


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(values: Tensor, labels: Tensor) -> Tensor:
    return values


def planted(values: Tensor, labels: Tensor) -> Tensor:
    values[(labels == 1).nonzero().squeeze(1)[:15], :2] += 6
    return values


def shifted(values: Tensor, labels: Tensor) -> Tensor:
    """Nearly all of the variance of every unit lies between two groups."""
    values[::3] += 20
    return values


def rectified(values: Tensor, labels: Tensor) -> Tensor:
    values[:, 3] = 1.0
    return (values - 0.5).relu()


def stepped(values: Tensor, labels: Tensor) -> Tensor:
    return values.round()


@pytest.mark.parametrize("change", [noise, planted, shifted, rectified, stepped])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_directions_are_those_of_literal_loops(change: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    """Labels of different size share a batch; one is too small to be split."""
    labels = torch.arange(4).repeat_interleave(torch.tensor([60, 45, 38, 19]))
    labels = labels[torch.randperm(len(labels), generator=generator())]
    values = change(torch.randn(len(labels), 6, generator=generator()), labels).to(dtype)
    found = sharpened_directions(values, group_by_label(labels), 0.0)
    assert 3 not in found
    for label in range(3):
        expected = reference.directions(values[labels == label].float())
        assert len(found[label]) == len(expected)
        for one, other in zip(found[label], expected, strict=True):
            assert one.standardized_gap == pytest.approx(other.gap, rel=1e-5)
            assert one.members == other.members
            assert one.threshold == pytest.approx(other.threshold, rel=1e-4, abs=1e-4)
            weights = torch.zeros(6, dtype=torch.float64)
            weights[one.units] = one.weights.double()
            torch.testing.assert_close(weights, other.weights, rtol=1e-4, atol=1e-4)


def test_batches_of_labels_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(400) % 8
    values = planted(torch.randn(400, 6, generator=generator()), labels)
    together = sharpened_directions(values, group_by_label(labels), 0.0)
    monkeypatch.setattr("lightning_backdoor.detection.directions.block_size", lambda device: 1)
    alone = sharpened_directions(values, group_by_label(labels), 0.0)
    assert sorted(together) == sorted(alone) == list(range(8))
    for label, found in together.items():
        assert [one.members for one in found] == [one.members for one in alone[label]]
        assert [one.standardized_gap for one in found] == pytest.approx(
            [one.standardized_gap for one in alone[label]], rel=1e-5
        )


def test_discriminants_are_fitted_on_the_best_separated_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "MAX_UNITS", 4)
    monkeypatch.setattr(reference, "UNITS", 4)
    labels = torch.arange(120) % 2
    values = planted(torch.randn(120, 9, generator=generator()), labels)
    found, expected = sharpened_directions(values, group_by_label(labels), 0.0)[1], reference.directions(values[1::2])
    assert [one.standardized_gap for one in found] == pytest.approx([one.gap for one in expected], rel=1e-5)
    assert max(len(one.units) for one in found) == len(found[0].fitted) == 4


@pytest.mark.parametrize("size", [3, 70, 301])
def test_the_inverse_root_is_that_of_the_cholesky_factor(size: int) -> None:
    values = torch.randn(2, size, 2 * size, generator=generator(), dtype=torch.float64)
    matrices = values @ values.mT
    expected = torch.linalg.cholesky(matrices).inverse()
    torch.testing.assert_close(inverse_root(matrices), expected)


def test_many_units_are_worked_on_in_strips() -> None:
    """The weights solve the equation of the discriminant."""
    upper = torch.arange(90) < 30
    members = torch.randn(90, 150, generator=generator(), dtype=torch.float64) + upper[:, None] * torch.rand(150)
    weights, positions = discriminant(members.float(), upper)
    expected, places = reference.discriminant(members, upper)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(positions.double(), places, rtol=1e-4, atol=1e-4)


def test_divisions_of_a_label_with_the_same_ridge_share_what_is_factorized(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def counted(matrices: Tensor) -> Tensor:
        made.append(len(matrices))
        return inverse_root(matrices)

    monkeypatch.setattr(rooms, "inverse_root", counted)
    columns, counts = torch.randn(2, 4, 20_000, generator=generator()), torch.tensor([20_000, 20_000])
    values = rooms.standardize(columns, counts, torch.ones(2, 20_000, dtype=torch.bool))
    upper = torch.rand(6, 20_000, generator=generator()) < 0.3
    of = torch.tensor([0, 0, 0, 1, 1, 1])
    weights, positions = rooms.discriminants(values, upper, of)
    assert made[0] <= 4  # at most two of each label, where a step lies between them
    for place in range(6):
        alone = rooms.discriminants(values, upper[place : place + 1], of[place : place + 1])
        torch.testing.assert_close((weights[place], positions[place]), (alone[0][0], alone[1][0]))


def test_positions_are_split_in_every_label() -> None:
    labels = torch.arange(90) % 3
    positions = torch.randn(90, generator=generator()) + 8 * (torch.arange(90) < 45)
    for label, one in split_labels(positions, group_by_label(labels)).items():
        threshold, gap, members = reference.split(positions[labels == label])
        assert (one.threshold, one.standardized_gap) == pytest.approx((threshold, gap))
        assert one.members == members
        assert one.allowed_gap < one.standardized_gap


def test_values_that_are_not_finite_are_an_error() -> None:
    values, labels = torch.zeros(60, 3), torch.arange(60) % 2
    values[7, 1] = torch.inf
    with pytest.raises(ArgumentError, match="finite"):
        sharpened_directions(values, group_by_label(labels), 0.0)


def test_the_precision_of_products_is_that_of_the_user_afterwards() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


class Calls(TorchDispatchMode):
    """Counts what goes through the dispatcher, and how often a value goes from the device to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.told = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.told += func in {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("share", "most"), [(0.0, 1500), (0.3, 8000)], ids=["clean", "planted"])
def test_calls_do_not_grow_with_the_labels(share: float, most: int) -> None:
    """On a GPU every call is a launch, and every value that Python reads waits for all of them.

    A label in which a group stands out is searched again in several pairs of halves.
    """
    counted = []
    for number in (10, 40):
        labels = torch.arange(number * 40) % number
        centers = 4 * torch.randn(number, 8, generator=generator())
        values = centers[labels] + torch.randn(len(labels), 8, generator=generator())
        values[(labels == 0).nonzero().squeeze(1)[: round(40 * share)], :2] += 30
        with Calls() as calls:
            decision = decide(values, torch.zeros(len(labels)), labels, all_to_all=True)
        assert len(decision.subpopulations) == (share > 0)
        counted.append((calls.count, calls.told))
    print(counted)
    (few, told), (many, told_of_many) = counted
    assert many <= 1.2 * few
    assert many < most
    assert told_of_many <= 1.5 * told + 10


@pytest.mark.parametrize("share", [0.4, 0.9])
def test_early_neighbors_lead_to_a_group_that_single_units_do_not_show(share: float) -> None:
    """What the group has in common is spread over all units; so many of its neighbors, and a few others, disagree."""
    labels, group = torch.arange(400) % 2, torch.zeros(400, dtype=torch.bool)
    group[:120:2] = True
    common = torch.randn(40, generator=generator(1))
    values = torch.randn(400, 40, generator=generator())
    values[group] += 8 * common / torch.linalg.vector_norm(common)
    drawn = torch.rand(400, generator=generator(2))
    agreement = torch.where((group & (drawn < share)) | (drawn < 0.05), 0.3, 0.9)
    found = sharpened_directions(values, group_by_label(labels), 2.0, agreement)[0]
    best = max((one for one in found if one.early), key=lambda one: one.standardized_gap)
    upper = values[:, best.units] @ best.weights > best.threshold
    assert upper[labels == 0].equal(group[labels == 0])
    assert not any(one.early for one in sharpened_directions(values, group_by_label(labels), 2.0)[0])
    alike = torch.full((400,), 0.5)
    assert not any(one.early for one in sharpened_directions(values, group_by_label(labels), 2.0, alike)[0])
