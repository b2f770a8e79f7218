"""Triggers all over the image: mixed-in pictures, waves and the adaptive blend."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_backdoor.attacks.painting import Verbatim, channels_like, chosen_by, one_of, to_uint8
from lightning_backdoor.attacks.triggers import Trigger
from lightning_backdoor.errors import ArgumentError

__all__ = ["SIG", "AdaptiveBlend", "Blended"]

TextureName = Literal["noise", "stripe", "flower"]


@dataclass(frozen=True, repr=False, eq=False)
class Blended(Trigger):
    """Mix a whole-image pattern ``M`` into the image: ``(1 - alpha) x + alpha M``.

    From `Chen et al., 2017 <https://arxiv.org/abs/1712.05526>`_.

    Args:
        alpha: Weight of the pattern, in ``(0, 1]``.
        pattern: ``"noise"``, uniform noise for each pixel and channel; ``"stripe"``, eight vertical bands, dark and
            light in turn (at 32 pixels: columns 0-3 dark, 4-7 light, ...); ``"flower"``, a photograph that comes with
            scikit-learn, which it needs, in place of the papers' Hello Kitty; or an image, uint8 ``(C, H, W)`` or
            ``(H, W)``. Photograph and image are resized to the images they meet.
        seed: Seed of the noise.
        additive: Add the pattern instead, ``x + alpha M``, saturating at 255, as UltraClean's authors do.

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
    additive: bool = False

    def __post_init__(self) -> None:
        _check_pattern(self.pattern, alpha=self.alpha)

    def __repr__(self) -> str:
        return _repr(self)

    def paint(self, images: Tensor) -> Tensor:
        """Return the triggered copy of a uint8 batch ``(N, C, H, W)``."""
        pattern = texture(self.pattern, self.seed, *images.shape[1:]).to(images.device)
        return to_uint8((1 - self.alpha * (not self.additive)) * images + self.alpha * pattern)


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
        return to_uint8(images + wave.float().to(images.device))

    def at_test(self) -> SIG:
        """Return the sine with the amplitude of test time."""
        return self if self.test_delta is None else SIG(self.test_delta, self.frequency)


@dataclass(frozen=True, repr=False, eq=False)
class AdaptiveBlend(Trigger):
    """Mix only some pieces of a pattern into each poison, and the whole of it at test time.

    Adap-Blend (`Qi et al., 2023 <https://openreview.net/forum?id=_wSHsgrVali>`_), to be used with cover samples:
    ``poison(data, AdaptiveBlend(pattern="flower"), rate=0.003, covers=0.003)``. Pattern and image are cut in a square
    grid of pieces; a shown piece becomes ``(1 - alpha) x + alpha M``, a masked one stays. Which pieces an image gets,
    its own pixels and ``seed`` decide.

    Args:
        alpha: Weight of the pattern in training, in ``(0, 1]``.
        test_alpha: Weight at test time.
        pattern: As for :class:`Blended`.
        pieces: Number of pieces, a square number.
        masked: Share of the pieces that an image does not get, in ``[0, 1)``, rounded to whole pieces; at least one
            piece is shown.
        seed: Seed of the choice of the pieces, and of the noise.

    Raises:
        ArgumentError: If an argument is out of range or the channels of the pattern do not match the image.
    """

    alpha: float = 0.15
    test_alpha: float = 0.2
    pattern: TextureName | Tensor = "noise"
    pieces: int = 16
    masked: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        _check_pattern(self.pattern, alpha=self.alpha, test_alpha=self.test_alpha)
        if self.pieces < 1 or math.isqrt(self.pieces) ** 2 != self.pieces:
            raise ArgumentError(f"`pieces` must be a square number such as 16, got {self.pieces}.")
        if not 0 <= self.masked < 1:
            raise ArgumentError(f"`masked` must be in [0, 1), got {self.masked}.")

    def __repr__(self) -> str:
        return _repr(self)

    def paint(self, images: Tensor) -> Tensor:
        """Return the triggered copy of a uint8 batch ``(N, C, H, W)``."""
        height, width = images.shape[-2:]
        side = math.isqrt(self.pieces)
        piece = (torch.arange(height) * side // height)[:, None] * side + torch.arange(width) * side // width
        count = max(1, round(self.pieces * (1 - self.masked)))
        shown = torch.zeros(len(images), self.pieces)
        for row, image in zip(shown, images, strict=True):
            row[torch.randperm(self.pieces, generator=chosen_by(image, self.seed))[:count]] = 1
        weight = self.alpha * shown[:, piece].unsqueeze(1).to(images.device)
        pattern = texture(self.pattern, self.seed, *images.shape[1:]).to(images.device)
        return to_uint8((1 - weight) * images + weight * pattern)

    def at_test(self) -> Blended:
        """Return the whole pattern with the weight of test time."""
        return Blended(self.test_alpha, self.pattern, self.seed)


def texture(pattern: TextureName | Tensor, seed: int, channels: int, height: int, width: int) -> Tensor:
    """Return a pattern as float ``(C or 1, H, W)``, 0-255."""
    if isinstance(pattern, Tensor):
        image = pattern.float().reshape(-1, *pattern.shape[-2:])
        if len(image) not in (1, channels):
            raise ArgumentError(
                f"`pattern` has {len(image)} channels and the image has {channels}. "
                "Pass a pattern with as many channels as the image, or a grey one."
            )
        return _resized(image, height, width)
    if pattern == "flower":
        return channels_like(_flower(height, width), channels)
    if pattern == "stripe":
        bands = torch.arange(width) * 8 // width
        return (bands % 2 * 255.0).expand(1, height, width)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), generator=generator).float()


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]


@lru_cache(maxsize=8)
def _flower(height: int, width: int) -> Tensor:
    """Return the middle square of scikit-learn's photograph of a flower, float ``(3, height, width)``, 0-255."""
    try:
        from sklearn.datasets import load_sample_image  # noqa: PLC0415  (optional)
    except ImportError as error:
        raise ArgumentError(
            "`pattern` 'flower' is a photograph that comes with scikit-learn, which is not installed. "
            "Install scikit-learn, or pass an image as `pattern`."
        ) from error
    image = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1).float()
    rows, columns = image.shape[1:]
    side = min(rows, columns)
    top, left = (rows - side) // 2, (columns - side) // 2
    return _resized(image[:, top : top + side, left : left + side], height, width)


def _check_pattern(pattern: object, **weights: float) -> None:
    for name, value in weights.items():
        if not 0 < value <= 1:
            raise ArgumentError(f"`{name}` must be in (0, 1], got {value}.")
    if not isinstance(pattern, Tensor):
        one_of("pattern", pattern, get_args(TextureName), "or a uint8 image")
    elif pattern.dtype != torch.uint8 or pattern.ndim not in (2, 3):
        raise ArgumentError(
            "`pattern` must be a uint8 image of shape (C, H, W) or (H, W), "
            f"got {pattern.dtype} {tuple(pattern.shape)}. Scale it to 0-255 and convert it to uint8."
        )


def _repr(trigger: Blended | AdaptiveBlend) -> str:
    values = {field.name: getattr(trigger, field.name) for field in fields(trigger)}
    if isinstance(trigger.pattern, Tensor):
        values["pattern"] = Verbatim(f"torch.tensor({trigger.pattern.tolist()}, dtype=torch.uint8)")
    return f"{type(trigger).__name__}({', '.join(f'{name}={value!r}' for name, value in values.items())})"
