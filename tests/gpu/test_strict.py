"""The second device refuses what CUDA refuses, allows what it allows, and computes what the CPU computes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.accelerators import on_cpu
from tests.gpu.strict import DEVICE, StrictTensor, second_device

ROWS = torch.arange(12.0).reshape(3, 4)


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with second_device():
        yield


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda there: there + ROWS,
    "sum in place": lambda there: ROWS.clone().add_(there),
    "concatenation": lambda there: torch.cat([there, ROWS]),
    "product": lambda there: ROWS @ there.T,
    "comparison of all": lambda there: torch.equal(there, ROWS),
    "cpu by index": lambda there: ROWS[torch.tensor([0], device=DEVICE)],
    "cpu by mask": lambda there: ROWS[there > 3],
    "values of the cpu by index": lambda there: there.index_put_((torch.tensor([0]),), ROWS[:1]),
    "gather": lambda there: there.gather(1, torch.zeros(3, 1, dtype=torch.long)),
    "generator": lambda there: torch.rand(3, generator=torch.Generator(), device=DEVICE),
    "numpy": lambda there: there.numpy(),
}
ALLOWED: dict[str, Callable[[Tensor], Any]] = {
    "scalar": lambda x: x + torch.tensor(2.0),
    "index": lambda x: x[torch.tensor([2, 0])],
    "mask": lambda x: x[torch.tensor([True, False, True])],
    "own mask": lambda x: x[x > 3],
    "where": lambda x: torch.where(x > 3, x, torch.tensor(0.0)),
    "assignment": lambda x: x.clone().index_fill_(0, torch.tensor([1], device=x.device), 5.0),
    "numbers": lambda x: x * x.new_tensor([1.0, 2.0, 3.0, 4.0]) + torch.tensor([1.0], device=x.device),
    "like": lambda x: torch.zeros_like(x) + x.new_ones(4) + torch.arange(4, device=x.device),
    "copy": lambda x: torch.empty_like(x).copy_(ROWS.flip(0)),
    "sort": lambda x: x.sort(descending=True).indices,
    "convolution": lambda x: nn.functional.conv1d(x[None], torch.ones(2, 3, 2, device=x.device)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cuda_refuses_is_refused(what: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match=r"same device|for generator|to numpy"):
        REFUSED[what](ROWS.to(DEVICE))


@pytest.mark.parametrize("what", ALLOWED)
def test_what_cuda_allows_gives_what_the_cpu_gives_and_stays_there(what: str) -> None:
    found = ALLOWED[what](ROWS.to(DEVICE))
    assert isinstance(found, StrictTensor)
    assert found.device == DEVICE
    assert torch.equal(on_cpu(found), ALLOWED[what](ROWS))


def test_a_function_that_mixes_devices_is_caught_and_its_mended_twin_is_not() -> None:
    def planted(x: Tensor) -> Tensor:
        return x - torch.linspace(0, 1, x.shape[1])

    def mended(x: Tensor) -> Tensor:
        return x - torch.linspace(0, 1, x.shape[1], device=x.device)

    assert torch.equal(planted(ROWS), mended(ROWS)), "on the CPU nothing can be seen"
    with pytest.raises(RuntimeError, match="same device"):
        planted(ROWS.to(DEVICE))
    assert torch.equal(mended(ROWS.to(DEVICE)).cpu(), mended(ROWS))


def test_a_network_learns_there_as_on_the_cpu() -> None:
    here = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    there, images, labels = copy.deepcopy(here).to(DEVICE), torch.rand(5, 3, 8, 8), torch.arange(5) % 2
    for network in (here, there):
        place = next(network.parameters()).device
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images.to(place)), labels.to(place)).backward()
            optimizer.step()
    assert isinstance(there[0].weight, StrictTensor)
    assert all(torch.equal(on_cpu(there.state_dict()[name]), value) for name, value in here.state_dict().items())


def test_copies_stay_there_and_files_are_read_to_the_cpu() -> None:
    there, file = ROWS.to(DEVICE), io.BytesIO()
    twin = copy.deepcopy(there)
    twin.zero_()
    assert there.sum().item() == 66
    assert there.to(DEVICE) is there
    torch.save({"rows": there}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["rows"], ROWS)


def test_kernels_without_a_fixed_order_are_refused_where_they_are_not_allowed() -> None:
    there, before = ROWS.to(DEVICE), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    there.cumsum(1)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match=r"cumsum.* does not have a deterministic implementation"):
            there.cumsum(1)
        there.long().cumsum(1)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=before)


def test_what_a_tensor_holds_is_no_attribute_that_others_take_over() -> None:
    with second_device():
        first, second = torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)
        vars(second).update(vars(first))
        assert second.tolist() == [1, 1]
