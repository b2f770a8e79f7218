"""Clean-label poisons that are crafted against a model: label-consistent and hidden-trigger images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_backdoor.attacks.knowledge import consulted, grad, outputs, scaled
from lightning_backdoor.attacks.painting import chosen_by, span, to_uint8
from lightning_backdoor.attacks.patches import Corners
from lightning_backdoor.attacks.triggers import CraftedTrigger, Trigger
from lightning_backdoor.errors import ArgumentError

__all__ = ["HiddenTrigger", "LabelConsistent"]

BATCH = 100


@dataclass(frozen=True, repr=False, eq=False)
class LabelConsistent(CraftedTrigger):
    """Make images of the target class hard to recognise, then paint the corner pattern on them.

    `Turner et al., 2019 <https://arxiv.org/abs/1912.02771>`_: the label stays true, but a model learns the pattern
    because what it knew of the class is no longer there. The perturbation is projected gradient ascent on the
    cross-entropy of the true label, from the image itself: ``steps`` times ``x <- clip(x + step sign(grad))``, within
    ``eps`` grey levels of the image and 0-255. At test time there is the pattern alone.

    Use it as ``poison(data, LabelConsistent(model), target, rate=0.4, rate_of="target_class", labels="clean")``.

    Args:
        model: Classifier trained on clean data: pixels in ``[0, 1]`` to logits. Wrap one that takes normalised images
            in :class:`lightning_backdoor.functional.PixelModel`.
        trigger: The pattern, in its forms of training and test time.
        eps: Largest change of a grey level, at least 0.
        step: Grey levels per step, at least 1.
        steps: Number of steps, at least 0.

    Raises:
        ArgumentError: If an argument is out of range.
    """

    model: nn.Module
    trigger: Trigger = Corners()  # noqa: RUF009  (frozen)
    eps: int = 8
    step: int = 2
    steps: int = 4

    def __post_init__(self) -> None:
        for name, least in (("eps", 0), ("step", 1), ("steps", 0)):
            if getattr(self, name) < least:
                raise ArgumentError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")

    def __repr__(self) -> str:
        return (
            f"LabelConsistent({type(self.model).__name__}, {self.trigger!r}, eps={self.eps}, step={self.step}, "
            f"steps={self.steps})"
        )

    def craft(self, images: Tensor, target: int) -> Tensor:
        """Return the perturbed images of class ``target`` with the pattern, uint8 ``(N, C, H, W)``."""
        return self.trigger(torch.cat([self._perturbed(part, target) for part in torch.split(images, BATCH)]))

    def paint(self, images: Tensor) -> Tensor:
        """Return a uint8 batch ``(N, C, H, W)`` with the pattern alone."""
        return self.trigger(images)

    def at_test(self) -> Trigger:
        """Return the pattern in its form of test time."""
        return self.trigger.at_test()

    def _perturbed(self, images: Tensor, target: int) -> Tensor:
        with consulted(self.model):
            clean = scaled(images, self.model)
            truth = torch.full((len(images),), target, device=clean.device)
            pixels = clean
            for _ in range(self.steps):
                uphill = grad(lambda x: F.cross_entropy(self.model(x), truth, reduction="sum"), pixels).sign()
                change = (pixels + self.step / 255 * uphill - clean).clamp(-self.eps / 255, self.eps / 255)
                pixels = (clean + change).clamp(0, 1)
        return to_uint8(pixels * 255).to(images.device)


@dataclass(frozen=True, repr=False, eq=False)
class HiddenTrigger(CraftedTrigger):
    """Move images of the target class, invisibly, to where a model sees images with the trigger.

    Feature collision of `Saha et al., 2020 <https://arxiv.org/abs/1910.00033>`_: the poisons do not show the trigger.
    They minimise the squared distance between the penultimate features of a poison and of a source image with the
    patch, within ``eps`` grey levels. In each step, poisons and patched sources are paired greedily, nearest first, in
    batches of at most 100. The attack is made for a victim that fine-tunes the head of this very model.

    Differs from the paper: signed steps that shrink linearly to zero in place of a plain gradient with a decaying
    rate, so that no rate has to be found for a model; and a fixed number of steps.

    Use it as ``poison(data, HiddenTrigger(model, sources), target, rate=0.5, rate_of="target_class", labels="clean")``.

    Args:
        model: Classifier trained on clean data, pixels in ``[0, 1]`` to logits, that ends in ``nn.Linear``.
        sources: Images of the class that the attacker wants to be mistaken, uint8 ``(M, C, H, W)``.
        eps: Largest change of a grey level, at least 1.
        steps: Number of steps, at least 1.
        step: Grey levels of the first step, above 0.
        size: Side of the patch; ``None`` is in proportion to 30 of 224 pixels.
        place: ``"corner"``, in proportion to 5 of 224 pixels from the bottom-right corner; ``"random"``, another place
            in each image.
        seed: Seed of the colours of the patch (4x4 random ones, enlarged), of its places and of the sources that meet.

    Raises:
        ArgumentError: If an argument is out of range or, when called, if the patch does not fit the image.
    """

    model: nn.Module
    sources: Tensor
    eps: int = 16
    steps: int = 100
    step: float = 4
    size: int | None = None
    place: str = "corner"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.place not in ("corner", "random"):
            raise ArgumentError(f"`place` must be 'corner' or 'random', got {self.place!r}.")
        for name in ("eps", "steps", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"`{name}` must be at least 1, got {value}.")
        if not self.step > 0:
            raise ArgumentError(f"`step` must be above 0, got {self.step}.")

    def __repr__(self) -> str:
        return (
            f"HiddenTrigger({type(self.model).__name__}, {len(self.sources)} sources, eps={self.eps}, "
            f"steps={self.steps}, place={self.place!r}, seed={self.seed})"
        )

    def paint(self, images: Tensor) -> Tensor:
        """Return a uint8 batch ``(N, C, H, W)`` with the patch, as at test time."""
        height, width = images.shape[-2:]
        size = self.size or span(width, 30, of=224)
        margin = span(width, 5, of=224)
        if size + margin > min(height, width):
            raise ArgumentError(
                f"A patch of `size` {size} at {margin} pixels from the corner does not fit an image of "
                f"{height}x{width} pixels. Pass a smaller `size`."
            )
        generator = torch.Generator().manual_seed(self.seed)
        colors = torch.randint(0, 256, (1, images.shape[1], 4, 4), generator=generator).float()
        patch = to_uint8(F.interpolate(colors, (size, size), mode="bilinear")[0]).to(images.device)
        painted = images.clone()
        for image in painted:
            top, left = height - margin - size, width - margin - size
            if self.place == "random":
                draw = chosen_by(image, self.seed)
                top, left = (int(torch.randint(side - size + 1, (1,), generator=draw)) for side in (height, width))
            image[:, top : top + size, left : left + size] = patch
        return painted

    def craft(self, images: Tensor, target: int) -> Tensor:
        """Return the moved images, uint8 ``(N, C, H, W)``, without the patch; ``target`` is not needed."""
        patched = self(self.sources)
        order = torch.randperm(len(patched), generator=torch.Generator().manual_seed(self.seed))
        places = order[torch.arange(len(images)) % len(order)]
        parts = zip(torch.split(images, BATCH), torch.split(places, BATCH), strict=True)
        return torch.cat([self._moved(part, patched[goals]) for part, goals in parts])

    def _moved(self, images: Tensor, goals: Tensor) -> Tensor:
        with consulted(self.model):
            clean = scaled(images, self.model)
            wanted = outputs(self.model, scaled(goals, self.model))[0].detach()
            pixels = clean
            for number in range(self.steps):
                partner = greedy_pairs(torch.cdist(outputs(self.model, pixels)[0].detach(), wanted))
                uphill = grad(partial(self._distance, to=wanted[partner]), pixels)
                length = self.step * (1 - number / self.steps) / 255
                change = (pixels - length * uphill.sign() - clean).clamp(-self.eps / 255, self.eps / 255)
                pixels = (clean + change).clamp(0, 1)
        return to_uint8(pixels * 255).to(images.device)

    def _distance(self, pixels: Tensor, to: Tensor) -> Tensor:
        return (outputs(self.model, pixels)[0] - to).square().sum()


def greedy_pairs(distances: Tensor) -> Tensor:
    """Return a column for each row of a square matrix: the nearest pair of all, then the nearest of those left."""
    left = distances.clone()
    partner = torch.empty(len(left), dtype=torch.long, device=left.device)
    for _ in range(len(left)):
        row, column = divmod(int(left.argmin()), left.shape[1])
        partner[row] = column
        left[row], left[:, column] = torch.inf, torch.inf
    return partner
