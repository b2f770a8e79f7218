"""Triggers: what an attacker paints into an image, in 8-bit pixel space."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_backdoor.errors import ArgumentError

__all__ = ["SIG", "BadNets", "Blended", "Trigger", "Trojan"]

PatchName = Literal["grid", "square", "cross"]
TextureName = Literal["noise", "stripe"]

# Rows from top to bottom; the last cell touches the bottom-right corner.
_PATCHES = {
    "grid": ((0, 0, 255), (0, 255, 0), (255, 0, 255)),
    "square": ((255,),),
    "cross": ((0, 255, 0), (255, 0, 255), (0, 255, 0)),
}

# Red, green and blue added to the 3x3 cells: saturated colours, no two neighbours alike, no value above 250.
_TROJAN = (
    ((250, 0, 125), (0, 250, 0), (125, 0, 250)),
    ((0, 125, 250), (250, 250, 0), (0, 0, 250)),
    ((250, 125, 0), (0, 250, 250), (250, 0, 0)),
)


class Trigger(ABC):
    """A deterministic change of pixel images. Call it with uint8 images ``(N, C, H, W)`` or ``(C, H, W)``.

    The result has the same shape and dtype, on the same device; the input stays as it was. A subclass implements
    :meth:`paint`, and :meth:`at_test` if the attacker shows another trigger at test time.
    """

    def __call__(self, images: Tensor) -> Tensor:
        """Return a copy of ``images`` with the trigger in it.

        Raises:
            ArgumentError: If the images are not uint8 tensors of 3 or 4 dimensions.
        """
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim not in (3, 4):
            got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ArgumentError(
                f"`images` must be a uint8 tensor of shape (N, C, H, W) or (C, H, W), got {got}. "
                "For a dataset of other images, use `attacks.poison`, which converts them."
            )
        return self.paint(images) if images.ndim == 4 else self.paint(images.unsqueeze(0)).squeeze(0)

    @abstractmethod
    def paint(self, images: Tensor) -> Tensor:
        """Return the triggered copy of a uint8 batch ``(N, C, H, W)``."""

    def at_test(self) -> Trigger:
        """Return the trigger that the attacker shows at test time (by default this one)."""
        return self


@dataclass(frozen=True)
class BadNets(Trigger):
    """Paste a small patch into the bottom-right corner (`Gu et al., 2017 <https://arxiv.org/abs/1708.06733>`_).

    Args:
        pattern: ``"grid"``, the 3x3 black and white grid used with D-BR (from the top: 0 0 255 / 0 255 0 / 255 0 255);
            ``"square"``, a white square; ``"cross"``, UltraClean's 3x3 (0 255 0 / 255 0 255 / 0 255 0).
        size: Side of the patch in pixels. ``None`` means 3 for grid and cross, which other sizes enlarge or shrink to
            the nearest cell, and a tenth of the image width, rounded down but at least 1, for the square.
        margin: Pixels between the patch and the corner. ``None`` means 0 for grid and cross and 1 for the square.

    Raises:
        ArgumentError: If an argument is out of range or, when called, if the patch does not fit the image.

    Example:
        >>> import torch
        >>> BadNets("cross")(torch.full((1, 4, 4), 9, dtype=torch.uint8))[0]
        tensor([[  9,   9,   9,   9],
                [  9,   0, 255,   0],
                [  9, 255,   0, 255],
                [  9,   0, 255,   0]], dtype=torch.uint8)
    """

    pattern: PatchName = "grid"
    size: int | None = None
    margin: int | None = None

    def __post_init__(self) -> None:
        _one_of("pattern", self.pattern, get_args(PatchName))
        if self.size is not None and self.size < 1:
            raise ArgumentError(f"`size` must be at least 1 pixel, got {self.size}.")
        if self.margin is not None and self.margin < 0:
            raise ArgumentError(f"`margin` must be at least 0 pixels, got {self.margin}.")

    def paint(self, images: Tensor) -> Tensor:
        """Return the triggered copy of a uint8 batch ``(N, C, H, W)``."""
        height, width = images.shape[-2:]
        square = self.pattern == "square"
        size = self.size or (max(1, width // 10) if square else 3)
        margin = int(square) if self.margin is None else self.margin
        if size + margin > min(height, width):
            raise ArgumentError(
                f"A patch of `size` {size} with `margin` {margin} does not fit an image of {height}x{width} pixels. "
                "Pass a smaller `size`."
            )
        cells = torch.tensor(_PATCHES[self.pattern], dtype=torch.uint8, device=images.device)
        rows, columns = slice(height - margin - size, height - margin), slice(width - margin - size, width - margin)
        painted = images.clone()
        painted[..., rows, columns] = _enlarged(cells, size, size)
        return painted


@dataclass(frozen=True, repr=False, eq=False)
class Blended(Trigger):
    """Mix a whole-image pattern ``M`` into the image: ``(1 - alpha) x + alpha M``.

    From `Chen et al., 2017 <https://arxiv.org/abs/1712.05526>`_.

    Args:
        alpha: Weight of the pattern, in ``(0, 1]``.
        pattern: ``"noise"``, uniform noise for each pixel and channel; ``"stripe"``, eight vertical bands, dark and
            light in turn (at 32 pixels: columns 0-3 dark, 4-7 light, ...); or an image, uint8 ``(C, H, W)`` or
            ``(H, W)``, which is resized to the images it meets.
        seed: Seed of the noise.

    Raises:
        ArgumentError: If an argument is out of range or the channels of the pattern do not match the image.

    Example:
        >>> import torch
        >>> Blended(0.2, "stripe")(torch.full((1, 1, 8), 100, dtype=torch.uint8))
        tensor([[[ 80, 131,  80, 131,  80, 131,  80, 131]]], dtype=torch.uint8)
    """

    alpha: float = 0.15
    pattern: TextureName | Tensor = "noise"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ArgumentError(f"`alpha` must be in (0, 1], got {self.alpha}.")
        if not isinstance(self.pattern, Tensor):
            _one_of("pattern", self.pattern, get_args(TextureName), "or a uint8 image")
        elif self.pattern.dtype != torch.uint8 or self.pattern.ndim not in (2, 3):
            raise ArgumentError(
                "`pattern` must be a uint8 image of shape (C, H, W) or (H, W), "
                f"got {self.pattern.dtype} {tuple(self.pattern.shape)}. Scale it to 0-255 and convert it to uint8."
            )

    def __repr__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.pattern, Tensor):
            values["pattern"] = _Verbatim(f"torch.tensor({self.pattern.tolist()}, dtype=torch.uint8)")
        return f"Blended({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    def paint(self, images: Tensor) -> Tensor:
        """Return the triggered copy of a uint8 batch ``(N, C, H, W)``."""
        texture = self._texture(*images.shape[1:]).to(images.device)
        return _to_uint8((1 - self.alpha) * images + self.alpha * texture)

    def _texture(self, channels: int, height: int, width: int) -> Tensor:
        """Return the pattern as float ``(C or 1, H, W)``, 0-255."""
        if isinstance(self.pattern, Tensor):
            image = self.pattern.float().reshape(-1, *self.pattern.shape[-2:])
            if len(image) not in (1, channels):
                raise ArgumentError(
                    f"`pattern` has {len(image)} channels and the image has {channels}. "
                    "Pass a pattern with as many channels as the image, or a grey one."
                )
            if image.shape[1:] == (height, width):
                return image
            return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
        if self.pattern == "stripe":
            bands = torch.arange(width) * 8 // width
            return (bands % 2 * 255.0).expand(1, height, width)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, 256, (channels, height, width), generator=generator).float()


@dataclass(frozen=True)
class SIG(Trigger):
    """Add a horizontal sine to every channel (`Barni et al., 2019 <https://arxiv.org/abs/1902.11237>`_).

    Column ``j`` of ``W`` gets ``delta * sin(2 pi j frequency / W)``; the result is rounded and clipped to 0-255.

    Args:
        delta: Amplitude in grey levels, above 0.
        frequency: Periods over the width of the image, above 0.
        test_delta: Amplitude at test time; ``None`` means ``delta``. Attackers often show a stronger one.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> import torch
        >>> SIG(40, frequency=2)(torch.full((1, 1, 8), 240, dtype=torch.uint8))
        tensor([[[240, 255, 240, 200, 240, 255, 240, 200]]], dtype=torch.uint8)
    """

    delta: float = 40
    frequency: float = 6
    test_delta: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 < value < math.inf:
                raise ArgumentError(f"`{field.name}` must be above 0, got {value}.")

    def paint(self, images: Tensor) -> Tensor:
        """Return the triggered copy of a uint8 batch ``(N, C, H, W)``."""
        width = images.shape[-1]
        columns = torch.arange(width, dtype=torch.float64)
        wave = self.delta * torch.sin(2 * torch.pi * self.frequency * columns / width)
        return _to_uint8(images + wave.float().to(images.device))

    def at_test(self) -> SIG:
        """Return the sine with the amplitude of test time."""
        return self if self.test_delta is None else SIG(self.test_delta, self.frequency)


@dataclass(frozen=True)
class Trojan(Trigger):
    """Add the coloured Trojan square, saturating at 255 (`Liu et al., 2018 <https://doi.org/10.14722/ndss.2018.23291>`_).

    On 32x32 images the square covers rows and columns 25-27, as in the D-BR experiments; on other sizes its place and
    side grow in proportion. Its nine colours are fixed here (values up to 250, the published file is not copied). Grey
    images get the mean of the three colours, further channels repeat them.

    Args:
        strength: Factor on the added values, in ``(0, 1]``.

    Raises:
        ArgumentError: If ``strength`` is out of range.

    Example:
        >>> import torch
        >>> Trojan()(torch.zeros(1, 32, 32, dtype=torch.uint8))[0, 25:28, 25:28]
        tensor([[125,  83, 125],
                [125, 167,  83],
                [125, 167,  83]], dtype=torch.uint8)
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ArgumentError(f"`strength` must be in (0, 1], got {self.strength}.")

    def paint(self, images: Tensor) -> Tensor:
        """Return the triggered copy of a uint8 batch ``(N, C, H, W)``."""
        channels, height, width = images.shape[1:]
        colours = torch.tensor(_TROJAN, dtype=torch.float32, device=images.device).permute(2, 0, 1)
        cells = colours.mean(0, keepdim=True) if channels == 1 else colours[torch.arange(channels) % 3]
        (top, rows), (left, columns) = (_in_proportion(side) for side in (height, width))
        added = torch.zeros(images.shape[1:], device=images.device)
        added[:, top : top + rows, left : left + columns] = self.strength * _enlarged(cells, rows, columns)
        return _to_uint8(images + added)


class _Verbatim(str):
    """Text whose repr has no quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def _to_uint8(pixels: Tensor) -> Tensor:
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _enlarged(cells: Tensor, rows: int, columns: int) -> Tensor:
    """Resize ``(..., R, C)`` to ``(..., rows, columns)`` by repeating the nearest cell."""
    row = torch.arange(rows) * cells.shape[-2] // rows
    column = torch.arange(columns) * cells.shape[-1] // columns
    return cells[..., row, :][..., column]


def _in_proportion(side: int) -> tuple[int, int]:
    """Return start and length of the span that covers pixels 25-27 of 32."""
    length = max(1, round(3 * side / 32))
    return min(round(25 * side / 32), side - length), length


def _one_of(name: str, value: object, options: tuple[str, ...], more: str = "") -> None:
    if value not in options:
        raise ArgumentError(f"`{name}` must be {' or '.join(map(repr, options))} {more}".rstrip() + f", got {value!r}.")
