"""Shots of one thing are found among pictures of other things, at any contrast of the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_backdoor.detection import near_duplicates as rooms
from lightning_backdoor.detection.near_duplicates import (
    closed_share,
    effective_number,
    near_duplicates,
    repeated_share,
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


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.size = max(self.size, made.numel())
        return made


@pytest.mark.parametrize("block", [1, 700, 2000, 10**6])
def test_blocks_of_pairs_make_no_difference_and_bound_the_memory(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains that lead from block to block, in any order, and samples that are all alike."""
    monkeypatch.setattr(rooms, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    thing = torch.randint(6, (200,), generator=generator)
    place = torch.rand(200, generator=generator) * 3  # on the arc of its thing
    arcs = torch.linalg.qr(torch.randn(144, 12, generator=generator))[0].T.view(6, 2, 144)
    pictures = place.cos()[:, None] * arcs[thing, 0] + place.sin()[:, None] * arcs[thing, 1]
    found = near_duplicates(pictures, 0.5)
    near = pictures @ pictures.T >= 1 - 0.05
    expected = torch.arange(200)
    for _ in range(200):
        expected = torch.where(near, expected, 200).amin(dim=1)
    assert found.equal(expected.unique(return_inverse=True)[1])
    assert 6 <= len(expected.unique()) < 30
    with Largest() as largest:
        assert not near_duplicates(torch.ones(200, 2) / 2**0.5, 0.5).any()
    assert largest.size <= max(2 * block, 2 * 200)


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


def tracks(things: int, each: int) -> Tensor:
    """Images ``(N, 24, 24)``, ``each`` shots of one thing, which change more than near-duplicates do."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(things, 1, 6, 6, generator=generator).repeat_interleave(each, 0)
    changed = F.interpolate(coarse + 0.5 * torch.randn(coarse.shape, generator=generator), size=24, mode="bicubic")
    return changed[:, 0]


def closed(images: Tensor, labels: Tensor, group: Tensor) -> tuple[float, float]:
    """Things in the group, of label 0, and the share of them that is nearest to another one."""
    pictures, inside = thumbnails(images), labels == 0
    numbers = near_duplicates(pictures[inside], usual_distance(pictures, labels))
    share = closed_share(pictures[inside], group[inside], numbers, pictures[~inside])
    return effective_number(numbers[group[inside]]), share


def test_whole_tracks_are_nearest_to_themselves_and_images_drawn_from_them_are_not() -> None:
    images, labels = tracks(40, 20), torch.arange(800) // 200
    clean = torch.arange(800) < 80
    things, share = closed(images, labels, clean)
    assert things >= 10, "a few tracks in all their changes look like many things"
    assert share > 0.8
    drawn = torch.randperm(800, generator=torch.Generator().manual_seed(0))[:80]
    poisoned = torch.zeros(800, dtype=torch.bool).index_fill(0, drawn, True)
    marked = images.clone()
    marked[poisoned, 12:18, 4:10] = 6.0
    assert closed(marked, labels.where(~poisoned, torch.tensor(0)), poisoned)[1] < 0.15, "wrong labels"
    with_right_labels = torch.arange(800) < 0
    with_right_labels[torch.randperm(200, generator=torch.Generator().manual_seed(1))[:150]] = True
    marked = images + 2.0 * with_right_labels[:, None, None] * torch.arange(24).remainder(6).lt(3)
    assert closed(marked, labels, with_right_labels)[1] < 0.15, "most of a label, and nearest to each other by that"
    assert closed(images, labels, labels == 0)[1] == 0, "all of a label cannot be told from its rest"


@pytest.mark.parametrize("block", [1, 10**6])
def test_tracks_repeat_their_images_within_a_label_and_other_data_do_not(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "BLOCK", block)

    def share(things: Tensor, labels: Tensor) -> float:
        coarse = torch.randn(len(things), 1, 6, 6, generator=torch.Generator().manual_seed(0))[things]
        pictures = thumbnails(F.interpolate(coarse, size=24, mode="bicubic"))
        return repeated_share(pictures, labels, usual_distance(pictures, labels))

    samples = torch.arange(200)
    assert share(samples, samples // 50) == 0
    assert share(samples // 4, samples // 50 % 4) == 1
    assert share(samples % 100, samples // 50) == 0, "copies with another label"
    assert share(samples.clamp(max=130), samples // 50) == pytest.approx(0.35), (
        "a third of the data are shots of one thing"
    )
    assert repeated_share(torch.zeros(0, 144), torch.zeros(0, dtype=torch.long), 0.0) == 0
