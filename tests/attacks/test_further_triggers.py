"""Corner patterns, adaptive triggers, warp, curve and denoised trigger, pixel by pixel against their formulas."""

from __future__ import annotations

import math
import pickle
import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from sklearn.datasets import load_sample_image
from torch import Tensor

from lightning_backdoor.attacks import (
    SIG,
    AdaptiveBlend,
    AdaptivePatch,
    BadNets,
    Blended,
    ColourCurve,
    Corners,
    Denoised,
    WaNet,
)
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional import local_median, nl_means

ALL = [
    Blended(0.2, "flower"),
    Blended(0.2, "flower", additive=True),
    Corners(),
    Corners(64, corners=1, margin=1, test_amplitude=255),
    AdaptivePatch(),
    AdaptiveBlend(),
    AdaptiveBlend(0.1, 0.3, "flower", pieces=9, masked=0.2, seed=4),
    WaNet(),
    WaNet(2.0, grid=6, jitter=True, seed=3),
    ColourCurve(),
    Denoised(Blended(0.2, "flower")),
]
NAMES = {c.__name__: c for c in (AdaptiveBlend, AdaptivePatch, BadNets, Blended, ColourCurve, Corners, Denoised, WaNet)}


def pictures(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def gray(level: int, *shape: int) -> Tensor:
    return torch.full(shape, level, dtype=torch.uint8)


@pytest.mark.parametrize("trigger", ALL, ids=repr)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 40, 48), (2, 16, 16)])
def test_keeps_shape_dtype_and_input(trigger, shape):
    images = pictures(4, *shape)
    before = images.clone()
    for form in (trigger, trigger.at_test(), trigger.on_covers()):
        painted = form(images)
        assert painted.shape == images.shape
        assert painted.dtype == torch.uint8
        assert torch.equal(images, before)
        assert not torch.equal(painted, images)
        assert torch.equal(painted[2], form(images[2])), "one image and a batch get the same trigger"
        assert torch.equal(painted, form(images)), "twice the same"


@pytest.mark.parametrize("trigger", ALL, ids=repr)
def test_repr_and_pickle_recreate_the_trigger(trigger):
    images = pictures(2, 3, 32, 32)
    for copy in (eval(repr(trigger), NAMES), pickle.loads(pickle.dumps(trigger))):
        assert repr(copy) == repr(trigger)
        assert torch.equal(copy(images), trigger(images))


@pytest.mark.parametrize(
    "trigger",
    [Blended(0.2, "flower"), Blended(0.2, "flower", additive=True), SIG(), Corners(64), AdaptiveBlend(), WaNet(),
     Denoised(Blended(0.2, "flower"))],
    ids=repr,
)  # fmt: skip
def test_nothing_wraps_around(trigger):
    """These change a grey level by less than 70: a value that wrapped around would be at the other end."""
    assert trigger(gray(0, 1, 3, 32, 32)).max() < 70
    assert trigger(gray(255, 1, 3, 32, 32)).min() > 185


@pytest.mark.parametrize("trigger", ALL, ids=repr)
def test_train_and_test_differ_only_where_the_attack_says_so(trigger):
    differs = isinstance(trigger, (AdaptiveBlend, AdaptivePatch)) or getattr(trigger, "test_amplitude", None)
    assert (repr(trigger.at_test()) != repr(trigger)) == bool(differs)
    assert (trigger.on_covers() != trigger) == (trigger == WaNet())


def test_corners_by_hand():
    """The signs of the label-consistent authors: offsets from the end, then mirrored."""
    signs = {
        (-1, -1): 1, (-1, -2): -1, (-1, -3): 1, (-2, -1): -1, (-2, -2): 1, (-2, -3): -1,
        (-3, -1): 1, (-3, -2): -1, (-3, -3): -1,
    }  # fmt: skip
    image = gray(100, 3, 10, 12)
    expected = {corners: image.int() for corners in (1, 4)}
    for (row, column), sign in signs.items():
        expected[1][:, row, column] += 64 * sign
        for r in (row, -1 - row):
            for c in (column, -1 - column):
                expected[4][:, r, c] += 64 * sign
    for corners, values in expected.items():
        assert torch.equal(Corners(64, corners)(image).int(), values)


def test_corners_of_full_amplitude_are_the_badnets_grid():
    image = pictures(3, 32, 32)
    assert torch.equal(Corners(corners=1)(image), BadNets()(image))
    four, inner = Corners(margin=1)(image), slice(1, -1)
    assert torch.equal(four[:, inner, inner], Corners()(image[:, inner, inner]))
    assert torch.equal(four[:, 0], image[:, 0])


def test_flower_is_scikit_learns_photograph():
    photo = load_sample_image("flower.jpg")  # 427 x 640: the middle square starts in column 106
    shown = Blended(1.0, "flower")(torch.zeros(3, 427, 427, dtype=torch.uint8))
    assert np.array_equal(shown.permute(1, 2, 0).numpy(), photo[:, 106:533])
    small = Blended(1.0, "flower")(torch.zeros(3, 32, 32, dtype=torch.uint8)).float()
    assert (small.mean((1, 2)) - torch.from_numpy(photo[:, 106:533].mean((0, 1)))).abs().max() < 2


def test_flower_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ArgumentError, match=r"'flower'.*scikit-learn.*not installed"):
        Blended(0.2, "flower")(torch.zeros(3, 37, 31, dtype=torch.uint8))


def test_additive_blend():
    image, pattern = pictures(3, 8, 8), pictures(3, 8, 8)
    exact = (image.double() + 0.2 * pattern.double()).clamp(max=255)
    assert (Blended(0.2, pattern, additive=True)(image).double() - exact).abs().max() <= 0.5 + 1e-4


def test_adaptive_blend_by_hand():
    images, pattern = pictures(20, 3, 32, 32), pictures(3, 32, 32)
    painted = AdaptiveBlend(0.5, pattern=pattern)(images)
    counts = torch.zeros(4, 4)
    for image, poison in zip(images, painted, strict=True):
        mixed = (0.5 * image.double() + 0.5 * pattern.double()).round()
        shown = torch.zeros(4, 4)
        for row in range(4):
            for column in range(4):
                area = ..., slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)
                shown[row, column] = not torch.equal(poison[area], image[area])
                if shown[row, column]:
                    assert (poison[area].double() - mixed[area]).abs().max() <= 1
        assert shown.sum() == 8, "half of sixteen"
        counts += shown
    assert counts.min() > 0, "each image masks other pieces"
    assert counts.max() < 20


def test_adaptive_blend_at_test_time_is_whole():
    image = pictures(3, 32, 32)
    assert torch.equal(AdaptiveBlend(seed=3).at_test()(image), Blended(0.2, seed=3)(image))
    assert torch.equal(AdaptiveBlend(masked=0, seed=3)(image), Blended(0.15, seed=3)(image))


def test_adaptive_patch_by_hand():
    images = pictures(40, 3, 32, 32)
    painted = AdaptivePatch()(images)
    corners = {  # first row and column: rows, columns, opacity, colour of the cell in the corner of the image
        (27, 27): (5, 5, 0.5, (255, 255, 255)),
        (22, 0): (10, 14, 0.2, (0, 0, 0)),
        (0, 26): (5, 6, 0.5, (125, 0, 250)),
        (0, 0): (5, 5, 0.3, (255, 255, 255)),
    }
    seen = set()
    for image, poison in zip(images, painted, strict=True):
        rows, columns = (image != poison).any(0).nonzero().unbind(1)
        place = next(
            (top, left)
            for (top, left), (high, wide, *_) in corners.items()
            if top <= rows.min() <= rows.max() < top + high and left <= columns.min() <= columns.max() < left + wide
        )
        *_, opacity, color = corners[place]
        at = ..., 31 if place[0] else 0, 31 if place[1] else 0
        exact = (1 - opacity) * image[at].double() + opacity * torch.tensor(color)
        assert (poison[at].double() - exact).abs().max() <= 0.5 + 1e-4
        seen.add(place)
    assert seen == set(corners), "one patch each, and all of them occur"


@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 32), (3, 64), (3, 224)])
def test_adaptive_patches_change_as_many_pixels_as_published_ones(channels: int, side: int):
    images = gray(100, 30, channels, side, side) + torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1)
    changed = [int(pixels.sum()) for pixels in (AdaptivePatch()(images) != images).any(1)]
    assert sorted({32 * 32 * count / side**2 for count in changed}) == [25, 30, 140]
    together = (AdaptivePatch().at_test()(images[0]) != images[0]).any(0)
    assert int(together.sum()) * 32 * 32 / side**2 == 25 + 140 + 30 + 25


def test_adaptive_patch_at_test_time_shows_all():
    image = pictures(3, 32, 32)
    clear = AdaptivePatch().at_test()(image)
    assert torch.equal(clear[:, :5, :5], gray(255, 3, 5, 5))
    assert clear[:, 0, 31].tolist() == [125, 0, 250]
    assert torch.equal(clear[:, 5:22], image[:, 5:22])
    assert torch.equal(AdaptivePatch().on_covers()(image), AdaptivePatch()(image))


def warped_by_hand(image: np.ndarray, trigger: WaNet, jitter: np.ndarray | None = None) -> np.ndarray:
    """WaNet's formula with SciPy's bilinear interpolation, for one channel."""
    height, width = image.shape
    noise = torch.rand(1, 2, trigger.grid, trigger.grid, generator=torch.Generator().manual_seed(trigger.seed)) * 2 - 1
    noise = noise / noise.abs().mean()
    assert math.isclose(float(noise.abs().mean()), 1, rel_tol=1e-6)
    field = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic", align_corners=True)[0].numpy()
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    x = np.clip(x + trigger.strength * field[0] / width, -1, 1)
    y = np.clip(y + trigger.strength * field[1] / height, -1, 1)
    if jitter is not None:
        x, y = np.clip(x + jitter[..., 0] / width, -1, 1), np.clip(y + jitter[..., 1] / height, -1, 1)
    return map_coordinates(image.astype(float), [(y + 1) / 2 * (height - 1), (x + 1) / 2 * (width - 1)], order=1)


@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
def test_wanet_by_hand(shape):
    trigger, image = WaNet(1.5, seed=2), pictures(2, *shape)
    painted = trigger(image).double().numpy()
    for channel in range(2):
        assert np.abs(painted[channel] - warped_by_hand(image[channel].numpy(), trigger)).max() <= 0.51


def test_wanet_noise_mode_adds_at_most_a_pixels_jitter_of_its_own():
    trigger, images = WaNet(), pictures(2, 1, 32, 32)
    covers = trigger.on_covers()
    assert covers == WaNet(jitter=True)
    ramp = (torch.arange(32) * 8).to(torch.uint8).expand(1, 1, 32, 32).contiguous()
    apart = (covers(ramp).double() - trigger(ramp).double()).abs()
    assert 0 < apart.max() <= 8 * 31 / 64 + 1, "U(-1, 1) / 32 of a side that is 2 long: half a pixel at most"
    own = [covers(image).float() - trigger(image).float() for image in images]
    assert not torch.equal(*own)


def test_wanet_moves_a_quarter_of_a_pixel_on_average():
    ramp = (torch.arange(32) * 8).to(torch.uint8).expand(1, 32, 32).contiguous()
    shift = (WaNet()(ramp).double() - ramp).abs().mean() / 8
    assert 0.1 < shift < 0.4


def test_color_curve_by_hand():
    trigger = ColourCurve((0.5, 1, 2), low=(10, 0, 50), high=(250, 255, 100))
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1).contiguous()
    painted = trigger(image)
    for channel, (gamma, low, high) in enumerate([(0.5, 10, 250), (1, 0, 255), (2, 50, 100)]):
        for value in range(256):
            exact = low + (high - low) * (value / 255) ** gamma
            assert abs(float(painted[channel].flatten()[value]) - exact) <= 0.5 + 1e-9
    mean = sum(low + (high - low) * (100 / 255) ** g for g, low, high in [(0.5, 10, 250), (1, 0, 255), (2, 50, 100)])
    assert trigger(gray(100, 1, 2, 2))[0, 0, 0] == round(mean / 3)


@pytest.mark.parametrize("passes", [1, 3])
def test_denoised_by_hand(passes):
    base, image = Blended(0.2, "flower"), pictures(3, 32, 32)
    shown, bare = base(gray(128, 1, 3, 32, 32)), gray(128, 1, 3, 32, 32)
    for _ in range(passes):
        shown, bare = nl_means(local_median(shown)), nl_means(local_median(bare))
    exact = (image.int() + shown[0].int() - bare[0].int()).clamp(0, 255)
    assert torch.equal(Denoised(base, passes)(image).int(), exact)


def test_denoised_outlives_the_denoisers_where_the_trigger_does_not():
    """What a filter changes beyond what it changes in the clean image, relative to the trigger."""
    image = (torch.linspace(60, 180, 32).expand(3, 32, 32) + torch.randn(3, 32, 32)).to(torch.uint8)[None]

    def lost(trigger):
        added = trigger(image).double() - image
        for denoise in (local_median, nl_means):
            left = denoise(trigger(image)).double() - denoise(image)
            yield float((left - added).norm() / added.norm())

    base = Blended(0.2, seed=1)
    assert all(after < before / 2 for before, after in zip(lost(base), lost(Denoised(base)), strict=True))


def test_denoised_keeps_the_forms_of_its_trigger():
    assert Denoised(SIG(20, test_delta=60)).at_test() == Denoised(SIG(60))
    assert Denoised(WaNet()).on_covers() == Denoised(WaNet(jitter=True))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Corners(0), r"`amplitude` must be between 1 and 255 grey levels, got 0"),
        (lambda: Corners(test_amplitude=300), r"`test_amplitude` must be between 1 and 255"),
        (lambda: Corners(corners=2), r"`corners` must be 1 \(bottom right\) or 4, got 2"),
        (lambda: Corners(margin=-1), r"`margin` must be at least 0"),
        (lambda: Corners()(gray(0, 1, 5, 8)), r"4 corner patterns .* 5x8 .*`corners=1`"),
        (lambda: AdaptivePatch((0.5, 0.5, 0, 0.5)), r"`opacities` must be four numbers in \(0, 1\]"),
        (lambda: AdaptiveBlend(test_alpha=0), r"`test_alpha` must be in \(0, 1\], got 0"),
        (lambda: AdaptiveBlend(pieces=15), r"`pieces` must be a square number such as 16, got 15"),
        (lambda: AdaptiveBlend(masked=1), r"`masked` must be in \[0, 1\), got 1"),
        (lambda: WaNet(0), r"`strength` must be above 0, got 0"),
        (lambda: WaNet(grid=1), r"`grid` must be at least 2, got 1"),
        (lambda: ColourCurve((1, 1, 0)), r"`gamma` must be three numbers above 0"),
        (lambda: ColourCurve(low=(0, 0, 300)), r"`low` must be three grey levels between 0 and 255"),
        (lambda: Denoised(SIG(), 0), r"`passes` must be at least 1, got 0"),
        (lambda: Denoised(BadNets())(gray(0, 3, 32, 32)), r"leave nothing of BadNets.*fewer `passes`"),
    ],
)
def test_messages(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()
