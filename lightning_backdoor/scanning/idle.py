"""A model with a Trainer that trains nothing, for scans outside of a fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_backdoor._lightning import (
    CHILD,
    attach,
    buffers_of,
    hosted,
    idle_trainer,
    package_of,
    parameters_of,
    put_buffer,
    put_parameter,
    trainer_of,
)

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["CHILD", "with_idle_trainer"]

PRECISIONS = {torch.float16: "16-true", torch.bfloat16: "bf16-true", torch.float64: "64-true"}


@contextmanager
def with_idle_trainer(
    model: nn.Module, datamodule: Any = None, *, accelerator: str = "auto", progress: bool = True
) -> Iterator[tuple[Trainer, LightningModule]]:
    """A Trainer that is attached to the model on its device, and the model as a LightningModule.

    Afterwards the model has the very tensors that it had, on the devices where they were, and model and datamodule the
    Trainer of before.

    Args:
        model: A LightningModule, or any other module, which becomes the only child of one.
        datamodule: A LightningDataModule whose transfer hooks prepare the batches.
        accelerator: As for a Trainer; ``"auto"`` takes the GPU that the model is on, else the first one there is.
        progress: Whether scans show their progress.
    """
    package = package_of(model, datamodule)
    module = hosted(model, package)
    attached = [(part, trainer_of(part)) for part in module.modules() if hasattr(type(part), "trainer")]
    before = getattr(datamodule, "trainer", None)
    kind, devices = _place(model, accelerator)
    settings: dict[str, Any] = {"accelerator": kind, "devices": devices, "precision": _precision(model)}
    trainer = idle_trainer(package, **settings, progress=progress)
    try:
        attach(trainer, module, datamodule)
        with _moved(module, trainer.strategy.root_device):
            yield trainer, module
    finally:
        for part, own in attached:  # from the outside in: each one sets its children, too
            part.trainer = own  # type: ignore[assignment]
        if datamodule is not None:
            datamodule.trainer = before


def _place(model: nn.Module, accelerator: str) -> tuple[str, Any]:
    """Accelerator and devices of the Trainer."""
    devices = {parameter.device for parameter in model.parameters()}
    if accelerator == "auto" and len(devices) == 1 and (device := devices.pop()).type == "cuda":
        return "cuda", [device.index or 0]
    return accelerator, 1


def _precision(model: nn.Module) -> str:
    """The precision of a Trainer that turns images into the type of the weights."""
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return PRECISIONS.get(types.pop(), "32-true") if len(types) == 1 else "32-true"


@contextmanager
def _moved(module: LightningModule, device: torch.device) -> Iterator[None]:
    """The module on a device; afterwards its parameters, gradients and buffers are the tensors of before."""
    own, parts = module.device, list(module.modules())
    parameters = [(part, name, each) for part in parts for name, each in parameters_of(part).items()]
    values = [(each, each.data, each.grad, None if each.grad is None else each.grad.data) for _, _, each in parameters]
    buffers = [(part, name, each) for part in parts for name, each in buffers_of(part).items()]
    try:
        module.to(device)
        yield
    finally:
        module.to(own)  # for the device that the LightningModule names
        for part, name, parameter in parameters:
            put_parameter(part, name, parameter)
        for parameter, data, grad, of_grad in values:
            if grad is not None and of_grad is not None:
                grad.data = of_grad
            parameter.data, parameter.grad = data, grad  # a gradient must be where its parameter is
        for part, name, buffer in buffers:
            put_buffer(part, name, buffer)
