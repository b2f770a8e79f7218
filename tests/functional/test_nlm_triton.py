"""Triton's kernels of non-local means against PyTorch's operations: in Triton's interpreter, and on a CUDA device."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_backdoor import functional
from lightning_backdoor.functional import denoising
from lightning_backdoor.functional.denoising import nl_means
from tests.functional.test_denoising import natural

OURS = ["lightning_backdoor.functional.nlm_triton", "lightning_backdoor.functional.nlm_kernels"]
KERNELS = ["means", "pack", "to_planes", "to_rgb"]
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # of weights that are set to zero


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ModuleType]:
    """The kernels as Triton's interpreter runs them, on CPU tensors: a decorator decides when a kernel is defined."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        for name in OURS:
            patch.delitem(sys.modules, name, raising=False)
        patch.setenv("TRITON_INTERPRET", "1")
        module = importlib.import_module(OURS[0])
        patch.setattr(module, "ROWS", 2)
        yield module
        for name in OURS:
            del sys.modules[name]
    vars(functional).pop("nlm_triton"), vars(functional).pop("nlm_kernels")


@pytest.fixture
def launched(interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Let ``nl_means`` take the kernels."""
    monkeypatch.setattr(denoising, "device_kernel", lambda *settings: interpreted)
    return interpreted


class Calls(TorchDispatchMode):
    """Counts what the dispatcher runs."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((1, 3, 1, 1), (5.0, 5.0, 3, 3)),
        ((2, 3, 2, 5), (5.0, 9.0, 3, 3)),
        ((2, 1, 2, 40), (20.0, 5.0, 7, 3)),
        ((1, 4, 3, 3), (5.0, 5.0, 1, 3)),
        ((2, 3, 5, 2), (5.0, 5.0, 3, 1)),
        *(pytest.param((2, 3, 5, 7), (5.0, 5.0, 7, search), marks=pytest.mark.slow) for search in (5, 13)),
    ],
)
def test_the_kernels_give_the_same_bit_for_bit(
    shape: tuple[int, ...], settings: tuple[float, float, int, int], interpreted: ModuleType, monkeypatch: Any
) -> None:
    images = natural(*shape)
    expected = nl_means(images, *settings)
    monkeypatch.setattr(denoising, "device_kernel", lambda *settings: interpreted)
    assert torch.equal(nl_means(images, *settings), expected)
    assert not torch.equal(images, expected) or settings[3] == 1 or shape[-1] == 1


def test_every_color_goes_there_and_back_as_on_a_cpu(interpreted: ModuleType) -> None:
    """A sample of the cube of all colors; without a search window the means are the pixels."""
    colors = torch.cartesian_prod(*[torch.arange(0, 256, 15).to(torch.uint8)] * 3)
    images = colors.T.reshape(1, 3, 18, 324).contiguous()
    assert torch.equal(interpreted.smooth_images(images, [(1, 5.0), (2, 5.0)], 1, 1), nl_means(images, 5.0, 5.0, 1, 1))


def test_a_block_of_images_takes_six_launches(launched: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[str] = []

    class Counted:
        """In place of a kernel; what the interpreter does around one is left out."""

        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **settings: launches.append(self.name)

    for name in KERNELS:
        monkeypatch.setattr(launched, name, Counted(name))
    nl_means(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))  # keeps the table of the cube root
    launches.clear()
    with Calls() as calls:
        nl_means(torch.zeros(50, 3, 32, 32, dtype=torch.uint8))
    assert launches == ["to_planes", "pack", "means", "pack", "means", "to_rgb"]
    assert calls.number <= 16
    monkeypatch.setattr(launched, "BYTES", 1)
    launches.clear()
    with Calls() as calls:
        nl_means(torch.zeros(5, 1, 32, 32, dtype=torch.uint8))
    assert launches == 5 * ["to_planes", "pack", "means"]
    assert calls.number <= 5 * 16


def test_the_largest_kernel_compiles_to_few_operations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Compiling takes time by the square of the operations times the loads; needs Triton's compiler, not a device."""
    triton = pytest.importorskip("triton")
    pytest.importorskip("triton.backends.nvidia")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # nothing compiled before
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    launched = importlib.import_module(OURS[0])
    sizes = {"ROWS": launched.ROWS, "LANES": launched.LANES, "PITCH": launched.SMALLEST_PITCH}
    constants = {"CHANNELS": 3, "PLANES": 2, "TEMPLATE": 7, "SHIFT": 6, "REACH": 6, "NATIVE": True, **sizes}
    kinds = {
        "words": "*i64",
        "squares": "*i32",
        "smooth": "*u8",
        **dict.fromkeys(("cubic", "square", "linear"), "fp32"),
    }
    signature = {name: kinds.get(name, "i32") for name in launched.means.arg_names if name not in constants}
    source = triton.compiler.ASTSource(launched.means, signature | dict.fromkeys(constants, "constexpr"), constants)
    compiled = triton.compile(source, target=target, options={"num_warps": 4, "num_stages": 1})
    operations = compiled.asm["ttir"].splitlines()
    assert len(operations) <= 750
    assert sum("tt.load" in line for line in operations) <= 50
    assert "dp4a.u32.u32" in compiled.asm["ptx"]


def test_without_the_kernels_calls_do_not_grow_with_the_images() -> None:
    """On the meta device, where an operation takes no time, for 12 offsets and two groups of planes."""

    def calls(number: int) -> int:
        with Calls() as counted:
            nl_means(torch.empty(number, 3, 8, 8, dtype=torch.uint8, device="meta"), template=7, search=5)
        return counted.number

    assert abs(calls(512) - calls(2)) <= 16
    assert calls(2) <= 60 * 12 * 2


def test_importing_the_package_leaves_triton_alone() -> None:
    assert denoising.device_kernel(torch.device("cpu"), True, 32, 7, 13) is None
    assert "nlm_triton" not in vars(denoising)


def test_a_device_without_triton_goes_the_slow_way_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setitem(sys.modules, OURS[0], None)
    monkeypatch.delattr("lightning_backdoor.functional.nlm_triton", raising=False)
    denoising.device_kernel.cache_clear()
    try:
        with pytest.warns(UserWarning, match="without its Triton kernels on cuda:0 and takes longer: ModuleNotFound"):
            assert denoising.device_kernel(torch.device("cuda:0"), True, 32, 7, 13) is None
    finally:
        denoising.device_kernel.cache_clear()


@pytest.mark.parametrize("color", [True, False])
def test_kernels_that_are_wrong_in_one_pixel_are_not_used(color: bool) -> None:
    def right(images: Tensor, groups: Any, template: int, search: int) -> Tensor:
        return denoising._smooth_without_kernels(images, groups, template, search)

    def wrong(images: Tensor, *settings: Any) -> Tensor:
        smoothed = right(images, *settings)
        smoothed[0, -1, 5, 20] += 1
        return smoothed

    place = torch.device("cpu"), color, 40
    denoising.require_same_means(right, *place, template=7, search=13)
    with pytest.raises(ArithmeticError, match="another than on the CPU"):
        denoising.require_same_means(wrong, *place, template=7, search=13)


def plain(images: Tensor, *settings: Any) -> Tensor:
    """The means by PyTorch's operations on the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoising, "device_kernel", lambda *settings: None)
        return nl_means(images, *settings)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((1, 3, 1, 1), (5.0, 5.0, 7, 13)),
        ((3, 1, 1, 1), (5.0, 5.0, 7, 13)),
        ((2, 3, 3, 40), (5.0, 5.0, 7, 13)),
        ((5, 1, 28, 28), (5.0, 5.0, 7, 13)),
        ((3, 4, 17, 31), (10.0, 3.0, 5, 9)),
        ((3, 3, 33, 65), (20.0, 2.0, 3, 21)),
        ((2, 3, 9, 7), (5.0, 5.0, 1, 1)),
        ((2, 3, 9, 70), (90.0, 90.0, 7, 5)),
        ((600, 3, 32, 32), (5.0, 5.0, 7, 13)),
        ((40, 3, 224, 224), (5.0, 5.0, 7, 13)),
        ((2, 3, 300, 500), (5.0, 5.0, 7, 13)),
    ],
)
def test_kernels_on_a_device_give_what_a_cpu_gives(shape: tuple[int, ...], settings: Any) -> None:
    images = natural(*shape)
    ours = nl_means(images.cuda(), *settings)
    assert denoising.device_kernel(torch.device("cuda", 0), shape[1] == 3, shape[3], *settings[2:]) is not None
    assert torch.equal(ours.cpu(), nl_means(images, *settings))
    difference = (ours.int() - plain(images.cuda(), *settings).int()).abs()
    assert difference.max() <= 1  # CUDA divides by a constant as it multiplies by its reciprocal
    assert difference.float().mean() < 1e-3


@pytest.mark.gpu
def test_blocks_on_a_device_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    images = natural(70, 3, 12, 20).cuda()
    together = nl_means(images)
    launched = denoising.device_kernel(images.device, True, 20, 7, 13)
    assert launched is not None
    monkeypatch.setattr(launched, "BYTES", 12 * 30 * 64 * 9)
    assert torch.equal(nl_means(images), together)
    assert torch.equal(nl_means(images[1::2]), together[1::2])
    assert torch.equal(nl_means(images.contiguous(memory_format=torch.channels_last)), together)
