"""Guards against Lightning's Fabric, which calls the hooks of callbacks without a Trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from lightning_backdoor._lightning import CallbackBase
from lightning_backdoor.errors import TrainerError

__all__ = ["guard_hooks", "guard_inherited_hooks"]

Class = TypeVar("Class", bound=type)

HOOKS = {name for name in dir(CallbackBase) if name.startswith("on_") or name in ("setup", "teardown")}
HOOKS -= {"on_after_setup"}


def guard_hooks(cls: Class) -> Class:
    """Let every hook that a class defines raise unless its first argument is a Trainer.

    Fabric takes any object as a callback and calls any method of it, with any arguments. It has no fit loop, in which
    samples could be left out or epochs repeated.
    """
    for name in HOOKS & vars(cls).keys():
        setattr(cls, name, _guarded(vars(cls)[name]))
    return cls


def guard_inherited_hooks(cls: Class) -> Class:
    """The same for a class that derives from Lightning's callbacks, with the hooks that it inherits.

    Fabric calls ``on_after_setup``, a hook of its own, in ``Fabric.setup``; it raises, too.
    """
    guard_hooks(cls)
    for name in HOOKS - vars(cls).keys():
        setattr(cls, name, _guarded(getattr(cls, name)))
    cls.on_after_setup = lambda self, **_: _refuse(self, "on_after_setup", "Fabric")  # type: ignore[attr-defined]
    return cls


def _guarded(hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(hook)  # Fabric and Lightning look at the signature and the code of what is inside
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = args[0] if args else kwargs.get("trainer")
        if not hasattr(trainer, "fit_loop"):
            _refuse(self, hook.__name__, type(trainer).__name__ if args or "trainer" in kwargs else "no argument")
        return hook(self, *args, **kwargs)

    return guarded


def _refuse(callback: Any, hook: str, got: str) -> NoReturn:
    name = type(callback).__name__
    raise TrainerError(
        f"{name} needs Lightning's Trainer, but `{hook}` was called with {got} in its place. Train by "
        f"Trainer(callbacks=[{name}(...)]).fit(...), or leave it out of Fabric(callbacks=...) and use the functions of "
        "`lightning_backdoor.functional` in a loop of your own."
    )
