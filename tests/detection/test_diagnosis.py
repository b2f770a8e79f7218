"""Wrong labels are told from right ones by the answers of a model that never saw the group."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_backdoor.detection.diagnosis import diagnose, same_answer
from lightning_backdoor.verdict import Diagnosis, Finding

CLASSES, EACH = 10, 60
ACCURACY, SURE = 0.8, 0.8  # of a model on samples that it never saw


def finding(positions: Tensor, label: int = 0) -> Finding:
    return Finding(label, positions, "strict", (), torch.tensor([0]), torch.tensor([1.0]), 0.0)


def answers(true: Tensor, classes: int = CLASSES, *, accuracy: float = ACCURACY, seed: int = 0) -> Tensor:
    """The true class with this chance, else any."""
    generator = torch.Generator().manual_seed(seed)
    mistaken = torch.rand(len(true), generator=generator) > accuracy
    return torch.where(mistaken, torch.randint(0, classes, (len(true),), generator=generator), true)


def judged(group: Tensor, *, sure: float = SURE, classes: int = CLASSES, own: float = ACCURACY) -> Finding:
    """A group of label 0 that gets these answers, among ordinary samples of which ``own`` of label 0 get it."""
    ordinary = torch.arange(classes).repeat_interleave(EACH)
    predicted = torch.where(ordinary == 0, answers(ordinary, classes, accuracy=own), answers(ordinary, classes))
    predicted = torch.cat([group, predicted])
    labels = torch.cat([torch.zeros_like(group), ordinary])
    unseen = torch.arange(len(labels)) < len(group)
    confidence = torch.where(unseen, sure, SURE)
    found = finding(torch.arange(len(group)))
    return diagnose(found, labels, predicted, confidence, unseen=unseen, ordinary=~unseen)


OF_OTHERS = answers(torch.arange(1, CLASSES).repeat(10))
OF_OWN = answers(torch.zeros(90, dtype=torch.long))
ONE = torch.full((90,), 3)


@pytest.mark.parametrize(
    ("group", "options", "expected"),
    [
        pytest.param(OF_OTHERS, {}, "wrong labels", id="samples of other classes"),
        pytest.param(OF_OWN, {}, "right labels", id="samples of the class"),
        pytest.param(answers(torch.zeros(90, dtype=torch.long), accuracy=0.6), {}, "right labels", id="a clean kind"),
        pytest.param(torch.cat([OF_OTHERS[:45], OF_OWN[:25]]), {}, "unclear", id="a part of them"),
        pytest.param(OF_OTHERS, {"sure": 0.5}, "unclear", id="not sure"),
        pytest.param(1 + torch.arange(90) % 3, {}, "unclear", id="few answers: a clean-label attack"),
        pytest.param(ONE, {}, "unclear", id="one other class"),
        pytest.param(1 + torch.arange(90) // 60, {"classes": 4}, "unclear", id="a clean kind like two classes of four"),
        pytest.param(answers(1 + torch.arange(90) % 3, 4), {"classes": 4}, "wrong labels", id="three classes of four"),
        pytest.param(OF_OTHERS, {"own": 0.2}, "unclear", id="the label itself is not known"),
        pytest.param(OF_OTHERS[:4], {}, "unclear", id="a few samples"),
        pytest.param(torch.ones(90, dtype=torch.long), {"classes": 2}, "unclear", id="two classes"),
        pytest.param(torch.zeros(90, dtype=torch.long), {"classes": 2}, "right labels", id="two classes, right"),
    ],
)
def test_the_diagnosis(group: Tensor, options: dict[str, float], expected: Diagnosis) -> None:
    found = judged(group, **options)
    assert found.diagnosis == expected
    assert torch.equal(found.suggested_labels, group)
    assert found.reference_confidence == pytest.approx(SURE)
    assert 0.7 < found.reference_accuracy < 0.9


def test_a_model_that_has_not_learned_gives_none() -> None:
    labels = torch.arange(CLASSES).repeat_interleave(EACH)
    unseen = torch.arange(len(labels)) < EACH // 2
    predicted, confidence = answers(labels, accuracy=0.1), torch.full((len(labels),), 0.2)
    found = diagnose(finding(unseen.nonzero().squeeze(1)), labels, predicted, confidence, unseen=unseen,
                     ordinary=~unseen)  # fmt: skip
    assert found.diagnosis == "unclear"
    assert found.reference_accuracy < 0.3


def test_samples_that_the_model_saw_have_no_part() -> None:
    labels = torch.cat([torch.zeros(90, dtype=torch.long), torch.arange(CLASSES).repeat_interleave(EACH)])
    predicted = torch.cat([OF_OTHERS[:60], torch.zeros(30, dtype=torch.long), answers(labels[90:])])
    place, confidence = torch.arange(len(labels)), torch.full((len(labels),), SURE)
    group = finding(place[:90])
    found = diagnose(group, labels, predicted, confidence, unseen=place < 60, ordinary=place >= 90)
    assert found.diagnosis == "wrong labels"
    assert torch.equal(found.suggested_labels[:60], OF_OTHERS[:60])
    assert bool((found.suggested_labels[60:] == -1).all())
    assert bool((found.suggested_confidences[60:] == 0).all())
    assert found.own_label_rate == float((OF_OTHERS[:60] == 0).float().mean())
    nothing = diagnose(group, labels, predicted, confidence, unseen=place < 0, ordinary=place >= 90)
    assert nothing == replace(group)


def test_the_chance_of_the_same_answer_has_no_bias_for_small_groups() -> None:
    drawn = [same_answer(torch.randint(0, 5, (6,), generator=torch.Generator().manual_seed(s))) for s in range(2000)]
    assert sum(drawn) / len(drawn) == pytest.approx(0.2, abs=0.01)
