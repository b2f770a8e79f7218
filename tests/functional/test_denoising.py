"""The denoisers against SciPy and OpenCV, and what must not matter: the other images, the compiler, the threads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia.color import linear_rgb_to_rgb
from kornia.color import rgb_to_lab as kornia_lab
from numpy.typing import NDArray
from scipy.ndimage import median_filter
from torch import Tensor

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional import denoising
from lightning_backdoor.functional.denoising import local_median, nl_means, select
from lightning_backdoor.functional.native import LARGEST_TEMPLATE, native_kernel
from lightning_backdoor.functional.nlm import rgb_to_lab

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def cifar() -> Tensor:
    """1,000 CIFAR-10 images, 100 of each class, uint8 (1000, 3, 32, 32)."""
    if not (DATA / "cifar10_test.npz").exists():
        pytest.skip(f"no CIFAR-10 in {DATA}")
    sys.path.insert(0, str(DATA))
    try:
        from unpack import arrays  # noqa: PLC0415  (lies beside the data)
    finally:
        sys.path.remove(str(DATA))
    images, _ = arrays("test")
    return torch.from_numpy(images[::10]).permute(0, 3, 1, 2).contiguous()


def natural(number: int, channels: int, height: int, width: int) -> Tensor:
    """Smooth structure plus noise: unlike pure noise, many patches resemble each other."""
    coarse = torch.rand(number, channels, height // 4 + 2, width // 4 + 2) * 200
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth + torch.randn(number, channels, height, width) * 4 + 25).clamp(0, 255).to(torch.uint8)


def scipy_median(images: Tensor, window: tuple[int, int, int]) -> Tensor:
    filtered = [median_filter(image.permute(1, 2, 0).numpy(), size=window, mode="reflect") for image in images]
    return torch.from_numpy(np.stack(filtered)).permute(0, 3, 1, 2)


def opencv_color(images: Tensor, *settings: Any) -> NDArray[np.uint8]:
    """Return what the authors' loop returns, (N, H, W, 3): RGB handed to a function that takes it for BGR."""
    loop = [
        cv2.fastNlMeansDenoisingColored(image, None, *settings)
        for image in images.permute(0, 2, 3, 1).contiguous().numpy()
    ]
    return np.stack(loop)


def differences(ours: Tensor, theirs: NDArray[np.uint8]) -> NDArray[np.int_]:
    if theirs.ndim == 4:
        ours = ours.permute(0, 2, 3, 1)
    return np.abs(ours.numpy().astype(int) - theirs.astype(int))


# --- local median ---------------------------------------------------------------------------------------------------


def test_local_median_equals_scipy_bit_for_bit_on_cifar(cifar: Tensor) -> None:
    assert torch.equal(local_median(cifar), scipy_median(cifar, (2, 2, 3)))


@pytest.mark.parametrize(
    "window", [(2, 2, 3), (2, 2, 1), (3, 3, 1), (3, 3, 3), (1, 1, 1), (2, 3, 2), (5, 4, 3), (9, 1, 1)]
)
@pytest.mark.parametrize("shape", [(3, 3, 9, 7), (1, 3, 1, 1), (2, 3, 2, 16)])
def test_local_median_equals_scipy_for_any_window(window: tuple[int, int, int], shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    assert torch.equal(local_median(images, window), scipy_median(images, window))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_default_window_stays_within_a_channel_unless_the_image_is_color(channels: int) -> None:
    images = torch.randint(0, 256, (2, channels, 8, 8), dtype=torch.uint8)
    assert torch.equal(local_median(images), scipy_median(images, (2, 2, 1)))


def test_local_median_takes_the_upper_of_the_middle_values() -> None:
    images = torch.tensor([[[[0, 255], [255, 0]]]], dtype=torch.uint8)
    assert int(local_median(images)[0, 0, 1, 1]) == 255


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 30), run=st.integers(1, 6), data=st.data())
def test_selection_finds_any_rank_also_from_sorted_runs(count: int, run: int, data: st.DataObject) -> None:
    count = count * run
    values = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    rank = data.draw(st.integers(0, count - 1))
    runs = [value for start in range(0, count, run) for value in sorted(values[start : start + run])]
    (found,) = select([torch.tensor([value]) for value in runs], [rank], presorted=run)
    assert int(found) == sorted(values)[rank]


# --- non-local means against OpenCV ---------------------------------------------------------------------------------


def test_nl_means_stays_within_half_a_gray_level_of_opencv_on_cifar(cifar: Tensor) -> None:
    theirs = opencv_color(cifar, 5, 5, 7, 13)
    difference = differences(nl_means(cifar), theirs)
    assert difference.mean() < 0.1  # promised: 0.5
    assert np.percentile(difference, 99) <= 2
    assert differences(cifar, theirs).mean() > 10 * difference.mean()  # the filter does far more than we miss


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (2, 3, 20, 33), (1, 3, 100, 70), (2, 3, 3, 40)])
@pytest.mark.parametrize("settings", [(5, 5, 7, 13), (10, 3, 5, 9), (3, 10, 3, 21)])
def test_nl_means_follows_opencv_for_other_sizes_and_settings(shape: tuple[int, ...], settings: Any) -> None:
    images = natural(*shape)
    difference = differences(nl_means(images, *settings), opencv_color(images, *settings))
    assert difference.mean() < 0.2
    assert np.percentile(difference, 99) <= 2


@pytest.mark.parametrize("shape", [(4, 1, 28, 28), (1, 1, 8, 8), (1, 1, 70, 130)])
@pytest.mark.parametrize("h", [1.5, 5.0, 20.0])
def test_gray_images_follow_opencv(shape: tuple[int, ...], h: float) -> None:
    images = natural(*shape)
    theirs = np.stack([cv2.fastNlMeansDenoising(image[0].numpy(), None, h, 7, 13) for image in images])
    difference = differences(nl_means(images, h=h)[:, 0], theirs)
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_other_channel_counts_are_gray_images() -> None:
    images = natural(2, 4, 12, 10)
    apart = torch.cat([nl_means(images[:, channel : channel + 1]) for channel in range(4)], dim=1)
    assert torch.equal(nl_means(images), apart)


def test_lab_is_kornias_for_linear_light() -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    lightness, a, b = kornia_lab(linear_rgb_to_rgb(images / 255)).unbind(1)
    expected = torch.stack([lightness * 2.55, a + 128, b + 128], dim=1).clamp(0, 255)
    assert (rgb_to_lab(images) - expected).abs().max() < 1.01


# --- what must not matter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("denoise", [local_median, nl_means])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_other_images_do_not_matter(denoise: Any, channels: int) -> None:
    images = natural(70, channels, 11, 18)
    together, order = denoise(images), torch.randperm(70)
    assert torch.equal(denoise(images[order]), together[order])
    assert torch.equal(torch.cat([denoise(part) for part in images.split(9)]), together)


@pytest.mark.parametrize("shape", [(40, 3, 11, 18), (17, 1, 32, 32), (2, 3, 70, 150)])
@pytest.mark.parametrize("settings", [(5.0, 5.0, 7, 13), (12.0, 2.0, 3, 5), (5.0, 5.0, 1, 1), (90.0, 90.0, 11, 5)])
def test_the_compiler_does_not_matter(shape: tuple[int, ...], settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if native_kernel(settings[2]) is None:
        pytest.skip("no C compiler")
    images = natural(*shape)
    plain = nl_means(images, *settings)
    monkeypatch.setattr(denoising, "NATIVE_FROM", 0)
    assert torch.equal(nl_means(images, *settings), plain)


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_the_result_is_the_same(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    images = natural(3, 3, 9, 9)
    plain = nl_means(images)
    monkeypatch.setattr(denoising, "NATIVE_FROM", 0)
    monkeypatch.setenv("CC", compiler)
    native_kernel.cache_clear()
    try:
        assert native_kernel(7) is None
        assert torch.equal(nl_means(images), plain)
    finally:
        native_kernel.cache_clear()


def test_without_a_temporary_folder_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*args: Any, **kwargs: Any) -> str:
        raise PermissionError("no place for temporary files")

    images = natural(3, 3, 9, 9)
    plain = nl_means(images)
    monkeypatch.setattr(denoising, "NATIVE_FROM", 0)
    monkeypatch.setattr("tempfile.mkdtemp", read_only)
    native_kernel.cache_clear()
    try:
        assert native_kernel(7) is None
        assert torch.equal(nl_means(images), plain)
    finally:
        native_kernel.cache_clear()


def test_the_kernel_serves_the_patches_whose_sums_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """And others go the slow way: OpenCV's whole numbers are the oracle, on images of nothing but extremes."""
    assert 2 * 255**2 * LARGEST_TEMPLATE**2 < 2**24 <= 2 * 255**2 * (LARGEST_TEMPLATE + 2) ** 2
    assert native_kernel(LARGEST_TEMPLATE + 2) is None
    monkeypatch.setattr(denoising, "NATIVE_FROM", 0)
    images = torch.randint(0, 2, (2, 1, 24, 24), dtype=torch.uint8) * 255
    for template in (LARGEST_TEMPLATE, LARGEST_TEMPLATE + 2, 21):
        theirs = np.stack([cv2.fastNlMeansDenoising(image[0].numpy(), None, 80, template, 7) for image in images])
        assert differences(nl_means(images, 80.0, 80.0, template, 7)[:, 0], theirs).max() <= 1


@pytest.mark.parametrize("denoise", [local_median, nl_means])
def test_threads_do_not_matter_and_their_number_stays(denoise: Any) -> None:
    images, before = natural(50, 3, 32, 32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = denoise(images)
        torch.set_num_threads(3)
        assert torch.equal(denoise(images), alone)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("denoise", [local_median, nl_means])
def test_memory_layout_grad_and_inference_mode_do_not_matter(denoise: Any) -> None:
    images = natural(5, 3, 12, 12)
    original, expected = images.clone(), denoise(images)
    assert torch.equal(denoise(images.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(denoise(images.repeat_interleave(2, dim=0)[::2]), expected)
    with torch.inference_mode():
        assert torch.equal(denoise(images), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(denoise(images), expected)
    assert torch.equal(images, original)
    assert not expected.is_inference()


@pytest.mark.parametrize("value", [0, 1, 128, 255])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_constant_images_stay_as_they_are(value: int, channels: int) -> None:
    images = torch.full((2, channels, 9, 14), value, dtype=torch.uint8)
    assert torch.equal(local_median(images), images)
    if channels != 3:
        assert torch.equal(nl_means(images), images)


def test_constant_colors_stay_constant_and_shift_as_in_opencv() -> None:
    colors = torch.randint(0, 256, (200, 3, 1, 1), dtype=torch.uint8)
    images = colors.expand(-1, -1, 9, 9).contiguous()
    ours = nl_means(images)
    assert torch.equal(ours, ours[:, :, :1, :1].expand_as(ours))
    assert differences(ours, opencv_color(images, 5, 5, 7, 13)).max() <= 1


@pytest.mark.parametrize("denoise", [local_median, nl_means])
@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (0, 1, 8, 8), (2, 3, 0, 5), (2, 0, 4, 4)])
def test_nothing_in_nothing_out(denoise: Any, shape: tuple[int, ...]) -> None:
    result = denoise(torch.empty(shape, dtype=torch.uint8))
    assert result.shape == shape
    assert result.dtype == torch.uint8


@pytest.mark.gpu
@pytest.mark.parametrize("denoise", [local_median, nl_means])
def test_a_gpu_gives_the_same_within_rounding(denoise: Any) -> None:
    images = natural(20, 3, 40, 24)
    difference = denoise(images.cuda()).cpu().int() - denoise(images).int()
    assert difference.abs().max() <= 1
    assert difference.abs().float().mean() < 0.001


# --- papercuts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("denoise", [local_median, nl_means])
@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.rand(2, 3, 8, 8), r"`images` must be uint8 .* got torch.float32 \(2, 3, 8, 8\).*\* 255"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"shape \(N, C, H, W\), got torch.uint8 \(3, 8, 8\)"),
        (np.zeros((2, 3, 8, 8), dtype=np.uint8), "got ndarray"),
    ],
)
def test_images_that_are_no_pixels(denoise: Any, images: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        denoise(images)


@pytest.mark.parametrize("window", [(2, 2), (2, 2, 0), (2.0, 2, 3)])
def test_windows_that_are_none(window: Any) -> None:
    with pytest.raises(
        ArgumentError, match=r"`window` must be three whole numbers .* Pass|UltraClean uses \(2, 2, 3\)"
    ):
        local_median(natural(1, 3, 8, 8), window)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"template": 6}, "`template` must be an odd whole number of pixels, got 6"),
        ({"search": 12}, "`search` must be an odd whole number of pixels, got 12"),
        ({"search": 13.0}, "`search` must be an odd"),
        ({"template": -7}, "`template` must be an odd"),
        ({"h": 0}, "`h` must be above 0"),
        ({"h_color": float("nan")}, "`h_color` must be above 0 and finite"),
        ({"h": float("inf")}, "`h` must be above 0 and finite"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        nl_means(natural(1, 3, 8, 8), **settings)
