"""Follow every unit of a network through one forward pass: what belongs to it, who consumes it, where it is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lightning_backdoor._lightning import version_of
from lightning_backdoor.surgery.taps import CREATION, eager_forward, mapped, tensors_in
from lightning_backdoor.surgery.unit_trace import Producer, Role, Slice, Strand

__all__ = ["Call", "Graph", "Pairs", "ResidualMode", "record", "register_rule"]

ResidualMode = Literal["branch_only", "reference", "full_group"]
Pairs = Iterable[tuple[Tensor, Strand]]
Rule = Callable[["Call"], Pairs]
_RULES: dict[str, Rule] = {}


def register_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register how units pass an operation: decorator of a function from a :class:`Call` to ``(output, strand)`` pairs.

    Args:
        names: Names of torch functions or tensor methods without underscores at their ends (``"add"`` also stands for
            ``Tensor.add_`` and ``Tensor.__add__``). Operations without a rule end what goes into them.
    """

    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


@dataclass(frozen=True, eq=False)
class Call:
    """One operation of the forward pass, with the strands of each tensor that went in."""

    graph: Graph
    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    flows: Mapping[int, tuple[Strand, ...]]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, wherever it was passed."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    @property
    def first(self) -> Any:
        """The first argument."""
        return self.argument(0, "input")

    def strands(self, value: Any) -> tuple[Strand, ...]:
        """What flows in an argument of this call."""
        return self.flows.get(id(value), ())

    def is_activation(self, value: Any) -> bool:
        """Whether an argument depends on the images (parameters, buffers, numbers and what is made of them do not)."""
        return id(value) in self.flows

    def everything(self) -> Iterator[Strand]:
        """All strands that went in."""
        return (strand for strands in self.flows.values() for strand in strands)

    def repeat(self, change: Callable[[Tensor], Tensor]) -> Any:
        """Do the operation once more on changed tensors."""
        return self.func(*mapped(self.args, change), **mapped(dict(self.kwargs), change))


class Graph(TorchFunctionMode):
    """Watches one forward pass of a module.

    Args:
        module: The model.
        layers: Names and layers whose units are followed.
        residual_mode: What a sum does to the units that enter it, see :func:`~lightning_backdoor.surgery.find_units`.
    """

    def __init__(self, module: nn.Module, layers: Mapping[str, nn.Module], residual_mode: ResidualMode) -> None:
        super().__init__()
        self.mode = residual_mode
        self.norms: list[Any] = []  # the norm modules that are running, outermost first
        self._groups: dict[Producer, set[Producer]] = {}
        self._uses: Counter[int] = Counter()  # by address, so that tied weights are counted together
        self._flows: Any = WeakIdKeyDictionary()  # activation -> (version, strands), constant -> None
        self._places: dict[int, tuple[nn.Module, str]] = {}
        self._holders: Counter[int] = Counter()
        self._producers: dict[int, Producer] = {}
        for part in module.modules():
            for value in vars(part).values():
                if isinstance(value, Tensor):
                    self._flows[value] = None
            own = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
            self._places.update({id(tensor): (part, key) for key, tensor in own})
            self._holders.update(tensor.data_ptr() for _, tensor in own)
        for name, layer in layers.items():
            weight = getattr(layer, "weight", None)
            if isinstance(weight, nn.Parameter) and id(weight) in self._places:
                self._producers[id(weight)] = Producer(name, layer, _outputs(layer, weight))

    @property
    def producers(self) -> list[Producer]:
        """All layers that are followed."""
        return list(self._producers.values())

    def producer(self, weight: Tensor) -> Producer | None:
        """The followed layer with this weight."""
        return self._producers.get(id(weight))

    def slice(self, tensor: Tensor | None, owner: Tensor, role: Role) -> Slice | None:
        """Name entries of a tensor, None if no module holds it."""
        return Slice(*self._places[id(tensor)], owner, role) if id(tensor) in self._places else None

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether a parameter or buffer is held by several modules, or was used several times."""
        place = tensor.data_ptr()
        return self._holders[place] > 1 or self._uses[place] > 1

    def stage(self, *entries: tuple[Tensor | None, Tensor, Role]) -> tuple[Slice, ...] | None:
        """Name entries of several tensors (None: absent), None if one of them is computed and held by no module."""
        found = [self.slice(tensor, owner, role) for tensor, owner, role in entries if tensor is not None]
        return None if None in found else tuple(x for x in found if x is not None)

    def consume(self, strand: Strand, column: Slice) -> None:
        """A weight reads the units; behind a sum only the first one is of interest, and only as the authors did."""
        producer = strand.producer
        if not strand.joined or not producer.read_behind_sum:
            producer.slices.append(column)
            producer.read_behind_sum |= strand.joined

    def join(self, strand: Strand) -> Iterator[Strand]:
        """The units enter a sum with others: there, a branch ends (and goes on in the mode ``reference``)."""
        if not strand.zero:
            self.lose(strand, "it enters a sum and is not zero there when it is off")
        elif not strand.joined:
            strand.producer.joins.append(strand.stages)
            if self.mode == "reference":
                yield replace(strand, joined=True)

    def unite(self, ones: tuple[Strand, ...], twos: tuple[Strand, ...]) -> Iterator[Strand]:
        """The units of two summands become one group, channel by channel."""
        both = (*ones, *twos)
        if len(ones) == len(twos) == 1 and torch.equal(ones[0].labels, twos[0].labels):
            members = {member for strand in both for member in self.group(strand.producer)}
            self._groups.update(dict.fromkeys(members, members))
            yield replace(ones[0], zero=ones[0].zero and twos[0].zero, stages=())
        else:
            for strand in both:
                self.lose(strand, "it enters a sum whose summands are not channel by channel units of layers")

    def group(self, producer: Producer) -> set[Producer]:
        """The layers whose units are added to those of this one, itself included."""
        return self._groups.get(producer, {producer})

    def lose(self, strand: Strand, why: str) -> None:
        """The units of a strand cannot be cut; behind a sum it is the sum that goes on, its parts are done with."""
        if not strand.joined:
            strand.producer.lost = strand.producer.lost or why

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and record its effect."""
        kwargs = kwargs or {}
        inputs = list(tensors_in((args, kwargs)))
        flows = {id(x): strands for x in inputs if (strands := self.read(x)) is not None}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        results = list(tensors_in(output)) or (inputs[:1] if name == "setitem" else [])
        if not results:
            return output
        for x in inputs:
            if id(x) in self._places:
                self._uses[x.data_ptr()] += 1
        found: dict[int, list[Strand]] = {id(x): [] for x in results}
        call = Call(self, name, func, args, kwargs, output, flows)
        if any(flows.values()) or any(self.producer(x) for x in inputs):
            for result, strand in _RULES.get(name, _unknown)(call):
                found[id(result)].append(strand)
        for x in results:
            self._flows[x] = (version_of(x), tuple(found[id(x)])) if flows and name not in CREATION else None
        return output

    def read(self, x: Tensor) -> tuple[Strand, ...] | None:
        """The strands of an activation, None for a constant; a tensor from outside is an activation without."""
        integers = x.ndim > 2 and not x.is_complex() and x.dtype != torch.bool  # fewer dimensions: labels, positions
        images = x.is_floating_point() or x.dtype == torch.uint8 or integers
        if id(x) in self._places or not (images or x in self._flows):
            return None
        if x not in self._flows:
            self._unseen()
            return ()
        flow = self._flows[x]
        if flow is None or flow[0] == version_of(x):
            return None if flow is None else flow[1]
        for strand in flow[1]:
            self.lose(strand, "it was changed in place behind another view")
        return ()

    def _unseen(self) -> None:
        """A tensor that no operation made: an input, or something hidden has read what was made so far."""
        for producer in self.producers:
            if producer.slices:
                producer.lost = producer.lost or "an operation that cannot be watched (scripted?) comes after it"


def record(
    module: nn.Module, run: Callable[[], Tensor], layers: Mapping[str, nn.Module], residual_mode: ResidualMode
) -> Graph:
    """Do one forward pass and follow the units of these layers through it."""
    graph = Graph(module, layers, residual_mode)
    with ExitStack() as stack:
        for part in module.modules():
            if _is_norm(part):
                stack.callback(part.register_forward_pre_hook(lambda norm, _: graph.norms.append(norm)).remove)
                stack.callback(part.register_forward_hook(lambda *_: graph.norms.pop() and None).remove)
        stack.enter_context(eager_forward())
        stack.enter_context(torch.no_grad())
        stack.enter_context(graph)
        logits = run()
    for strand in graph.read(logits) or ():
        graph.lose(strand, "it is a part of the logits")
    return graph


def _unknown(call: Call) -> Pairs:
    if call.name not in CREATION:
        for strand in call.everything():
            call.graph.lose(strand, f"no rule for {call.name!r}, into which it goes")
    return ()


def _outputs(layer: nn.Module, weight: Tensor) -> int:
    transposed = getattr(layer, "transposed", False)
    return int(layer.out_channels) if transposed else len(weight)  # type: ignore[arg-type]


def _is_norm(module: nn.Module) -> bool:
    """Whether a module scales, shifts and normalises each channel by statistics that it keeps, under any class name."""
    values = [getattr(module, key, None) for key in ("weight", "bias", "running_mean", "running_var")]
    return all(isinstance(v, Tensor) and v.ndim == 1 for v in values)
