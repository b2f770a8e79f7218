import math

import pytest
import torch
from torch import Tensor

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional import mixed_cross_entropy, ss_contrastive_loss


def literal_loss(views: Tensor, labels: Tensor, trusted: Tensor, temperature: float, reference: bool) -> float:
    """Anchor by anchor, positive by positive."""
    size = len(views)
    z = torch.cat([views[:, 0], views[:, 1]]).double()
    z = z / z.norm(dim=1, keepdim=True)
    total = 0.0
    for a in range(2 * size):
        i = a % size
        others = [q for q in range(2 * size) if q != a]
        positives = []
        for q in others:
            j = q % size
            pair = labels[i] == labels[j] and trusted[i] and (trusted[j] or reference)
            if i == j or pair:
                positives.append(q)
        normalizer = math.log(sum(math.exp(float(z[a] @ z[q]) / temperature) for q in others))
        total -= sum(float(z[a] @ z[p]) / temperature - normalizer for p in positives) / len(positives)
    return total / (2 * size) * temperature / 0.07


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_equals_the_literal_sum(temperature: float, reference: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(9, 2, 5, generator=generator)
    labels, trusted = torch.arange(9) % 3, torch.tensor([1, 1, 0, 1, 0, 1, 0, 1, 1], dtype=torch.bool)
    expected = literal_loss(views, labels, trusted, temperature, reference)
    found = float(ss_contrastive_loss(views, labels, trusted, temperature, reference_mask=reference))
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_reference_mask_differs_where_an_untrusted_image_shares_a_trusted_label() -> None:
    views, labels = torch.randn(4, 2, 3), torch.tensor([0, 0, 1, 1])
    trusted = torch.tensor([True, False, True, True])
    plain, reference = (ss_contrastive_loss(views, labels, trusted, reference_mask=mask) for mask in (False, True))
    assert float(plain) != pytest.approx(float(reference))
    everything = torch.ones(4, dtype=torch.bool)
    plain, reference = (ss_contrastive_loss(views, labels, everything, reference_mask=mask) for mask in (False, True))
    assert float(plain) == pytest.approx(float(reference))


def test_labels_of_untrusted_images_do_not_count() -> None:
    views, trusted = torch.randn(6, 2, 4), torch.zeros(6, dtype=torch.bool)
    one = ss_contrastive_loss(views, torch.zeros(6, dtype=torch.long), trusted)
    assert float(one) == pytest.approx(float(ss_contrastive_loss(views, torch.arange(6), trusted)))


def test_views_that_agree_cost_less() -> None:
    generator = torch.Generator().manual_seed(0)
    apart = torch.randn(8, 2, 16, generator=generator)
    together = apart[:, :1].repeat(1, 2, 1)
    labels, trusted = torch.arange(8), torch.ones(8, dtype=torch.bool)
    assert ss_contrastive_loss(together, labels, trusted) < ss_contrastive_loss(apart, labels, trusted)


def test_mixed_cross_entropy_is_two_means() -> None:
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    trusted = torch.tensor([1, 1, 0, 0, 1, 0], dtype=torch.bool)
    suspect = torch.tensor([0, 0, 1, 0, 0, 0], dtype=torch.bool)
    losses = [-float(row.log_softmax(0)[label]) for row, label in zip(logits, labels.tolist(), strict=True)]
    expected = (losses[0] + losses[1] + losses[4]) / 3 - 0.5 * losses[2]
    assert float(mixed_cross_entropy(logits, labels, trusted, suspect, 0.5)) == pytest.approx(expected, rel=1e-5)


def test_a_group_without_samples_adds_nothing() -> None:
    logits, labels = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])
    nobody, all_ = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    assert float(mixed_cross_entropy(logits, labels, nobody, nobody).detach()) == 0
    loss = mixed_cross_entropy(logits, labels, all_, nobody)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels))
    loss.backward()
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("infinite", [math.inf, -math.inf])
@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_an_infinite_logit_of_a_sample_that_does_not_count_is_without_effect(weight: float, infinite: float) -> None:
    """Half precision overflows; neither the value nor any gradient may turn into NaN by ``inf * 0``."""
    generator = torch.Generator().manual_seed(0)
    plain, labels = torch.randn(4, 3, generator=generator), torch.tensor([0, 1, 2, 0])
    trusted, suspect = torch.tensor([True, True, False, False]), torch.tensor([False, False, True, False])
    overflown = plain.clone()
    overflown[3] = torch.tensor([infinite, 0.0, 1.0])
    if weight == 0:
        overflown[2] = overflown[3]
    found = []
    for logits in (plain.requires_grad_(), overflown.requires_grad_()):
        loss = mixed_cross_entropy(logits, labels, trusted, suspect, weight)
        loss.backward()
        found.append((loss.detach(), logits.grad))
    torch.testing.assert_close(found[0], found[1])


def test_an_infinite_logit_of_a_trusted_sample_is_not_hidden() -> None:
    logits, everyone = torch.tensor([[-math.inf, 0.0], [1.0, 0.0]]), torch.ones(2, dtype=torch.bool)
    assert float(mixed_cross_entropy(logits, torch.tensor([0, 1]), everyone, ~everyone)) == math.inf


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match=r"shape \(B, 2, D\)"):
        ss_contrastive_loss(torch.zeros(4, 3, 5), torch.zeros(4), torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="`temperature`"):
        ss_contrastive_loss(torch.zeros(4, 2, 5), torch.zeros(4), torch.zeros(4, dtype=torch.bool), 0)
    with pytest.raises(ArgumentError, match="`weight`"):
        mixed_cross_entropy(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), torch.ones(1), torch.ones(1), -1)
