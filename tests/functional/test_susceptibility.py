"""Susceptibility scores against loops over the paper's equation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional import susceptibility_scores


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("versions", [1, 2, 3])
@pytest.mark.parametrize("classes", [2, 7])
def test_equals_the_equation(versions: int, classes: int) -> None:
    original, denoised = draw(5, classes, seed=0), [draw(5, classes, seed=1 + v) for v in range(versions)]
    expected = [
        sum(abs(float(original[i, k]) - float(version[i, k])) for version in denoised for k in range(classes))
        for i in range(5)
    ]
    torch.testing.assert_close(susceptibility_scores(original, denoised), torch.tensor(expected))


def test_is_zero_only_where_nothing_moves() -> None:
    original = draw(4, 3, seed=0)
    moved = original.clone()
    moved[2, 1] += 0.5
    assert susceptibility_scores(original, [original, moved]).tolist() == pytest.approx([0, 0, 0.5, 0])


def test_follows_the_samples_and_ignores_the_order_of_versions_and_classes() -> None:
    original, first, second = (draw(6, 4, seed=s) for s in range(3))
    scores, order = susceptibility_scores(original, [first, second]), torch.tensor([3, 1, 0, 5, 4, 2])
    torch.testing.assert_close(susceptibility_scores(original[order], [first[order], second[order]]), scores[order])
    torch.testing.assert_close(susceptibility_scores(original, [second, first]), scores)
    classes = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        susceptibility_scores(original[:, classes], [first[:, classes], second[:, classes]]), scores
    )


@pytest.mark.parametrize(
    ("original", "denoised", "words"),
    [
        (torch.zeros(2, 3), [], "`denoised` must hold at least one"),
        (torch.zeros(2, 3), [torch.zeros(2, 3), torch.zeros(3, 3)], r"one shape.*\(2, 3\) and \(3, 3\)"),
        (torch.zeros(2), [torch.zeros(2)], r"one shape \(N, K\)"),
    ],
)
def test_says_which_shapes_disagree(original: Tensor, denoised: list[Tensor], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        susceptibility_scores(original, denoised)
