"""Copies of the model's weights that users keep beside it, and which of them are averages, seen by how they move."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_backdoor._lightning import BUFFERS, CallbackBase

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["Found", "Mirror", "Watch", "find_mirrors", "tensors_of"]

Path = tuple[tuple[bool, Any], ...]
"""Steps from a holder to what it holds: (True, name of an attribute) or (False, key of a dict or list)."""

_DEPTH = 5  # steps from a holder
_MOST = 10_000  # values that are looked at per search, and items per container
_SOURCES = 16  # parts of one shape that are told apart
_TENSORS, _VALUES = 4, 64  # that are compared per copy and step
_STEPS = 64  # that are judged together: on a GPU, reading values waits for it
_ROUNDING = 4.0  # rounding errors of one update, in units of the last place
_SIGNAL = 8.0  # times the rounding error that a value must move to count
_POINTS = 4  # values that must have moved
_JUMP = 1e-3  # a move that ends this close to the weights, as a share of the way, is a copy
_NOT_SEARCHED = {"builtins", "torch", "numpy", "pandas", "lightning", "pytorch_lightning", "lightning_backdoor"}
_USUAL = set(vars(nn.Module()))


@dataclass
class Mirror:
    """Tensors outside of training with the shapes of the model's, or of those of a part of it.

    Attributes:
        key: Its holder: the key of a callback, empty for the module.
        root: The holder.
        path: Where the holder has the container.
        places: Keys of the tensors in the container; dotted names where it is a module.
        sources: Names of the model's tensors that they may be copies of; several where parts are alike.
        registered: Names under which the module has them, where it does.
    """

    key: str
    root: Any
    path: Path
    places: tuple[Any, ...]
    sources: list[tuple[str, ...]]
    registered: tuple[str, ...] = ()
    compared: list[int] = field(default_factory=list)

    @property
    def place(self) -> str:
        """Where it is, seen from the holder: ``ema.shadow_params``."""
        return _spelled(self.path)

    @property
    def name(self) -> str:
        """A name that is unique and the same in a resumed run."""
        return f"{self.key}.{self.place}"

    @property
    def shown(self) -> str:
        """A name for readers."""
        return f"{type(self.root).__name__}.{self.place}"

    def container(self) -> Any:
        """What holds the tensors now."""
        return _follow(self.root, self.path)

    def attach(self, container: Any) -> None:
        """Let the holder have this container again."""
        parent, (is_attribute, key) = _follow(self.root, self.path[:-1]), self.path[-1]
        if is_attribute:
            setattr(parent, key, container)
        else:
            parent[key] = container

    def tensors(self) -> list[Tensor]:
        """The tensors as they are now."""
        container = self.container()
        return [_item(container, place) for place in self.places]

    def state(self) -> Any:
        """The state of a module with its counters, else the tensors."""
        container = self.container()
        return container.state_dict() if isinstance(container, nn.Module) else self.tensors()

    def put_state(self, state: Any) -> bool:
        """Put back what :meth:`state` returned, and say whether it is there and fits."""
        container = self.container()
        if isinstance(container, nn.Module):
            now = container.state_dict()
            if not isinstance(state, dict) or _shapes(state) != _shapes(now):
                return False
            container.load_state_dict(state)
            return True
        if not isinstance(state, list) or [v.shape for v in state] != [v.shape for v in self.tensors()]:
            return False
        self.put(state)
        return True

    def put(self, values: Iterable[Tensor]) -> None:
        """Write values into the tensors."""
        for tensor, value in zip(self.tensors(), values, strict=True):
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.copy_(value)

    def sample(self, pl_module: nn.Module) -> tuple[Tensor, list[Tensor]]:
        """A few values of it, and those of each source at the same places."""
        container = self.container()
        own = [_some(_item(container, self.places[i])) for i in self.compared]
        of = [[_some(_item(pl_module, source[i])) for i in self.compared] for source in self.sources]
        return torch.cat(own), [torch.cat(values) for values in of]

    def likeness(self, pl_module: nn.Module) -> float:
        """Largest cosine between a few of its values and those of a source."""
        own, of = self.sample(pl_module)
        pairs = [(own.double().cpu(), values.double().cpu()) for values in of]
        return max(float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs)


@dataclass
class Found:
    """What a search found.

    Attributes:
        mirrors: Copies of the model or of a part of it, but for the following.
        averaged: torch's own averages, by the key of the holder and the place there; without those in the module.
    """

    mirrors: list[Mirror] = field(default_factory=list)
    averaged: dict[tuple[str, str], AveragedModel] = field(default_factory=dict)


def find_mirrors(holders: Iterable[tuple[str, Any]], pl_module: nn.Module) -> Found:
    """Find copies of the model or of a part of it in callbacks, in the module's attributes, and among its parts.

    Looks into dicts, lists, modules and plain objects. A part of the module is a copy if it has no gradients and the
    shapes of one that has some. Optimizers and their states are left out: their moments have the shapes of weights.

    Args:
        holders: Callbacks by unique keys.
        pl_module: The LightningModule under training.
    """
    search = _Search(pl_module)
    for key, holder in holders:
        search.attributes(key, holder, (), holder, _DEPTH)
    search.part(pl_module, ())
    return search.found


class Watch:
    """Sees which copies of the model are averages: by a few of their values, before every step of the optimizer.

    An average moves from where it was towards the present weights, all of its values by the same share of their way.
    A record of a state (the best weights so far) changes by becoming the weights; a teacher does not change; moments
    of gradients move elsewhere. One such move is enough: some dozens of values are on that line by no accident.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
        find: Finds the copies that there are.

    Attributes:
        seen: By name of the copies that came or changed in training: for an average, the first tensor that it
            averages; else empty.
        told: Copies that the user was told about.
        holders: Who wants it to go on, by id.
        under_way: Whether a step was seen.
    """

    def __init__(self, trainer: Trainer, pl_module: nn.Module, find: Callable[[Any], Found]) -> None:
        self.seen: dict[str, str] = {}
        self.told: set[str] = set()
        self.holders: set[int] = set()
        self.under_way = False
        self._trainer, self._module, self._find = weakref.ref(trainer), weakref.ref(pl_module), find
        self._mirrors: dict[str, tuple[Mirror, Any]] = {}
        self._rows: dict[str, list[tuple[Tensor, list[Tensor]]]] = {}
        self._epoch = self._left = 0  # steps until the next search

    @torch.no_grad()
    def after_step(self, *_: Any) -> None:
        """Look; a hook that comes before the optimizer's step. Draws nothing and changes nothing."""
        trainer, module = self._trainer(), self._module()
        if trainer is None or module is None:
            return
        # parts that are not trained have no gradients; before the second step that may be true of all
        if not self._left or self._epoch != trainer.current_epoch:
            self.settle()
            self.take_stock(self._find(trainer))
            self._epoch, self._left = trainer.current_epoch, _STEPS if self.under_way else 1
        self._left -= 1
        self.under_way = True
        for name, (mirror, _container) in self._mirrors.items():
            if not self.seen.get(name):
                try:
                    self._rows.setdefault(name, []).append(mirror.sample(module))
                except Exception:  # the user's object has changed meanwhile; this must never end a training
                    self._rows.pop(name, None)

    def take_stock(self, found: Found) -> None:
        """Note what copies there are now; those that came since the first step hold something of the training."""
        before, self._mirrors = self._mirrors, {mirror.name: (mirror, mirror.container()) for mirror in found.mirrors}
        for name, (mirror, _container) in self._mirrors.items():
            if name not in before and self.under_way and not mirror.registered:
                self.seen.setdefault(name, "")
        for name, (mirror, _container) in before.items():
            if name not in self._mirrors or self._mirrors[name][0].sources != mirror.sources:
                self._rows.pop(name, None)

    def settle(self) -> None:
        """Judge the steps seen so far."""
        for name, rows in self._rows.items():
            verdict = None if name not in self._mirrors else _moves(rows)
            if verdict is not None and not self.seen.get(name):
                self.seen[name] = "" if verdict < 0 else self._mirrors[name][0].sources[verdict][0]
            del rows[:-1]

    def break_off(self) -> None:
        """Judge the steps seen so far, and do not compare with what comes: call before weights are put elsewhere."""
        self.settle()
        self._rows.clear()

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, and the values that the next step is compared with; plain values and tensors."""
        self.settle()
        last = {name: [own.cpu(), *(values.cpu() for values in of)] for name, ((own, of),) in self._rows.items()}
        return {"seen": dict(self.seen), "last": last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.seen.update({name: first for name, first in state_dict["seen"].items() if not self.seen.get(name)})
        self._rows.update({name: [(own, of)] for name, (own, *of) in state_dict["last"].items()})

    def averages(self, mirror: Mirror) -> tuple[str, ...] | None:
        """Names of the tensors that a copy is an average of; ``None`` where it is none, or not seen to be."""
        first = self.seen.get(mirror.name)
        return next((source for source in mirror.sources if source[0] == first), None)

    def bring_back(self, found: Found) -> bool:
        """Attach averages again that their holder has lost since the last look, and say whether there were any."""
        names = {mirror.name for mirror in found.mirrors}
        lost = [held for name, held in self._mirrors.items() if self.seen.get(name) and name not in names]
        for mirror, container in lost:
            with suppress(AttributeError, LookupError, TypeError):  # what held it is gone, too
                mirror.attach(container)
        return bool(lost)


class _Search:
    """Walks through holders; what is part of the module, or was looked at before, is not looked at again."""

    def __init__(self, pl_module: nn.Module) -> None:
        self.found = Found()
        self._model = _Model(pl_module)
        self._module = pl_module
        self._seen = {id(part) for part in pl_module.modules()}
        self._most = len(self._seen) + _MOST
        self._parts: set[int] = set()

    def attributes(self, key: str, root: Any, path: Path, owner: Any, depth: int) -> None:
        """Look at what an object holds under plain names."""
        for name, value in list(vars(owner).items()):
            if not (isinstance(owner, nn.Module) and name in _USUAL):
                self._look(key, root, (*path, (True, name)), value, depth - 1)

    def part(self, module: nn.Module, path: Path) -> None:
        """Look at a part of the module: whether it is a copy of a trained one, or holds one."""
        if id(module) in self._parts or isinstance(module, AveragedModel):
            return
        self._parts.add(id(module))
        trained = any(parameter.grad is not None for parameter in module.parameters())
        if path and not trained and self._add("", self._module, path, tensors_of(module)):
            return
        self.attributes("", self._module, path, module, _DEPTH)
        buffers = {name: buffer for name, buffer in module.named_buffers(recurse=False)}
        self._add("", self._module, (*path, (True, BUFFERS)), buffers)
        for name, child in module.named_children():
            self.part(child, (*path, (True, name)))

    def _look(self, key: str, root: Any, path: Path, value: Any, depth: int) -> None:
        if depth < 0 or id(value) in self._seen or len(self._seen) > self._most or not _is_searched(value):
            return
        self._seen.add(id(value))
        if isinstance(value, AveragedModel):
            self.found.averaged[key, _spelled(path)] = value
        elif isinstance(value, nn.Module):
            if not self._add(key, root, path, tensors_of(value)):
                self.attributes(key, root, path, value, depth)
                for name, child in value.named_children():
                    self._look(key, root, (*path, (True, name)), child, depth - 1)
        elif isinstance(value, (dict, list, tuple)):
            items = dict(value) if isinstance(value, dict) else dict(enumerate(value))
            self._add(key, root, path, {place: item for place, item in items.items() if isinstance(item, Tensor)})
            for place, item in items.items():
                self._look(key, root, (*path, (False, place)), item, depth - 1)
        elif hasattr(value, "__dict__"):
            self.attributes(key, root, path, value, depth)

    def _add(self, key: str, root: Any, path: Path, tensors: dict[Any, Tensor]) -> bool:
        """Note a group of tensors if they have the shapes of the model or of a part, and say whether they do."""
        usable = {place: tensor for place, tensor in tensors.items() if _is_usable(tensor)}
        if not any(tensor.dim() > 1 for tensor in usable.values()):
            return False
        own, inside = self._model.tensors, root is self._module and all(is_attribute for is_attribute, _ in path)
        prefix = _spelled(tuple(step for step in path if step != (True, BUFFERS)))
        registered = tuple(f"{prefix}.{place}".lstrip(".") for place in usable) if inside else ()
        if any(own.get(name) is not tensor for name, tensor in zip(registered, usable.values(), strict=False)):
            registered = ()
        places, sources = self._model.sources(usable, registered)
        if registered:
            sources = [names for names in sources if any(own[name].grad is not None for name in names)]
        shared = any(_shares(usable[p], own[n]) for names in sources for p, n in zip(places, names, strict=True))
        if not sources or shared:  # no copy, but the model's own tensors
            return False
        mirror = Mirror(key, root, path, places, sources[:_SOURCES], registered)
        compared = [i for i, place in enumerate(places) if usable[place].is_floating_point() and usable[place].dim()]
        trained = [i for i in compared if own[sources[0][i]].requires_grad]
        mirror.compared = _spread(trained or compared, _TENSORS)
        if mirror.compared:
            self.found.mirrors.append(mirror)
        return bool(mirror.compared)


class _Model:
    """The tensors of the module, by name, and by the shapes of its parts."""

    def __init__(self, pl_module: nn.Module) -> None:
        self._module = pl_module

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return tensors_of(self._module)

    def sources(
        self, tensors: dict[Any, Tensor], but: tuple[str, ...]
    ) -> tuple[tuple[Any, ...], list[tuple[str, ...]]]:
        """Which of the tensors have counterparts, and the names of those: by name, else by shape and order.

        Args:
            tensors: Tensors by their place in a container.
            but: Names of the tensors themselves, where they are the model's.
        """
        places = tuple(tensors)
        if all(isinstance(place, str) for place in places):
            first = str(places[0])
            prefixes = [n.removesuffix(first) for n in self.tensors if n == first or n.endswith(f".{first}")]
            named = [tuple(prefix + place for place in places) for prefix in prefixes]
            fits = [names for names in named if names != but and all(map(self._fits, names, tensors.values()))]
            if fits:
                return places, fits
        floats = tuple(place for place, tensor in tensors.items() if tensor.is_floating_point())
        for chosen in (floats, tuple(place for place in floats if tensors[place].dim())):
            alike = self._by_shapes.get(tuple(tensors[place].shape for place in chosen), [])
            fits = [names for names in alike if not set(names) & set(but)]
            if chosen and fits:
                return chosen, fits
        return (), []

    def _fits(self, name: str, tensor: Tensor) -> bool:
        return name in self.tensors and self.tensors[name].shape == tensor.shape

    @cached_property
    def _by_shapes(self) -> dict[tuple[torch.Size, ...], list[tuple[str, ...]]]:
        found: dict[tuple[torch.Size, ...], list[tuple[str, ...]]] = {}
        alike: set[tuple[int, ...]] = set()
        for prefix, part in _outside(self._module, ""):
            parameters = list(part.named_parameters(prefix))
            trained = [(name, value) for name, value in parameters if value.requires_grad]
            for view in (trained, parameters, [*parameters, *part.named_buffers(prefix)]):
                floats = [(name, value) for name, value in view if _is_usable(value) and value.is_floating_point()]
                for group in (floats, [(name, value) for name, value in floats if value.dim()]):
                    ids = tuple(id(value) for _, value in group)
                    if group and ids not in alike:
                        alike.add(ids)
                        shapes = tuple(value.shape for _, value in group)
                        found.setdefault(shapes, []).append(tuple(name for name, _ in group))
        return found


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a module, by name."""
    return dict(chain(module.named_parameters(), module.named_buffers()))


def _outside(module: nn.Module, prefix: str) -> Iterable[tuple[str, nn.Module]]:
    """A module and its parts with their names, but for those of averages."""
    if not isinstance(module, AveragedModel):
        yield prefix, module
        for name, child in module.named_children():
            yield from _outside(child, f"{prefix}.{name}".lstrip("."))


def _shapes(state: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in state.items()}


def _is_searched(value: Any) -> bool:
    """Whether a value may hold copies of the model: not a number, an optimizer and its state, data, or a Trainer."""
    if isinstance(value, (nn.Module, AveragedModel)):
        return True
    if isinstance(value, dict):
        return 0 < len(value) <= _MOST and not {"state", "param_groups"} <= value.keys()
    if isinstance(value, (list, tuple)):
        return 0 < len(value) <= _MOST and not isinstance(value[0], (bool, int, float, str, bytes))
    data = (torch.utils.data.Dataset, torch.utils.data.DataLoader, torch.utils.data.Sampler)
    steps = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, CallbackBase)
    if isinstance(value, (type, *data, *steps)) or hasattr(type(value), "train_dataloader"):
        return False
    return type(value).__module__.partition(".")[0] not in _NOT_SEARCHED


def _is_usable(tensor: Tensor) -> bool:
    lazy = torch.nn.parameter.is_lazy(tensor)
    return not lazy and tensor.layout == torch.strided and tensor.device.type != "meta"


def _shares(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.device == b.device and a.numel() > 0 and a.data_ptr() == b.data_ptr())


def _spelled(path: Path) -> str:
    steps = (f".{key}" if is_attribute else f"[{key!r}]" for is_attribute, key in path)
    return "".join(steps).lstrip(".")


def _follow(value: Any, path: Path) -> Any:
    for is_attribute, key in path:
        value = getattr(value, key) if is_attribute else value[key]
    return value


def _item(container: Any, place: Any) -> Tensor:
    found: Tensor = attrgetter(place)(container) if isinstance(container, nn.Module) else container[place]
    return found


def _spread(items: list[int], most: int) -> list[int]:
    return items[:: max(1, -(-len(items) // most))]


def _some(tensor: Tensor) -> Tensor:
    """Up to :data:`_VALUES` values from all over a tensor."""
    strides = [max(1, -(-size // 8)) for size in tensor.shape[:2]]
    few = tensor.detach()[tuple(slice(None, None, stride) for stride in strides)]
    return few.reshape(-1)[:: max(1, -(-few.numel() // _VALUES))]


def _moves(rows: list[tuple[Tensor, list[Tensor]]]) -> int | None:
    """How a copy changed from step to step.

    Args:
        rows: Its values and those of its sources, step by step.

    Returns:
        The number of the source that it averages, -1 for another change, ``None`` for no change.
    """
    last, sources = rows[-1]
    rows = [row for row in rows if row[0].shape == last.shape and len(row[1]) == len(sources)]
    own = torch.stack([values.to(last.device) for values, _ in rows])  # those from a checkpoint are on the CPU
    of = [torch.stack([row[1][k].to(now.device) for row in rows]) for k, now in enumerate(sources)]
    precision = [(torch.finfo(own.dtype).eps, torch.finfo(values.dtype).eps) for values in of]
    own, of = own.double().cpu(), [values.double().cpu() for values in of]
    moved = (own[1:] != own[:-1]).any(dim=1).nonzero().flatten().tolist()
    for step in moved:
        for number, weights in enumerate(of):
            for target in (weights[step + 1], weights[step]):
                if _is_average(own[step], own[step + 1], target, precision[number]):
                    return number
    return -1 if moved else None


def _is_average(before: Tensor, after: Tensor, target: Tensor, precision: tuple[float, float]) -> bool:
    """Whether all values went the same share of their way to the target, and more than rounding explains."""
    size, way, move = before.abs() + target.abs() + torch.finfo(torch.float32).tiny, target - before, after - before
    share = float((way / size) @ (move / size)) / max(float((way / size).square().sum()), 1e-300)
    rounding = _ROUNDING * (precision[0] + abs(share) * precision[1]) * size
    on_line = bool(((move - share * way).abs() <= rounding).all())
    return on_line and int((move.abs() > _SIGNAL * rounding).sum()) >= _POINTS and 0 < share < 1 - _JUMP
