"""Pixel space: inferred or given, checked, and exact for images that came from 8-bit files."""

from __future__ import annotations

from typing import Any

import kornia
import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import transforms as v1
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from lightning_backdoor.data import PixelSpace, check_finite, infer_pixel_space
from lightning_backdoor.errors import ArgumentError, DataError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(b: int = 6, c: int = 3, size: int = 9, low: int = 0, high: int = 256) -> Tensor:
    return torch.randint(low, high, (b, c, size, size), dtype=torch.uint8)


def normalised(p: Tensor, mean: Any = MEAN, std: Any = STD) -> Tensor:
    return torch.stack([v1.Normalize(mean, std)(image.float() / 255) for image in p])


class Wrapped:
    """A user's own transform around another."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> Any:
        return self.transform(image)


TRANSFORMS = {
    "v1": v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)]),
    "v1 nested": v1.Compose([v1.Compose([v1.ToTensor(), v1.Compose([v1.Normalize(MEAN, STD)])]), v1.RandomErasing()]),
    "v2": v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(MEAN), list(STD))]),
    "v2 in sequential": nn.Sequential(v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(MEAN), list(STD))),
    "torchvision preset": ResNet18_Weights.DEFAULT.transforms(),
    "kornia": kornia.augmentation.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    "kornia sequence": kornia.augmentation.AugmentationSequential(
        kornia.augmentation.RandomHorizontalFlip(),
        kornia.augmentation.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    ),
    "kornia enhance": kornia.enhance.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    "timm": timm.data.create_transform((3, 9, 9), mean=MEAN, std=STD),
    "random apply": v1.RandomApply([v1.Normalize(MEAN, STD)], p=1.0),
    "list": [v1.ToTensor(), v1.Normalize(MEAN, STD)],
    "own wrapper": Wrapped(v1.Compose([v1.Normalize(MEAN, STD)])),
    "255 units": v1.Normalize([255 * m for m in MEAN], [255 * s for s in STD]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_normalize_is_found(name: str) -> None:
    p = pixels()
    space = infer_pixel_space(normalised(p), transform=TRANSFORMS[name])
    assert space.mean == pytest.approx(MEAN)
    assert space.std == pytest.approx(STD)
    assert torch.equal(space.to_pixels(normalised(p)), p)


def test_two_normalize_steps_are_taken_together() -> None:
    p = pixels()
    both = v1.Compose([v1.Normalize(0.5, 0.5), v1.Normalize(MEAN, STD)])
    images = torch.stack([both(image.float() / 255) for image in p])
    assert torch.equal(infer_pixel_space(images, transform=both).to_pixels(images), p)


class TestRange:
    def test_uint8_is_pixels(self) -> None:
        p = pixels()
        space = infer_pixel_space(p)
        assert space.identity
        assert torch.equal(space.to_pixels(p), p)
        assert torch.equal(space.to_model(p, p), p)
        with pytest.raises(DataError, match=r"uint8 images before and torch.float32 now"):
            space.to_pixels(p.float())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
    def test_fractions(self, dtype: torch.dtype) -> None:
        p = pixels()
        images = (p.double() / 255).to(dtype)
        space = infer_pixel_space(images)
        assert (space.mean, space.std) == ((0.0,), (1.0,))
        assert torch.equal(space.to_pixels(images), p)

    def test_floats_in_0_to_255(self) -> None:
        p = pixels()
        space = infer_pixel_space(p.float())
        assert torch.equal(space.to_pixels(p.float()), p)
        assert torch.allclose(space.to_model(p, p.float()), p.float(), atol=1e-4)

    @pytest.mark.parametrize("scale", [2.0, 16.0, 60.0, 1000.0])
    def test_other_ranges_are_not_guessed(self, scale: float) -> None:
        with pytest.raises(ArgumentError, match=r"neither 0..1 nor 0..255"):
            infer_pixel_space(torch.rand(4, 1, 8, 8) * scale)

    def test_black_and_constant_images(self) -> None:
        assert infer_pixel_space(torch.zeros(2, 3, 8, 8)) == PixelSpace()
        assert infer_pixel_space(torch.full((2, 3, 8, 8), 0.5)) == PixelSpace()

    def test_overshoot_of_float_resizing(self) -> None:
        resize = v2.Compose([v2.Resize(17, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)])
        images = torch.stack([resize(image.float() / 255) for image in pixels(size=8, low=100, high=200)])
        images[:, :, :1, :2] = -0.04
        assert infer_pixel_space(images, transform=resize) == PixelSpace()
        with pytest.raises(ArgumentError, match="pixel space cannot be inferred"):
            infer_pixel_space(images)


class TestModel:
    @staticmethod
    def module(**settings: Any) -> nn.Module:
        return nn.ModuleDict({"net": timm.create_model("test_resnet", **settings)})

    def test_timm_configuration_when_images_are_normalised_so(self) -> None:
        p = pixels()
        config = timm.create_model("test_resnet").pretrained_cfg
        images = normalised(p, config["mean"], config["std"])
        space = infer_pixel_space(images, model=self.module())
        assert space.mean == pytest.approx(config["mean"])
        assert torch.equal(space.to_pixels(images), p)

    def test_not_when_they_are_not(self) -> None:
        assert infer_pixel_space(pixels().float() / 255, model=self.module()) == PixelSpace()
        model = self.module(pretrained_cfg_overlay={"mean": MEAN, "std": STD})
        with pytest.raises(ArgumentError, match="pixel space cannot be inferred"):
            infer_pixel_space(normalised(pixels(), 0.5, 0.5), model=model)

    def test_normalised_otherwise_within_the_range(self) -> None:
        model = self.module(pretrained_cfg_overlay={"mean": MEAN, "std": STD})
        assert infer_pixel_space(normalised(pixels()), model=model).mean == pytest.approx(MEAN)
        with pytest.raises(ArgumentError, match="pixel space cannot be inferred"):
            infer_pixel_space(normalised(pixels(), 0.5, 0.6), model=model)

    def test_kornia_layer_in_the_module(self) -> None:
        layer = kornia.augmentation.Normalize(torch.tensor(MEAN), torch.tensor(STD))
        model = nn.ModuleDict({"augment": nn.Sequential(layer), "net": nn.Linear(3, 3)})
        assert infer_pixel_space(normalised(pixels()), model=model).std == pytest.approx(STD)

    def test_the_transform_comes_first(self) -> None:
        model = self.module(pretrained_cfg_overlay={"mean": MEAN, "std": STD})
        images = normalised(pixels(), 0.5, 0.5)
        assert infer_pixel_space(images, transform=v1.Normalize(0.5, 0.5), model=model).mean == (0.5,)


class TestGiven:
    def test_wins_over_everything(self) -> None:
        images = normalised(pixels())
        space = infer_pixel_space(images, transform=v1.Normalize(0.5, 0.5), mean=MEAN, std=list(STD))
        assert space == PixelSpace(MEAN, STD)

    def test_one_number_for_all_channels(self) -> None:
        p = pixels(c=7)
        space = infer_pixel_space(normalised(p, [0.3] * 7, [0.2] * 7), mean=0.3, std=0.2)
        assert space == PixelSpace((0.3,), (0.2,))
        assert torch.equal(space.to_pixels(normalised(p, [0.3] * 7, [0.2] * 7)), p)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"mean": 0.5}, "`mean` and `std` belong together"),
            ({"std": 0.5}, "`mean` and `std` belong together"),
            ({"mean": 123.7, "std": 58.0}, r"`mean` must be a fraction.*got \(123.7,\).*255"),
            ({"mean": 0.5, "std": 0.0}, "`std` must be positive"),
            ({"mean": (0.5, 0.5), "std": 0.5}, "`mean` must have one number or one per channel: 3 channels, got 2"),
        ],
    )
    def test_bad_numbers(self, settings: dict[str, Any], words: str) -> None:
        with pytest.raises(ArgumentError, match=words):
            infer_pixel_space(normalised(pixels(), 0.5, 0.5), **settings)

    def test_wrong_numbers_are_noticed(self) -> None:
        with pytest.raises(ArgumentError, match=r"undoing `mean` and `std` .* leaves the pixel range.*Pass `mean`"):
            infer_pixel_space(normalised(pixels()), mean=0.5, std=0.5)


def test_a_transform_that_does_not_fit_is_noticed() -> None:
    with pytest.raises(ArgumentError, match=r"from -2\.\d+ to 2\.\d+; undoing the transform's Normalize"):
        infer_pixel_space(normalised(pixels(b=20)), transform=v1.Normalize(0.5, 0.5))


def test_unknown_normalisation_names_the_remedy_and_the_range() -> None:
    images = normalised(pixels(b=20))
    with pytest.raises(ArgumentError, match=r"3 channels with values from -2\.12 to 2\.64.*`mean` and `std`.*0\.485"):
        infer_pixel_space(images, transform=lambda x: x)


def test_noise_of_random_erasing_is_tolerated() -> None:
    images = normalised(pixels(b=20))
    images[:3, :, :4, :4] = torch.randn(3, 3, 4, 4)
    assert infer_pixel_space(images, transform=TRANSFORMS["v1"]).mean == MEAN


class TestNonFinite:
    def test_inference_looks_past_single_values(self) -> None:
        images = pixels().float() / 255
        images[0, 0, 0, 0] = float("nan")
        assert infer_pixel_space(images) == PixelSpace()

    def test_nothing_finite(self) -> None:
        with pytest.raises(DataError, match="no finite value"):
            infer_pixel_space(torch.full((2, 3, 4, 4), float("nan")))

    def test_items_are_named(self) -> None:
        images = torch.rand(4, 3, 5, 5)
        indices = torch.tensor([7, 30, 4, 11])
        check_finite(images, indices)
        check_finite(pixels(4), indices)
        images[1, 2, 0, 0], images[3, 0, 1, 1] = float("nan"), float("inf")
        with pytest.raises(DataError, match=r"NaN or infinite values: dataset items 30, 11. Repair"):
            check_finite(images, indices)
        with pytest.raises(DataError, match="0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 5 more"):
            check_finite(torch.full((15, 1, 2, 2), float("nan")), torch.arange(15))


class TestLike:
    def test_dtype_and_memory_format(self) -> None:
        space, p = PixelSpace(MEAN, STD), pixels()
        like = normalised(p).to(torch.bfloat16, memory_format=torch.channels_last)
        back = space.to_model(p[:2], like)
        assert back.dtype == torch.bfloat16
        assert back.shape[0] == 2
        assert back.is_contiguous(memory_format=torch.channels_last)
        assert space.to_model(p.to(memory_format=torch.channels_last), normalised(p)).is_contiguous()

    def test_grey_without_channel_axis(self) -> None:
        images = pixels(c=1).float().squeeze(1) / 255
        space = infer_pixel_space(images)
        assert space.to_pixels(images).shape == (6, 1, 9, 9)
        back = space.to_model(space.to_pixels(images), images)
        assert torch.equal(back, images)

    def test_the_arguments_are_not_written_to(self) -> None:
        space, p = PixelSpace((0.0,), (1.0,)), pixels()
        images = p.float() / 255
        copy = images.clone()
        space.to_pixels(images)
        space.to_model(p, images)
        assert torch.equal(images, copy)

    def test_values_outside_are_clamped_and_rounded(self) -> None:
        values = torch.tensor([-0.3, 0.0, 0.4999 / 255, 0.5001 / 255, 254.6 / 255, 1.7]).view(1, 1, 1, 6)
        assert PixelSpace().to_pixels(values).flatten().tolist() == [0, 0, 0, 1, 255, 255]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    channels=st.integers(1, 6),
    one=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
def test_round_trip(*, seed: int, channels: int, one: bool, dtype: torch.dtype, data: Any) -> None:
    """The literal equation in NumPy, and back: pixels exactly, model space within rounding."""
    size = 1 if one else channels
    fractions = st.lists(st.floats(0, 1), min_size=size, max_size=size)
    mean, std = data.draw(fractions), data.draw(st.lists(st.floats(0.004, 2), min_size=size, max_size=size))
    p = torch.randint(0, 256, (2, channels, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    shape = (1, -1, 1, 1)
    literal = (p.numpy() / 255 - np.reshape(mean, shape)) / np.reshape(std, shape)
    images = torch.from_numpy(literal).to(dtype)
    space = PixelSpace(tuple(mean), tuple(std))
    assert torch.equal(space.to_pixels(images), p)
    back = space.to_model(p, images)
    assert back.dtype == dtype
    tolerance = 2e-7 / min(std) if dtype == torch.float32 else 1e-12 / min(std)
    assert torch.allclose(back, images, rtol=1e-6, atol=tolerance)


def test_bit_for_bit_torchvision() -> None:
    p = pixels(b=30, size=16)
    images = normalised(p)
    assert torch.equal(PixelSpace(MEAN, STD).to_model(p, images), images)
