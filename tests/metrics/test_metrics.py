"""The metrics against scikit-learn, hand counts and their edge cases."""

from __future__ import annotations

import doctest
import math
import pickle

import pytest
import torch
from sklearn.metrics import precision_score, recall_score, roc_auc_score

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.metrics import AttackSuccessRate, DetectionRates, RecoveredAccuracy, attack, detection


@pytest.mark.parametrize("module", [attack, detection])
def test_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def rates(scores, keep, poisoned) -> dict[str, float]:
    metric = DetectionRates()
    metric.update(torch.as_tensor(scores, dtype=torch.float), torch.as_tensor(keep), torch.as_tensor(poisoned))
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.mark.parametrize("kind", [AttackSuccessRate, RecoveredAccuracy])
def test_fraction_over_batches_from_logits_and_from_classes(kind):
    logits, labels = torch.randn(50, 4), torch.randint(0, 4, (50,))
    expected = sum(int(row.argmax()) == int(label) for row, label in zip(logits, labels, strict=True)) / 50
    metric = kind()
    metric.update(logits[:7], labels[:7])
    metric.update(logits[7:].argmax(1), labels[7:])
    assert metric.compute().item() == pytest.approx(expected)
    metric.reset()
    metric.update(torch.tensor([1]), torch.tensor([1]))
    assert pickle.loads(pickle.dumps(metric)).compute() == 1.0


@pytest.mark.parametrize("kind", [AttackSuccessRate, RecoveredAccuracy])
def test_one_logit_tells_two_classes_and_labels_may_be_a_column(kind):
    logits, labels = torch.randn(50), torch.randint(0, 2, (50,))
    expected = kind()
    expected.update(torch.stack([torch.zeros(50), logits], 1), labels)
    for preds in (logits, logits[:, None], (logits > 0).long(), (logits > 0).long()[:, None]):
        for given in (labels, labels[:, None], labels.float(), labels[:, None].double()):
            metric = kind()
            metric.update(preds, given)
            assert metric.compute() == expected.compute()
    with pytest.raises(ArgumentError, match="logits of two classes, got labels up to 2"):
        kind().update(logits[:3], torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("kind", [AttackSuccessRate, RecoveredAccuracy])
def test_wrong_shapes(kind):
    with pytest.raises(ArgumentError, match=r"`preds` must be .*\(N,\) or logits .*got \(3, 4\) and \(2,\)"):
        kind().update(torch.zeros(3, 4), torch.zeros(2))


def test_an_empty_fraction_is_undefined():
    metric = AttackSuccessRate()
    metric.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert metric.compute().isnan()


@pytest.mark.parametrize("levels", [2, 5, 1000], ids=lambda count: f"{count} distinct scores")
@pytest.mark.parametrize("seed", range(5))
def test_against_scikit_learn(levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (80,), generator=generator).float() - levels / 2
    poisoned = torch.rand(80, generator=generator) < 0.2
    keep = torch.rand(80, generator=generator) < 0.5
    got = rates(scores, keep, poisoned)
    assert got["auroc"] == pytest.approx(roc_auc_score(poisoned, scores), abs=1e-6)
    assert got["tpr"] == pytest.approx(recall_score(poisoned, ~keep))
    assert got["fpr"] == pytest.approx(recall_score(~poisoned, ~keep))
    assert got["precision"] == pytest.approx(precision_score(poisoned, ~keep))


def test_batches_are_one_ranking():
    scores, poisoned = torch.randn(40), torch.arange(40) % 3 == 0
    keep = scores < 0.5
    metric = DetectionRates()
    for part in range(0, 40, 7):
        metric.update(scores[part : part + 7], keep[part : part + 7], poisoned[part : part + 7])
    whole = rates(scores, keep, poisoned)
    assert {name: value.item() for name, value in metric.compute().items()} == whole


def test_nothing_poisoned():
    got = rates([0.1, 0.2, 0.3, 0.4], [True, True, True, False], [False] * 4)
    assert math.isnan(got["tpr"])
    assert math.isnan(got["auroc"])
    assert got["fpr"] == 0.25
    assert got["precision"] == 0.0


def test_nothing_flagged():
    got = rates([0.1, 0.2, 0.3, 0.4], [True] * 4, [False, False, False, True])
    assert math.isnan(got["precision"])
    assert (got["tpr"], got["fpr"], got["auroc"]) == (0.0, 0.0, 1.0)


def test_everything_poisoned():
    got = rates([0.1, 0.2], [False, True], [True, True])
    assert math.isnan(got["auroc"])
    assert (got["tpr"], got["fpr"], got["precision"]) == (0.5, 0.0, 1.0)


def test_infinite_and_missing_scores():
    assert rates([math.inf, 0, -math.inf], [True] * 3, [True, False, False])["auroc"] == 1.0
    assert math.isnan(rates([math.nan, 0, 1], [True] * 3, [True, False, False])["auroc"])


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_no_sample_yet():
    assert all(value.isnan() for value in DetectionRates().compute().values())


@pytest.mark.parametrize("name", ["keep", "poisoned"])
@pytest.mark.parametrize("bad", [torch.zeros(4), torch.zeros(3, dtype=torch.bool)], ids=["dtype", "shape"])
def test_masks_are_checked(name, bad):
    masks = {"keep": torch.zeros(4, dtype=torch.bool), "poisoned": torch.zeros(4, dtype=torch.bool), name: bad}
    with pytest.raises(ArgumentError, match=rf"`{name}` must be a boolean mask of shape \(N,\) like `scores` \(4,\)"):
        DetectionRates().update(torch.zeros(4), **masks)
