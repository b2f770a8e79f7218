"""Leave the random steps of a training transform out, where nothing else is lost with them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lightning_backdoor.data.random_state import isolated_rng

__all__ = ["Recorder", "same", "without_random_steps"]

_DRAWS = 8  # a step that acts on half of the images is seen to be random in 127 of 128 cases
_LIBRARIES = {"torchvision", "albumentations", "timm", "kornia"}


class Recorder:
    """Does what a transform does, by a copy of it, and writes down what it was first called with in any process."""

    def __init__(self, transform: Callable[..., Any], path: Path) -> None:
        self.transform, self.path = copy.deepcopy(transform), path

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Write the arguments to the file and return them."""
        if not self.path.exists():
            torch.save(
                ([_written(value) for value in args], {name: _written(v) for name, v in named.items()}), self.path
            )
        return self.transform(*args, **named)

    def read(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What was written down."""
        args, named = torch.load(self.path, weights_only=True)
        return tuple(map(_read, args)), {name: _read(value) for name, value in named.items()}


def _written(value: Any) -> Any:
    """An image as a tensor with a note of what it was; plain values as they are."""
    if isinstance(value, Image.Image):
        return {"image": torch.from_numpy(np.array(value))}
    if isinstance(value, np.ndarray):
        return {"array": torch.from_numpy(value.copy())}
    return value.detach().as_subclass(Tensor) if isinstance(value, Tensor) else value


def _read(value: Any) -> Any:
    if isinstance(value, dict) and "image" in value:
        return Image.fromarray(value["image"].numpy())
    return value["array"].numpy() if isinstance(value, dict) and "array" in value else value


def without_random_steps(
    transform: Any, args: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[Callable[..., Any] | None, list[str]]:
    """Leave out the steps that are random and change only the pixels of an image.

    Each step is tried under several seeds. One of a known library whose outputs differ, and have the type and the shape
    of the input, is augmentation. Steps that crop to another size or make tensors stay, and so do steps of the user's
    own, which may do more than one thing.

    Args:
        transform: The transform; compositions are searched.
        args: An image, if the transform is called with it.
        named: What the transform is called with by name, if it is (as albumentations is).

    Returns:
        The transform without them, ``None`` if nothing is left; and the names of what was left out.
    """
    left, names, _ = _reduced(transform, dict(named) if named else args[0])
    return left, names


def _reduced(transform: Any, value: Any) -> tuple[Any, list[str], Any]:
    """The transform without random steps, their names, and what becomes of the value."""
    if isinstance(transform, nn.Sequential) or "Compose" in type(transform).__name__:
        kept, names = [], []
        for step in transform.children() if isinstance(transform, nn.Sequential) else transform.transforms:
            left, out, value = _reduced(step, value)
            kept += [] if left is None else [left]
            names += out
        if not names:
            return transform, [], value
        if isinstance(transform, nn.Sequential):
            return nn.Sequential(*kept), names, value
        composition = copy.copy(transform)
        composition.transforms = kept
        return composition, names, value
    outputs = [_draw(transform, value, seed) for seed in range(_DRAWS)]
    is_random = not all(same(outputs[0], output) for output in outputs[1:])
    known = type(transform).__module__.partition(".")[0] in _LIBRARIES and type(transform).__name__ != "Lambda"
    if known and is_random and all(_kind(output) == _kind(value) for output in outputs):
        return None, [type(transform).__name__], value
    return transform, [], outputs[0]


def _draw(transform: Any, value: Any, seed: int) -> Any:
    with isolated_rng(seed):
        drawing, value = copy.deepcopy((transform, value))
        if hasattr(drawing, "set_random_seed"):
            drawing.set_random_seed(seed)
        return drawing(**value) if isinstance(value, dict) else drawing(value)


def _kind(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _kind(part) for key, part in value.items()}
    if isinstance(value, Tensor):
        return type(value), value.shape, value.dtype
    return type(value), np.asarray(value).shape, np.asarray(value).dtype


def same(first: Any, second: Any) -> bool:
    """Whether two items hold the same numbers; what cannot be compared is taken for the same."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    try:
        one, two = (np.asarray(part.float() if isinstance(part, Tensor) else part) for part in (first, second))
        return bool(np.array_equal(one, two, equal_nan=True))
    except Exception:  # cannot be compared
        return True
