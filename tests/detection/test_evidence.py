"""A group counts if samples that had no part in finding it show it again; near-duplicates count as one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from benchmarks.false_alarms import cases, made
from lightning_backdoor import DBRCallback, DSTCallback, NONECallback, UltraCleanCallback
from lightning_backdoor.callbacks.unit_decision import decide_by_units
from lightning_backdoor.detection import subpopulations
from lightning_backdoor.detection.evidence import first_half, overlap_log_p, replication
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional import decide, find_subpopulations, thumbnails
from lightning_backdoor.scanning.measure_units import Measured


def noise(n: int, units: int, seed: int = 0) -> Tensor:
    return torch.randn(n, units, generator=torch.Generator().manual_seed(seed))


def with_group(n: int, members: int, units: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Samples of a label, of which some answer on two units as the others do not."""
    values, upper = noise(n, units, seed), torch.arange(n) < members
    values[upper, :2] += 7
    return values, upper


def test_the_chance_of_an_overlap_is_that_of_all_ways_to_draw() -> None:
    one = torch.tensor([True, True, True, False, False, False, False])
    for both in range(3):
        other = torch.zeros(7, dtype=torch.bool)
        other[:both] = other[3 : 3 + 2 - both] = True
        draws = [set(draw) for draw in itertools.combinations(range(7), 2)]
        share = sum(len(draw & {0, 1, 2}) >= both for draw in draws) / len(draws)
        assert math.exp(overlap_log_p(one, other)) == pytest.approx(share)


def test_halves_keep_groups_together_and_are_of_a_size() -> None:
    groups = torch.randint(0, 40, (500,), generator=torch.Generator().manual_seed(0))
    first = first_half(groups, 0)
    assert all(len(first[groups == group].unique()) == 1 for group in range(40))
    assert abs(int(first.sum()) - 250) <= 20
    assert not first.equal(first_half(groups, 1))


@pytest.mark.parametrize("members", [12, 40, 100])
def test_a_group_shows_in_both_halves(members: int) -> None:
    found = replication(*with_group(200, members, 64))
    assert found.p_value < 1e-5
    assert found.distinct == members


@pytest.mark.parametrize("seed", range(2))
def test_a_group_shows_in_both_halves_beside_units_that_are_silent_but_for_a_few_samples(seed: int) -> None:
    silent = 5.0 * (noise(200, 100, 5 + seed) > 2)
    values, upper = with_group(200, 60, 64, seed)
    assert replication(torch.cat([values, silent], dim=1), upper).p_value < 1e-5
    clean = torch.cat([noise(200, 64, seed), silent], dim=1)
    assert replication(clean, upper).p_value > 1e-3, "the clean twin"


def test_what_is_found_in_noise_does_not_show_again() -> None:
    for seed in range(8):
        values = (noise(25, 256, seed) - 1).relu()
        assert replication(values, values @ noise(256, 1, 99).squeeze(1) > 0).p_value > 1e-3


def test_near_duplicates_come_into_one_half_and_are_one_thing() -> None:
    values, upper = with_group(200, 40, 64)
    found = replication(values, upper, torch.arange(200).where(~upper, 1000))
    assert found.distinct == 1
    assert found.p_value > 1e-3, "the other half has none of them"
    assert replication(values, upper, torch.arange(200) // 2).distinct == 20


def test_too_few_samples_are_no_evidence() -> None:
    assert replication(noise(10, 4), torch.arange(10) < 5).p_value == 1
    assert replication(torch.ones(100, 4), torch.arange(100) < 50).p_value == 1


def planted(copies: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three labels, the first with a group: ``copies`` shots of each of several things; values, labels and pictures."""
    labels = torch.arange(3).repeat_interleave(200)
    values = 6 * torch.nn.functional.one_hot(labels, 32) + noise(600, 32)
    values[:60, 10:13] += 9
    things = torch.arange(600)
    things[:60] = torch.arange(60) // copies
    images = noise(600, 24 * 24, 1)[things].view(600, 24, 24) + 0.05 * noise(600, 24 * 24, 2).view(600, 24, 24)
    return values, labels, thumbnails(images)


def test_a_group_of_one_thing_from_many_sides_is_not_found() -> None:
    values, labels, pictures = planted(copies=3)
    (found,) = find_subpopulations(values, labels, pictures=pictures)
    assert [(figure.name, round(figure.value)) for figure in found.figures[-1:]] == [("different_things", 20)]
    values, labels, pictures = planted(copies=15)
    assert find_subpopulations(values, labels, pictures=pictures) == []
    assert decide(values, torch.zeros(600), labels, pictures=pictures).keep.all()
    assert len(find_subpopulations(values, labels)) == 1, "if they were different things, it would be"
    with pytest.raises(ArgumentError, match="`pictures` must have shape"):
        find_subpopulations(values, labels, pictures=pictures[1:])


def test_a_group_of_tracks_is_not_found_and_marked_images_are(monkeypatch: pytest.MonkeyPatch) -> None:
    values, labels, pictures = planted(copies=2)
    (found,) = find_subpopulations(values, labels, pictures=pictures)
    closed, things = found.figures[-2:]
    assert (closed.criterion, things.name) == ("closed_share<0.4", "different_things")
    assert closed.value < 0.15
    assert things.value == 30
    track, shot = torch.arange(600), torch.arange(600)
    track[:60] //= 10
    shot[:60] //= 2
    images = noise(600, 144, 1)[track] + 0.5 * noise(600, 144, 2)[shot]
    tracks = thumbnails(images.view(600, 12, 12))
    assert find_subpopulations(values, labels, pictures=tracks) == []
    monkeypatch.setattr(subpopulations, "CLOSED", 1.1)
    (found,) = find_subpopulations(values, labels, pictures=tracks)
    assert found.figures[-1].value == 30, "shots of one track are not near-duplicates, but for pairs"


def test_where_data_are_tracks_two_of_them_are_no_finding_however_much_their_shots_differ() -> None:
    values, labels, _ = planted(copies=1)
    sample, group = torch.arange(600), torch.arange(600) < 60

    def pictures_of(thing: Tensor, changes: Tensor) -> Tensor:
        return thumbnails((noise(600, 144, 1)[thing] + changes * noise(600, 144, 2)).view(600, 12, 12))

    two_tracks, changes = torch.where(group, sample // 30, sample), torch.where(group, 0.5, 0.05)[:, None]
    pairs = torch.where(group, two_tracks, sample // 2)
    (found,) = find_subpopulations(values, labels, pictures=pictures_of(two_tracks, changes))
    assert found.figures[-1].value == 60, "no two shots of the group are near-duplicates"
    assert find_subpopulations(values, labels, pictures=pictures_of(pairs, changes)) == []
    chosen = torch.where(group, 300 + 2 * sample, pairs)  # of the tracks of other labels
    (found,) = find_subpopulations(values, labels, pictures=pictures_of(chosen, changes))
    closed, things = found.figures[-2:]
    assert (closed.name, things.value) == ("closed_share", 60)
    assert closed.value < 0.1


def test_how_sure_the_share_is_follows_from_the_things_that_were_counted_each_once() -> None:
    """A sign that the attacker has chosen often makes the effective number small, not the share uncertain."""
    sample = torch.arange(1200)
    labels, group = sample // 400, sample < 300
    values = 6 * torch.nn.functional.one_hot(labels, 32) + noise(1200, 32)
    values[group, 10:13] += 9
    often, chosen = sample < 60, group & (sample % 4 > 0)  # of tracks of other labels; the rest are pairs of its own
    thing = torch.where(group, sample // 8 + 5000, sample // 2)
    thing = torch.where(chosen, 200 + sample, thing).masked_fill(often, 550)
    images = noise(6000, 144, 1)[thing] + torch.where(group & ~often, 0.5, 0.05)[:, None] * noise(1200, 144, 2)
    (found,) = find_subpopulations(values, labels, pictures=thumbnails(images.view(1200, 12, 12)))
    closed, things = found.figures[-2:]
    assert closed.name == "closed_share"
    assert 0.2 < closed.value < 0.35
    assert things.value < 25, "241 things, of which one is there 60 times"


def test_a_rate_decides_how_much_evidence_is_needed() -> None:
    values, labels, _ = planted(copies=1)
    assert len(find_subpopulations(values, labels, false_alarm_rate=1e-6)) == 1
    assert find_subpopulations(values, labels, false_alarm_rate=1e-60) == []
    for rate in (0.0, -1.0, math.nan):
        with pytest.raises(ArgumentError, match="`false_alarm_rate` must be positive"):
            find_subpopulations(values, labels, false_alarm_rate=rate)


@pytest.mark.parametrize("defense", [UltraCleanCallback, NONECallback, DBRCallback, DSTCallback])
def test_every_defense_has_the_dial(defense: type) -> None:
    assert "false_alarm_rate=0.05" in repr(defense(false_alarm_rate=0.05))
    with pytest.raises(ArgumentError, match="`false_alarm_rate` must be a fraction"):
        defense(false_alarm_rate=1.0)


def test_the_dial_reaches_the_decision() -> None:
    values, labels, pictures = planted(copies=1)
    units = Measured(labels, labels, values, values[:, 0], values[:, 0], torch.zeros(32, 3), (), pictures)
    assert not decide_by_units(units, None, rule="auto", max_removed=0.3).keep.all()
    assert decide_by_units(units, None, rule="auto", max_removed=0.3, false_alarm_rate=1e-60).keep.all()


@pytest.mark.slow
def test_noise_raises_no_more_alarms_than_stated() -> None:
    tried = [made(*case) for case in cases(3) if case[1][0] * case[1][1] <= 1000]
    assert len(tried) >= 250
    alarms = sum(bool(find_subpopulations(values, labels)) for values, labels in tried)
    assert alarms <= 0.01 * len(tried)
