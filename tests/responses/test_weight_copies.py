"""Copies of weights and optimizers: they stay what they are, know new groups, and averages that start again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_backdoor.responses.weight_copies import put_weights, restart_averages, weights


def trainer_of(module: nn.Module, *optimizers: torch.optim.Optimizer, **callbacks: Any) -> Any:
    held = [SimpleNamespace(state_key="held", average=value) for value in callbacks.values()]
    return SimpleNamespace(optimizers=list(optimizers), callbacks=held, lightning_module=module)


def step(module: nn.Module, optimizer: torch.optim.Optimizer, value: float) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()


def momentum(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(state["momentum_buffer"].mean()) for state in optimizer.state.values()]


def test_what_was_copied_can_be_put_back_again_and_again() -> None:
    module = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)
    step(module, optimizer, 1.0)
    trainer, before = trainer_of(module, optimizer), module.weight.detach().clone()
    saved = weights(trainer, module)
    for _ in range(2):
        step(module, optimizer, 3.0)
        assert momentum(optimizer) == [3.5]
        put_weights(trainer, module, saved)
        assert momentum(optimizer) == [1.0]
        assert torch.equal(module.weight, before)


def test_groups_that_are_new_or_have_grown_keep_what_they_have() -> None:
    module = nn.ModuleList(nn.Linear(2, 1, bias=False) for _ in range(4))
    first, second, third, fourth = module
    groups = [{"params": list(first.parameters())}, {"params": list(second.parameters()), "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.5)
    step(module, optimizer, 1.0)
    trainer = trainer_of(module, optimizer)
    saved = weights(trainer, module)
    optimizer.param_groups[0]["params"].append(third.weight)  # the numbers of all parameters after it move
    optimizer.add_param_group({"params": [fourth.weight], "lr": 0.3})
    step(module, optimizer, 3.0)
    optimizer.param_groups[1]["lr"] = 9.0
    put_weights(trainer, module, saved)
    found = {name: float(optimizer.state[part.weight]["momentum_buffer"].mean()) for name, part in enumerate(module)}
    assert found == {0: 3.5, 1: 1.0, 2: 3.0, 3: 3.0}
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.3]
    assert torch.equal(first.weight, saved["module"]["0.weight"])


def test_an_average_starts_again_from_what_it_averages() -> None:
    module = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    module["average"] = AveragedModel(module["body"])
    outside = AveragedModel(module)
    for average, part in ((module["average"], module["body"]), (outside, module)):
        average.update_parameters(part)
    nn.init.ones_(module["body"].weight)
    restart_averages(trainer_of(module, average=outside), module)
    assert int(module["average"].n_averaged) == int(outside.n_averaged) == 0
    assert torch.equal(module["average"].module.weight, torch.ones(2, 2))
    assert torch.equal(outside.module["body"].weight, torch.ones(2, 2))
    assert torch.equal(outside.module["average"].module.weight, torch.ones(2, 2)), "after the one that it holds"


def test_an_average_of_one_of_several_parts_alike_waits_for_its_next_update() -> None:
    module = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    average = AveragedModel(module[1])
    average.update_parameters(module[1])
    before = average.module.weight.detach().clone()
    nn.init.ones_(module[1].weight)
    restart_averages(trainer_of(module, average=average), module)
    assert int(average.n_averaged) == 0
    assert torch.equal(average.module.weight, before)
