"""Checks of constructor arguments, and the signature of a constructor with the arguments that it shares with others."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

from lightning_backdoor.callbacks.options import ScanArguments
from lightning_backdoor.errors import ArgumentError

__all__ = [
    "flat_signature",
    "require_class",
    "require_count",
    "require_fraction",
    "require_one_of",
    "require_positive",
    "require_rate",
    "require_share",
]


def require_fraction(name: str, value: float) -> float:
    """Return ``value`` if it lies strictly between 0 and 1, else explain the unit."""
    if not 0 < value < 1:
        hint = f" For {value:g} per cent, pass {value / 100:g}." if 1 <= value < 100 else ""
        raise ArgumentError(f"`{name}` must be a fraction between 0 and 1, got {value}.{hint}")
    return value


def require_share(name: str, value: float) -> float:
    """Return ``value`` if it lies above 0 and is at most 1, else explain the unit."""
    return value if value == 1 else require_fraction(name, value)


def require_positive(name: str, value: int | None) -> int | None:
    """Return ``value`` if it is None or a whole number of at least one."""
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ArgumentError(f"`{name}` must be a whole number of at least 1, or None, got {value!r}.")
    return value


def require_count(name: str, value: int) -> int:
    """Return ``value`` if it is a whole number, 0 or larger."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ArgumentError(f"`{name}` must be a whole number of at least 0, got {value!r}.")
    return value


def require_rate(name: str, value: float | None) -> float | None:
    """Return ``value`` if it is None or a learning rate."""
    if value is not None and value <= 0:
        raise ArgumentError(f"`{name}` must be a positive learning rate or None, got {value}.")
    return value


def require_class(name: str, value: int | None) -> int | None:
    """Return ``value`` if it is None or a class index."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ArgumentError(f"`{name}` must be a class index (0, 1, ...) or None, got {value!r}.")
    return value


def require_one_of(name: str, value: Any, options: tuple[str | None, ...]) -> Any:
    """Return ``value`` if it is one of the options."""
    if value not in options:
        raise ArgumentError(f"`{name}` must be one of {', '.join(map(repr, options))}, got {value!r}.")
    return value


def flat_signature(cls: type, shared: type, defaults: dict[str, Any]) -> inspect.Signature:
    """The keyword arguments that a constructor declares, then those of a TypedDict that it takes as ``**``.

    The arguments of the scan come last.

    Args:
        cls: The class.
        shared: The TypedDict.
        defaults: What its arguments are if they are not given.
    """
    declared = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    own = [parameter for parameter in declared if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    names = {parameter.name for parameter in own}
    taken = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in declared)
    hints = get_type_hints(shared) if taken else {}
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hint)
        for name, hint in hints.items()
        if name not in names
    ]
    more.sort(key=lambda parameter: parameter.name in ScanArguments.__annotations__)
    return inspect.Signature([*own, *more])
