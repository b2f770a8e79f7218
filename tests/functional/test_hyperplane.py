import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional.hyperplane import (
    HyperplaneStatistics,
    bias_scores,
    compromise_scores,
    strong_thresholds,
)


def network_outputs(n: int = 300, units: int = 7, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    activations = 3 * torch.randn(n, units, generator=generator) + 5
    return activations, (8 * torch.randn(n, classes, generator=generator)).softmax(dim=1)


def literal_scores(activations: Tensor, probabilities: Tensor, strong: float = 0.9, weak: float = 0.1) -> np.ndarray:
    """The paper's statistic, unit by unit and class by class."""
    a, p = activations.double().numpy(), probabilities.numpy()
    d = np.zeros((a.shape[1], p.shape[1]))
    for unit in range(a.shape[1]):
        for label in range(p.shape[1]):
            unit_shift, usual = a[p[:, label] > strong, unit], a[p[:, label] < weak, unit]
            if len(unit_shift) and len(usual):
                d[unit, label] = unit_shift.max() - (usual.mean() + 3 * usual.std())
    return d.max(axis=1)


@pytest.mark.parametrize("thresholds", [(0.9, 0.1), (0.4, 0.3)])
def test_equals_the_literal_loop(thresholds: tuple[float, float]) -> None:
    activations, probabilities = network_outputs()
    expected = literal_scores(activations, probabilities, *thresholds)
    np.testing.assert_allclose(
        compromise_scores(activations, probabilities, *thresholds), expected, atol=1e-6, rtol=1e-6
    )


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_batches_and_processes_make_no_difference(sizes: list[int], seed: int) -> None:
    activations, probabilities = network_outputs(n=sum(sizes), seed=seed)
    whole = HyperplaneStatistics(7, 4)
    whole.update(activations, probabilities)
    shares = [HyperplaneStatistics(7, 4), HyperplaneStatistics(7, 4)]
    for i, (a, p) in enumerate(zip(activations.split(sizes), probabilities.split(sizes), strict=True)):
        shares[i % 2].update(a, p)
    merged = HyperplaneStatistics(7, 4)
    merged.load([share.state() for share in shares])
    torch.testing.assert_close(merged.activation_excess(), whole.activation_excess(), atol=1e-9, rtol=1e-9)
    assert torch.equal(merged.largest, whole.largest)


def test_memory_depends_on_units_and_classes_alone() -> None:
    statistics = HyperplaneStatistics(7, 4)
    size = statistics.state().numel()
    for seed in range(3):
        statistics.update(*network_outputs(seed=seed))
    assert statistics.state().numel() == size == 4 * (3 * 7 + 2)


def test_a_class_without_confident_samples_scores_zero() -> None:
    activations, probabilities = network_outputs()
    flat = torch.full_like(probabilities, 0.25)
    assert torch.equal(compromise_scores(activations, flat), torch.zeros(7))


def test_a_class_that_is_never_ruled_out_scores_zero_instead_of_nan() -> None:
    activations = torch.tensor([[5.0], [7.0]])
    probabilities = torch.tensor([[0.95, 0.05], [0.92, 0.08]])  # W_0 is empty, S_1 is empty
    assert compromise_scores(activations, probabilities).tolist() == [0.0]


def test_a_planted_hyperplane_unit_stands_out_and_its_clean_twin_does_not() -> None:
    activations, probabilities = network_outputs(n=2000)
    clean = compromise_scores(activations, probabilities)
    of_class_one = (probabilities[:, 1] > 0.9).nonzero().squeeze(1)[:20]
    activations[of_class_one, 3] += 100
    planted = compromise_scores(activations, probabilities)
    assert planted.argmax() == 3
    assert planted[3] > 50 > clean.max() + 40
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(planted[others], clean[others])


def test_thresholds_fall_back_where_no_sample_is_confident() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(5000, generator=generator) * 0.6
    predicted = torch.arange(5000) % 2
    confidence[0] = 0.95  # class 0 has a confident sample
    thresholds, replaced = strong_thresholds(confidence, predicted, classes=3)
    assert replaced == [1]
    assert thresholds[0] == thresholds[2] == torch.tensor(0.9)
    assert ((confidence > thresholds[1]) & (predicted == 1)).sum() == math.ceil(0.01 * 2500)


def test_the_fallback_takes_twenty_samples_or_all_there_are() -> None:
    thresholds, _ = strong_thresholds(torch.linspace(0.1, 0.5, 30), torch.zeros(30, dtype=torch.long), classes=1)
    assert (torch.linspace(0.1, 0.5, 30) > thresholds[0]).sum() == 20
    thresholds, _ = strong_thresholds(torch.full((5,), 0.3), torch.zeros(5, dtype=torch.long), classes=1)
    assert thresholds[0] < 0.3


def test_bias_scores_standardise_layers() -> None:
    raw = torch.tensor([[1.0, 1000.0], [2.0, 990.0], [9.0, 995.0]])
    assert bias_scores(raw).argmax() == 2
    wide = torch.tensor([[1.0, 1000.0], [2.0, 990.0], [5.0, 995.0]])
    assert bias_scores(wide).argmax() == 0
    assert bias_scores(wide, torch.tensor([1.0, 990.0]), torch.tensor([1.0, 10.0])).argmax() == 2


@pytest.mark.parametrize("wrong", [{"strong": 0.0}, {"strong": 1.5}, {"weak": 0.0}, {"weak": 10.0}])
def test_thresholds_are_probabilities(wrong: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match="must be probabilities"):
        HyperplaneStatistics(2, 2, **wrong)


def test_shapes_are_checked() -> None:
    with pytest.raises(ArgumentError, match=r"must have shape \(B, 2\)"):
        HyperplaneStatistics(2, 3).update(torch.zeros(4, 3), torch.zeros(4, 3))
