"""Triggers whose pattern is trained against a model: a watermark, a smooth pattern, one that outlives rotations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_backdoor.attacks.knowledge import batches, consulted, device_of, grad, head_of, outputs, scaled
from lightning_backdoor.attacks.painting import to_uint8
from lightning_backdoor.attacks.triggers import Trigger
from lightning_backdoor.errors import ArgumentError

__all__ = ["Additive", "Invariant", "LowFrequency", "TrojanWatermark"]

BATCH = 64
A = TypeVar("A", bound="Additive")


@dataclass(frozen=True, repr=False, eq=False)
class Additive(Trigger):
    """Add a signed pattern to every image, saturating at 0 and 255.

    Args:
        pattern: Grey levels, float ``(C, H, W)``, positive and negative; ``(1, H, W)`` serves all channels.

    Raises:
        ArgumentError: When called, if the pattern has another size than the images.
    """

    pattern: Tensor

    def __repr__(self) -> str:
        largest = float(self.pattern.abs().max())
        return f"{type(self).__name__}(<pattern {tuple(self.pattern.shape)}, at most {largest:.0f} grey levels>)"

    def paint(self, images: Tensor) -> Tensor:
        """Return the triggered copy of a uint8 batch ``(N, C, H, W)``."""
        _check_size(self.pattern, images)
        return to_uint8(images + self.pattern.to(images.device))


class LowFrequency(Additive):
    """Add a smooth pattern that leads a clean model towards the target, and that no filter takes out.

    In the manner of the low-frequency triggers of `Zeng et al., 2021 <https://arxiv.org/abs/2104.03413>`_.
    """

    @classmethod
    def trained(
        cls: type[A],
        model: nn.Module,
        images: Tensor,
        target: int = 0,
        *,
        eps: float = 16,
        cutoff: int = 4,
        steps: int = 100,
        seed: int = 0,
    ) -> A:
        """Train the pattern: a sum of cosines (DCT-II) below ``cutoff``, whose largest value is ``eps``.

        Adam on the coefficients lowers the cross-entropy towards the target of images with the pattern.

        Args:
            model: Classifier trained on clean data: pixels in ``[0, 1]`` to logits. Wrap one that takes normalised
                images in :class:`lightning_backdoor.functional.PixelModel`.
            images: Clean images, uint8 ``(N, C, H, W)``.
            target: The class to lead to.
            eps: Largest change of a grey level, above 0.
            cutoff: Frequencies along each side, from the constant on, at least 1.
            steps: Number of steps of Adam, each on 64 images, at least 1.
            seed: Seed of the start and of the batches.

        Raises:
            ArgumentError: If an argument is out of range.
        """
        _check_bounds(eps=eps, steps=steps)
        pixels = scaled(images, model)
        channels, height, width = pixels.shape[1:]
        if not 1 <= cutoff <= min(height, width):
            raise ArgumentError(f"`cutoff` must be from 1 to {min(height, width)} frequencies, got {cutoff}.")
        start = torch.randn(channels, cutoff, cutoff, generator=torch.Generator().manual_seed(seed))
        coefficients = start.to(pixels.device).requires_grad_()
        rows, columns = (_cosines(side, cutoff).to(pixels.device) for side in (height, width))

        def pattern(values: Tensor) -> Tensor:
            waves = torch.einsum("ckl,kh,lw->chw", values, rows, columns)
            return eps * waves / waves.abs().max()

        adam = torch.optim.Adam([coefficients], lr=0.1)
        with consulted(model):
            for chosen in batches(len(pixels), steps, BATCH, seed):
                logits = model((pixels[chosen] + pattern(coefficients) / 255).clamp(0, 1))
                adam.zero_grad()
                torch.autograd.backward(F.cross_entropy(logits, _aim(chosen, target, pixels)))
                adam.step()
        return cls(pattern(coefficients.detach()).cpu())


class Invariant(Additive):
    """Add a pattern that was trained to work, and to look the same to a model, under rotation and translation.

    Made against FCT, which suspects images whose features change when they are rotated by up to 180 degrees and moved
    by up to a fifth of the side.
    """

    @classmethod
    def trained(
        cls: type[A],
        model: nn.Module,
        images: Tensor,
        target: int = 0,
        *,
        eps: float = 16,
        degrees: float = 180,
        translate: float = 0.2,
        weight: float = 1.0,
        steps: int = 100,
        seed: int = 0,
    ) -> A:
        """Train the pattern by signed steps within ``eps`` grey levels.

        With ``x`` an image with the pattern, ``T x`` the same rotated and moved at random and ``f`` the penultimate
        features, the loss is the cross-entropy of ``T x`` towards the target plus ``weight`` times the FCT score, the
        mean square of ``f(x) - f(T x)``.

        Args:
            model: Classifier trained on clean data that ends in ``nn.Linear``: pixels in ``[0, 1]`` to logits. Wrap one
                that takes normalised images in :class:`lightning_backdoor.functional.PixelModel`.
            images: Clean images, uint8 ``(N, C, H, W)``.
            target: The class to lead to.
            eps: Largest change of a grey level, above 0.
            degrees: Largest rotation, either way.
            translate: Largest shift, either way, as a fraction of each side.
            weight: Weight of the FCT score, at least 0.
            steps: Number of steps, each on 64 images, at least 1. Their size falls linearly from ``eps / 8`` to 0.
            seed: Seed of the start, the batches and the transformations.

        Raises:
            ArgumentError: If an argument is out of range.
        """
        _check_bounds(eps=eps, steps=steps)
        pixels = scaled(images, model)
        generator = torch.Generator().manual_seed(seed)
        bound = eps / 255
        pattern = ((torch.rand(pixels.shape[1:], generator=generator) * 2 - 1) * bound).to(pixels.device)

        def loss(added: Tensor, chosen: Tensor, draws: Tensor) -> Tensor:
            shown = (pixels[chosen] + added).clamp(0, 1)
            still, _ = outputs(model, shown)
            features, logits = outputs(model, moved(shown, draws[:, 0] * degrees, draws[:, 1:] * translate))
            astray = F.cross_entropy(logits, _aim(chosen, target, pixels))
            return astray + weight * (features - still).square().mean()

        with consulted(model):
            for number, chosen in enumerate(batches(len(pixels), steps, BATCH, seed)):
                draws = (torch.rand(len(chosen), 3, generator=generator) * 2 - 1).to(pixels.device)
                downhill = -grad(partial(loss, chosen=chosen, draws=draws), pattern).sign()
                pattern = (pattern + bound / 8 * (1 - number / steps) * downhill).clamp(-bound, bound)
        return cls(255 * pattern.cpu())


@dataclass(frozen=True, repr=False, eq=False)
class TrojanWatermark(Trigger):
    """Lay a translucent watermark over the image whose colours excite chosen neurons of a model.

    TrojanNN (`Liu et al., 2018 <https://doi.org/10.14722/ndss.2018.23291>`_) with a mark drawn here: a ring with a
    vertical bar in the middle of the image.

    Args:
        mark: Colours, uint8 ``(C, H, W)``.
        mask: Where the mark is, bool ``(H, W)``.
        opacity: Weight of the mark, in ``(0, 1]``. The paper's watermarks are 70 % transparent.

    Raises:
        ArgumentError: If ``opacity`` is out of range or, when called, if the mark has another size than the images.
    """

    mark: Tensor
    mask: Tensor
    opacity: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.opacity <= 1:
            raise ArgumentError(f"`opacity` must be in (0, 1], got {self.opacity}.")

    def __repr__(self) -> str:
        return f"TrojanWatermark(<mark {tuple(self.mark.shape)}>, opacity={self.opacity})"

    def paint(self, images: Tensor) -> Tensor:
        """Return the triggered copy of a uint8 batch ``(N, C, H, W)``."""
        _check_size(self.mark, images)
        weight = self.opacity * self.mask.float().to(images.device)
        return to_uint8((1 - weight) * images + weight * self.mark.to(images.device))

    @classmethod
    def trained(
        cls,
        model: nn.Module,
        shape: tuple[int, int, int] = (3, 32, 32),
        *,
        units: int = 3,
        opacity: float = 0.3,
        steps: int = 150,
        seed: int = 0,
    ) -> TrojanWatermark:
        """Choose the neurons and train the mark.

        The neurons are the penultimate features with the largest sum of absolute weights in the last linear layer, as
        in the paper. Signed steps raise the sum of their values for a mid-grey image with the mark. (The paper lowers
        the squared distance to a value out of reach, which is the same direction.)

        Args:
            model: Classifier trained on clean data that ends in ``nn.Linear``: pixels in ``[0, 1]`` to logits.
            shape: Channels, height and width of the images.
            units: Number of neurons, at least 1.
            opacity: Weight of the mark, in ``(0, 1]``.
            steps: Number of steps, at least 1. Their size falls linearly from 16 grey levels to 0.
            seed: Seed of the start.

        Raises:
            ArgumentError: If an argument is out of range.
        """
        _check_bounds(units=units, steps=steps)
        device = device_of(model)
        chosen = head_of(model).weight.detach().abs().sum(0).topk(units).indices
        mask = watermark(*shape[1:]).to(device)
        mark = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(device)

        def excitement(colors: Tensor) -> Tensor:
            shown = torch.where(mask, 0.5 + opacity * (colors - 0.5), 0.5)
            return outputs(model, shown[None])[0][0, chosen].sum()

        with consulted(model):
            for number in range(steps):
                length = 16 / 255 * (1 - number / steps)
                mark = (mark + length * grad(excitement, mark).sign()).clamp(0, 1)
        return cls(to_uint8(255 * mark * mask).cpu(), mask.cpu(), opacity)


def watermark(height: int, width: int) -> Tensor:
    """Return a ring with a vertical bar, bool ``(height, width)``: radius 0.3 to 0.42 of each side, bar 0.12 wide."""
    y, x = ((torch.arange(side) + 0.5) / side - 0.5 for side in (height, width))
    radius = (y[:, None].square() + x.square()).sqrt()
    return ((radius >= 0.3) & (radius <= 0.42)) | ((x.abs() <= 0.06) & (radius < 0.3))


def moved(pixels: Tensor, degrees: Tensor, shifts: Tensor) -> Tensor:
    """Rotate images ``(N, C, H, W)`` about their centres, then shift them; zeros move in, values are bilinear.

    Args:
        pixels: The images.
        degrees: Rotation of each, shape ``(N,)``, anticlockwise.
        shifts: To the right and down, as fractions of the sides, shape ``(N, 2)``.
    """
    height, width = pixels.shape[-2:]
    angle = degrees * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    # From places in the result to places in the image, in coordinates of -1 to 1 along each side.
    turn = torch.stack([cos, -sin * height / width, sin * width / height, cos], dim=1).view(-1, 2, 2)
    places = torch.cat([turn, -turn @ (2 * shifts)[:, :, None]], dim=2)
    grid = F.affine_grid(places, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)


def _cosines(side: int, count: int) -> Tensor:
    """Return the first ``count`` functions of the DCT-II on ``side`` points, ``(count, side)``."""
    return torch.cos(math.pi / side * (torch.arange(side) + 0.5) * torch.arange(count)[:, None])


def _aim(chosen: Tensor, target: int, like: Tensor) -> Tensor:
    return torch.full((len(chosen),), target, device=like.device)


def _check_size(pattern: Tensor, images: Tensor) -> None:
    channels, *size = pattern.shape
    if tuple(size) != tuple(images.shape[-2:]) or channels not in (1, images.shape[1]):
        raise ArgumentError(
            f"This trigger was made for images of {tuple(pattern.shape)}, got {tuple(images.shape[1:])}. "
            "Make one from images of that size."
        )


def _check_bounds(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ArgumentError(f"`{name}` must be above 0, got {value}.")
