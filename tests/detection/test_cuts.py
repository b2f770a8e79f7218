"""Cuts of one score per sample, against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional import limit_removed, natural_break, select_fraction

numbers = st.integers(-40, 40).map(lambda i: i / 8)


def within(values: list[float], at: float) -> float:
    """Sum of squared deviations of the groups on both sides of ``at``, by loops."""
    total = 0.0
    for group in ([v for v in values if v <= at], [v for v in values if v > at]):
        center = sum(group) / len(group)
        total += sum((v - center) ** 2 for v in group)
    return total


@settings(max_examples=200, deadline=None)
@given(st.lists(numbers, min_size=2, max_size=25).filter(lambda v: min(v) < max(v)))
def test_natural_break_is_the_best_of_all_breaks(values: list[float]) -> None:
    found = natural_break(torch.tensor(values, dtype=torch.float64))
    assert found in values
    assert found < max(values)
    best = min(within(values, at) for at in values if at < max(values))
    assert within(values, found) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_natural_break_far_from_zero(dtype: torch.dtype) -> None:
    values = torch.tensor([1000.0, 1001.0, 1002.0, 1008.0, 1009.0], dtype=dtype)
    assert natural_break(values) == 1002.0
    assert (values > natural_break(values)).tolist() == [False, False, False, True, True]


def test_natural_break_does_not_part_equal_values() -> None:
    assert natural_break(torch.tensor([0.0] * 50 + [1.0])) == 0.0
    assert natural_break(torch.tensor([1.0] * 50 + [0.0])) == 0.0


def test_natural_break_agrees_with_kmeans() -> None:
    vq = pytest.importorskip("scipy.cluster.vq")
    generator = torch.Generator().manual_seed(1)
    values = torch.cat([torch.randn(80, generator=generator), 6 + torch.randn(20, generator=generator)]).double()
    upper = values > natural_break(values)
    centers, _ = vq.kmeans(values[:, None].numpy(), np.array([[0.0], [6.0]]))
    assert sorted(centers[:, 0].tolist()) == pytest.approx([float(values[~upper].mean()), float(values[upper].mean())])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (torch.ones(5), "all equal"),
        (torch.ones(1), r"N >= 2.*\(1,\)"),
        (torch.ones(3, 2), r"N >= 2.*\(3, 2\)"),
        (torch.tensor([1.0, math.nan, 2.0]), "finite"),
        (torch.tensor([1.0, math.inf, 2.0]), "finite"),
    ],
)
def test_natural_break_says_what_it_cannot_split(values: Tensor, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        natural_break(values)


@settings(deadline=None)
@given(st.lists(numbers, min_size=1, max_size=30), st.floats(0, 0.999))
def test_select_fraction_is_the_papers_count(values: list[float], fraction: float) -> None:
    scores = torch.tensor(values)
    keep, threshold = select_fraction(scores, fraction)
    assert int((~keep).sum()) == int(fraction * len(values))
    assert bool((scores[keep] <= threshold).all())
    assert bool((scores[~keep] >= threshold).all())
    if len(set(values)) == len(values):
        assert torch.equal(keep, ~(scores > threshold))


def test_select_fraction_of_nothing_keeps_all() -> None:
    keep, threshold = select_fraction(torch.tensor([1.0, 5.0, 2.0]), 0.3)
    assert bool(keep.all())
    assert threshold == math.inf
    assert select_fraction(torch.tensor([1.0, 5.0]), 0.0)[1] == math.inf


def test_select_fraction_cuts_ties_by_position() -> None:
    assert select_fraction(torch.ones(4), 0.5)[0].tolist() == [False, False, True, True]


def test_select_fraction_never_removes_what_must_stay() -> None:
    keep, threshold = select_fraction(torch.tensor([-math.inf, 3.0, -math.inf, 2.0]), 0.75)
    assert keep.tolist() == [True, False, True, False]
    assert threshold == -math.inf


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 20.0])
def test_select_fraction_wants_a_fraction(fraction: float) -> None:
    with pytest.raises(ArgumentError, match=rf"`fraction` must lie in \[0, 1\), got {fraction}.*pass 0.2"):
        select_fraction(torch.zeros(3), fraction)


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_limit_removed_keeps_the_most_suspicious(rows: list[tuple[float, bool]], share: float) -> None:
    scores, keep = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    before = keep.clone()
    limited = limit_removed(scores, keep, share)
    assert torch.equal(keep, before)
    assert bool(limited[keep].all())
    assert int((~limited).sum()) == min(int((~keep).sum()), int(share * len(rows)))
    spared = ~keep & limited
    if bool(spared.any()) and not bool(limited.all()):
        assert float(scores[~limited].min()) >= float(scores[spared].max())
