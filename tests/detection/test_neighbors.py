"""Neighbours: a literal loop, and who may change sides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional import neighbor_agreement, reconsider_uncertain


def literally(features: Tensor, labels: Tensor, trusted: Tensor, k: int) -> Tensor:
    shares, k = [], min(k, int(trusted.sum()) - 1)
    for i in range(len(features)):
        others = [j for j in trusted.nonzero().flatten().tolist() if j != i]
        cosines = [float(F.cosine_similarity(features[i], features[j], dim=0)) for j in others]
        nearest = sorted(zip(cosines, others, strict=True), reverse=True)[:k]
        shares.append(sum(int(labels[j] == labels[i]) for _, j in nearest) / len(nearest))
    return torch.tensor(shares)


@pytest.mark.parametrize("k", [1, 5, 20, 1000])
def test_agreement_is_that_of_a_literal_loop(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    labels = torch.randint(0, 4, (60,), generator=generator)
    features = torch.randn(60, 6, generator=generator) + 2 * F.one_hot(labels, 6)
    trusted = torch.rand(60, generator=generator) < 0.5
    torch.testing.assert_close(
        neighbor_agreement(features, labels, trusted, k), literally(features, labels, trusted, k)
    )


def test_lengths_do_not_matter_and_equal_images_are_neighbors_of_each_other() -> None:
    features, labels = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    trusted = torch.ones(30, dtype=torch.bool)
    scale = torch.rand(30, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    plain = neighbor_agreement(features, labels, trusted, 5)
    assert torch.equal(plain, neighbor_agreement(features * scale, labels, trusted, 5))
    same = neighbor_agreement(torch.ones(30, 4), torch.zeros(30, dtype=torch.long), trusted, 5)
    assert torch.equal(same, torch.ones(30))


@pytest.mark.parametrize("block", [1, 7, 60, 1000])
def test_blocks_do_not_show(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    labels, features = torch.randint(0, 4, (60,), generator=generator), torch.randn(60, 6, generator=generator)
    trusted = torch.rand(60, generator=generator) < 0.5
    whole = neighbor_agreement(features, labels, trusted, 5)
    monkeypatch.setattr("lightning_backdoor.detection.neighbors.BLOCK", block)
    assert torch.equal(neighbor_agreement(features, labels, trusted, 5), whole)


def test_wrong_arguments() -> None:
    features, labels = torch.zeros(3, 2), torch.zeros(3, dtype=torch.long)
    some = torch.tensor([True, True, False])
    with pytest.raises(ArgumentError, match="must have shape"):
        neighbor_agreement(features, labels[:2], some)
    with pytest.raises(ArgumentError, match="`k` must be at least 1"):
        neighbor_agreement(features, labels, some, 0)
    with pytest.raises(ArgumentError, match="two samples be trusted"):
        neighbor_agreement(features, labels, torch.tensor([True, False, False]))


USUAL = torch.linspace(0.4, 1.0, 200)  # agreement of the trusted samples of a label


def reconsider(uncertain: list[float], usual: Tensor = USUAL, most: int = 10) -> tuple[list[bool], list[bool]]:
    agreement = torch.cat([usual, torch.tensor(uncertain)])
    trusted = torch.arange(len(agreement)) < len(usual)
    labels = torch.zeros(len(agreement), dtype=torch.long)
    more, fewer = reconsider_uncertain(agreement, labels, trusted, ~trusted, most=most)
    assert not more[trusted].any()
    assert not fewer[trusted].any()
    return more[~trusted].tolist(), fewer[~trusted].tolist()


def test_a_majority_of_the_neighbors_makes_a_sample_trusted_and_hardly_any_suspect() -> None:
    assert reconsider([0.5, 1.0, 0.45, 0.1]) == ([True, True, False, False], [False, False, False, True])


def test_where_trusted_samples_disagree_themselves_nobody_is_trusted() -> None:
    assert reconsider([1.0, 0.5], USUAL - 0.4)[0] == [False, False]


def test_few_trusted_samples_are_no_ground_for_suspicion() -> None:
    assert reconsider([0.0], USUAL[::4])[1] == [False]


def test_the_bound_takes_those_that_agree_least() -> None:
    assert reconsider([0.2, 0.0, 0.1], most=2)[1] == [False, True, True]
    assert reconsider([0.2, 0.0, 0.1], most=0)[1] == [False] * 3
    assert reconsider([0.2, 0.0, 0.1], most=-1)[1] == [False] * 3


def test_samples_that_are_not_uncertain_stay_where_they_are() -> None:
    agreement, trusted = torch.cat([USUAL, torch.tensor([0.0, 1.0])]), torch.arange(202) < 200
    nobody = torch.zeros(202, dtype=torch.bool)
    more, fewer = reconsider_uncertain(agreement, torch.zeros(202, dtype=torch.long), trusted, nobody, most=9)
    assert not more.any()
    assert not fewer.any()
