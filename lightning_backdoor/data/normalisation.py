"""The normalisation that a transform applies or a model announces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["Affine", "configured", "normalise_of"]

Affine = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std, one number per channel or one for all


def normalise_of(transform: Any) -> Affine | None:
    """Return mean and std of all ``Normalize`` steps in ``transform`` taken together; None when there is none.

    Looks into lists, ``Compose`` and other holders of ``transforms``, ``nn.Module`` containers (kornia, v2) and
    wrappers with a ``transform``. A step in 0..255 units (a number above 10) is brought to 0..1.
    """
    total: Affine | None = None
    for step in _steps(transform, 0):
        total = step if total is None else _after(total, step)
    return total


def configured(model: Any) -> Iterator[Affine]:
    """Yield the normalisations of a module: its ``Normalize`` layers, then its timm configurations."""
    if not isinstance(model, nn.Module):
        return
    modules = list(model.modules())
    for module in modules:
        step = _step(module) if type(module).__name__ == "Normalize" else None
        if step is not None:
            yield step
    for module in modules:
        for name in ("pretrained_cfg", "default_cfg"):
            config = getattr(module, name, None)
            if isinstance(config, Mapping) and "mean" in config and "std" in config:
                step = _affine(config["mean"], config["std"])
                if step is not None:
                    yield step


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
    inner = getattr(transform, "transform", None)
    yield from _steps([*parts, *([inner] if callable(inner) and inner not in parts else [])], depth + 1)


def _step(transform: Any) -> Affine | None:
    """Return mean and std of one transform: as attributes (torchvision, timm, albumentations) or kornia's flags."""
    flags = getattr(transform, "flags", None)
    if isinstance(flags, Mapping) and "mean" in flags and "std" in flags:
        return _affine(flags["mean"], flags["std"])
    for mean, std in (("mean", "std"), ("image_mean", "image_std")):
        if hasattr(transform, mean) and hasattr(transform, std):
            return _affine(getattr(transform, mean), getattr(transform, std))
    return None


def _affine(mean: Any, std: Any) -> Affine | None:
    means, stds = _numbers(mean), _numbers(std)
    if not means or not stds or min(stds) <= 0:
        return None
    scale = 255.0 if max(*map(abs, means), *stds) > 10 else 1.0
    return tuple(m / scale for m in means), tuple(s / scale for s in stds)


def _numbers(value: Any) -> tuple[float, ...]:
    if isinstance(value, Tensor):
        value = value.detach().flatten().tolist()
    if isinstance(value, int | float):
        return (float(value),)
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return ()
    numbers = list(value)
    return tuple(map(float, numbers)) if all(isinstance(n, int | float) for n in numbers) else ()


def _after(first: Affine, second: Affine) -> Affine:
    """Compose: ``((u - m1) / s1 - m2) / s2 = (u - (m1 + s1 m2)) / (s1 s2)``."""
    (m1, s1), (m2, s2) = first, second
    channels = max(map(len, (m1, s1, m2, s2)))
    m1, s1, m2, s2 = (v * channels if len(v) == 1 else v for v in (m1, s1, m2, s2))
    means = tuple(a + b * c for a, b, c in zip(m1, s1, m2, strict=True))
    return means, tuple(a * b for a, b in zip(s1, s2, strict=True))
