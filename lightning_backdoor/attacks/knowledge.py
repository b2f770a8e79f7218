"""What an attacker reads off a trained classifier: features, and gradients with respect to pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_backdoor.errors import ArgumentError, ModelError

__all__ = ["batches", "consulted", "device_of", "grad", "head_of", "outputs", "scaled"]


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter, the CPU if there is none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def scaled(images: Tensor, model: nn.Module) -> Tensor:
    """Return uint8 images as floats in ``[0, 1]`` on the device of the model."""
    if images.dtype != torch.uint8 or images.ndim != 4 or not len(images):
        raise ArgumentError(
            f"`images` must be uint8 images of shape (N, C, H, W), got {images.dtype} {tuple(images.shape)}. "
            "Stack the raw images, before any normalisation."
        )
    return images.to(device_of(model)).float() / 255


@contextmanager
def consulted(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients for parameters; each flag is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for module, _ in modes:
            module.training = False
        for parameter, _ in wanted:
            parameter.requires_grad = False
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in wanted:
            parameter.requires_grad = flag


def head_of(model: nn.Module) -> nn.Linear:
    """Return the last linear layer, whose input is the penultimate features.

    Raises:
        ModelError: If the model has no linear layer.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no nn.Linear, whose input this attack needs. Pass a model that ends in one."
        )
    return layers[-1]


def outputs(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the penultimate features ``(N, D)`` and the logits ``(N, K)`` of pixels in ``[0, 1]``."""
    seen: list[Tensor] = []
    handle = head_of(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits: Tensor = model(pixels)
    finally:
        handle.remove()
    return seen[-1].flatten(1), logits


def grad(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return the gradient of a scalar function at a point, without a trace in the model."""
    place = at.detach().requires_grad_()
    return torch.autograd.grad(loss(place), place)[0]


def batches(count: int, steps: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield ``steps`` random batches of ``size`` of ``count`` positions (or of all, if there are fewer)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randperm(count, generator=generator)[:size]
