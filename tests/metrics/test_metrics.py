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


CLASSES = torch.tensor([0, 0, 1, 1, 1, 3])
PREDICTIONS = torch.tensor([2, 2, 2, 0, 1, 2])
AIMS = torch.full((6,), 2)


def test_success_of_every_source_class_and_of_every_attack_label():
    by_source = AttackSuccessRate(average=None, num_classes=4)
    by_source.update(PREDICTIONS[:2], AIMS[:2], classes=CLASSES[:2])
    by_source.update(PREDICTIONS[2:], AIMS[2:], classes=CLASSES[2:, None])
    expected = torch.tensor([1.0, 1 / 3, math.nan, 1.0])
    torch.testing.assert_close(by_source.compute(), expected, equal_nan=True)
    mean = AttackSuccessRate(average="macro", num_classes=4)
    mean.update(PREDICTIONS, AIMS, classes=CLASSES)
    assert mean.compute().item() == pytest.approx((1 + 1 / 3 + 1) / 3)
    by_aim = AttackSuccessRate(average=None, num_classes=3)
    by_aim.update(PREDICTIONS, AIMS)
    torch.testing.assert_close(by_aim.compute(), torch.tensor([math.nan, math.nan, 4 / 6]), equal_nan=True)
    by_aim.reset()
    with pytest.warns(UserWarning, match="called before the ``update`` method"):
        assert bool(by_aim.compute().isnan().all())
    all_images = AttackSuccessRate(num_classes=3)
    all_images.update(PREDICTIONS, AIMS)
    assert all_images.compute().item() == pytest.approx(4 / 6), "as in torchmetrics, micro needs no classes"


def test_recovered_images_of_every_class():
    recovered = RecoveredAccuracy(average=None, num_classes=4)
    recovered.update(PREDICTIONS, CLASSES)
    torch.testing.assert_close(recovered.compute(), torch.tensor([0.0, 1 / 3, math.nan, 0.0]), equal_nan=True)


def test_classes_work_in_torchmetrics_wrappers_and_when_pickled():
    from torchmetrics import ClasswiseWrapper  # noqa: PLC0415

    wrapped = ClasswiseWrapper(AttackSuccessRate(average=None, num_classes=4), prefix="asr_")
    wrapped.update(PREDICTIONS, AIMS, CLASSES)
    assert wrapped.compute()["asr_0"] == 1.0
    metric = AttackSuccessRate(average=None, num_classes=4)
    metric.update(PREDICTIONS, AIMS, CLASSES)
    assert torch.equal(pickle.loads(pickle.dumps(metric)).compute()[:2], metric.compute()[:2])


def test_detection_of_every_class_is_that_of_its_samples_alone():
    generator = torch.Generator().manual_seed(0)
    scores, classes = torch.rand(60, generator=generator), torch.randint(-1, 3, (60,), generator=generator)
    keep, poisoned = scores < 0.7, (torch.rand(60, generator=generator) < 0.4) & (classes != 1)
    metric = DetectionRates(average=None, num_classes=4)
    metric.update(scores[:20], keep[:20], poisoned[:20], classes[:20])
    metric.update(scores[20:], keep[20:], poisoned[20:], classes[20:])
    found = metric.compute()
    for label in range(3):
        own = classes == label
        for name, value in rates(scores[own], keep[own], poisoned[own]).items():
            assert found[name][label].item() == pytest.approx(value, nan_ok=True), (name, label)
    assert found["fpr"][3] == 0
    assert found["tpr"][[1, 3]].isnan().all(), "nothing of them is poisoned"
    mean = DetectionRates(average="macro", num_classes=4)
    mean.update(scores, keep, poisoned, classes)
    assert mean.compute()["tpr"] == found["tpr"].nanmean()
    with pytest.warns(UserWarning, match="called before the ``update`` method"):
        assert DetectionRates(average=None, num_classes=4).compute()["tpr"].shape == (4,)


@pytest.mark.parametrize(
    ("kwargs", "classes", "words"),
    [
        ({"average": "weighted"}, None, "`average` must be 'micro', 'macro' or None, got 'weighted'"),
        ({"average": None}, None, "`num_classes` must be a whole number of at least 1 with `average=None`, got None"),
        ({"average": "macro", "num_classes": 0}, None, "got 0"),
        ({"average": None, "num_classes": 3}, CLASSES, "`num_classes` must be larger than every class, got 3 .* to 3"),
        ({"average": None, "num_classes": 4}, CLASSES[:2], r"`classes` must have shape \(6,\), .* got \(2,\)"),
    ],
)
def test_what_does_not_fit_classes(kwargs, classes, words):
    with pytest.raises(ArgumentError, match=words):
        AttackSuccessRate(**kwargs).update(PREDICTIONS, AIMS, classes)
    if classes is None or len(classes) == 6:
        with pytest.raises(ArgumentError, match=words):
            DetectionRates(**kwargs).update(torch.rand(6), AIMS > 0, AIMS > 0, classes)
    with pytest.raises(ArgumentError, match="`classes` must be passed with `average=None`"):
        DetectionRates(average=None, num_classes=2).update(torch.rand(6), AIMS > 0, AIMS > 0)
