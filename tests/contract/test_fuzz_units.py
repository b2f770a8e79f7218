"""Units of small random networks: a reset cuts exactly what it says, whatever stands around the unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_backdoor.errors import ModelError
from lightning_backdoor.surgery import find_units, reset_units
from tests.contract.tally import COUNTS

ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.LeakyReLU,
    nn.Softplus,
    nn.Identity,
]
SIDE = 8


class Block(nn.Module):
    """A convolution, perhaps a norm, an activation, perhaps a pooling."""

    def __init__(self, before: int, after: int, norm: str, activation: int, *, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, 3, padding=1, bias=norm != "batch")
        self.norm = {"batch": nn.BatchNorm2d, "group": lambda n: nn.GroupNorm(1, n), "none": lambda _: nn.Identity()}[
            norm
        ](after)
        self.act, self.pool = ACTIVATIONS[activation](), nn.MaxPool2d(2) if pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.act(self.norm(self.conv(x))))


class Residual(nn.Module):
    """Two convolutions beside what came in."""

    def __init__(self, width: int, norm: str, activation: int) -> None:
        super().__init__()
        self.first, self.second = Block(width, width, norm, activation), Block(width, width, norm, len(ACTIVATIONS) - 1)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.second(self.first(x)))


@st.composite
def networks(draw: Any) -> nn.Module:
    norm, activation = draw(st.sampled_from(["batch", "group", "none"])), draw(st.integers(0, len(ACTIVATIONS) - 1))
    layers: list[nn.Module] = []
    width, side = 3, SIDE
    for _ in range(draw(st.integers(1, 3))):
        pool, after = draw(st.booleans()), draw(st.integers(2, 5))
        layers.append(Block(width, after, norm, activation, pool=pool))
        width, side = after, side // (1 + pool)
        if draw(st.booleans()):
            layers.append(Residual(width, norm, activation))
    if draw(st.booleans()):
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    else:
        layers.append(nn.Flatten())
        width *= side * side
    if draw(st.booleans()):
        hidden = draw(st.integers(2, 6))
        layers += [nn.Linear(width, hidden), nn.ReLU()]
        width = hidden
    torch.manual_seed(draw(st.integers(0, 999)))
    network = nn.Sequential(*layers, nn.Linear(width, 4)).double()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value in (part.weight.data, part.bias.data, part.running_mean):
                value.uniform_(0.2, 1.0)
    return network.eval()


def site(network: nn.Module, name: str) -> nn.Module:
    """The module whose output are the units of a layer, on their way into what reads them."""
    parent = name.rpartition(".")[0]
    return network.get_submodule(parent) if parent else network[int(name) + 1]


@torch.no_grad()
def without(network: nn.Module, name: str, unit: int, images: Tensor) -> Tensor:
    """Logits where the unit says nothing."""

    def mute(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, unit] = 0
        return output

    handle = site(network, name).register_forward_hook(mute)
    try:
        return network(images)
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore:The units of")
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(network=networks(), mode=st.sampled_from(["prune", "reinit"]), data=st.data())
def test_a_reset_is_exact_in_random_networks(network: nn.Module, mode: Any, data: Any) -> None:
    images = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    try:
        layers = find_units(network, lambda: network(images))
    except ModelError:
        assert any(isinstance(part, (nn.GroupNorm, nn.Softplus)) for part in network.modules())
        return
    COUNTS["fuzz cases"] += 1
    layer = data.draw(st.sampled_from(layers))
    unit = data.draw(st.integers(0, layer.size - 1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    expected = without(network, layer.name, unit, images)
    names = {value.data_ptr(): name for name, value in network.state_dict().items()}
    allowed: dict[str, Tensor] = {}
    for piece in layer.slices:
        name = names[piece.tensor.data_ptr()]
        mask = piece.mask(torch.tensor([unit]))
        allowed[name] = allowed.get(name, torch.zeros_like(mask)) | mask
    reset_units(layer, torch.tensor([unit]), mode=mode)
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected, atol=1e-10, rtol=1e-9)
    for name, value in network.state_dict().items():
        changed = value != before[name]
        assert not bool((changed & ~allowed.get(name, torch.zeros_like(changed))).any()), name
