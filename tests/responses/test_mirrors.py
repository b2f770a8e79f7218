"""Copies of the model that users keep: averages are told from teachers, records and moments, and start again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_backdoor.responses.weight_copies import (
    put_weights,
    restart_averages,
    unwatch_averages,
    watch_averages,
    weights,
)

DECAY = 0.9
Update = Callable[[int], None]


class Holder:
    """A callback, as far as the search is concerned."""

    state_key = "held"


class Run:
    """A Trainer, as far as the watch is concerned: two layers and a norm, trained for some steps."""

    def __init__(self, watched: bool = True) -> None:
        torch.manual_seed(0)
        self.lightning_module = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))})
        self.lightning_module["head"] = nn.Linear(8, 3)
        self.holder, self.current_epoch = Holder(), 0
        self.callbacks = [self.holder]
        self.optimizers = [torch.optim.SGD(self.lightning_module.parameters(), lr=0.1, momentum=0.9)]
        self.watched = watched

    def train(self, update: Update, steps: int = 4) -> None:
        """Epochs of two steps; ``update`` is what callbacks do at the end of a batch."""
        if self.watched:
            watch_averages(self, self.lightning_module, self)
        for step in range(steps):
            self.current_epoch = step // 2
            self.optimizers[0].step(self.backward)
            update(step)

    def backward(self) -> float:
        self.optimizers[0].zero_grad()
        logits = self.lightning_module["head"](self.lightning_module["net"](torch.randn(16, 4)))
        loss = nn.functional.cross_entropy(logits, torch.randint(3, (16,)))
        loss.backward()
        return loss.item()

    def reset(self) -> None:
        """What a defence does."""
        with torch.no_grad():
            self.lightning_module["net"][0].weight.mul_(0.5)
        restart_averages(self, self.lightning_module)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def lerp(average: dict[str, Tensor], module: nn.Module, share: float = 1 - DECAY) -> None:
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            average[name] = share * value + (1 - share) * average[name]


def in_a_dict(run: Run) -> tuple[Update, Callable[[], Any]]:
    run.holder.shadow = state(run.lightning_module)
    return lambda _: lerp(run.holder.shadow, run.lightning_module), lambda: run.holder.shadow


def in_a_dict_of_the_module(run: Run) -> tuple[Update, Callable[[], Any]]:
    run.lightning_module.extra = {"ema": {"net": state(run.lightning_module["net"])}}
    shadow = run.lightning_module.extra["ema"]["net"]
    return lambda _: lerp(shadow, run.lightning_module["net"]), lambda: {f"net.{k}": v for k, v in shadow.items()}


def in_a_new_dict_every_time(run: Run) -> tuple[Update, Callable[[], Any]]:
    run.holder.shadow = dict(run.lightning_module.named_parameters())
    run.holder.shadow = {name: value.detach().clone() for name, value in run.holder.shadow.items()}

    def update(_: int) -> None:
        now = dict(run.lightning_module.named_parameters())
        run.holder.shadow = {name: value.lerp(now[name].detach(), 0.1) for name, value in run.holder.shadow.items()}

    return update, lambda: run.holder.shadow


def in_a_list_of_an_object(run: Run) -> tuple[Update, Callable[[], Any]]:
    names = [name for name, _ in run.lightning_module.named_parameters()]

    class Average:
        def __init__(self) -> None:
            self.shadow_params = [value.detach().clone() for value in run.lightning_module.parameters()]
            self.collected_params = None

    run.holder.ema = Average()

    def update(_: int) -> None:
        for mean, value in zip(run.holder.ema.shadow_params, run.lightning_module.parameters(), strict=True):
            mean.sub_(0.1 * (mean - value.detach()))

    return update, lambda: dict(zip(names, run.holder.ema.shadow_params, strict=True))


def in_a_copy(run: Run) -> tuple[Update, Callable[[], Any]]:
    run.holder.model = copy.deepcopy(run.lightning_module).requires_grad_(False)

    def update(_: int) -> None:
        for mean, value in zip(run.holder.model.parameters(), run.lightning_module.parameters(), strict=True):
            mean.data.mul_(DECAY).add_(value.data, alpha=1 - DECAY)

    return update, run.holder.model.state_dict


def in_a_part_of_the_module(run: Run) -> tuple[Update, Callable[[], Any]]:
    target = copy.deepcopy(run.lightning_module["net"])
    run.lightning_module["target"] = target

    def update(_: int) -> None:
        for mean, value in zip(target.parameters(), run.lightning_module["net"].parameters(), strict=True):
            mean.data.lerp_(value.data, 0.1)

    return update, lambda: {f"net.{name}": value for name, value in target.state_dict().items()}


def in_buffers(run: Run) -> tuple[Update, Callable[[], Any]]:
    class Shadow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("decay", torch.tensor(DECAY))
            for name, value in run.lightning_module["net"].named_parameters():
                self.register_buffer(name.replace(".", ""), value.detach().clone())

    shadow = run.lightning_module["shadow"] = Shadow()

    def update(_: int) -> None:
        for name, value in run.lightning_module["net"].named_parameters():
            mean = getattr(shadow, name.replace(".", ""))
            mean.sub_(0.1 * (mean - value.detach()))

    names = {name: name.replace(".", "") for name, _ in run.lightning_module["net"].named_parameters()}
    return update, lambda: {f"net.{name}": getattr(shadow, own) for name, own in names.items()}


def by_timm(kind: Any, place: str) -> Callable[[Run], tuple[Update, Callable[[], Any]]]:
    def make(run: Run) -> tuple[Update, Callable[[], Any]]:
        average = kind(run.lightning_module["net"], decay=DECAY)
        if place == "module":
            run.lightning_module["average"] = average
        else:
            run.holder.average = average

        def value() -> Any:
            return {f"net.{name}": value for name, value in average.module.state_dict().items()}

        return lambda _: average.update(run.lightning_module["net"]), value

    return make


AVERAGES = {
    "dict": in_a_dict,
    "nested": in_a_dict_of_the_module,
    "new dicts": in_a_new_dict_every_time,
    "list": in_a_list_of_an_object,
    "copy": in_a_copy,
    "part": in_a_part_of_the_module,
    "buffers": in_buffers,
    "timm 2": by_timm(ModelEmaV2, "callback"),
    "timm 3": by_timm(ModelEmaV3, "callback"),
    "timm 3 inside": by_timm(ModelEmaV3, "module"),
}
every = pytest.mark.parametrize("make", AVERAGES.values(), ids=AVERAGES)


def equal(copied: dict[str, Tensor], module: nn.Module) -> bool:
    now = module.state_dict()
    return all(torch.equal(value, now[name]) for name, value in copied.items() if not name.endswith("tracked"))


@every
def test_an_average_starts_again(make: Any) -> None:
    run = Run()
    update, average = make(run)
    run.train(update)
    assert not equal(average(), run.lightning_module)
    run.reset()
    assert {name for name, _ in run.lightning_module["net"].named_parameters("net")} <= average().keys()
    if make is in_a_copy:  # of the parameters alone it is known what they are, but the rest is the model's, too
        assert set(average()) == set(run.lightning_module.state_dict())
    assert equal(average(), run.lightning_module)


@every
def test_an_average_goes_back_with_the_weights(make: Any) -> None:
    run = Run()
    update, average = make(run)
    first = weights(run, run.lightning_module)
    start = {name: value.clone() for name, value in average().items()}
    run.train(update)
    saved, then = weights(run, run.lightning_module), {name: value.clone() for name, value in average().items()}
    run.train(update)
    for state_then, expected in ((saved, then), (first, start)):
        put_weights(run, run.lightning_module, state_then)
        assert all(torch.equal(value, expected[name]) for name, value in average().items())


@pytest.mark.parametrize("when", [lambda step: step % 3 == 2, lambda step: step % 2 == 1, lambda step: step > 4])
def test_an_average_may_move_at_times_only(when: Any) -> None:
    run = Run()
    update, average = in_a_dict(run)
    run.train(lambda step: update(step) if when(step) else None, steps=7)
    run.reset()
    assert equal(average(), run.lightning_module)


def test_an_average_of_one_of_several_parts_alike_is_told_by_how_it_moves() -> None:
    run = Run()
    run.lightning_module["net"] = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    run.optimizers = [torch.optim.SGD(run.lightning_module.parameters(), lr=0.1)]
    part = run.lightning_module["net"][2]
    run.holder.shadow = [value.detach().clone() for value in part.parameters()]

    def update(_: int) -> None:
        for mean, value in zip(run.holder.shadow, part.parameters(), strict=True):
            mean.lerp_(value.detach(), 0.1)

    run.train(update)
    run.reset()
    assert all(torch.equal(mean, value) for mean, value in zip(run.holder.shadow, part.parameters(), strict=True))


def test_an_average_that_its_callback_lost_is_put_back() -> None:
    run = Run()
    update, average = in_a_dict(run)
    run.train(update)
    saved = weights(run, run.lightning_module)
    run.holder.shadow = {}  # it was told to load a state from before it had any
    put_weights(run, run.lightning_module, {**saved, "averages": {}})
    assert average().keys() == run.lightning_module.state_dict().keys()
    assert equal(average(), run.lightning_module)


def test_an_average_of_torch_is_found_in_an_object_and_starts_again() -> None:
    run = Run(watched=False)
    run.holder.ema = Holder()
    average = run.holder.ema.model = AveragedModel(run.lightning_module)
    saved = weights(run, run.lightning_module)
    run.train(lambda _: average.update_parameters(run.lightning_module))
    run.reset()
    assert int(average.n_averaged) == 0
    assert equal(average.module.state_dict(), run.lightning_module)
    average.update_parameters(run.lightning_module)
    put_weights(run, run.lightning_module, saved)
    assert int(average.n_averaged) == 0
    put_weights(run, run.lightning_module, {**saved, "averages": {}})
    assert equal(average.module.state_dict(), run.lightning_module)


def a_teacher(run: Run) -> Update:
    run.holder.held = copy.deepcopy(run.lightning_module)
    return lambda _: None


def a_teacher_inside(run: Run) -> Update:
    run.lightning_module["held"] = copy.deepcopy(run.lightning_module["net"]).requires_grad_(False)
    return lambda _: None


def moments(run: Run) -> Update:
    run.holder.held = [torch.zeros_like(value) for value in run.lightning_module.parameters()]

    def update(_: int) -> None:
        for moment, value in zip(run.holder.held, run.lightning_module.parameters(), strict=True):
            moment.lerp_(value.grad, 0.1)

    return update


def states_of_the_optimizer(run: Run) -> Update:
    def update(_: int) -> None:
        run.holder.held = copy.deepcopy(run.optimizers[0].state_dict())

    return update


def the_best_weights(run: Run) -> Update:
    run.holder.held = state(run.lightning_module)

    def update(step: int) -> None:
        if step == 1:
            run.holder.held = state(run.lightning_module)

    return update


def the_first_weights_that_were_good(run: Run) -> Update:
    run.holder.held = None

    def update(step: int) -> None:
        if step == 1:
            run.holder.held = copy.deepcopy(run.lightning_module)

    return update


def the_weights_before(run: Run) -> Update:
    run.holder.held = {}

    def update(_: int) -> None:
        run.holder.held.update(state(run.lightning_module))

    return update


def held_by(run: Run) -> list[Tensor]:
    held = run.lightning_module["held"] if hasattr(run.lightning_module, "held") else run.holder.held
    held = held.state_dict() if isinstance(held, nn.Module) else held
    values = list(held.get("state", held).values() if isinstance(held, dict) else held)
    return [value["momentum_buffer"] if isinstance(value, dict) else value for value in values]


quiet = [a_teacher, a_teacher_inside, moments, states_of_the_optimizer]
told = [the_best_weights, the_first_weights_that_were_good, the_weights_before]


@pytest.mark.parametrize("make", quiet + told)
@pytest.mark.filterwarnings("ignore:.*Holder.held")
def test_what_is_no_average_is_left_as_it_is(make: Any) -> None:
    run = Run()
    first = weights(run, run.lightning_module)
    update = make(run)
    run.train(update)
    before = [value.clone() for value in held_by(run)]
    run.reset()
    if make is not a_teacher_inside:  # which is in the module's own state
        put_weights(run, run.lightning_module, first)
    assert all(torch.equal(a, b) for a, b in zip(before, held_by(run), strict=True))


@pytest.mark.parametrize("make", told)
def test_a_record_of_weights_is_named_once(make: Any) -> None:
    run = Run()
    run.train(make(run))
    with pytest.warns(UserWarning, match=r"^`Holder\.held`: copies of the model's weights .* not seen to be averages"):
        run.reset()
    run.reset()


@pytest.mark.parametrize("make", quiet)
def test_what_holds_nothing_of_the_training_is_not_mentioned(make: Any) -> None:
    run = Run()
    run.train(make(run))
    run.reset()


def test_the_weights_of_the_model_itself_are_no_copy() -> None:
    run = Run()
    run.holder.model, run.holder.parameters = run.lightning_module, list(run.lightning_module.parameters())
    run.holder.states = run.lightning_module.state_dict()
    run.train(lambda _: None)
    run.reset()
    assert weights(run, run.lightning_module)["averages"] == {}


def test_watching_changes_nothing_and_leaves_nothing() -> None:
    runs = [Run(watched=False), Run(watched=True)]
    for run in runs:
        update, _ = in_a_dict(run)
        torch.manual_seed(1)
        run.train(update)
    plain, watched = runs
    assert torch.equal(
        torch.stack([v.sum() for v in state(plain.lightning_module).values()]),
        torch.stack([v.sum() for v in state(watched.lightning_module).values()]),
    )
    assert equal(plain.holder.shadow, plain.lightning_module) is equal(watched.holder.shadow, watched.lightning_module)
    watch_averages(watched, watched.lightning_module, plain)
    unwatch_averages(watched, plain)
    assert watched.optimizers[0]._optimizer_step_pre_hooks
    unwatch_averages(watched, watched)
    assert not watched.optimizers[0]._optimizer_step_pre_hooks


def test_what_was_seen_goes_on_after_a_checkpoint(tmp_path: Any) -> None:
    whole = Run()
    update, _ = in_a_dict(whole)
    whole.train(lambda _: None, steps=1)
    states = [watch_averages(whole, whole.lightning_module, whole).state_dict()]
    whole.train(update, steps=1)  # is seen at the next step
    whole.train(lambda _: None, steps=1)
    states.append(watch_averages(whole, whole.lightning_module, whole).state_dict())
    torch.save(states, tmp_path / "states.pt")
    early, late = torch.load(tmp_path / "states.pt", weights_only=True)
    assert early["seen"] == {}
    assert late["seen"] == {"held#0.shadow": "net.0.weight"}
    resumed = Run()
    in_a_dict(resumed)
    watch_averages(resumed, resumed.lightning_module, resumed, late)
    nn.init.ones_(resumed.lightning_module["head"].weight)
    restart_averages(resumed, resumed.lightning_module)
    assert equal(resumed.holder.shadow, resumed.lightning_module)


def test_several_that_are_no_averages_are_counted() -> None:
    run = Run()
    run.holder.history = []
    run.train(lambda _: run.holder.history.append(SimpleNamespace(weights=state(run.lightning_module))), steps=8)
    with pytest.warns(UserWarning, match=r"`Holder\.history\[4\]\.weights` and 3 more: copies"):
        run.reset()
