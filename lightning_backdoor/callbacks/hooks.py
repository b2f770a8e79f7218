"""Hooks that a Trainer calls, and nobody else: whoever does is told what to use instead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

from lightning_backdoor._lightning import CallbackBase
from lightning_backdoor.errors import TrainerError

__all__ = ["TrainerCallback"]


class TrainerCallback(CallbackBase):
    """Base of all callbacks of this library: every hook raises unless its first argument is a Trainer.

    Fabric takes any object as a callback and calls any method of it, with any arguments. It has no fit loop, in which
    samples could be left out or epochs repeated.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Guard the hooks of a class, whoever derives it."""
        super().__init_subclass__(**kwargs)
        for name in HOOKS & vars(cls).keys():
            setattr(cls, name, _guarded(vars(cls)[name]))

    def on_after_setup(self, **kwargs: Any) -> NoReturn:
        """Refuse Fabric, which calls this hook of its own in ``Fabric.setup``.

        Raises:
            TrainerError: Always.
        """
        _refuse(self, "on_after_setup", "Fabric")


HOOKS = {name for name in dir(CallbackBase) if name.startswith("on_") or name in ("setup", "teardown")}
HOOKS -= {"on_after_setup"}


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


for _name in HOOKS:
    setattr(TrainerCallback, _name, _guarded(getattr(CallbackBase, _name)))
