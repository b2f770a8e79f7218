"""The scorers of the baselines against literal loops, closed forms, and planted second populations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_backdoor.baselines import (
    activation_clusters,
    deep_knn_scores,
    select_by_rejection,
    select_clusters,
    select_per_class,
    spectral_signature_scores,
    strip_scores,
)
from lightning_backdoor.baselines.activation_clustering import silhouette_score
from lightning_backdoor.baselines.components import principal_components
from lightning_backdoor.baselines.scored import decision_of
from lightning_backdoor.baselines.strip import blend
from lightning_backdoor.errors import ArgumentError


def classes(n: int = 120, d: int = 6, planted: int = 12, apart: float = 12.0) -> tuple[Tensor, Tensor, Tensor]:
    """Three classes of features; ``planted`` samples of class 1 have moved away from the others. And which ones."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    features = torch.randn(n, d, generator=generator) + 4 * torch.nn.functional.one_hot(labels, d)
    truth = torch.zeros(n, dtype=torch.bool)
    truth[(labels == 1).nonzero().squeeze(1)[:planted]] = True
    features[truth, 5] += apart
    return features, labels, truth


@pytest.mark.parametrize("d", [6, 60], ids=["more samples", "more dimensions"])
def test_spectral_signatures_are_those_of_a_loop_over_numpys_singular_vectors(d: int) -> None:
    features, labels, _ = classes(d=d)
    expected = np.zeros(len(labels))
    for label in range(3):
        members = [i for i in range(len(labels)) if labels[i] == label]
        rows = features[members].double().numpy()
        centerd = rows - rows.mean(axis=0)
        direction = np.linalg.svd(centerd)[2][0]
        for i, row in zip(members, centerd, strict=True):
            expected[i] = (row @ direction) ** 2
    np.testing.assert_allclose(spectral_signature_scores(features, labels), expected, rtol=1e-4, atol=1e-5)


def test_spectral_signatures_remove_planted_samples_and_as_many_of_each_clean_class() -> None:
    features, labels, truth = classes()
    keep = select_per_class(spectral_signature_scores(features, labels), labels, 0.3)
    assert not keep[truth].any()
    assert [int((~keep & (labels == label)).sum()) for label in range(3)] == [12, 12, 12]


def test_components_are_a_turn_of_the_features() -> None:
    features, *_ = classes()
    found = principal_components(features, 6)
    distances = torch.cdist(features.double(), features.double())
    torch.testing.assert_close(torch.cdist(found, found), distances, atol=1e-5, rtol=1e-5)
    assert (found.var(dim=0).diff() <= 0).all()


def test_neighbors_are_those_of_a_loop() -> None:
    features, labels, _ = classes()
    features[50:60] = features[50]  # twins, whose distance is zero
    k = 7
    expected = []
    for i in range(len(labels)):
        distances = (features.double() - features[i].double()).square().sum(dim=1)
        distances[i] = math.inf
        votes = [0] * 3
        for j in distances.argsort(stable=True)[:k].tolist():
            votes[int(labels[j])] += 1
        own = votes.pop(int(labels[i]))
        expected.append((max(votes) - own) / k)
    found = deep_knn_scores(features, labels, k)
    unique = torch.ones(len(labels), dtype=torch.bool)
    unique[50:60] = False  # which of the twins are the k nearest ones is not determined
    near_twins = torch.cdist(features, features[50:51]).squeeze(1) < 3
    checked = unique & ~near_twins
    assert checked.sum() > 60
    torch.testing.assert_close(found[checked], torch.tensor(expected)[checked])


def test_a_sample_is_no_neighbor_of_its_own_even_among_many_twins() -> None:
    features, labels = torch.zeros(40, 2), torch.zeros(40, dtype=torch.long)
    labels[0] = 1
    scores = deep_knn_scores(features, labels, 3)
    assert scores[0] == 1.0
    assert (scores[1:] <= -1 / 3).all()


def test_wrong_labels_are_not_the_plurality_of_their_neighbors() -> None:
    features, labels, _ = classes(apart=0.0)
    features += 8 * torch.nn.functional.one_hot(labels, 6)
    given = labels.clone()
    given[:5] = (given[:5] + 1) % 3
    assert (deep_knn_scores(features, given, 30) > 0).nonzero().squeeze(1).tolist() == [0, 1, 2, 3, 4]
    assert (deep_knn_scores(features, labels, 30) <= 0).all()


def test_entropies_are_those_of_a_loop() -> None:
    logits = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    counts = torch.ones(4, 5, dtype=torch.bool)
    counts[2, 3] = False
    for i in range(4):
        entropies = []
        for t in range(5):
            exponentials = [math.exp(value) for value in logits[i, t].tolist()]
            shares = [value / sum(exponentials) for value in exponentials]
            if counts[i, t]:
                entropies.append(-sum(share * math.log2(share) for share in shares))
        assert strip_scores(logits, counts)[i] == pytest.approx(-sum(entropies) / len(entropies), abs=1e-6)
    assert strip_scores(torch.zeros(1, 2, 8)) == pytest.approx(-3.0)
    assert strip_scores(1e4 * torch.eye(3)[None]) == pytest.approx(0.0)


def test_strip_has_no_entropy_of_an_infinite_logit_that_is_a_chance_of_zero_or_does_not_count() -> None:
    logits = torch.tensor([[[0.0, 0.0, -math.inf], [math.inf, math.inf, 0.0]]])
    counts = torch.tensor([[True, False]])
    torch.testing.assert_close(strip_scores(logits, counts), torch.tensor([-1.0]))


def test_blending_is_the_mean_of_both_images() -> None:
    pixels = torch.tensor([0, 100, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    assert blend(pixels, torch.full((1, 1, 1), 200, dtype=torch.uint8)).flatten().tolist() == [100, 150, 228]


def test_rejection_removes_its_share_of_a_normal_distribution_and_all_of_what_is_far() -> None:
    scores = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    assert float((~select_by_rejection(scores, 0.01)).float().mean()) == pytest.approx(0.01, abs=0.003)
    scores[:1000] = 9.0
    removed = ~select_by_rejection(scores, 0.01)
    assert removed[:1000].all()
    assert float(removed[1000:].float().mean()) < 0.01


def test_the_silhouette_is_that_of_a_loop() -> None:
    points = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)).double()
    second = torch.tensor([True] * 3 + [False] * 6)
    total = 0.0
    for i in range(9):
        means = {}
        for cluster in (True, False):
            others = [j for j in range(9) if j != i and bool(second[j]) == cluster]
            means[cluster] = sum(float((points[i] - points[j]).norm()) for j in others) / len(others)
        within, between = means[bool(second[i])], means[not second[i]]
        total += (between - within) / max(within, between)
    assert silhouette_score(points, second) == pytest.approx(total / 9)
    assert silhouette_score(points, torch.zeros(9, dtype=torch.bool)) == 0.0
    metrics = pytest.importorskip("sklearn.metrics")
    alone = torch.arange(9) == 4
    assert silhouette_score(points, alone) == pytest.approx(metrics.silhouette_score(points, alone))


def test_clustering_finds_the_planted_cluster_and_no_other() -> None:
    features, labels, truth = classes()
    clusters = activation_clusters(features, labels, components=2)
    assert torch.equal(clusters.scores[labels == 1] > 0, truth[labels == 1])
    assert clusters.shares[1] == pytest.approx(12 / 40)
    assert torch.equal(select_clusters(clusters, labels, silhouette=0.45), ~truth)
    assert select_clusters(clusters, labels, size=0.2, silhouette=0.45).all(), "30 % are not a small cluster then"
    clean, labels, _ = classes(apart=0.0)
    assert select_clusters(activation_clusters(clean, labels, components=2), labels, silhouette=0.45).all()


def test_clustering_is_that_of_independent_components() -> None:
    """The paper reduces by ICA: the same clusters and silhouettes as from whitened principal components."""
    decomposition = pytest.importorskip("sklearn.decomposition")
    features, labels, truth = classes(d=8)
    rows = features[labels == 1]
    independent = decomposition.FastICA(4, whiten="unit-variance", random_state=0, tol=1e-2).fit_transform(rows)
    clusters = activation_clusters(features, labels, components=4)
    expected = silhouette_score(torch.from_numpy(independent).double(), truth[labels == 1])
    assert clusters.silhouettes[1] == pytest.approx(expected, abs=1e-3)


def test_scores_belong_to_their_samples_whatever_the_order() -> None:
    features, labels, _ = classes()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    for score in (
        spectral_signature_scores,
        lambda x, y: deep_knn_scores(x, y, 9),
        lambda x, y: activation_clusters(x, y, components=2).scores.where(y == 1, 0.0),  # one best cut
    ):
        torch.testing.assert_close(score(features, labels)[order], score(features[order], labels[order]))


def test_classes_without_anything_to_split_are_kept() -> None:
    features = torch.cat([torch.ones(5, 3), torch.randn(1, 3)])
    labels = torch.tensor([0, 0, 0, 0, 0, 2])
    clusters = activation_clusters(features, labels)
    assert clusters.shares == {0: 0.0, 2: 0.0}
    assert select_clusters(clusters, labels).all()
    assert spectral_signature_scores(features, labels).abs().max() < 1e-6


def test_a_decision_keeps_to_the_limit_and_cuts_below_what_is_removed() -> None:
    scores = torch.tensor([0.1, 5.0, 4.0, 3.0])
    decision = decision_of(scores, torch.tensor([True, False, False, False]), "mine", max_removed=0.5)
    assert decision.keep.tolist() == [True, False, False, True]
    assert (decision.threshold, decision.num_flagged_before_cap, decision.rule) == (3.0, 3, "mine, max_removed(0.5)")
    nothing = decision_of(scores, torch.ones(4, dtype=torch.bool), "mine", max_removed=0.5)
    assert nothing.threshold == math.inf


def test_wrong_shapes() -> None:
    features, labels, _ = classes()
    for wrong in ((features[:, 0], labels), (features, labels[:5]), (features, labels.float())):
        for score in (spectral_signature_scores, activation_clusters, lambda x, y: deep_knn_scores(x, y, 3)):
            with pytest.raises(ArgumentError, match=r"`features` must have shape \(N, D\)"):
                score(*wrong)
    with pytest.raises(ArgumentError, match="`k` must be at least 1 and below the number of samples, 120, got 120"):
        deep_knn_scores(features, labels, 120)
    with pytest.raises(ArgumentError, match=r"`logits` must have shape \(N, T, K\)"):
        strip_scores(torch.zeros(3, 2))
