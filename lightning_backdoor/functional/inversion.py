"""Reverse-engineer a trigger of bounded size: which few pixels send any image to one class?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_backdoor.errors import ArgumentError, ModelError

__all__ = ["InvertedTrigger", "PixelModel", "count_classes", "invert_trigger", "rate_trigger", "stamp"]

Classifier = Callable[[Tensor], Tensor]

_PLACE = 0.7  # share of the steps that search the place; the others optimize the pattern in the place that was found
_LR, _BETAS = 0.1, (0.5, 0.9)  # Adam on the arguments of tanh: NONE's rate, Neural Cleanse's momenta
_PENALTY, _PACE = 1e-3, 1.1  # first weight of the mask's size, and the factor by which it follows the budget
_COVERED = 0.5  # mask value above which a pixel counts against the budget
_INSIDE, _OUTSIDE, _SIDE = 2.0, -4.0, 0.8  # NONE's first mask: a square of 0.8 √S pixels


@dataclass(frozen=True)
class InvertedTrigger:
    """A trigger that was found by :func:`invert_trigger`.

    Attributes:
        target: The class that it leads to.
        mask: Pixels that it covers, bool, shape ``(1, 1, H, W)``.
        pattern: Its colours, float in ``[0, 1]`` on the 8-bit grid, shape ``(1, C, H, W)``; 0 outside the mask.
        success: Share of the images of other classes that it sends to ``target``, in ``[0, 1]``; of those that
            :func:`invert_trigger` was given.
        loss: Their mean cross-entropy towards ``target``, which ranks triggers that all fail.
    """

    target: int
    mask: Tensor
    pattern: Tensor
    success: float = float("nan")
    loss: float = float("nan")


class PixelModel(nn.Module):
    """A classifier of pixels in ``[0, 1]`` around one of normalised images.

    Args:
        model: Callable from ``(pixels - mean) / std`` to logits.
        mean: Per channel or one for all, as a fraction of the pixel range.
        std: The same; positive. A model that takes floats in 0..255 has mean 0 and std 1/255.

    Raises:
        ArgumentError: ``std`` is not positive or, when called, the numbers do not fit the channels.
    """

    def __init__(
        self, model: Classifier, mean: float | Sequence[float] = 0.0, std: float | Sequence[float] = 1.0
    ) -> None:
        super().__init__()
        self.model = model
        self.mean, self.std = ((v,) if isinstance(v, int | float) else tuple(map(float, v)) for v in (mean, std))
        if not all(value > 0 for value in self.std):
            raise ArgumentError(f"`std` must be positive, got {std}.")

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits ``(N, K)`` of float pixels ``(N, C, H, W)``."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, pixels.shape[1]):
                raise ArgumentError(
                    f"`{name}` must have one number or one per channel: {pixels.shape[1]} channels, got {len(values)}."
                )
        mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return self.model((pixels - mean) / std)


def stamp(images: Tensor, trigger: InvertedTrigger) -> Tensor:
    """Return a copy of float pixels ``(N, C, H, W)`` in ``[0, 1]`` with the trigger in it."""
    return torch.where(trigger.mask.to(images.device), trigger.pattern.to(images), images)


def count_classes(model: Classifier, images: Tensor) -> int:
    """Return the number of classes of a model, found by a forward of the first image.

    Raises:
        ModelError: The model does not return logits of shape ``(N, K)``.
    """
    with _frozen(model), torch.no_grad():
        logits = model(images[:1])
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"`model` must return logits of shape (N, K), got {got}. Pass a callable that does.")
    if logits.shape[1] == 1:
        raise ModelError(
            "`model` must return a logit for each class, got one alone. For a binary model pass "
            "lambda images: torch.nn.functional.pad(model(images), (1, 0))."
        )
    return logits.shape[1]


def rate_trigger(
    model: Classifier, images: Tensor, labels: Tensor, trigger: InvertedTrigger, *, batch_size: int = 256
) -> InvertedTrigger:
    """Return a trigger with the success and the loss that it has on these images.

    Args:
        model: Callable from pixels to logits; in evaluation mode while this runs.
        images: Float pixels in ``[0, 1]``, shape ``(N, C, H, W)``.
        labels: True labels, shape ``(N,)``. Images of the target class are left out.
        trigger: The trigger, stamped on every image.
        batch_size: Images per forward.

    Returns:
        The trigger; success and loss are ``nan`` if every image is of the target class.
    """
    victims = images[labels != trigger.target]
    if len(victims) == 0:
        return replace(trigger, success=float("nan"), loss=float("nan"))
    parts = (victims[start : start + batch_size] for start in range(0, len(victims), batch_size))
    with _frozen(model), torch.no_grad():
        logits = torch.cat([model(stamp(part, trigger)) for part in parts])
    wanted = torch.full((len(victims),), trigger.target, device=logits.device)
    success = (logits.argmax(dim=1) == wanted).float().mean()
    return replace(trigger, success=float(success), loss=float(cross_entropy(logits.float(), wanted)))


def invert_trigger(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    target: int,
    pixels: int,
    steps: int = 150,
    starts: int = 1,
    batch_size: int = 64,
    seed: int = 0,
) -> InvertedTrigger:
    """Find the trigger of at most ``pixels`` pixels that sends most images of other classes to ``target``.

    Mask and pattern are the tanh-transformed variables of Neural Cleanse (`Wang et al., 2019
    <https://doi.org/10.1109/SP.2019.00031>`_) and of the evaluation of NONE (`Wang et al., 2022
    <https://arxiv.org/abs/2202.06382>`_), optimised in pixel space by Adam: cross-entropy towards the target plus
    ``w`` times the sum of the mask. ``w`` grows by a tenth with every step in which more pixels are covered than the
    budget allows, and shrinks while there are fewer. After 70 % of the steps the ``pixels`` largest values of the
    mask become the trigger's place, and the remaining steps optimise its colours there. The first start covers
    every pixel by half, so that gradients find the place; each further one begins with NONE's square, somewhere.

    Differs from NONE: no neuron is stimulated, any differentiable classifier will do; the budget is exact; the
    pattern reaches every colour. The model's modes, gradients and ``requires_grad`` and the global random streams
    stay as they are.

    Args:
        model: Differentiable callable from float pixels to logits ``(N, K)``; see :class:`PixelModel`.
        images: Float pixels in ``[0, 1]``, shape ``(N, C, H, W)``, on the device of the model.
        labels: True labels, shape ``(N,)``. Images of the target class are not used.
        target: The class to reach.
        pixels: Budget, from 1 to ``H * W``.
        steps: Steps of Adam for each start.
        starts: How often to begin; the trigger with the highest success on ``images`` wins.
        batch_size: Images per step.
        seed: Seed of the first patterns and of the batches.

    Returns:
        The trigger, with its success and loss on ``images``, which are optimistic: it was made for them.

    Raises:
        ArgumentError: An argument is out of range, or no image is of another class.
        ModelError: The model does not return logits.
    """
    _check(images, labels, pixels=pixels, steps=steps, starts=starts, batch_size=batch_size)
    classes = count_classes(model, images)
    if not 0 <= target < classes:
        raise ArgumentError(f"`target` must be a class from 0 to {classes - 1}, got {target}.")
    generator = torch.Generator().manual_seed(seed)
    found = []
    with _frozen(model), torch.inference_mode(False), torch.enable_grad():
        victims = images[labels != target].detach()
        if len(victims) == 0:
            raise ArgumentError(f"`images` must hold images of other classes than `target` {target}, got none.")
        inversion = _Inversion(model, victims, target, batch_size, generator)
        for start in range(starts):
            mask, pattern = inversion.first(pixels, square=start > 0)
            mask = inversion.place(mask, pattern, pixels, steps=round(_PLACE * steps))
            inversion.paint(mask, pattern, steps=steps - round(_PLACE * steps))
            colors = (_unit(pattern.detach()) * 255).round() / 255
            found.append(InvertedTrigger(target, mask, colors * mask))
    rated = [rate_trigger(model, images, labels, trigger) for trigger in found]
    return max(rated, key=lambda trigger: (trigger.success, -trigger.loss))


@dataclass(frozen=True)
class _Inversion:
    """The search for one target: what stays the same over starts and stages."""

    model: Classifier
    victims: Tensor
    target: int
    batch_size: int
    generator: torch.Generator

    def first(self, pixels: int, *, square: bool) -> tuple[Tensor, Tensor]:
        """Return the variables of mask ``(1, 1, H, W)`` and pattern ``(1, C, H, W)`` before the first step."""
        _, channels, height, width = self.victims.shape
        pattern = 2 * torch.rand(1, channels, height, width, generator=self.generator) - 1
        mask = torch.zeros(1, 1, height, width)
        if square:
            side = max(1, min(int(_SIDE * pixels**0.5), height, width))
            top, left = (int(torch.randint(edge - side + 1, (), generator=self.generator)) for edge in (height, width))
            mask.fill_(_OUTSIDE)[..., top : top + side, left : left + side] = _INSIDE
        like = self.victims
        return mask.to(like).requires_grad_(), pattern.to(like).requires_grad_()

    def place(self, mask: Tensor, pattern: Tensor, pixels: int, *, steps: int) -> Tensor:
        """Optimise both variables in place and return the budget's worth of pixels, bool ``(1, 1, H, W)``."""
        adam, weight = torch.optim.Adam((mask, pattern), lr=_LR, betas=_BETAS), _PENALTY
        for _ in range(steps):
            soft = _unit(mask)
            weight *= _PACE if int((soft > _COVERED).sum()) > pixels else 1 / _PACE
            loss = self._loss(soft, pattern) + weight * soft.sum()
            mask.grad, pattern.grad = torch.autograd.grad(loss, (mask, pattern))
            adam.step()
        top = mask.detach().flatten().topk(pixels).indices
        return torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device).index_fill_(0, top, 1).view_as(mask)

    def paint(self, mask: Tensor, pattern: Tensor, *, steps: int) -> None:
        """Optimise the variable of the pattern in place, under a mask that stays."""
        adam, fixed = torch.optim.Adam((pattern,), lr=_LR, betas=_BETAS), mask.to(pattern.dtype)
        for _ in range(steps):
            (pattern.grad,) = torch.autograd.grad(self._loss(fixed, pattern), (pattern,))
            adam.step()

    def _loss(self, mask: Tensor, pattern: Tensor) -> Tensor:
        drawn = torch.randint(len(self.victims), (min(self.batch_size, len(self.victims)),), generator=self.generator)
        images = self.victims[drawn.to(self.victims.device)]
        logits = self.model(mask * _unit(pattern) + (1 - mask) * images)
        return cross_entropy(logits, torch.full((len(images),), self.target, device=logits.device))


def _unit(variable: Tensor) -> Tensor:
    """Map a free variable to ``(0, 1)``."""
    return (variable.tanh() + 1) / 2


@contextmanager
def _frozen(model: Classifier) -> Iterator[None]:
    """Evaluation mode and no gradients for parameters, each flag put back afterwards."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    # Flags are written one by one: `train()` may be overridden by the user and would unfreeze frozen layers.
    flags = [(module, module.training) for module in modules]
    wanted = [(parameter, parameter.requires_grad) for module in modules for parameter in module.parameters(False)]
    try:
        for module, _ in flags:
            module.training = False
        for parameter, _ in wanted:
            parameter.requires_grad = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        for parameter, flag in wanted:
            parameter.requires_grad = flag


def _check(images: Tensor, labels: Tensor, *, pixels: int, **counts: int) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ArgumentError(
            f"`images` must be float pixels of shape (N, C, H, W), got {images.dtype} {tuple(images.shape)}."
        )
    if len(images) == 0:
        raise ArgumentError("`images` must hold at least one image, got none.")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise ArgumentError(
            f"`images` must be pixels from 0 to 1, got values from {low:.3g} to {high:.3g}. Undo the normalisation "
            "and pass `PixelModel(model, mean, std)` as the model."
        )
    if labels.shape != images.shape[:1]:
        raise ArgumentError(f"`labels` must have shape ({len(images)},) like `images`, got {tuple(labels.shape)}.")
    area = images.shape[-2] * images.shape[-1]
    if not 1 <= pixels <= area:
        raise ArgumentError(f"`pixels` must be from 1 to {area}, the pixels of an image, got {pixels}.")
    for name, value in counts.items():
        if value < 1:
            raise ArgumentError(f"`{name}` must be at least 1, got {value}.")
