from __future__ import annotations

import pytest
import torch

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.report.tiles import Group, choose, collect
from lightning_backdoor.verdict import Verdict
from tests.report.helpers import evidence, verdict


def test_both_sides_of_the_line_are_shown():
    judged = verdict(500, 100)
    groups = choose(judged)
    assert [len(group.positions) for group in groups] == [12, 6, 6]
    assert groups[0].positions == judged.removed[:12].tolist()
    assert groups[1].positions == judged.removed[-6:].tolist()
    kept = torch.where(judged.keep, judged.scores, -1.0)
    assert groups[2].positions == kept.argsort(descending=True)[:6].tolist()


@pytest.mark.parametrize(("n", "removed"), [(1, 0), (2, 1), (3, 2), (15, 14), (24, 0), (25, 19), (40, 40)])
def test_no_image_twice_and_never_more_than_the_limit(n, removed):
    groups = choose(verdict(n, removed))
    positions = [position for group in groups for position in group.positions]
    assert 1 <= len(positions) <= 24
    assert len(set(positions)) == len(positions)
    assert all(group.positions for group in groups)


def test_nothing_removed_shows_the_highest_scores():
    judged = verdict(100, 0)
    (group,) = choose(judged)
    assert group.positions == judged.scores.argsort(descending=True)[:24].tolist()
    assert "kept" in group.heading


def test_differences_are_amplified_by_one_factor():
    pixels = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    changed = pixels.clone()
    changed[1, :, :2] += 20
    exhibits = collect([Group("", [5, 3])], evidence(images=lambda _: pixels, denoised=lambda _: [pixels, changed]))
    assert [exhibit.position for exhibit in exhibits] == [5, 3]
    assert [exhibit.factor for exhibit in exhibits] == [12, 12]
    assert torch.equal(exhibits[0].tiles[1:], torch.zeros(2, 4, 4, 3, dtype=torch.uint8))
    assert exhibits[1].tiles[2, :2].unique().tolist() == [240]
    assert exhibits[1].tiles[0].unique().tolist() == [100]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_any_number_of_channels_becomes_color(channels):
    exhibits = collect([Group("", [0, 1])], evidence(channels))
    assert exhibits[0].tiles.shape == (3, 8, 8, 3)
    if channels < 3:
        assert torch.equal(exhibits[0].tiles[..., 0], exhibits[0].tiles[..., 2])


def test_large_images_are_made_smaller_and_keep_their_shape():
    wide = torch.randint(0, 256, (1, 3, 100, 400)).to(torch.uint8)
    (exhibit,) = collect([Group("", [0])], evidence(images=lambda _: wide, denoised=None))
    assert exhibit.tiles.shape == (1, 40, 160, 3)


def test_without_images_there_is_nothing_to_show():
    assert collect([Group("", [0])], evidence(images=None)) == []


def test_what_is_not_pixels_is_refused():
    group = [Group("", [0])]
    with pytest.raises(
        ArgumentError, match=r"`images` must return uint8 pixels of shape \(1, C, H, W\), got torch.float"
    ):
        collect(group, evidence(images=lambda _: torch.rand(1, 3, 8, 8)))
    with pytest.raises(ArgumentError, match="`denoised` must return one tensor for each name in `variants`"):
        collect(group, evidence(variants=["blur"]))
    with pytest.raises(ArgumentError, match="`denoised` must return tensors of the shape of `images`"):
        collect(group, evidence(denoised=lambda _: [torch.zeros(1, 3, 4, 4, dtype=torch.uint8)] * 2))


def test_equal_scores_are_no_difficulty():
    same = Verdict(scores=torch.ones(30), keep=torch.ones(30, dtype=torch.bool), threshold=1.0, rule="r")
    assert len(choose(same)[0].positions) == 24
