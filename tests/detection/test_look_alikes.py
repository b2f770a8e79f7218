"""Groups in many labels are found where they look like other labels, and not where they are a clean kind of image."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_backdoor.detection import look_alikes, subpopulations
from lightning_backdoor.detection.look_alikes import (
    Counts,
    LikeOthers,
    few_p_value,
    like_others,
    tell_labels_apart,
    wrong_labels_p_value,
)
from lightning_backdoor.detection.near_duplicates import usual_distance
from lightning_backdoor.detection.subpopulations import SCANS, search_labels
from lightning_backdoor.functional import decide, find_all_to_all_subpopulation, find_subpopulations, thumbnails

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


# A group in one label.


def wrong_in_one(seed: int = 0, sources: tuple[int, ...] = (1, 2, 3, 4, 5), each: int = 6) -> Kind:
    """Some images of each of some classes, with a faint mark, have the label 0."""
    shown, labels = images(seed)
    upper = torch.isin(labels, torch.tensor(sources)) & (torch.arange(len(labels)) < each * LABELS)
    shown[upper, :, :4, :4] += 1
    return shown, labels.masked_fill(upper, 0), upper


def marked_in_one(seed: int = 0) -> Kind:
    """Half of a class has a mark; the labels are right."""
    shown, labels = images(seed)
    upper = (labels == 0) & (torch.arange(len(labels)) < 180)
    shown[upper, :, :4, :4] += 4
    return shown, labels, upper


def unlike_any_in_one(seed: int = 0) -> Kind:
    shown, labels, upper = unlike_any(seed)
    return shown, labels, upper & (labels == 0)


def wrong_in_all(seed: int = 0, rare: int = EACH) -> Kind:
    """A fifth of all images has any other label; class 0 has fewer images of its own."""
    shown, true = images(seed)
    generator = torch.Generator().manual_seed(seed + 2)
    wrong = torch.rand(len(true), generator=generator) < 0.2
    shift = torch.randint(1, LABELS, (len(true),), generator=generator)
    labels = torch.where(wrong, (true + shift) % LABELS, true)
    kept = (true > 0) | (torch.arange(len(true)) < rare * LABELS)
    return shown[kept], labels[kept], (wrong & (labels == 0))[kept]


def alike(made: Kind) -> LikeOthers:
    shown, labels, upper = made
    pictures = thumbnails(shown)
    return like_others(pictures, labels, upper, usual_distance(pictures, labels))


@pytest.mark.parametrize("seed", range(2))
def test_wrong_labels_in_one_label_are_told_from_clean_kinds_of_it(seed: int) -> None:
    found = alike(wrong_in_one(seed))
    assert found.p_value < 1e-4
    assert found.excess > 5
    assert found.labels > 4
    for clean in (marked_in_one(seed), unlike_any_in_one(seed)):
        assert alike(clean).p_value > 0.1
        assert alike(clean).excess < 1


@pytest.mark.parametrize("rare", [EACH, 15])
def test_wrong_labels_that_all_labels_have_are_no_excess_in_one(rare: int) -> None:
    """Where all labels get as many wrong ones, these are a larger share of a rare label."""
    found = alike(wrong_in_all(rare=rare))
    assert found.p_value < 0.05, "they are wrong"
    assert found.excess < 2


def test_wrong_labels_of_two_classes_are_of_two_classes() -> None:
    found = alike(wrong_in_one(sources=(1, 3), each=10))
    assert found.p_value < 1e-3
    assert 1.5 < found.labels <= 2


def behind_covers(made: Kind, seed: int = 0, *, continuous: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Values of a model that gives all images their label, and early agreement that does not see a group.

    What the group has in common lies in some units, and half of the other labels have it, too. ``continuous``: all of
    the label has it, from none of it evenly to all, the group most.
    """
    _, labels, upper = made
    generator = torch.Generator().manual_seed(seed)
    centers, common = torch.randn(LABELS, 40, generator=generator), torch.randn(40, generator=generator)
    values = 2 * centers[labels] + torch.randn(len(labels), 40, generator=generator)
    common[10:] = 0
    covers = (labels > 0) & (torch.rand(len(labels), generator=generator) < 0.5)
    share = (upper | covers).float()
    if continuous:
        own = (labels == 0).nonzero().squeeze(1)
        share[own[upper[own].int().argsort(stable=True)]] = torch.linspace(0, 1, len(own))
    values += 9 * share[:, None] * common / torch.linalg.vector_norm(common)
    agreement = torch.where(upper, 0.35, 0.85) + 0.1 * torch.randn(len(labels), generator=generator)
    return values, labels, agreement


@pytest.mark.parametrize("seed", range(3))
def test_a_group_that_covers_hide_is_found_if_it_looks_like_many_other_labels(seed: int) -> None:
    made = wrong_in_one(seed)
    values, labels, agreement = behind_covers(made, seed)
    assert find_subpopulations(values, labels, agreement=agreement) == [], "nothing speaks for wrong labels"
    assert find_subpopulations(values, labels, pictures=thumbnails(made[0])) == [], "no early neighbors"
    (one,) = find_subpopulations(values, labels, agreement=agreement, pictures=thumbnails(made[0]))
    found = (labels == 0) & (one.project(values) > one.threshold)
    assert one.gate == "look_alikes"
    assert int((found & made[2]).sum()) >= 28
    assert int((found & ~made[2]).sum()) <= 1
    assert [figure.name for figure in one.figures] == [
        "standardized_gap", "member_share", "early_agreement_ratio", "other_label_p_value", "other_label_excess",
        "looks_like_labels", "own_auroc", "replication_p_value", "different_things",
    ]  # fmt: skip
    early = torch.where(made[2], 0.85, agreement)
    assert find_subpopulations(values, labels, agreement=early, pictures=thumbnails(made[0])) == [], "they agree"


@pytest.mark.parametrize("made", [marked_in_one(), unlike_any_in_one(), wrong_in_one(sources=(1, 3), each=10)])
def test_the_same_group_is_no_finding_if_its_labels_look_right_or_those_of_two_classes(made: Kind) -> None:
    values, labels, agreement = behind_covers(made)
    assert find_subpopulations(values, labels, agreement=agreement, pictures=thumbnails(made[0])) == []


@pytest.mark.parametrize("seed", range(3))
def test_the_same_group_is_no_finding_at_one_end_of_a_label_that_varies_continuously(seed: int) -> None:
    made = wrong_in_one(seed)
    values, labels, agreement = behind_covers(made, seed, continuous=True)
    assert find_subpopulations(values, labels, agreement=agreement, pictures=thumbnails(made[0])) == []


def test_labels_that_are_wrong_everywhere_are_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has learned them, and they have something in common; only that of one label does not count."""
    shown, labels, _ = wrong_in_all(1)
    true = images(1)[1]
    values, _, agreement = behind_covers((shown, labels, labels != true))
    assert find_subpopulations(values, labels, agreement=agreement, pictures=thumbnails(shown)) == []
    monkeypatch.setattr(subpopulations, "ALIKE_EXCESS", 0.0)
    monkeypatch.setattr(subpopulations, "OVERLAP_LABELS", 1.0)
    assert find_subpopulations(values, labels, agreement=agreement, pictures=thumbnails(shown))


def test_a_group_needs_three_other_labels_to_look_like(monkeypatch: pytest.MonkeyPatch) -> None:
    made = wrong_in_one(sources=(1, 2, 3), each=12)
    few = made[1] < 4
    values, labels, agreement = (column[few] for column in behind_covers(made))
    found = find_subpopulations(values, labels, agreement=agreement, pictures=thumbnails(made[0])[few])
    assert [one.gate for one in found] == ["look_alikes"]
    monkeypatch.setattr(subpopulations, "OVERLAP_OTHERS", 4)
    assert find_subpopulations(values, labels, agreement=agreement, pictures=thumbnails(made[0])[few]) == []


def test_pictures_that_do_not_tell_labels_apart_say_nothing() -> None:
    shown, labels, upper = wrong_in_one()
    pictures, noise = thumbnails(shown), thumbnails(torch.rand(shown.shape, generator=torch.Generator().manual_seed(0)))
    assert tell_labels_apart(pictures, labels, usual_distance(pictures, labels))
    assert not tell_labels_apart(noise, labels, usual_distance(noise, labels))
    values, _, agreement = behind_covers((shown, labels, upper))
    assert search_labels(values, labels, agreement=agreement, pictures=pictures).early
    assert not search_labels(values, labels, agreement=agreement, pictures=noise).early, "nothing is searched in vain"


def test_half_of_the_neighbors_are_not_more_than_half() -> None:
    labels = torch.full((240,), 2)
    labels[:20] = torch.arange(2).repeat_interleave(10)  # of the 20 nearest, ten have each label
    pictures = torch.eye(2)[torch.ones(240, dtype=torch.long)]
    pictures[:21] = torch.eye(2)[0]
    shares = look_alikes._neighbors(pictures, labels, torch.tensor([20]), torch.arange(240), -1.0)
    firm = look_alikes._firm(shares, torch.tensor([0]))
    assert not bool(firm[0])
    assert not bool(firm[1])


def test_what_a_group_has_in_common_is_measured_where_few_of_all_images_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(look_alikes, "COMPARED", 1)
    compared = []

    def neighbors(pictures: Tensor, *rest: Any) -> Tensor:
        compared.append(pictures)
        return found(pictures, *rest)

    found = look_alikes._neighbors
    monkeypatch.setattr(look_alikes, "_neighbors", neighbors)
    alike(wrong_in_one())
    assert [bool(one.isfinite().all()) for one in compared] == [True, True], "members and ordinary samples"
