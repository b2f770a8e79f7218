"""Counters and best values that modules and callbacks keep beside their ``state_dict``, copied and put back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

__all__ = ["counters", "defines", "put_counters", "reset_metrics"]

_SCALARS = (bool, int, float, str, type(None))
_PACKAGES = ("pytorch_lightning.", "lightning.", "torch.")


def counters(owner: Any) -> dict[str, Any]:
    """Copy the attributes that hold a number, a string or None.

    Left out are attributes of Lightning's own classes, and all of callbacks that have a ``state_dict``. Lists and dicts
    are records of the user, which go on; tensors belong to ``state_dict``.

    Args:
        owner: A LightningModule or a callback.
    """
    bases = [cls for cls in type(owner).__mro__ if cls.__module__.startswith(_PACKAGES)]
    if isinstance(owner, nn.Module):
        own = {name for cls in bases if cls.__name__ == "LightningModule" for name in vars(cls())}
    elif all(cls.__name__ == "Callback" for cls in bases) and not defines(owner, "state_dict"):
        own = set()
    else:
        return {}
    return {name: value for name, value in vars(owner).items() if name not in own and isinstance(value, _SCALARS)}


def put_counters(owner: Any, state: dict[str, Any]) -> None:
    """Put back what :func:`counters` copied.

    What has become an object of another kind since (an open file, a module, a parameter) is left alone; a dict of
    tensors, as the copy of the best weights, is not.
    """
    now = vars(owner)  # without the parts of a module, which an entry of the same name would hide
    now.update({name: value for name, value in state.items() if name in now and _holds_values(now[name])})


def reset_metrics(module: nn.Module) -> None:
    """Let torchmetrics inside a module forget what they have seen, the best value of earlier epochs included."""
    for part in module.modules():
        if isinstance(part, Metric):
            part.reset()


def defines(owner: Any, name: str) -> bool:
    """Whether a class of the user defines a method of a module or a callback, and not Lightning or torch alone."""
    own = [cls for cls in type(owner).__mro__ if not cls.__module__.startswith(_PACKAGES)]
    return any(name in vars(cls) for cls in own)


def _holds_values(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(map(_holds_values, value))
    if isinstance(value, dict):
        return all(map(_holds_values, value.values()))
    return isinstance(value, (*_SCALARS, torch.Tensor))
