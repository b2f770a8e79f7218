from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from lightning_backdoor.errors import ModelError
from lightning_backdoor.surgery import UnitLayer, find_units, unit_layers
from tests.surgery.families import FAMILIES, K, built, places, units_of


@pytest.mark.parametrize("name", FAMILIES)
def test_which_layers_are_offered(name: str) -> None:
    family, (model, images) = FAMILIES[name], built(name)
    found = units_of(model, images)
    with torch.no_grad():
        candidates = unit_layers(model, lambda: model(images))
    assert [layer.name for layer in found] == [key for key in candidates if not re.search(family.refused, key)]
    assert [layer.name for layer in found if layer.branch] == [
        layer.name for layer in found if re.search(family.branch, layer.name)
    ]
    for layer in found:
        assert layer.layer is candidates[layer.name]
        assert layer.size == len(layer.layer.weight)
        assert layer.trainable
        assert places(family, layer.name)


class Bytes(nn.Module):
    """Takes 8-bit images and scales them itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images.float() / 255)


def test_units_of_a_model_that_takes_bytes() -> None:
    model, images = Bytes().eval(), torch.randint(0, 255, (4, 3, 8, 8), dtype=torch.uint8)
    assert [(found.name, found.size) for found in find_units(model, lambda: model(images))] == [("body.0", 6)]


class Net(nn.Module):
    """Whatever ``body`` does with the hidden layers, and a head."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], width: int = 6, **layers: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        for key, layer in layers.items():
            self.add_module(key, layer)
        self.fc = nn.Linear(width, K)
        self.body = body
        self.constant = torch.ones(6, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(self, self.conv(images)))


CONSTANT = torch.ones(6, 1, 1)
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def names(net: nn.Module, **options: Any) -> list[str]:
    return [layer.name for layer in units_of(net.eval(), IMAGES, **options)]


def one(net: nn.Module, name: str, **options: Any) -> UnitLayer:
    return next(layer for layer in units_of(net.eval(), IMAGES, **options) if layer.name == name)


def columns(layer: UnitLayer) -> list[tuple[nn.Module, list[int]]]:
    owners = [(p.module, p.owner) for p in layer.slices if p.role == "column"]
    return [
        (part, (owner[:1] if bool((owner == owner[0]).all()) else owner).flatten().tolist()) for part, owner in owners
    ]


def test_flattened_maps_take_contiguous_columns() -> None:
    net = Net(lambda net, x: nn.functional.max_pool2d(x.relu(), 4).flatten(1), width=24)
    assert columns(one(net, "conv")) == [(net.fc, [unit for unit in range(6) for _ in range(4)])]


def test_channels_that_move_are_followed() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        one, two = x.relu().chunk(2, dim=1)
        shuffled = torch.stack([one, two], dim=2).flatten(1, 2)  # 0 3 1 4 2 5
        return torch.cat([torch.zeros_like(one), shuffled.flip(1)], dim=1).permute(0, 2, 3, 1).mean((1, 2))

    net = Net(body, width=9)
    assert columns(one(net, "conv")) == [(net.fc, [-1, -1, -1, 5, 2, 4, 1, 3, 0])]


def test_columns_of_a_grouped_convolution() -> None:
    net = Net(lambda net, x: net.grouped(x.relu()).mean((2, 3)), width=4, grouped=nn.Conv2d(6, 4, 1, groups=2))
    assert columns(one(net, "conv")) == [(net.grouped, [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5])]


def test_depthwise_filters_belong_to_the_unit() -> None:
    net = Net(lambda net, x: net.dw(x.relu()).mean((2, 3)), width=12, dw=nn.Conv2d(6, 12, 3, groups=6))
    layer = one(net, "conv")
    owner = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert names(net) == ["conv"]
    assert [(p.attribute, p.owner.tolist()) for p in layer.slices if p.module is net.dw] == [
        ("weight", owner),
        ("bias", owner),
    ]
    assert columns(layer) == [(net.fc, owner)]


@pytest.mark.parametrize(
    ("body", "layers", "expected"),
    [
        (lambda net, x: x.relu().mean((2, 3)), {}, ["conv"]),
        (lambda net, x: x.sigmoid().mean((2, 3)), {}, ["conv"]),
        (lambda net, x: (x * x.sigmoid() + 1).mean((2, 3)), {}, ["conv"]),
        (lambda net, x: net.norm(x).relu().mean((2, 3)), {"norm": nn.GroupNorm(6, 6)}, ["conv"]),
        (lambda net, x: net.norm(x).relu().mean((2, 3)), {"norm": nn.InstanceNorm2d(6, affine=True)}, ["conv"]),
        (lambda net, x: net.norm(x).mean((2, 3)), {"norm": nn.GroupNorm(2, 6)}, []),
        (lambda net, x: net.norm(x.mean((2, 3))), {"norm": nn.LayerNorm(6)}, []),
        (lambda net, x: x.softmax(1).mean((2, 3)), {}, []),
        (lambda net, x: (x / x.norm(dim=1, keepdim=True)).mean((2, 3)), {}, []),
        (lambda net, x: x.mean(1).flatten(1)[:, :6], {}, []),
        (lambda net, x: x.relu().flatten(1) @ torch.ones(384, 6), {}, []),
        (lambda net, x: net.two(net.two(x).relu()).mean((2, 3)), {"two": nn.Conv2d(6, 6, 1)}, []),
        (lambda net, x: (x + net.two(x.relu())).mean((2, 3)), {"two": nn.Conv2d(6, 6, 1)}, ["conv", "two"]),
        (lambda net, x: (x + net.two(x).sigmoid()).mean((2, 3)), {"two": nn.Conv2d(6, 6, 1)}, ["conv"]),
        (lambda net, x: (x * net.two(x).sigmoid()).mean((2, 3)), {"two": nn.Conv2d(6, 6, 1)}, ["conv"]),
        (lambda net, x: (x * net.two(x).relu()).mean((2, 3)), {"two": nn.Conv2d(6, 6, 1)}, ["conv", "two"]),
        (lambda net, x: _changed_behind(x).mean((2, 3)), {}, []),
        (lambda net, x: (x + net.two(_unwatched(x))).mean((2, 3)), {"two": nn.Conv2d(6, 6, 1)}, ["two"]),
        (lambda net, x: (x.relu() * CONSTANT).mean((2, 3)), {}, []),
        (lambda net, x: (x.relu() * net.constant).mean((2, 3)), {}, ["conv"]),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The units of")
def test_what_can_be_cut(body: Any, layers: dict[str, nn.Module], expected: list[str]) -> None:
    net = Net(body, **layers)
    if expected:
        assert names(net) == expected
    else:
        with pytest.raises(
            ModelError, match=r"No unit of Net can be reset \(.*'conv'.*Use a defence that works on samples"
        ):
            names(net)


ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanh, nn.Tanhshrink, nn.Hardtanh, nn.Hardswish,
    nn.Hardsigmoid, nn.Sigmoid, nn.LogSigmoid,
)  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_units_pass_every_activation(activation: type[nn.Module]) -> None:
    net = Net(lambda net, x: net.act(net.norm(x)).mean((2, 3)), norm=nn.BatchNorm2d(6), act=activation())
    assert names(net) == ["conv"]


def _unwatched(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return x.sigmoid()


def _changed_behind(x: Tensor) -> Tensor:
    x[:, :3].add_(1)
    return x


def test_a_frozen_norm_is_a_norm() -> None:
    frozen = torchvision.ops.FrozenBatchNorm2d(6)
    net = Net(lambda net, x: (x + net.norm(net.two(x)).relu()).mean((2, 3)), two=nn.Conv2d(6, 6, 1), norm=frozen)
    layer = one(net, "two")
    assert [(p.role, p.attribute) for p in layer.slices if p.module is frozen] == [
        ("mean", "running_mean"), ("variance", "running_var"), ("scale", "weight"), ("shift", "bias"),
    ]  # fmt: skip
    assert layer.trainable
    assert [p.module for p in layer.switches] == [net.two, net.two], "a frozen norm cannot learn to let it through"


@pytest.mark.parametrize("norm", [nn.SyncBatchNorm, nn.BatchNorm2d])
def test_norms_by_their_statistics(norm: Any) -> None:
    net = Net(lambda net, x: net.norm(x).relu().mean((2, 3)), norm=norm(6))
    assert [p.role for p in one(net, "conv").slices] == [
        "weight", "bias", "mean", "variance", "scale", "shift", "column",
    ]  # fmt: skip


def residual(net: Any, x: Tensor) -> Tensor:
    x = x.relu()
    x = (x + net.norm(net.one(x))).relu()
    return (x + net.two(x)).mean((2, 3))


def make_residual() -> Net:
    return Net(residual, one=nn.Conv2d(6, 6, 1), norm=nn.BatchNorm2d(6), two=nn.Conv2d(6, 6, 1))


def test_residual_modes() -> None:
    net, aligned = make_residual(), list(range(6))
    assert [columns(layer) for layer in units_of(net.eval(), IMAGES)] == [[(net.one, aligned)], [], []]
    reference = units_of(net, IMAGES, residual_mode="reference")
    assert [columns(layer) for layer in reference] == [
        [(net.one, aligned), (net.two, aligned)],
        [(net.two, aligned)],
        [(net.fc, aligned)],
    ]
    for layer in units_of(net, IMAGES, residual_mode="full_group"):
        assert columns(layer) == [(net.one, aligned), (net.two, aligned), (net.fc, aligned)]
        assert {p.module for p in layer.slices} == {net.conv, net.one, net.norm, net.two, net.fc}
        assert not layer.branch


def test_full_group_needs_sums_of_units_channel_by_channel() -> None:
    net = Net(
        lambda net, x: net.two(x + net.one(x).flip(1)).mean((2, 3)), one=nn.Conv2d(6, 6, 1), two=nn.Conv2d(6, 6, 1)
    )
    assert names(net) == ["conv", "one", "two"]
    assert names(net, residual_mode="full_group") == ["two"]


def test_tied_and_computed_weights_are_left_alone_and_told() -> None:
    net = make_residual()
    net.two.weight = net.one.weight
    with pytest.raises(ModelError, match="shared"):
        names(net)
    net = make_residual()
    nn.utils.parametrizations.weight_norm(net.one)
    with pytest.warns(UserWarning, match=r"\['one'\] are left alone: their weights are computed"):
        assert names(net) == ["two"]


def test_frozen_layers_are_reported() -> None:
    net = make_residual()
    net.conv.requires_grad_(False)
    net.two.requires_grad_(False)
    assert [(layer.name, layer.trainable) for layer in units_of(net.eval(), IMAGES)] == [
        ("conv", False), ("one", True), ("two", False),
    ]  # fmt: skip


def test_quantised_and_sharded_weights_are_an_error() -> None:
    net = make_residual()
    net.two.weight = nn.Parameter(torch.zeros(6, 6, 1, 1, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"quantised weights, but 'two' is a Conv2d.*floating point"):
        units_of(net, IMAGES)
    net = make_residual()
    net.one.weight.ds_id = 0  # as DeepSpeed marks what it took away
    with pytest.raises(ModelError, match=r"sharded weights, but 'one'.*strategy=\"ddp\""):
        units_of(net, IMAGES)


def test_nothing_is_left_behind() -> None:
    net = make_residual().eval()
    before = [value.clone() for value in net.state_dict().values()]
    units_of(net, IMAGES)
    with pytest.raises(RuntimeError):
        units_of(net, IMAGES[:, :1])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))


def test_a_compiled_model() -> None:
    net = make_residual().eval()
    compiled = torch.compile(net, backend="eager")
    with torch.no_grad():
        compiled(IMAGES)
    assert [layer.name for layer in units_of(compiled, IMAGES)] == ["_orig_mod.conv", "_orig_mod.one", "_orig_mod.two"]
