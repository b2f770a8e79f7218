"""Shots of one thing are found among pictures of other things, at any contrast of the data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_backdoor.detection.near_duplicates import (
    effective_number,
    near_duplicates,
    thumbnails,
    usual_distance,
)


def shots(things: int, each: int, *, alike: float = 0.0, change: float = 0.05) -> tuple[Tensor, Tensor]:
    """Images ``(N, 3, 24, 24)`` and which thing they show; ``alike`` of every image is common to all."""
    generator = torch.Generator().manual_seed(0)
    shown = torch.arange(things).repeat_interleave(each)
    common = torch.randn(3, 24, 24, generator=generator)
    single = torch.randn(things, 3, 24, 24, generator=generator)
    images = (1 - alike) * single[shown] + alike * common
    return images + (1 - alike) * change * torch.randn(images.shape, generator=generator), shown


def numbers_of(images: Tensor) -> Tensor:
    pictures = thumbnails(images)
    return near_duplicates(pictures, usual_distance(pictures, torch.arange(len(images)) % 2))


@pytest.mark.parametrize("alike", [0.0, 0.8])
def test_shots_of_one_thing_have_the_same_number_also_where_all_images_are_alike(alike: float) -> None:
    images, shown = shots(20, 6, alike=alike)
    assert numbers_of(images).equal(shown)


def test_different_things_have_different_numbers_whatever_they_share() -> None:
    for alike in (0.0, 0.5, 0.9):
        images, _ = shots(60, 1, alike=alike)
        assert len(numbers_of(images).unique()) == 60


def test_brightness_and_contrast_make_no_difference() -> None:
    images, shown = shots(20, 6)
    light = 0.5 + torch.rand(len(images), 1, 1, 1, generator=torch.Generator().manual_seed(1))
    assert numbers_of(images * light + 3 * light).equal(shown)


def test_a_chain_of_small_changes_is_one_thing() -> None:
    generator = torch.Generator().manual_seed(0)
    first, last = torch.randn(2, 24, 24, generator=generator)
    film = torch.stack([first + (last - first) * step / 30 for step in range(31)])
    others = torch.randn(30, 24, 24, generator=generator)
    numbers = numbers_of(torch.cat([film, others]))
    assert len(numbers[:31].unique()) == 1
    assert len(numbers.unique()) == 31


def test_the_effective_number_is_simpsons() -> None:
    assert effective_number(torch.tensor([4, 4, 7, 7])) == 2
    assert effective_number(torch.arange(9)) == pytest.approx(9)
    assert effective_number(torch.tensor([0] * 9 + [1])) == pytest.approx(100 / 82)
    assert effective_number(torch.empty(0)) == 0


def test_images_of_one_brightness_are_no_near_duplicates() -> None:
    assert numbers_of(torch.ones(30, 3, 8, 8)).unique().numel() == 30
