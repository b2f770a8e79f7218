"""Groups in many labels are found where they look like other labels, and not where they are a clean kind of image."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lightning_backdoor.detection import look_alikes
from lightning_backdoor.detection.look_alikes import Counts, few_p_value, wrong_labels_p_value
from lightning_backdoor.detection.near_duplicates import usual_distance
from lightning_backdoor.detection.subpopulations import SCANS
from lightning_backdoor.functional import decide, find_all_to_all_subpopulation, thumbnails

LABELS, EACH = 6, 60
Kind = tuple[Tensor, Tensor, Tensor]


def images(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of six classes, ``(N, 1, 12, 12)``, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(LABELS).repeat(EACH)
    classes = torch.randn(LABELS, 1, 12, 12, generator=generator)
    return classes[labels] + torch.randn(len(labels), 1, 12, 12, generator=generator), labels


def marked(seed: int = 0) -> Kind:
    """A sixth of every class has a mark; the labels are right."""
    shown, labels = images(seed)
    upper = torch.arange(len(labels)) % 36 >= 30
    shown[upper, :, :4, :4] += 4
    return shown, labels, upper


def all_to_all(seed: int = 0) -> Kind:
    """A sixth of every class has a mark and the next label."""
    shown, labels, upper = marked(seed)
    return shown, torch.where(upper, (labels + 1) % LABELS, labels), upper


def unlike_any(seed: int = 0) -> Kind:
    """A sixth of every class looks like no ordinary image, as line drawings among photographs do."""
    shown, labels, upper = marked(seed)
    shown[upper] = torch.randn(int(upper.sum()), 1, 12, 12, generator=torch.Generator().manual_seed(seed + 1))
    return shown, labels, upper


def p_value(made: Kind) -> float:
    shown, labels, upper = made
    pictures = thumbnails(shown)
    return wrong_labels_p_value(pictures, labels, upper, usual_distance(pictures, labels))


@pytest.mark.parametrize("seed", range(3))
def test_groups_with_the_labels_of_others_are_told_from_clean_kinds_of_image(seed: int) -> None:
    assert p_value(all_to_all(seed)) < 1e-8
    assert p_value(marked(seed)) > 0.5
    assert p_value(unlike_any(seed)) > 0.05


def test_copies_are_one_sample() -> None:
    shown, labels, upper = all_to_all()
    once = ~upper | (torch.arange(len(labels)) >= len(labels) - 2 * 36)
    copied = torch.cat([once.nonzero().squeeze(1), *([(once & upper).nonzero().squeeze(1)] * 9)])
    single = p_value((shown[once], labels[once], upper[once]))
    assert p_value((shown[copied], labels[copied], upper[copied])) > single / 10
    assert p_value(all_to_all()) < single / 1e3, "as many different samples"


def test_a_group_in_one_label_says_nothing() -> None:
    shown, labels, upper = all_to_all()
    assert p_value((shown, labels, upper & (labels == 0))) == 1
    assert p_value((shown, labels, torch.zeros_like(upper))) == 1
    assert p_value((shown, labels, torch.ones_like(upper))) == 1


def test_draws_of_large_data_find_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEMBERS", "REST", "COMPARED"):
        monkeypatch.setattr(look_alikes, name, 50)
    assert p_value(all_to_all()) < 1e-3
    assert p_value(marked()) > 0.5


def test_the_chance_of_few_hits_is_that_of_all_ways_to_draw() -> None:
    """Two tables: of 3 and 2 samples that are compared with 3 and 4 others."""
    tables = [Counts(1, 3, 2, 3), Counts(0, 2, 3, 4)]
    ways = [
        [
            len(set(draw) & set(range(one.hits + one.other_hits)))
            for draw in itertools.combinations(range(6), one.samples)
        ]
        for one in tables
    ]
    sums = [a + b for a in ways[0] for b in ways[1]]
    assert few_p_value(tables) == pytest.approx(sum(each <= 1 for each in sums) / len(sums))
    assert few_p_value([one.reversed().reversed() for one in tables]) == few_p_value(tables)
    assert few_p_value([Counts(900, 1000, 900, 1000)]) == pytest.approx(0.5, abs=0.05)
    assert few_p_value([]) == 1


def test_labels_that_are_half_right_pass_at_the_stated_rate() -> None:
    """Members are drawn at random from all labels, and half of them have labels of others: the edge of the test."""
    p_values = []
    for seed in range(30):
        shown, labels = images(seed)
        generator = torch.Generator().manual_seed(seed + 100)
        upper = torch.rand(len(labels), generator=generator) < 0.2
        wrong = upper & (torch.rand(len(labels), generator=generator) < 0.5)
        p_values.append(p_value((shown, torch.where(wrong, (labels + 1) % LABELS, labels), upper)))
    for rate in (0.01, 0.1, 0.3):
        assert sum(p <= rate for p in p_values) <= 30 * rate + 2 * (30 * rate) ** 0.5


def responses(made: Kind) -> Tensor:
    """Units that tell classes, and three that answer to the mark."""
    _, labels, upper = made
    generator = torch.Generator().manual_seed(0)
    values = 2 * torch.randn(LABELS, 24, generator=generator)[labels]
    values += torch.randn(len(labels), 24, generator=generator)
    values[upper, :3] += 12
    return values


@pytest.mark.parametrize("made", [marked(), unlike_any()], ids=["marked", "unlike any"])
def test_a_clean_kind_in_every_label_is_no_finding(made: Kind) -> None:
    shown, labels, upper = made
    values, pictures = responses(made), thumbnails(shown)
    without = decide(values, torch.zeros(len(labels)), labels, all_to_all=True)
    assert torch.equal(~without.keep, upper), "the gate alone"
    decision = decide(values, torch.zeros(len(labels)), labels, all_to_all=True, pictures=pictures)
    assert bool(decision.keep.all())
    assert not decision.all_to_all
    assert find_all_to_all_subpopulation(values, labels, pictures=pictures) == []
    assert len(find_all_to_all_subpopulation(values, labels, pictures=pictures, false_alarm_rate=torch.inf)) == LABELS


def test_an_attack_on_every_label_is_found_behind_a_clean_kind_that_all_have() -> None:
    shown, labels, upper = made = all_to_all()
    values = responses(made)
    clean = torch.arange(len(labels)) % 36 < 6
    values[clean, 3] += 40
    found = find_all_to_all_subpopulation(values, labels, pictures=thumbnails(shown))
    assert [one.label for one in found] == list(range(LABELS))
    assert torch.equal(sum((labels == one.label) & (one.project(values) > one.threshold) for one in found) > 0, upper)
    figure = found[0].figures[-1]
    assert figure.name == "other_label_p_value"
    bound = 0.01 / SCANS / (LABELS + 1)
    assert figure.bound == pytest.approx(bound / 6), "the second division that was tested"
    direct = decide(responses(made), torch.zeros(len(labels)), labels, all_to_all=True, pictures=thumbnails(shown))
    assert torch.equal(~direct.keep, upper)
    assert f"other_label_p_value<={bound / 2:g}" in direct.rule
