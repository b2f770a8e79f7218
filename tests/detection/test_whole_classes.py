"""Labels that stand out as a whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_backdoor.detection.whole_classes import _p_value, student_upper_tail, whole_classes

IMAGES = 200


def rates(labels: int, seed: int = 0) -> Tensor:
    """What the patterns of clean labels do: a few images get each label, more of them the first one."""
    generator = torch.Generator().manual_seed(seed)
    usual = 0.05 * torch.rand(labels, labels, generator=generator)
    usual[:, 0] += 0.15
    return usual


def found(given: Tensor, rate: float = 0.01) -> list[int]:
    labels = list(range(10, 10 + len(given)))
    return [one.label for one in whole_classes(given, labels, IMAGES, false_alarm_rate=rate, scans=3)]


def test_a_label_whose_pattern_turns_other_images_into_it_is_found_and_its_clean_twin_is_not() -> None:
    planted = rates(10)
    assert found(planted) == []
    planted[4, 4] = 0.9
    (one,) = whole_classes(planted, list(range(10)), IMAGES, false_alarm_rate=0.01)
    assert (one.label, one.rate) == (4, pytest.approx(0.9))
    assert one.others == pytest.approx(float(rates(10).diagonal().max()))
    assert one.p_value < 1e-4


def test_a_label_that_any_change_leads_to_is_not_found() -> None:
    """Its own pattern does no more than those of the other labels."""
    sink = rates(10)
    sink[:, 4] = 0.9
    assert found(sink) == []


def test_less_than_half_of_the_images_is_no_signal() -> None:
    weak = torch.zeros(50, 50)
    weak[4, 4] = 0.45
    assert found(weak) == []


@pytest.mark.parametrize("labels", [2, 3])
def test_so_few_labels_have_no_others_to_be_compared_with(labels: int) -> None:
    planted = torch.zeros(labels, labels)
    planted[1, 1] = 1.0
    assert found(planted) == []


def test_normal_rates_are_found_as_seldom_as_stated() -> None:
    """On the transformed scale, with a rate of one in two so that a few hundred sets show it, and no half to reach."""
    alarms, sets = 0, 300
    generator = torch.Generator().manual_seed(0)
    for _ in range(sets):
        angles = (0.9 + 0.1 * torch.randn(8, 8, generator=generator)).clamp(0, torch.pi / 2)
        alarms += bool(whole_classes(angles.sin().square(), list(range(8)), 10**6, false_alarm_rate=0.5))
    assert alarms <= 0.5 * sets


def test_a_p_value_is_uniform_among_normal_values() -> None:
    """It is at most so large as often as it says, and no more seldom: each rate within three standard errors."""
    values = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    p_values = torch.tensor([_p_value(float(row[0]), row[1:], 10**6) for row in values])
    for rate in (0.01, 0.1, 0.5):
        error = (rate * (1 - rate) / len(values)) ** 0.5
        assert float((p_values <= rate).float().mean()) == pytest.approx(rate, abs=3 * error)


def test_equal_rates_deviate_by_the_error_of_few_images() -> None:
    """Of 25 images: 0.1 on the transformed scale, so that 0.2 beside nine equal values is t = 2 / sqrt(1 + 1 / 9)."""
    expected = student_upper_tail(2 / (10 / 9) ** 0.5, 8)
    assert _p_value(0.7, torch.full((9,), 0.5), 25) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("value", "degrees", "chance"), [(0.0, 5, 0.5), (6.314, 1, 0.05), (4.501, 8, 0.001)])
def test_tail_of_students_distribution(value: float, degrees: int, chance: float) -> None:
    """Quantiles as printed in tables."""
    assert student_upper_tail(value, degrees) == pytest.approx(chance, rel=1e-3)
