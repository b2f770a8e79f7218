"""The turn and shift of an image: the same one for it in whatever batch it is, and what a literal loop makes of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_backdoor.functional import turning
from lightning_backdoor.functional.turning import ANGLE, SHIFT, turn_and_shift


def pictures(n: int = 6, height: int = 9, width: int = 12) -> Tensor:
    return torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_shape_and_dtype_stay_and_the_input_is_left_alone() -> None:
    images = pictures()
    before = images.clone()
    moved = turn_and_shift(images, torch.arange(6), seed=0)
    assert moved.shape == images.shape
    assert moved.dtype == torch.uint8
    assert torch.equal(images, before)


def test_an_image_meets_its_own_transformation_in_whatever_batch_it_is() -> None:
    images, indices = pictures(), torch.tensor([7, 0, 3, 12, 10**9, 5])
    whole = turn_and_shift(images, indices, seed=4)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    assert torch.equal(turn_and_shift(images[order], indices[order], seed=4), whole[order])
    for place in range(6):
        alone = turn_and_shift(images[place : place + 1], indices[place : place + 1], seed=4)
        assert torch.equal(alone[0], whole[place])


def test_it_depends_on_seed_and_position_and_on_nothing_else() -> None:
    image = pictures(1).expand(3, -1, -1, -1)
    moved = turn_and_shift(image, torch.tensor([1, 1, 2]), seed=0)
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])
    assert not torch.equal(moved, turn_and_shift(image, torch.tensor([1, 1, 2]), seed=1))
    torch.manual_seed(9)
    stream = torch.get_rng_state()
    assert torch.equal(moved, turn_and_shift(image, torch.tensor([1, 1, 2]), seed=0))
    assert torch.equal(torch.get_rng_state(), stream), "no number of the global stream is drawn"
    for seed in (-1, 2**40):
        turn_and_shift(image, torch.arange(3), seed=seed)


def test_every_pixel_is_one_of_the_image_or_black() -> None:
    images = pictures(20)
    moved = turn_and_shift(images, torch.arange(20), seed=0)
    for image, other in zip(images, moved, strict=True):
        colors = {tuple(pixel) for pixel in image.flatten(1).T.tolist()} | {(0, 0, 0)}
        assert {tuple(pixel) for pixel in other.flatten(1).T.tolist()} <= colors


def test_turns_and_shifts_cover_their_ranges_and_stay_within() -> None:
    drawn = turning._draws(torch.arange(400), 0)
    assert bool((drawn.abs() <= 1).all())
    assert bool((drawn.amax(dim=0) > 0.95).all())
    assert bool((drawn.amin(dim=0) < -0.95).all())
    assert (ANGLE, SHIFT) == (180.0, 0.2)


def test_draws_are_those_of_a_generator_for_each_image() -> None:
    """Numbers that are drawn for one image leave nothing behind for the next."""
    for seed, indices in ((0, [0, 1, 2]), (7, [5, 10**9, 3]), (-1, [4])):
        alone = [torch.rand(3, generator=turning._seeded(torch.Generator(), seed, index)) * 2 - 1 for index in indices]
        assert torch.equal(turning._draws(torch.tensor(indices), seed), torch.stack(alone))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (9, 12)])
def test_kornia_agrees(height: int, width: int) -> None:
    from kornia.geometry.transform import get_affine_matrix2d, warp_affine  # noqa: PLC0415  (slow to import)

    images, indices = pictures(40, height, width), torch.arange(40)
    drawn, sides = turning._draws(indices, 3), torch.tensor([width, height])
    center = ((sides - 1) / 2).expand(40, 2)
    matrices = get_affine_matrix2d(
        drawn[:, 1:] * SHIFT * sides, center=center, scale=torch.ones(40, 2), angle=drawn[:, 0] * ANGLE
    )
    theirs = warp_affine(images.float(), matrices[:, :2], (height, width), mode="nearest", padding_mode="zeros")
    differ = turn_and_shift(images, indices, seed=3) != theirs
    assert float(differ.float().mean()) < 1e-3, "where two pixels are equally near"


@pytest.mark.parametrize("side", [0, 1])
def test_an_image_of_one_row_or_column_is_moved(side: int) -> None:
    shape = [6, 3, 8, 8]
    shape[2 + side] = 1
    moved = turn_and_shift(torch.full(shape, 7, dtype=torch.uint8), torch.arange(6), seed=0)
    assert {*moved.unique().tolist()} <= {0, 7}
    assert bool((moved == 7).any())


@pytest.mark.parametrize(("index", "seed"), [(0, 0), (5, 0), (17, 3)])
def test_a_literal_loop_agrees(index: int, seed: int) -> None:
    """Every pixel is that nearest to the place that it came from: shifted back, and turned back about the center."""
    image = pictures(1)
    _, _, height, width = image.shape
    turn, right, down = turning._draws(torch.tensor([index]), seed)[0].tolist()
    angle = math.radians(turn * ANGLE)
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    expected, near_an_edge = torch.zeros_like(image), torch.zeros(height, width, dtype=torch.bool)
    for y in range(height):
        for x in range(width):
            across, along = x - right * SHIFT * width - middle_x, y - down * SHIFT * height - middle_y
            from_x = math.cos(angle) * across + math.sin(angle) * along + middle_x
            from_y = math.cos(angle) * along - math.sin(angle) * across + middle_y
            near_an_edge[y, x] = any(abs(place % 1 - 0.5) < 1e-3 for place in (from_x, from_y))
            column, row = round(from_x), round(from_y)
            if 0 <= row < height and 0 <= column < width:
                expected[0, :, y, x] = image[0, :, row, column]
    moved = turn_and_shift(image, torch.tensor([index]), seed=seed)
    assert int(near_an_edge.sum()) < height * width // 10, "rounding may choose either neighbor there"
    assert torch.equal(moved[..., ~near_an_edge], expected[..., ~near_an_edge])
    assert bool((moved > 0).any())
