import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional import center_repulsion_loss, fct_scores, select_trusted, split_by_rank


def test_fct_is_the_mean_square_by_default() -> None:
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    expected = [
        sum((x - y) ** 2 for x, y in zip(*rows, strict=True)) / 7 for rows in zip(a.tolist(), b.tolist(), strict=True)
    ]
    torch.testing.assert_close(fct_scores(a, b), torch.tensor(expected))


def test_cosine_and_normalized_fct_ignore_lengths() -> None:
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    cosine = fct_scores(a, b, "cosine")
    torch.testing.assert_close(fct_scores(3 * a, 0.1 * b, "cosine"), cosine)
    torch.testing.assert_close(fct_scores(3 * a, 0.1 * b, "normalized_mse"), 2 * cosine / 7)


@pytest.mark.parametrize("metric", ["mse", "normalized_mse", "cosine"])
def test_features_that_do_not_move_score_zero(metric: str) -> None:
    a = torch.randn(4, 6)
    torch.testing.assert_close(fct_scores(a, a, metric), torch.zeros(4), atol=1e-6, rtol=0)


def test_orthogonal_centers_have_no_loss_and_a_simplex_the_least() -> None:
    labels = torch.arange(8) % 4
    assert float(center_repulsion_loss(torch.eye(4)[labels], labels)) == 0
    simplex = torch.eye(4) - 0.25
    assert float(center_repulsion_loss(simplex[labels], labels)) == pytest.approx(-1 / 4)
    assert float(center_repulsion_loss(torch.ones(8, 4), labels)) == pytest.approx(12 / 16)


def test_repulsion_looks_at_labels_that_are_present_and_at_directions() -> None:
    features, labels = torch.rand(10, 5), torch.tensor([3, 7] * 5)
    a, b = features[::2].mean(0), features[1::2].mean(0)
    expected = 2 * float(a @ b) / float(a.norm() * b.norm()) / 4
    assert float(center_repulsion_loss(features, labels)) == pytest.approx(expected)
    assert float(center_repulsion_loss(9 * features, labels)) == pytest.approx(expected)
    assert float(center_repulsion_loss(features, torch.zeros(10, dtype=torch.long))) == pytest.approx(0, abs=1e-6)


def test_repulsion_has_a_gradient_that_turns_centers_apart() -> None:
    features = torch.rand(12, 6, requires_grad=True)
    labels = torch.arange(12) % 3
    before = center_repulsion_loss(features, labels)
    before.backward()
    assert center_repulsion_loss(features - 5 * features.grad, labels) < before


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=60), st.floats(0, 0.5), st.floats(0, 0.5))
def test_a_split_has_exact_sizes_and_respects_the_order(values: list[float], trusted: float, suspect: float) -> None:
    scores, n = torch.tensor(values), len(values)
    low, high = split_by_rank(scores, trusted, suspect)
    assert (int(low.sum()), int(high.sum())) == (int(trusted * n), int(suspect * n))
    assert not bool((low & high).any())
    if low.any() and high.any():
        assert scores[low].max() <= scores[~low].min()
        assert scores[high].min() >= scores[~high].max()


def test_ties_do_not_change_the_sizes() -> None:
    low, high = split_by_rank(torch.zeros(100))
    assert (int(low.sum()), int(high.sum())) == (20, 5)


@pytest.mark.parametrize("shares", [(20, 5), (-0.1, 0.1), (0.8, 0.3)])
def test_shares_that_cannot_be(shares: tuple[float, float]) -> None:
    with pytest.raises(ArgumentError, match="must be shares"):
        split_by_rank(torch.zeros(10), *shares)


def test_shapes_and_metric_are_checked() -> None:
    with pytest.raises(ArgumentError, match=r"must both have shape \(N, D\)"):
        fct_scores(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ArgumentError, match="`metric` must be"):
        fct_scores(torch.zeros(2, 3), torch.zeros(2, 3), "l1")
    with pytest.raises(ArgumentError, match=r"`features` must have shape \(B, D\)"):
        center_repulsion_loss(torch.zeros(2, 3), torch.zeros(3))
    assert math.isfinite(float(center_repulsion_loss(torch.zeros(2, 3), torch.tensor([0, 1]))))


def test_every_class_is_trusted_in_the_same_share_and_suspects_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 4
    scores = torch.rand(100, generator=generator) + labels * 10  # one class looks less suspicious than all others
    considered = torch.rand(100, generator=generator) > 0.2
    trusted = select_trusted(scores, labels, considered, 0.2)
    assert torch.bincount(labels[trusted]).tolist() == [5, 5, 5, 5]
    assert not (trusted & ~considered).any()
    for label in range(4):
        inside = (labels == label) & considered
        assert scores[inside & trusted].max() < scores[inside & ~trusted].min()


def test_a_class_with_few_samples_is_trusted_in_what_it_has() -> None:
    labels, considered = torch.tensor([0, 0, 1, 2]), torch.tensor([True, True, True, False])
    assert select_trusted(torch.arange(4.0), labels, considered, 0.1).tolist() == [True, False, True, False]
