"""Both Lightning packages and every private name that this library leans on, in one place."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn

__all__ = ["CallbackBase", "call_limits", "rank_zero_info", "rank_zero_warn", "restart_fetcher"]

PACKAGES = ("pytorch_lightning", "lightning.pytorch")

# Instance attributes of Lightning and torch that are not documented, and what happens without them.
LEDGER = {
    "trainer.fit_loop.setup_data": "the training loader cannot be told from others: no curation",
    "trainer.fit_loop.max_batches": "epoch lengths stay as they were before pruning",
    "trainer.fit_loop._combined_loader": "float `limit_train_batches` keeps the old length",
    "trainer.fit_loop._data_fetcher": "the first epoch after a rewind may draw removed samples",
    "trainer.fit_loop.epoch_progress": "no rewind",
    "trainer.fit_loop.epoch_loop.batch_progress": "no rewind",
    "trainer.fit_loop.epoch_loop.scheduler_progress": "no rewind",
    "trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress": "no rewind",
    "trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress": "no rewind",
}


def _callback_classes() -> tuple[type, ...]:
    found = []
    for package in PACKAGES:
        try:
            found.append(importlib.import_module(package).Callback)
        except ModuleNotFoundError:
            continue
        except Exception as error:  # one broken package must not take the other one down
            warnings.warn(f"`import {package}` failed ({error}); its Trainer cannot use these callbacks.", stacklevel=2)
    if not found:
        raise ImportError("lightning_backdoor needs Lightning: pip install pytorch-lightning")
    return tuple(dict.fromkeys(found))


if TYPE_CHECKING:

    class CallbackBase:
        """A Lightning callback, as far as the type checker is concerned."""

        def __init__(self) -> None: ...
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None: ...
        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None: ...
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None: ...
        def state_dict(self) -> dict[str, Any]: ...
        def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

else:
    CallbackBase = type(
        "CallbackBase",
        _callback_classes(),
        {"__doc__": "A callback of every installed Lightning package at once.", "__module__": __name__},
    )


def call_limits(trainer: Any, lengths: list[int]) -> list[int | float]:
    """Batches per loader after ``limit_train_batches``, by Lightning's rule, at least one."""
    limit = trainer.limit_train_batches
    if isinstance(limit, int):
        return [min(length, limit) for length in lengths]
    return [max(1, int(length * limit)) for length in lengths]


def restart_fetcher(trainer: Any) -> None:
    """Throw prefetched batches away and start a new epoch of the training loader."""
    fetcher = getattr(trainer.fit_loop, "_data_fetcher", None)
    if fetcher is not None:
        iter(fetcher)
