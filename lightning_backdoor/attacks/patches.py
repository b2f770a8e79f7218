"""Triggers on a few pixels: BadNets, the Trojan square, corner patterns and the adaptive patches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_backdoor.attacks.painting import (
    channels_like,
    chosen_by,
    enlarged,
    in_proportion,
    one_of,
    span,
    to_uint8,
)
from lightning_backdoor.attacks.triggers import Trigger
from lightning_backdoor.errors import ArgumentError

__all__ = ["AdaptivePatch", "BadNets", "Corners", "Trojan"]

PatchName = Literal["grid", "square", "cross"]

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

# Rows and columns of the adaptive patches on 32x32 pixels: grid, cross, Trojan colours, white square.
_ADAPTIVE = ((5, 5), (10, 14), (5, 6), (5, 5))


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
        one_of("pattern", self.pattern, get_args(PatchName))
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
        painted[..., rows, columns] = enlarged(cells, size, size)
        return painted


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
        cells = channels_like(
            torch.tensor(_TROJAN, dtype=torch.float32, device=images.device).permute(2, 0, 1), channels
        )
        (top, rows), (left, columns) = (in_proportion(side) for side in (height, width))
        added = torch.zeros(images.shape[1:], device=images.device)
        added[:, top : top + rows, left : left + columns] = self.strength * enlarged(cells, rows, columns)
        return to_uint8(images + added)


@dataclass(frozen=True)
class Corners(Trigger):
    """Add the signed 3x3 grid to the bottom-right corner, or mirrored to all four corners.

    The pattern of label-consistent poisons (`Turner et al., 2019 <https://arxiv.org/abs/1912.02771>`_): from the top
    - - + / - + - / + - +, where + adds ``amplitude`` and - subtracts it, saturating at 0 and 255. With amplitude 255 it
    is white and black.

    Args:
        amplitude: Grey levels added or subtracted, in ``[1, 255]``. UltraClean trains with 64.
        corners: 1 (bottom right) or 4.
        margin: Pixels between the pattern and the edges, at least 0.
        test_amplitude: Amplitude at test time; ``None`` means ``amplitude``.

    Raises:
        ArgumentError: If an argument is out of range or, when called, if the patterns do not fit the image.

    Example:
        >>> import torch
        >>> Corners(64, corners=1)(torch.full((1, 4, 4), 200, dtype=torch.uint8))[0]
        tensor([[200, 200, 200, 200],
                [200, 136, 136, 255],
                [200, 136, 255, 136],
                [200, 255, 136, 255]], dtype=torch.uint8)
    """

    amplitude: int = 255
    corners: int = 4
    margin: int = 0
    test_amplitude: int | None = None

    def __post_init__(self) -> None:
        for name in ("amplitude", "test_amplitude"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 255:
                raise ArgumentError(f"`{name}` must be between 1 and 255 grey levels, got {value}.")
        if self.corners not in (1, 4):
            raise ArgumentError(f"`corners` must be 1 (bottom right) or 4, got {self.corners}.")
        if self.margin < 0:
            raise ArgumentError(f"`margin` must be at least 0 pixels, got {self.margin}.")

    def paint(self, images: Tensor) -> Tensor:
        """Return the triggered copy of a uint8 batch ``(N, C, H, W)``."""
        height, width = images.shape[-2:]
        if (3 + self.margin) * (2 if self.corners == 4 else 1) > min(height, width):
            raise ArgumentError(
                f"{self.corners} corner patterns with `margin` {self.margin} do not fit an image of {height}x{width} "
                "pixels. Pass a smaller `margin` or `corners=1`."
            )
        signs = torch.tensor(_PATCHES["grid"], device=images.device) / 255 * 2 - 1
        added = torch.zeros(height, width, device=images.device)
        top, left = height - self.margin - 3, width - self.margin - 3
        added[top : top + 3, left : left + 3] = self.amplitude * signs
        if self.corners == 4:
            added = added + added.flip(0) + added.flip(1) + added.flip(0, 1)
        return to_uint8(images + added)

    def at_test(self) -> Corners:
        """Return the pattern with the amplitude of test time."""
        return self if self.test_amplitude is None else Corners(self.test_amplitude, self.corners, self.margin)


@dataclass(frozen=True)
class AdaptivePatch(Trigger):
    """Show one faint patch of four in training, and all four clearly at test time.

    Adap-Patch (`Qi et al., 2023 <https://openreview.net/forum?id=_wSHsgrVali>`_), to be used with cover samples:
    ``poison(data, AdaptivePatch(), rate=0.003, covers=0.006)``. Rows and columns that the patches cover on 32x32 pixels
    (in proportion on other sizes): 5x5 a grid (bottom right), 10x14 a cross (bottom left), 5x6 the Trojan colours (top
    right), 5x5 a white square (top left); each is mixed into the image with its opacity. Which one an image gets, its
    own pixels and ``seed`` decide. The paper's patches are picture files of 25 to 140 pixels; these are drawn here, the
    largest one with the least opacity.

    Args:
        opacities: Opacity of the four patches in training, in ``(0, 1]``.
        test_opacity: Opacity of all of them at test time.
        together: All patches in each image, which is the form of test time.
        seed: Seed of the choice of the patch.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    opacities: tuple[float, float, float, float] = (0.5, 0.2, 0.5, 0.3)
    test_opacity: float = 1.0
    together: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.opacities) != 4 or not all(0 < value <= 1 for value in (*self.opacities, self.test_opacity)):
            raise ArgumentError(
                "`opacities` must be four numbers in (0, 1] and `test_opacity` one, "
                f"got {self.opacities} and {self.test_opacity}."
            )

    def paint(self, images: Tensor) -> Tensor:
        """Return the triggered copy of a uint8 batch ``(N, C, H, W)``."""
        pictures, masks = self._patches(images)
        if self.together:
            shown = torch.arange(4).expand(len(images), 4)
        else:
            shown = torch.stack([torch.randint(4, (1,), generator=chosen_by(image, self.seed)) for image in images])
        opacity = torch.tensor(self.opacities, device=images.device).view(4, 1, 1, 1) * masks
        weight = torch.stack([opacity[patches].sum(0) for patches in shown.to(images.device)])
        return to_uint8(images + weight * (pictures - images.float()))

    def at_test(self) -> AdaptivePatch:
        """Return all patches with the opacity of test time."""
        clear = (self.test_opacity,) * 4
        return replace(self, opacities=clear, together=True)

    def _patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return all patches in one picture, ``(C, H, W)``, and the mask of each, ``(4, 1, H, W)``."""
        channels, height, width = images.shape[1:]
        grays = [torch.tensor(_PATCHES[name]).expand(3, -1, -1) for name in ("grid", "cross", "square")]
        cells = [grays[0], grays[1], torch.tensor(_TROJAN).permute(2, 0, 1), grays[2]]
        corners = [(True, True), (True, False), (False, True), (False, False)]  # bottom, right
        picture, masks = torch.zeros(channels, height, width), torch.zeros(4, 1, height, width)
        for mask, colors, sides, (bottom, right) in zip(masks, cells, _ADAPTIVE, corners, strict=True):
            rows, columns = span(height, sides[0], of=32), span(width, sides[1], of=32)
            top, left = bottom * (height - rows), right * (width - columns)
            area = ..., slice(top, top + rows), slice(left, left + columns)
            picture[area] = enlarged(channels_like(colors.float(), channels), rows, columns)
            mask[area] = 1
        return picture.to(images.device), masks.to(images.device)
