"""Callbacks in the hands of Fabric, which has no fit loop: refused in words, whatever is handed on."""

from __future__ import annotations

from itertools import product
from typing import Any

import lightning.fabric
import pytest
import pytorch_lightning as pl
from torch import nn

from lightning_backdoor.errors import TrainerError
from tests.callbacks.helpers import make_trainer
from tests.contract.problem import net_of
from tests.contract.registry import Entry, every, every_kind

WORDS = r"{0} needs Lightning's Trainer.*Trainer\(callbacks=\[{0}.*`lightning_backdoor.functional`"
HOOKS = [name for name in dir(pl.Callback) if name.startswith("on_") or name in ("setup", "teardown")]


class OwnTrainer:
    """What a loop around Fabric calls its trainer."""

    fast_dev_run, current_epoch = False, 0


@every
def test_fabric_is_refused_before_the_first_step(entry: Entry) -> None:
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1, callbacks=[entry.make()])
    with pytest.raises(TrainerError, match=WORDS.format(entry.name)):
        fabric.setup(nn.Linear(2, 2))


@every_kind
def test_every_hook_that_a_loop_of_ones_own_calls_is_refused(entry: Entry) -> None:
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1, callbacks=[entry.make()])
    module = net_of()
    handed: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {}),
        ((), {"results": {}}),
        ((), {"trainer": None, "pl_module": module}),
        ((), {"trainer": OwnTrainer(), "pl_module": module}),
        ((fabric, module), {}),
    ]
    for hook, (args, kwargs) in product(HOOKS, handed):
        with pytest.raises(TrainerError, match=WORDS.format(entry.name)):
            fabric.call(hook, *args, **kwargs)


@every
def test_a_trainer_is_welcome_and_lightning_sees_which_hooks_are_there(entry: Entry) -> None:
    callback = entry.make()
    callback.on_sanity_check_start(make_trainer([callback]), net_of())
    assert callback.on_train_batch_end.__name__ == "on_train_batch_end"
    if entry.kind == "watch":
        return
    overridden = pl.utilities.model_helpers.is_overridden
    assert overridden("on_train_start", callback, pl.Callback)
    assert not overridden("on_predict_start", callback, pl.Callback)
