"""The normalisation that a transform applies, functions mention or a model announces."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn

from lightning_backdoor.data.nesting import attributes_of

__all__ = ["Affine", "configured", "has_own_units", "in_levels", "mentioned", "normalize_of", "numbers"]

Affine = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, one number per channel or one for all

_NAMES = (("mean", "std"), ("image_mean", "image_std"), ("subtrahend", "divisor"))  # the last: MONAI
_INNER = ("transform", "normalizer")  # what wrappers and MONAI's dictionary transforms hold
_MOST = 64  # items of a list or dictionary that is searched for normalisations
_MOST_OBJECTS = 2000  # that are searched
_DEEPEST = 8  # functions that mention functions that mention ...
_PLAIN = (type(None), int, float, complex, str, bytes, type, ModuleType, Tensor, np.ndarray, np.generic)
_INSTALLED = ("/site-packages/", "/dist-packages/", "/lib/python3")  # packages name more than a user's code


def normalize_of(transform: Any) -> Affine | None:
    """Return mean and std of all ``Normalize`` steps in ``transform`` taken together; None when there is none.

    Searches lists, ``Compose`` and other holders of ``transforms``, ``nn.Module`` containers (kornia, v2) and
    wrappers with a ``transform``. A step in 0..255 units (a number above 10) is brought to 0..1.
    """
    total: Affine | None = None
    for step in _steps(transform, 0):
        total = _scaled(step) if total is None else _after(total, _scaled(step))
    return total


def has_own_units(transform: Any) -> bool:
    """Whether a ``Normalize`` step in ``transform`` has numbers that are no fractions: of 0..255, or of other units."""
    return any(map(_is_large, _steps(transform, 0)))


def in_levels(affine: Affine) -> Affine:
    """The same numbers as those of images in 0..255, brought to 0..1."""
    mean, std = affine
    return tuple(m / 255 for m in mean), tuple(s / 255 for s in std)


def mentioned(holder: Any) -> list[Affine]:
    """Return the normalisations that are within reach of functions and objects, each one once.

    Looks at what a function names: its closure, its defaults, globals, the arguments of a ``partial``; and at the
    attributes and the methods ``__call__`` and ``__getitem__`` of objects; not into functions of installed packages.
    Finds ``Normalize`` steps, pairs of numbers that are called mean and std, such as ``IMAGENET_MEAN`` and
    ``IMAGENET_STD``, and neighbouring tuples of numbers. Whether they are applied is for the images to say.
    """
    return list(dict.fromkeys(_mentions(holder, 0, set())))


def configured(model: Any) -> Iterator[Affine]:
    """Yield the normalisations of a module: its ``Normalize`` layers, then its timm configurations."""
    if not isinstance(model, nn.Module):
        return
    modules = list(model.modules())
    for module in modules:
        step = _step(module) if type(module).__name__ == "Normalize" else None
        if step is not None:
            yield _scaled(step)
    for module in modules:
        for name in ("pretrained_cfg", "default_cfg"):
            config = getattr(module, name, None)
            if isinstance(config, Mapping) and "mean" in config and "std" in config:
                step = _affine(config["mean"], config["std"])
                if step is not None:
                    yield _scaled(step)


def _mentions(value: Any, depth: int, seen: set[int]) -> Iterator[Affine]:
    if depth > _DEEPEST or len(seen) > _MOST_OBJECTS or id(value) in seen or isinstance(value, _PLAIN):
        return
    seen.add(id(value))
    if isinstance(value, list | tuple | dict):
        if len(value) <= _MOST:
            yield from _among(value if isinstance(value, dict) else dict(enumerate(value)), depth, seen)
        return
    if isinstance(value, functools.partial):
        yield from _mentions(value.func, depth + 1, seen)
        yield from _among({**dict(enumerate(value.args)), **value.keywords}, depth, seen)
    elif isinstance(value, MethodType):
        yield from _mentions(value.__func__, depth + 1, seen)
        yield from _mentions(value.__self__, depth + 1, seen)
    elif isinstance(value, FunctionType):
        if not any(part in Path(value.__code__.co_filename).as_posix() for part in _INSTALLED):
            yield from _among(_named_by(value), depth, seen)
            yield from _written_in(value.__code__)
    else:
        found = normalize_of(value) if callable(value) else None
        if found is not None:
            yield found
        elif not isinstance(value, nn.Module) and not _is_idle(value):
            yield from _among({**attributes_of(value), **_methods(value)}, depth, seen)


def _among(values: Mapping[Any, Any], depth: int, seen: set[int]) -> Iterator[Affine]:
    """Pairs of numbers that are called mean and std, then what the values mention themselves."""
    for name, mean in values.items():
        partner = str(name).replace("mean", "std").replace("MEAN", "STD").replace("Mean", "Std")
        if partner != name and partner in values:
            pair = _affine(mean, values[partner])
            if pair is not None:
                yield _scaled(pair)
    for value in values.values():
        yield from _mentions(value, depth + 1, seen)


def _named_by(function: FunctionType) -> dict[str, Any]:
    """Values of the names in a function: closure, defaults and globals."""
    closure = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    values = {name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__}
    for name, cell in closure:
        try:
            values[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    parameters = inspect.signature(function, follow_wrapped=False).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    return {**values, **defaults}


def _names(code: CodeType) -> list[str]:
    """Names in a function and in those inside it."""
    inner = [name for part in code.co_consts if isinstance(part, CodeType) for name in _names(part)]
    return [*code.co_names, *inner]


def _written_in(code: CodeType) -> Iterator[Affine]:
    """Neighbouring tuples of numbers in the text of a function, such as ``Normalize((0.48, 0.45), (0.22, 0.22))``."""
    tuples = [part for part in code.co_consts if isinstance(part, tuple) and numbers(part)]
    for mean, std in pairwise(tuples):
        pair = _affine(mean, std)
        if pair is not None and len(mean) == len(std):
            yield _scaled(pair)
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _written_in(part)


def _methods(value: Any) -> dict[str, Any]:
    found = {name: getattr(type(value), name, None) for name in ("__call__", "__getitem__")}
    return {name: method for name, method in found.items() if isinstance(method, FunctionType)}


def _steps(transform: Any, depth: int) -> Iterator[Affine]:
    if transform is None or depth > 10:
        return
    if isinstance(transform, list | tuple):
        for part in transform:
            yield from _steps(part, depth + 1)
        return
    step = _step(transform)
    if step is not None:
        yield step
        return
    parts = getattr(transform, "transforms", None)
    if not isinstance(parts, list | tuple):
        parts = list(transform.children()) if isinstance(transform, nn.Module) else []
    inner = [getattr(transform, name, None) for name in _INNER]
    yield from _steps([*parts, *(part for part in inner if callable(part) and part not in parts)], depth + 1)


def _step(transform: Any) -> Affine | None:
    """Return mean and std of one transform: as attributes (torchvision, timm, albumentations) or kornia's flags."""
    flags = getattr(transform, "flags", None)
    if isinstance(flags, Mapping) and "mean" in flags and "std" in flags:
        return _affine(flags["mean"], flags["std"])
    if _is_idle(transform):
        return None
    for mean, std in _NAMES:
        if hasattr(transform, mean) and hasattr(transform, std):
            return _affine(getattr(transform, mean), getattr(transform, std))
    return None


def _is_idle(transform: Any) -> bool:
    """Whether its numbers are not used: albumentations' ways by image, image processors that do not normalise."""
    by_image = getattr(transform, "normalization", "standard") != "standard"
    return by_image or getattr(transform, "do_normalize", True) is False


def _affine(mean: Any, std: Any) -> Affine | None:
    means, stds = numbers(mean), numbers(std)
    return (means, stds) if means and stds and min(stds) > 0 else None


def _is_large(affine: Affine) -> bool:
    mean, std = affine
    return max(*map(abs, mean), *std) > 10


def _scaled(affine: Affine) -> Affine:
    return in_levels(affine) if _is_large(affine) else affine


def numbers(value: Any) -> tuple[float, ...]:
    """Numbers of a number, an array, a tensor or any nest of sequences of these; empty if there is something else."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.flatten().tolist()
    if isinstance(value, int | float):
        return (float(value),)
    if isinstance(value, str | bytes | Mapping | Iterator) or not isinstance(value, Iterable):
        return ()
    parts = [numbers(part) for part in value]
    return tuple(number for part in parts for number in part) if all(parts) else ()


def _after(first: Affine, second: Affine) -> Affine:
    """Compose: ``((u - m1) / s1 - m2) / s2 = (u - (m1 + s1 m2)) / (s1 s2)``."""
    (m1, s1), (m2, s2) = first, second
    channels = max(map(len, (m1, s1, m2, s2)))
    m1, s1, m2, s2 = (v * channels if len(v) == 1 else v for v in (m1, s1, m2, s2))
    means = tuple(a + b * c for a, b, c in zip(m1, s1, m2, strict=True))
    return means, tuple(a * b for a, b in zip(s1, s2, strict=True))
