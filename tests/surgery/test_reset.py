from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_backdoor.errors import ArgumentError, ModelError
from lightning_backdoor.surgery import UnitLayer, reset_units
from lightning_backdoor.surgery.unit_trace import Slice
from tests.surgery.families import FAMILIES, built, masked, places, units_of


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def entries(model: nn.Module, layer: UnitLayer, units: Tensor) -> dict[str, Tensor]:
    """What the layer says belongs to these units, by the tensors' names."""
    names = {value.data_ptr(): key for key, value in model.state_dict().items()}
    found: dict[str, Tensor] = {}
    for piece in layer.slices:
        key = names[piece.tensor.data_ptr()]
        found[key] = found.get(key, torch.zeros(())).bool() | piece.mask(units)
    return found


def assert_only_changed(before: dict[str, Tensor], model: nn.Module, allowed: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        changed = value != before[key]
        assert not bool((changed & ~allowed.get(key, torch.zeros((), dtype=torch.bool))).any()), key


def some_units(layer: UnitLayer) -> Tensor:
    return torch.arange(layer.size - 1, -1, -(layer.size // 6 + 1))


@pytest.mark.parametrize("name", FAMILIES)
def test_units_are_cut_exactly_and_can_learn_again(name: str) -> None:
    family, (model, images) = FAMILIES[name], built(name)
    whole, before = logits_of(model, images), state_of(model)
    moved = 0
    for layer in units_of(model, images)[:: family.every]:
        units = some_units(layer)
        with masked(model, places(family, layer.name), units, family.axis):
            without = logits_of(model, images)
        moved += int((without - whole).abs().max() > 1e-9)
        for check in (check_prune, check_reinit):
            check(model, images, layer, units, without)
            model.load_state_dict(before)
            model.eval()
    assert moved > len(units_of(model, images)[:: family.every]) / 2, "the units matter"


def check_prune(model: nn.Module, images: Tensor, layer: UnitLayer, units: Tensor, without: Tensor) -> None:
    before = state_of(model)
    tensors = {key: (id(value), value.stride()) for key, value in model.named_parameters()}
    reset_units(layer, units, mode="prune")
    torch.testing.assert_close(logits_of(model, images), without, atol=1e-10, rtol=1e-9)
    allowed = entries(model, layer, units)
    assert_only_changed(before, model, allowed)
    for key, parameter in model.named_parameters():
        assert tensors[key] == (id(parameter), parameter.stride())
        assert not bool(parameter[allowed[key]].any() if key in allowed else False), key
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, before[key]), key


def check_reinit(model: nn.Module, images: Tensor, layer: UnitLayer, units: Tensor, without: Tensor) -> None:
    before = state_of(model)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    reset_units(layer, units, mode="reinit")
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(logits_of(model, images), without, atol=1e-10, rtol=1e-9)
    assert_only_changed(before, model, entries(model, layer, units))
    row = layer.layer.weight
    fresh = row.detach()[units].clone()
    if not any(piece.tensor is row for piece in layer.switches):
        assert bool((fresh != before[f"{layer.name}.weight"][units]).all())
    model.train()  # batch statistics keep a unit from being dead, which a fresh one may be on a few pixels
    for parameter in model.parameters():
        parameter.grad = None
    loss(model, images).backward()
    outgoing = [piece for piece in layer.slices if piece.role == "column"] + list(layer.switches)
    assert any(bool(piece.tensor.grad[piece.mask(units)].any()) for piece in outgoing)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.grad, alpha=-0.1)
            parameter.grad = None
    loss(model, images).backward()
    assert bool(row.grad[units].any()), layer.name


def loss(model: nn.Module, images: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), torch.arange(len(images)))


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 5)
    )


SMALL = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_which_entries_change_by_hand() -> None:
    model = small().eval()
    model[1].weight.data.fill_(3)
    model[1].bias.data.fill_(2)
    model[1].running_mean.fill_(7)
    before = state_of(model)
    reset_units(units_of(model, SMALL)[0], torch.tensor([2]), mode="reinit", seed=3)
    after = model.state_dict()
    changed = {key: (after[key] != before[key]).nonzero().tolist() for key in before}
    assert changed.pop("0.weight") == [[2, i, j, k] for i in range(3) for j in range(3) for k in range(3)]
    assert changed.pop("4.weight") == [[row, column] for row in range(6) for column in (8, 9, 10, 11)]
    assert {key: where for key, where in changed.items() if where} == {
        "0.bias": [[2]], "1.weight": [[2]], "1.bias": [[2]], "1.running_mean": [[2]],
    }  # fmt: skip
    assert [after[key][2].item() for key in ("1.weight", "1.bias", "1.running_mean", "1.running_var")] == [1, 0, 0, 1]
    assert not after["4.weight"][:, 8:12].any()


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), torch.optim.AdamW])
@pytest.mark.parametrize("mode", ["prune", "reinit"])
def test_optimizer_state_of_exactly_these_entries_is_cleared(make: Any, mode: Any) -> None:
    model = small()
    optimizer = make(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    layer, units = units_of(model.eval(), SMALL)[0], torch.tensor([0, 3])
    touched = entries(model, layer, units)
    reset_units(layer, units, mode=mode, optimizers=[optimizer])
    for key, parameter in model.named_parameters():
        where = touched.get(key, torch.zeros_like(parameter, dtype=torch.bool))
        state = optimizer.state[parameter]
        for buffer in (v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape):
            assert torch.equal(buffer == 0, where), key
        assert "step" not in state or state["step"] == 1


def test_the_draw_is_the_layers_own_and_follows_the_seed() -> None:
    drawn = []
    for seed in (1, 1, 2):
        model = small().eval()
        torch.rand(seed)
        reset_units(units_of(model, SMALL)[0], torch.arange(4), seed=seed)
        drawn.append(model[0].weight.detach())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    torch.manual_seed(2)
    assert torch.equal(drawn[2], nn.Conv2d(3, 4, 3).weight)


def test_a_layer_that_cannot_draw_itself_gets_its_own_deviation() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 3, 3, 3) * 0.02)

        def forward(self, images: Tensor) -> Tensor:
            return nn.functional.conv2d(images, self.weight)

    plain = Plain()
    layer = UnitLayer("plain", plain, 64, (Slice(plain, "weight", torch.arange(64), "weight"),))
    before = plain.weight.detach().clone()
    reset_units(layer, torch.arange(64), seed=0)
    assert plain.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert bool((plain.weight != before).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_and_memory_format_stay(dtype: torch.dtype) -> None:
    model = small().eval()
    layer = units_of(model, SMALL)[0]
    model.to(dtype, memory_format=torch.channels_last)
    strides = [p.stride() for p in model.parameters()]
    reset_units(layer, torch.tensor([1]))
    assert [p.stride() for p in model.parameters()] == strides
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("residual_mode", ["reference", "full_group"])
def test_modes_cut_what_they_say(residual_mode: Any) -> None:
    """What reads the sum first, or all that reads the stage's sums, no longer sees the channel."""
    model, images = built("basic resnet")
    layers = {layer.name: layer for layer in units_of(model, images, residual_mode=residual_mode)}
    units, before = torch.tensor([1, 6]), state_of(model)
    readers = ["layer2.1.conv1", "layer3.0.conv1", "layer3.0.downsample.0"]
    readers = readers[:1] if residual_mode == "reference" else readers
    off = [("layer2.0.bn2", 0)] if residual_mode == "reference" else []
    handles = [
        model.get_submodule(reader).register_forward_pre_hook(lambda _, x: (x[0].index_fill(1, units, 0.0),))
        for reader in readers
    ]
    with masked(model, off, units, 1):
        without = logits_of(model, images)
    for handle in handles:
        handle.remove()
    for mode in ("prune", "reinit"):
        reset_units(layers["layer2.0.conv2"], units, mode=mode)
        torch.testing.assert_close(logits_of(model, images), without, atol=1e-10, rtol=1e-9)
        model.load_state_dict(before)


def test_no_units_change_nothing() -> None:
    model = small().eval()
    before = state_of(model)
    reset_units(units_of(model, SMALL)[0], torch.tensor([], dtype=torch.int64))
    assert_only_changed(before, model, {})


def test_errors() -> None:
    model = small().eval()
    layer = units_of(model, SMALL)[0]
    for units in (torch.tensor([4]), torch.tensor([-1]), torch.tensor([True, False]), torch.tensor([[0]])):
        with pytest.raises(ArgumentError, match=r"`units` must be .* in \[0, 4\), the units of '0', got .*nonzero"):
            reset_units(layer, units)
    with pytest.raises(ArgumentError, match=r'`mode` must be "reinit" or "prune", got \'drop\''):
        reset_units(layer, torch.tensor([0]), mode="drop")  # type: ignore[arg-type]
    model[0].requires_grad_(False)
    layer = units_of(model, SMALL)[0]
    with pytest.raises(ModelError, match=r"'0' cannot learn again.*`trainable`.*prune"):
        reset_units(layer, torch.tensor([0]))
    reset_units(layer, torch.tensor([0]), mode="prune")
