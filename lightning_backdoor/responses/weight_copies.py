"""What training changes, copied and put back: weights, optimizers, and averages of the model."""

from __future__ import annotations

import copy
from contextlib import suppress
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_backdoor._lightning import CallbackBase, callbacks_of, rank_zero_warn
from lightning_backdoor.responses.mirrors import Found, Mirror, Watch, find_mirrors

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = [
    "averages",
    "foreign",
    "on_cpu",
    "put_weights",
    "restart_averages",
    "start_of_fit",
    "unwatch_averages",
    "watch_averages",
    "weights",
]

_WATCHES: WeakKeyDictionary[Any, tuple[Watch, list[Any]]] = WeakKeyDictionary()
"""Trainers whose copies of the model are watched, and the handles of the hooks at their optimizers."""
_ALIKE = 0.5  # cosine between a few values of a copy and of the weights
_SHOWN = 5  # copies that a warning names


def weights(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
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


def watch_averages(
    trainer: Trainer, pl_module: LightningModule, holder: object, before: dict[str, Any] | None = None
) -> Watch:
    """See from now on which copies of the model, in callbacks and in the module, are averages of it.

    :func:`restart_averages` and :func:`put_weights` write into those alone: a teacher, the weights of the best epoch
    and moments of gradients have the same shapes, and are left as they are.

    Args:
        trainer: The running Trainer, with its optimizers.
        pl_module: The LightningModule under training.
        holder: Who wants it.
        before: State of the watch when a checkpoint was written.
    """
    if trainer not in _WATCHES:
        watch = Watch(trainer, pl_module, _find)
        # one optimizer is enough, since copies are compared with the weights from one of its steps to the next
        handles: list[Any] = []
        with suppress(AttributeError):  # of an optimizer that passes torch's own by, which calls no hooks
            handles = [optimizer.register_step_pre_hook(watch.after_step) for optimizer in trainer.optimizers[:1]]
        _WATCHES[trainer] = watch, handles
    watch, _ = _WATCHES[trainer]
    watch.holders.add(id(holder))
    if before:
        watch.load_state_dict(before)
    return watch


def unwatch_averages(trainer: Trainer, holder: object) -> None:
    """Look no more at copies of the model, once nobody else wants it."""
    if trainer not in _WATCHES:
        return
    watch, handles = _WATCHES[trainer]
    watch.holders.discard(id(holder))
    if not watch.holders:
        for handle in handles:
            handle.remove()
        del _WATCHES[trainer]


def averages(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Copy averages of the model and other modules beside it, by callback (or ``""``: the module) and attribute.

    Before the first step it is not known which copies of the model are averages: all are copied.
    """
    found, watch = _find(trainer), _watch(trainer)
    if watch is not None:
        watch.settle()
    kept: dict[str, dict[str, Any]] = {}
    for (key, name), module in {**_others(trainer, found), **found.averaged}.items():
        kept.setdefault(key, {})[name] = on_cpu(module.state_dict())
    for mirror in found.mirrors:
        if not _is_saved(mirror, trainer) and (watch is None or not watch.under_way or watch.averages(mirror)):
            kept.setdefault(mirror.key, {})[mirror.place] = on_cpu(mirror.state())
    return kept


def put_weights(trainer: Trainer, pl_module: LightningModule, state: dict[str, Any], *, groups: bool = True) -> None:
    """Put back what :func:`weights` copied, as often as needed.

    Parameter groups that came since (layers were thawed) keep what they have. Averages that came since start again.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
        state: What :func:`weights` returned.
        groups: Also the settings of the parameter groups; without, learning rates stay where schedulers put them.
    """
    found = _break_off(trainer, pl_module, bring_back=True)
    pl_module.load_state_dict(state["module"], strict=getattr(pl_module, "strict_loading", True))
    for optimizer, saved in zip(trainer.optimizers, state["optimizers"], strict=True):
        now = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(_with_new_groups(saved, optimizer.state_dict()))
        for group, settings in zip(optimizer.param_groups, now, strict=True):
            group.update({} if groups else settings)
    for (key, name), module in {**_others(trainer, found), **found.averaged}.items():
        if name in state["averages"].get(key, {}):
            module.load_state_dict(state["averages"][key][name])
        elif isinstance(module, AveragedModel):
            _restart(module, pl_module)
    for mirror, source in _seen(trainer, found):
        saved = state["averages"].get(mirror.key, {}).get(mirror.place)
        if not _is_saved(mirror, trainer) and not mirror.put_state(saved):
            mirror.put(_present(source, pl_module))


def restart_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Let averages of the model or of a part of it, in callbacks or in itself, start again from the present weights.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
    """
    found = _break_off(trainer, pl_module)
    own = [part for part in pl_module.modules() if isinstance(part, AveragedModel)]
    for average in (*own, *found.averaged.values()):
        _restart(average, pl_module)
    for mirror, source in _seen(trainer, found):
        mirror.put(_present(source, pl_module))


def foreign(trainer: Trainer) -> list[tuple[str, Any]]:
    """Callbacks that are not of this library, under unique keys: going back in one defence must not undo another."""
    found: dict[str, Any] = {}
    for callback in callbacks_of(trainer):
        if not isinstance(callback, CallbackBase):
            found[f"{callback.state_key}#{sum(key.startswith(callback.state_key) for key in found)}"] = callback
    return list(found.items())


def start_of_fit(trainer: Trainer, pl_module: LightningModule, at_setup: dict[str, Any]) -> dict[str, Any] | None:
    """The weights that the module had before the first step of a fit, on the CPU, the same in all processes.

    Call after ``configure_model``, and before the first step.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
        at_setup: Its state at the setup of the fit, or of an interrupted one: a checkpoint has replaced it since.

    Returns:
        State of the module; ``None`` where a checkpoint was loaded into layers that were not there at the setup.
    """
    if trainer.ckpt_path is None:
        return cast(dict[str, Any], on_cpu(pl_module.state_dict()))
    if at_setup.keys() != pl_module.state_dict().keys():
        return None
    return trainer.strategy.broadcast(at_setup)  # only loading the checkpoint made ranks equal


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


def _watch(trainer: Trainer) -> Watch | None:
    return _WATCHES[trainer][0] if trainer in _WATCHES else None


def _find(trainer: Trainer) -> Found:
    return find_mirrors(foreign(trainer), trainer.lightning_module)


def _seen(trainer: Trainer, found: Found) -> list[tuple[Mirror, tuple[str, ...]]]:
    """The copies that are averages, with names of what they average."""
    watch = _watch(trainer)
    known = [] if watch is None else [(mirror, watch.averages(mirror)) for mirror in found.mirrors]
    return [(mirror, source) for mirror, source in known if source is not None]


def _break_off(trainer: Trainer, pl_module: nn.Module, *, bring_back: bool = False) -> Found:
    """What there is before weights are put elsewhere; say once which copies came of the training and are no averages.

    Of the tensors with the shapes of weights, those count that point where the weights do: no moments of gradients.
    """
    found, watch = _find(trainer), _watch(trainer)
    if watch is None:
        return found
    watch.break_off()
    if bring_back and watch.bring_back(found):  # a callback was told to load a state from before it had its average
        found = _find(trainer)
    watch.take_stock(found)
    suspects = [mirror for mirror in found.mirrors if watch.seen.get(mirror.name) is not None]
    others = [mirror for mirror in suspects if watch.averages(mirror) is None and mirror.name not in watch.told]
    others = [mirror for mirror in others if mirror.likeness(pl_module) > _ALIKE]
    watch.told.update(mirror.name for mirror in others)
    if others:
        names = ", ".join(f"`{mirror.shown}`" for mirror in others[:_SHOWN])
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        rank_zero_warn(
            f"{names}{more}: copies of the model's weights that came of the training so far and are not seen to be "
            "averages of it. They are left as they are and may hold a backdoor. Do not load them after the fit, unless "
            "they were written anew; keep an average in torch.optim.swa_utils.AveragedModel, which starts again."
        )
    return found


def _present(source: tuple[str, ...], pl_module: nn.Module) -> list[torch.Tensor]:
    return [attrgetter(name)(pl_module) for name in source]


def _is_saved(mirror: Mirror, trainer: Trainer) -> bool:
    """Whether a copy of the model is in the state of the module."""
    return bool(mirror.registered) and set(mirror.registered) <= trainer.lightning_module.state_dict().keys()


def _others(trainer: Trainer, found: Found) -> dict[tuple[str, str], nn.Module]:
    """Modules that callbacks have beside the model, and which are no copies of it, by callback and attribute."""
    mirrors = {(mirror.key, mirror.place) for mirror in found.mirrors}
    own = {id(part) for part in trainer.lightning_module.modules()}
    return {
        (key, name): value
        for key, callback in foreign(trainer)
        for name, value in vars(callback).items()
        if isinstance(value, nn.Module) and id(value) not in own and (key, name) not in mirrors
    }


def _restart(average: AveragedModel, pl_module: nn.Module) -> None:
    """Let torch's average start again; of several parts alike it is not known which one: the next update copies it."""
    average.n_averaged.zero_()
    parts = [part for part in _outside(pl_module) if _alike(part, average.module)]
    sources = {tuple(map(id, _values(part))): part for part in parts}
    if len(sources) == 1:
        with torch.no_grad():
            for mean, value in zip(_values(average.module), _values(*sources.values()), strict=True):
                mean.copy_(value)


def _outside(module: nn.Module) -> list[nn.Module]:
    """A module and its parts, but for those of averages."""
    if isinstance(module, AveragedModel):
        return []
    return [module, *(part for child in module.children() for part in _outside(child))]


def _alike(part: nn.Module, other: nn.Module) -> bool:
    return type(part) is type(other) and [v.shape for v in _values(part)] == [v.shape for v in _values(other)]


def _values(module: nn.Module) -> list[torch.Tensor]:
    return list(chain(module.parameters(), module.buffers()))
