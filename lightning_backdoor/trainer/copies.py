"""What training changes, copied and put back: weights, optimizers, and averages of the model."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_backdoor.trainer.compat import CallbackBase

__all__ = ["averages", "foreign", "on_cpu", "put_weights", "restart_averages", "weights"]


def weights(trainer: Any, pl_module: Any) -> dict[str, Any]:
    """Copy the module's state, that of the optimizers, and averages, as plain values that a checkpoint can hold.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
    """
    return {
        "module": on_cpu(pl_module.state_dict()),
        "optimizers": [on_cpu(optimizer.state_dict()) for optimizer in trainer.optimizers],
        "averages": averages(trainer),
    }


def averages(trainer: Any) -> dict[str, dict[str, Any]]:
    """Copy the averaged models that callbacks keep beside the trained one, by callback and attribute."""
    return {
        key: {name: on_cpu(module.state_dict()) for name, module in _modules(trainer, callback).items()}
        for key, callback in foreign(trainer)
    }


def put_weights(trainer: Any, pl_module: Any, state: dict[str, Any], *, groups: bool = True) -> None:
    """Put back what :func:`weights` copied, as often as needed.

    Parameter groups that came since (layers were thawed) keep what they have.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
        state: What :func:`weights` returned.
        groups: Also the settings of the parameter groups; without, learning rates stay where schedulers put them.
    """
    pl_module.load_state_dict(state["module"], strict=getattr(pl_module, "strict_loading", True))
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
        now = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(_with_new_groups(saved, optimizer.state_dict()))
        for group, settings in zip(optimizer.param_groups, now, strict=True):
            group.update({} if groups else settings)
    for key, callback in foreign(trainer):
        for name, module in _modules(trainer, callback).items():
            if name in state["averages"].get(key, {}):
                module.load_state_dict(state["averages"][key][name])


def restart_averages(trainer: Any, pl_module: Any) -> None:
    """Let averages of the model or of a part of it, in callbacks or in itself, start again from the present weights.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
    """
    held = [value for callback in trainer.callbacks for value in vars(callback).values()]
    found = [value for value in (*pl_module.modules(), *held) if isinstance(value, AveragedModel)]
    parts = _outside(pl_module)
    for average in found:
        average.n_averaged.zero_()
        sources = {tuple(map(id, _values(part))): part for part in parts if _alike(part, average.module)}
        if len(sources) == 1:  # of several alike it is not known which one is averaged; the next update copies it
            with torch.no_grad():
                for mean, value in zip(_values(average.module), _values(*sources.values()), strict=True):
                    mean.copy_(value)


def foreign(trainer: Any) -> list[tuple[str, Any]]:
    """Callbacks that are not of this library, under unique keys: going back in one defence must not undo another."""
    found: dict[str, Any] = {}
    for callback in trainer.callbacks:
        if not isinstance(callback, CallbackBase):
            found[f"{callback.state_key}#{sum(key.startswith(callback.state_key) for key in found)}"] = callback
    return list(found.items())


def on_cpu(value: Any) -> Any:
    """Copy nested containers with every tensor cloned to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [on_cpu(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return copy.deepcopy(value)


def _with_new_groups(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A copy of an optimizer's saved state, and its present one for groups that are new or have other parameters."""
    saved = copy.deepcopy(saved)  # the optimizer goes on with the tensors that it is given
    groups, moved = list(now["param_groups"]), dict[Any, Any]()
    for place, (old, new) in enumerate(zip(saved["param_groups"], now["param_groups"], strict=False)):
        if len(old["params"]) == len(new["params"]):
            groups[place] = {**old, "params": new["params"]}
            moved.update(zip(old["params"], new["params"], strict=True))
    lost = {number for group in saved["param_groups"] for number in group["params"]} - moved.keys()
    fresh = {number for group in groups for number in group["params"]} - set(moved.values())
    state = {moved.get(key, key): value for key, value in saved["state"].items() if key not in lost}
    return {
        **saved,
        "state": {**state, **{key: value for key, value in now["state"].items() if key in fresh}},
        "param_groups": groups,
    }


def _modules(trainer: Any, callback: Any) -> dict[str, nn.Module]:
    own = trainer.lightning_module
    return {name: value for name, value in vars(callback).items() if isinstance(value, nn.Module) and value is not own}


def _outside(module: nn.Module) -> list[nn.Module]:
    """A module and its parts, but for those of averages."""
    if isinstance(module, AveragedModel):
        return []
    return [module, *(part for child in module.children() for part in _outside(child))]


def _alike(part: nn.Module, other: nn.Module) -> bool:
    return type(part) is type(other) and [v.shape for v in _values(part)] == [v.shape for v in _values(other)]


def _values(module: nn.Module) -> list[torch.Tensor]:
    return list(chain(module.parameters(), module.buffers()))
