"""Every trigger is compared, pixel by pixel, with its formula written as loops."""

from __future__ import annotations

import doctest
import math
import pickle

import pytest
import torch
from torch import Tensor

from lightning_backdoor.attacks import SIG, BadNets, Blended, Trojan, blends, patches, poisoning, warps
from lightning_backdoor.errors import ArgumentError

ALL = [
    BadNets(),
    BadNets("square"),
    BadNets("cross", size=5, margin=2),
    Blended(),
    Blended(0.3, "stripe"),
    Blended(0.2, torch.arange(16, dtype=torch.uint8).reshape(4, 4)),
    SIG(),
    SIG(20, frequency=3, test_delta=60),
    Trojan(),
    Trojan(0.5),
]


def pictures(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("module", [blends, patches, poisoning, warps])
def test_docstrings_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("trigger", ALL, ids=repr)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 224, 200), (2, 8, 8)])
def test_keeps_shape_dtype_and_input(trigger, shape):
    images = pictures(4, *shape)
    before = images.clone()
    painted = trigger(images)
    assert painted.shape == images.shape
    assert painted.dtype == torch.uint8
    assert torch.equal(images, before)
    assert not torch.equal(painted, images)
    assert torch.equal(painted[2], trigger(images[2])), "one image and a batch get the same trigger"
    assert torch.equal(painted, trigger(images)), "twice the same"


@pytest.mark.parametrize("trigger", ALL, ids=repr)
def test_repr_and_pickle_recreate_the_trigger(trigger):
    images = pictures(2, 3, 32, 32)
    names = {"torch": torch, "BadNets": BadNets, "Blended": Blended, "SIG": SIG, "Trojan": Trojan}
    for copy in (eval(repr(trigger), names), pickle.loads(pickle.dumps(trigger))):
        assert repr(copy) == repr(trigger)
        assert torch.equal(copy(images), trigger(images))


def test_grid_by_hand():
    image = torch.full((3, 32, 32), 7, dtype=torch.uint8)
    expected = image.clone()
    for row, values in ((31, (255, 0, 255)), (30, (0, 255, 0)), (29, (0, 0, 255))):
        for column, value in zip((29, 30, 31), values, strict=True):
            expected[:, row, column] = value
    assert torch.equal(BadNets()(image), expected)


def test_cross_by_hand():
    image = torch.full((1, 32, 32), 7, dtype=torch.uint8)
    expected = image.clone()
    expected[:, 29:, 29:] = 0
    for row, column in ((31, 30), (30, 31), (30, 29), (29, 30)):
        expected[:, row, column] = 255
    assert torch.equal(BadNets("cross")(image), expected)


@pytest.mark.parametrize(("width", "rows"), [(32, range(28, 31)), (224, range(201, 223)), (8, range(6, 7))])
def test_square_by_hand(width, rows):
    image = torch.zeros(3, width, width, dtype=torch.uint8)
    white = BadNets("square")(image)
    for row in range(width):
        for column in range(width):
            assert (white[:, row, column] == (255 if row in rows and column in rows else 0)).all()


def test_square_flush_in_the_corner():
    white = BadNets("square", margin=0)(torch.zeros(1, 224, 224, dtype=torch.uint8))
    assert white.count_nonzero() == 22 * 22
    assert white[0, -22:, -22:].all()


def test_enlarged_grid_repeats_cells():
    corner = BadNets(size=6)(torch.zeros(1, 12, 12, dtype=torch.uint8))[0, 6:, 6:]
    small = BadNets()(torch.zeros(1, 3, 3, dtype=torch.uint8))[0]
    assert torch.equal(corner, small.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_stripe_by_hand():
    image = pictures(3, 32, 32)
    blended = Blended(0.2, "stripe")(image)
    for column in range(32):
        pattern = 0 if column % 8 < 4 else 255
        expected = (0.8 * image[:, :, column].double() + 0.2 * pattern).round()
        assert torch.equal(blended[:, :, column].double(), expected)


def test_noise_is_seeded_and_mixed_as_the_formula_says():
    black, white = torch.zeros(3, 16, 16, dtype=torch.uint8), torch.full((3, 16, 16), 255, dtype=torch.uint8)
    pattern = Blended(1.0, seed=3)(black)
    assert torch.equal(Blended(1.0, seed=3)(white), pattern), "at alpha 1 only the pattern is left"
    assert not torch.equal(Blended(1.0, seed=4)(black), pattern)
    assert 110 < pattern.float().mean() < 145
    image = pictures(3, 16, 16)
    exact = 0.85 * image.double() + 0.15 * pattern.double()
    assert (Blended(0.15, seed=3)(image).double() - exact).abs().max() <= 0.5 + 1e-4


def test_own_pattern_is_resized_and_gray_serves_all_channels():
    pattern = torch.full((8, 8), 200, dtype=torch.uint8)
    blended = Blended(0.5, pattern)(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert (blended == 100).all()


@pytest.mark.parametrize("width", [32, 28])
def test_sig_by_hand(width):
    image = pictures(3, width, width)
    marked = SIG(40, frequency=6)(image)
    for column in range(width):
        wave = 40 * math.sin(2 * math.pi * column * 6 / width)
        exact = (image[:, :, column].double() + wave).clamp(0, 255)
        assert (marked[:, :, column].double() - exact).abs().max() <= 0.5 + 1e-4


def test_sig_has_its_own_amplitude_at_test_time():
    gray = torch.full((1, 8, 8), 128, dtype=torch.uint8)
    trigger = SIG(20, frequency=2, test_delta=80)
    assert trigger(gray).max() == 148
    assert trigger.at_test()(gray).max() == 208
    assert SIG(20).at_test() == SIG(20)


def test_trojan_square_sits_on_rows_25_to_27_and_saturates():
    black = Trojan()(torch.zeros(3, 32, 32, dtype=torch.uint8))
    touched = black.sum(0).nonzero()
    assert {tuple(place) for place in touched.tolist()} == {(r, c) for r in range(25, 28) for c in range(25, 28)}
    assert black.max() == 250
    bright = torch.full((3, 32, 32), 200, dtype=torch.uint8)
    assert torch.equal(Trojan()(bright).int(), (bright.int() + black.int()).clamp(max=255))


def test_trojan_square_keeps_its_proportion():
    large = Trojan()(torch.zeros(3, 64, 64, dtype=torch.uint8))
    small = Trojan()(torch.zeros(3, 32, 32, dtype=torch.uint8))
    assert torch.equal(large, small.repeat_interleave(2, 1).repeat_interleave(2, 2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BadNets("dot"), r"`pattern` must be 'grid' or 'square' or 'cross', got 'dot'"),
        (lambda: BadNets(size=0), r"`size` must be at least 1 pixel, got 0"),
        (lambda: BadNets(margin=-1), r"`margin` must be at least 0"),
        (lambda: BadNets(size=9)(torch.zeros(1, 8, 8, dtype=torch.uint8)), r"`size` 9 .* 8x8 .*smaller `size`"),
        (lambda: Blended(0), r"`alpha` must be in \(0, 1\], got 0"),
        (
            lambda: Blended(pattern="kitty"),
            r"`pattern` must be 'noise' or 'stripe' or 'flower' or a uint8 image, got 'kitty'",
        ),
        (lambda: Blended(pattern=torch.rand(3, 4, 4)), r"`pattern` must be a uint8 image .*float32.*convert"),
        (
            lambda: Blended(pattern=torch.zeros(3, 4, 4, dtype=torch.uint8))(torch.zeros(1, 4, 4, dtype=torch.uint8)),
            r"`pattern` has 3 channels and the image has 1",
        ),
        (lambda: SIG(delta=0), r"`delta` must be above 0, got 0"),
        (lambda: SIG(test_delta=math.nan), r"`test_delta` must be above 0"),
        (lambda: Trojan(2), r"`strength` must be in \(0, 1\], got 2"),
        (lambda: BadNets()(torch.rand(3, 32, 32)), r"`images` must be a uint8 tensor .*float32.*attacks.poison"),
        (lambda: BadNets()("cat.jpg"), r"`images` must be a uint8 tensor .*got str"),
    ],
)
def test_messages(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()
