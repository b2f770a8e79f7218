"""Triggers that move or recolour every pixel: WaNet's warp and a colour curve."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_backdoor.attacks.painting import channels_like, chosen_by, to_uint8
from lightning_backdoor.attacks.triggers import Trigger
from lightning_backdoor.errors import ArgumentError

__all__ = ["ColourCurve", "WaNet"]


@dataclass(frozen=True)
class WaNet(Trigger):
    """Warp the image smoothly and imperceptibly (`Nguyen and Tran, 2021 <https://arxiv.org/abs/2102.10369>`_).

    A control grid of uniform noise in ``[-1, 1]``, divided by its mean absolute value, is enlarged bicubically to the
    image, ``b``; the pixel at ``g`` (coordinates in ``[-1, 1]``) is read, bilinearly, at ``clamp(g + strength b / S,
    -1, 1)``, where ``S`` is the side of the image along that coordinate. The noise mode is made of cover samples:
    ``poison(data, WaNet(), rate=0.05, covers=0.1)`` shows the model images with the same warp plus a jitter of ``U(-1,
    1) / S``, each its own, with their true labels.

    Args:
        strength: Strength of the warp, above 0. At 0.5, the mean shift is a quarter of a pixel.
        grid: Side of the control grid, at least 2.
        jitter: Add the jitter, which is the form of cover samples; an image's own pixels and ``seed`` decide it.
        seed: Seed of the control grid.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    strength: float = 0.5
    grid: int = 4
    jitter: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise ArgumentError(f"`strength` must be above 0, got {self.strength}.")
        if self.grid < 2:
            raise ArgumentError(f"`grid` must be at least 2, got {self.grid}.")

    def paint(self, images: Tensor) -> Tensor:
        """Return the triggered copy of a uint8 batch ``(N, C, H, W)``."""
        height, width = images.shape[-2:]
        sides = torch.tensor([width, height])  # grid_sample takes x before y
        noise = torch.rand(1, 2, self.grid, self.grid, generator=torch.Generator().manual_seed(self.seed)) * 2 - 1
        noise = noise / noise.abs().mean()
        field = F.interpolate(noise, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        places = (torch.stack([x, y], dim=-1) + self.strength * field / sides).clamp(-1, 1)
        if self.jitter:
            own = [torch.rand(height, width, 2, generator=chosen_by(image, self.seed)) * 2 - 1 for image in images]
            places = (places + torch.stack(own) / sides).clamp(-1, 1)
        places = places.expand(len(images), -1, -1, -1).to(images.device)
        return to_uint8(F.grid_sample(images.float(), places, align_corners=True))

    def on_covers(self) -> WaNet:
        """Return the warp with jitter."""
        return replace(self, jitter=True)


@dataclass(frozen=True)
class ColourCurve(Trigger):
    """Recolour the image with one curve per channel, as photo filters do.

    A filter attack in the manner of those in `Liu et al., 2019 <https://doi.org/10.1145/3319535.3363216>`_ (Nashville,
    Gotham): a grey level ``v`` becomes ``low + (high - low) (v / 255) ** gamma``, rounded, in every image alike. The
    default is a warm, faded look in the manner of Nashville. Grey images get the mean of the three curves, further
    channels repeat them.

    Args:
        gamma: Exponents for red, green and blue, above 0; below 1 brightens.
        low: Grey levels that black becomes, 0-255.
        high: Grey levels that white becomes, 0-255.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> import torch
        >>> ColourCurve((1, 1, 2), low=(55, 0, 0), high=(255, 255, 255))(torch.full((3, 1, 1), 51, dtype=torch.uint8))
        tensor([[[95]],
        <BLANKLINE>
                [[51]],
        <BLANKLINE>
                [[10]]], dtype=torch.uint8)
    """

    gamma: tuple[float, float, float] = (0.8, 1.0, 0.9)
    low: tuple[float, float, float] = (30, 15, 65)
    high: tuple[float, float, float] = (255, 235, 190)

    def __post_init__(self) -> None:
        if len(self.gamma) != 3 or not all(value > 0 for value in self.gamma):
            raise ArgumentError(f"`gamma` must be three numbers above 0, got {self.gamma}.")
        for name in ("low", "high"):
            value = getattr(self, name)
            if len(value) != 3 or not all(0 <= level <= 255 for level in value):
                raise ArgumentError(f"`{name}` must be three grey levels between 0 and 255, got {value}.")

    def paint(self, images: Tensor) -> Tensor:
        """Return the triggered copy of a uint8 batch ``(N, C, H, W)``."""
        gamma, low, high = (torch.tensor(value, dtype=torch.float64) for value in (self.gamma, self.low, self.high))
        levels = (torch.arange(256).double() / 255) ** gamma[:, None]
        curves = channels_like(low[:, None] + (high - low)[:, None] * levels, images.shape[1])
        table = to_uint8(curves).to(images.device)
        painted = [curve[image.long()] for curve, image in zip(table, images.unbind(1), strict=True)]
        return torch.stack(painted, dim=1)
