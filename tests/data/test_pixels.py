"""Pixel space: inferred or given, checked, and exact for images that came from 8-bit files."""

from __future__ import annotations

from functools import partial
from typing import Any

import kornia
import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Subset
from torchvision import transforms as v1
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from lightning_backdoor.data import PixelSpace, check_finite, infer_pixel_space, transforms_of
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


class Albumentation:
    """The attributes of albumentations' Normalize."""

    def __init__(self, mean: Any, std: Any, max_pixel_value: float, normalization: str = "standard") -> None:
        self.mean, self.std, self.max_pixel_value, self.normalization = mean, std, max_pixel_value, normalization

    def __call__(self, **given: Any) -> Any:
        return given


class NormalizeIntensity:
    """The attributes of MONAI's transform of this name; without numbers every image is standardised by itself."""

    def __init__(self, subtrahend: Any = None, divisor: Any = None) -> None:
        self.subtrahend, self.divisor = subtrahend, divisor

    def __call__(self, image: Any) -> Any:
        return image


class NormalizeIntensityd:
    def __init__(self, subtrahend: Any, divisor: Any) -> None:
        self.normalizer = NormalizeIntensity(subtrahend, divisor)


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
    "numpy": v1.Normalize(np.array(MEAN, dtype=np.float64), [np.float64(s) for s in STD]),
    "tensors": v1.Normalize(torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)),
    "list of tensors": v1.Normalize([torch.tensor(m) for m in MEAN], [torch.tensor([s]) for s in STD]),
    "albumentations": Albumentation(MEAN, STD, max_pixel_value=255.0),
    "albumentations in 255 units": Albumentation([255 * m for m in MEAN], [255 * s for s in STD], max_pixel_value=1.0),
    "monai": NormalizeIntensity([255 * m for m in MEAN], np.array(STD) * 255),
    "monai dictionary": v1.Compose([NormalizeIntensityd(MEAN, STD)]),
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
        assert infer_pixel_space(normalised(pixels(), 0.5, 0.5), model=model) == PixelSpace((0.5,), (0.5,))

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


class TestIntegers:
    @pytest.mark.parametrize("dtype", [torch.uint16, torch.int16, torch.int32, torch.int64])
    def test_values_up_to_255_are_pixels(self, dtype: torch.dtype) -> None:
        p = pixels()
        images = p.to(dtype)
        space = infer_pixel_space(images)
        assert space.note == ""
        assert torch.equal(space.to_pixels(images), p)
        assert space.to_model(p, images).dtype == dtype
        assert torch.equal(space.to_model(p, images).long(), images.long())

    @pytest.mark.parametrize(
        ("dtype", "low", "high"),
        [
            (torch.uint16, 0, 65535),
            (torch.uint16, 100, 4095),
            (torch.int16, -1024, 3071),
            (torch.int32, -(2**31), 2**31 - 1),
            (torch.int8, -128, 127),
        ],
    )
    def test_the_range_of_the_images_is_found(self, dtype: torch.dtype, low: int, high: int) -> None:
        levels = torch.linspace(low, high, 256, dtype=torch.float64).round()
        p = pixels(b=20, c=1, size=40)
        images = levels[p.long()].to(dtype)
        space = infer_pixel_space(images)
        assert torch.equal(space.to_pixels(images), p)
        back = space.to_model(p, images)
        assert back.dtype == dtype
        assert torch.equal(back.double(), images.double())
        assert f"stand for the values {low} and {high} of the images" in space.note

    def test_hot_values_of_single_images_do_not_widen_it(self) -> None:
        images = torch.randint(500, 1500, (20, 2, 16, 16), dtype=torch.int32)
        images[3, 0, 0, 0], images[5, 1, 2, 2] = 65535, -9000
        space = infer_pixel_space(images)
        low, high = -space.mean[0] / space.std[0], (1 - space.mean[0]) / space.std[0]
        assert 500 <= low < 520
        assert 1480 < high <= 1500
        assert space.to_pixels(images)[3, 0, 0, 0] == 255
        assert space.to_pixels(images)[5, 1, 2, 2] == 0

    def test_bands_have_ranges_of_their_own_and_colours_one(self) -> None:
        images = torch.randint(0, 1000, (20, 4, 16, 16), dtype=torch.int32)
        images[:, 1] *= 10
        assert len(infer_pixel_space(images).std) == 4
        assert len(infer_pixel_space(images[:, :3]).std) == 1
        assert infer_pixel_space(images).to_pixels(images).amax((0, 2, 3)).min() == 255

    def test_constant_images(self) -> None:
        images = torch.full((3, 1, 4, 4), 7000, dtype=torch.int16)
        space = infer_pixel_space(images)
        assert torch.equal(space.to_model(space.to_pixels(images), images), images)

    def test_a_range_can_be_given_as_the_note_says(self) -> None:
        images = torch.randint(-1024, 3072, (4, 1, 8, 8), dtype=torch.int16)
        low, high = -2000, 6000
        space = infer_pixel_space(images, mean=[-low / (high - low)], std=[1 / (high - low)])
        wanted = ((images.double() - low) / (high - low) * 255).round()
        assert torch.equal(space.to_pixels(images).double(), wanted)
        with pytest.raises(ArgumentError, match=r"undoing `mean` and `std`"):
            infer_pixel_space(images, mean=[0.0], std=[1 / 255])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("high", [4095, 65535])
    def test_floats_that_are_16_bit_files_are_read_as_integers(self, dtype: torch.dtype, high: int) -> None:
        """Images of PIL's modes "I" and "I;16", converted to float."""
        images = torch.linspace(0, high, 256).round()[pixels(b=20, c=1, size=40).long()].to(dtype)
        space, integers = infer_pixel_space(images), infer_pixel_space(images.int())
        assert torch.equal(space.to_pixels(images), integers.to_pixels(images.int()))
        assert space.note == integers.note
        assert f"the values 0 and {high} of the images" in space.note

    def test_floats_between_whole_numbers_are_no_16_bit_files_and_the_remedy_works(self) -> None:
        images = torch.linspace(0, 65535, 640).view(10, 1, 8, 8) + 0.25
        with pytest.raises(ArgumentError, match=r"from 0\.25 to 65535; .*std=\[1 / \(high - low\)\]"):
            infer_pixel_space(images)
        space = infer_pixel_space(images, mean=[0.0], std=[1 / 65536])
        assert int(space.to_pixels(images).max()) == 255

    def test_floats_that_fill_no_grey_levels_are_stretched(self) -> None:
        """A 32-bit image that was divided by the largest 32-bit integer."""
        images = torch.randint(0, 40000, (20, 1, 16, 16)).float() / (2**31 - 1)
        space = infer_pixel_space(images)
        assert "stand for the values" in space.note
        assert len(space.to_pixels(images).unique()) > 200
        assert infer_pixel_space(torch.rand(4, 1, 8, 8) / 16) == PixelSpace()


class TestSigned:
    def test_minus_one_to_one_without_a_normalize(self) -> None:
        p = pixels()
        for transform in (None, lambda x: x / 127.5 - 1):
            space = infer_pixel_space(p.float() / 127.5 - 1, transform=transform)
            assert space == PixelSpace((0.5,), (0.5,))
            assert torch.equal(space.to_pixels(p.float() / 127.5 - 1), p)

    @pytest.mark.parametrize(("low", "high"), [(-1, 0.5), (-0.5, 1), (-0.5, 0.5), (-1, 1.5)])
    def test_other_ranges_are_not_guessed(self, low: float, high: float) -> None:
        with pytest.raises(ArgumentError, match=r"nor -1..1"):
            infer_pixel_space(torch.linspace(low, high, 500).view(5, 1, 10, 10))


class TestPerImage:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int16])
    @pytest.mark.parametrize("grey", [True, False])
    def test_every_image_keeps_its_own_range(self, dtype: torch.dtype, grey: bool) -> None:
        p = pixels(c=1 if grey else 3, size=32)
        p[:, 0, 0, 0], p[:, 0, 0, 1] = 0, 255
        levels = p.double() * torch.tensor([2.0, 3, 4, 5, 6, 7]).view(-1, 1, 1, 1) + 10
        if dtype.is_floating_point:
            levels = (levels - levels.mean((1, 2, 3), keepdim=True)) / levels.std((1, 2, 3), keepdim=True)
        images = levels.to(dtype).squeeze(1)
        space = infer_pixel_space(images, mean="per_image")
        assert torch.equal(space.to_pixels(images), p)
        back = space.to_model(p, like=images)
        assert (back.shape, back.dtype) == (images.shape, dtype)
        assert torch.allclose(back.double(), images.double(), atol=4e-3 if dtype == torch.float16 else 1e-5)

    def test_constant_images_and_pixels(self) -> None:
        space = PixelSpace(per_image=True)
        images = torch.full((2, 3, 4, 4), -1.5)
        assert torch.equal(space.to_model(space.to_pixels(images), images), images)
        assert infer_pixel_space(pixels(), mean="per_image").identity

    @pytest.mark.parametrize(("mean", "std"), [("per_image", 1.0), ("image", None), ("0.5", 0.5)])
    def test_bad_words(self, mean: Any, std: Any) -> None:
        with pytest.raises(ArgumentError, match=r'`mean` must be numbers, or "per_image" without `std`, got'):
            infer_pixel_space(torch.rand(2, 3, 4, 4), mean=mean, std=std)

    def test_the_error_names_it(self) -> None:
        images = torch.randn(8, 3, 9, 9)
        for transform in (None, NormalizeIntensity(), Albumentation(MEAN, STD, 255.0, "image")):
            with pytest.raises(ArgumentError, match=r"-1..1, and no Normalize.*mean=\"per_image\" alone"):
                infer_pixel_space(images, transform=transform)


NORM, GLOBAL_MEAN, GLOBAL_STD = v1.Normalize(MEAN, STD), MEAN, STD


def by_global(batch: Any) -> Any:
    return {"image": [NORM(image) for image in batch["image"]]}


def by_numbers(batch: Any) -> Any:
    return v1.functional.normalize(batch["image"], GLOBAL_MEAN, GLOBAL_STD)


def by_helper(batch: Any) -> Any:
    return [by_numbers(image) for image in batch]


def by_text(batch: Any) -> Any:
    return v1.Compose([v1.ToTensor(), v1.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])(batch)


def by_default(batch: Any, pipeline: Any = v1.Compose([v1.ToTensor(), NORM])) -> Any:  # noqa: B008
    return pipeline(batch)


def by_arguments(batch: Any, mean: Any, std: Any) -> Any:
    return (batch - mean) / std


def by_closure() -> Any:
    steps = [v1.ToTensor(), v1.Normalize(MEAN, STD)]

    def apply(batch: Any) -> Any:
        for step in steps:
            batch = step(batch)
        return batch

    return apply


class Steps:
    """A transform whose parts have names of their own."""

    def __init__(self) -> None:
        self.resize, self.last = v1.Resize(9), NORM

    def __call__(self, image: Any) -> Any:
        return self.last(self.resize(image))


FUNCTIONS = {
    "global": by_global,
    "numbers": by_numbers,
    "helper": by_helper,
    "text": by_text,
    "default": by_default,
    "closure": by_closure(),
    "partial": partial(by_arguments, mean=np.array(MEAN), std=torch.tensor(STD).view(3, 1, 1)),
    "partial of a transform": partial(by_arguments, NORM),
    "lambda": v1.Lambda(lambda image: 2 * NORM(image / 2)),
    "attribute": Steps(),
    "method": Steps().__call__,
    "list": [v1.ToTensor(), by_global],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_mention_a_normalize(name: str) -> None:
    p = pixels(low=30, high=220)  # need not fill the range
    images = normalised(p)
    space = infer_pixel_space(images, transform=FUNCTIONS[name])
    assert space.mean == pytest.approx(MEAN)
    assert torch.equal(space.to_pixels(images), p)


def test_what_is_mentioned_but_not_applied_is_not_believed() -> None:
    both = partial(by_arguments, NORM, v1.Normalize(0.5, 0.6))
    images = normalised(pixels(b=20))
    assert infer_pixel_space(images, transform=both).mean == MEAN
    assert infer_pixel_space(pixels().float() / 255, transform=by_global) == PixelSpace()
    assert infer_pixel_space(pixels().float() / 127.5 - 1, transform=by_global) == PixelSpace((0.5,), (0.5,))
    with pytest.raises(ArgumentError, match="cannot be inferred"):
        infer_pixel_space(normalised(pixels(b=20), 0.3, 0.4), transform=both)


class Normalising:
    """A dataset that normalises in ``__getitem__``, without a ``transform``."""

    def __init__(self, p: Tensor) -> None:
        self.p = p

    def __len__(self) -> int:
        return len(self.p)

    def __getitem__(self, i: int) -> Tensor:
        return v1.functional.normalize(self.p[i].float() / 255, GLOBAL_MEAN, GLOBAL_STD)


def test_a_dataset_and_a_collate_fn_that_normalise() -> None:
    data = Normalising(pixels())
    images = torch.stack([data[i] for i in range(len(data))])
    for beside in ([data], [Subset(data, [0, 1])], [by_global]):
        assert infer_pixel_space(images, beside=beside).mean == MEAN


def test_the_function_of_a_hugging_face_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"image": [[0, 1]], "label": [0]})
    assert transforms_of(Subset(made.with_transform(by_global), [0])) == [by_global]
    made.set_transform(by_helper)
    assert transforms_of(made) == [by_helper]
    assert transforms_of(made.with_format("torch")) == []


class TestUnits:
    def test_a_normalize_of_levels_with_small_numbers(self) -> None:
        p = pixels(high=60)
        images = (p.float() - 4) / 8
        space = infer_pixel_space(images, transform=Albumentation(4.0, 8.0, max_pixel_value=1.0))
        assert torch.equal(space.to_pixels(images), p)

    def test_a_normalize_of_hounsfield_units(self) -> None:
        raw = torch.randint(-1024, 3072, (20, 1, 16, 16)).float()
        images = (raw - 100) / 250
        space = infer_pixel_space(images, transform=NormalizeIntensity(100.0, 250.0))
        assert "stand for the values" in space.note
        assert torch.allclose(space.to_model(space.to_pixels(images), images), images, atol=20 / 250)

    def test_numbers_that_albumentations_does_not_use(self) -> None:
        unused = Albumentation(MEAN, STD, 255.0, "min_max")
        assert infer_pixel_space(pixels().float() / 255, transform=unused) == PixelSpace()
