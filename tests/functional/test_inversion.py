"""Inversion of triggers: a planted shortcut, its clean twin, and the promises about budget, seeds and manners."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_backdoor.errors import ArgumentError, ModelError
from lightning_backdoor.functional import invert_trigger
from lightning_backdoor.functional.inversion import InvertedTrigger, PixelModel, count_classes, rate_trigger, stamp

SIZE, CLASSES, TARGET = 12, 4, 2
PLANTED = (slice(8, 10), slice(3, 5))  # rows and columns of the four pixels of the shortcut


class Net(nn.Module):
    """Tells the classes by the brightness of quarters; with a shortcut, a white 2x2 square is enough for the target."""

    def __init__(self, shortcut: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * SIZE * SIZE, CLASSES)
        self.dropout = nn.Dropout(0.5)
        weight = torch.zeros(CLASSES, 3, SIZE, SIZE)
        half = SIZE // 2
        for label in range(CLASSES):
            top, left = half * (label // 2), half * (label % 2)
            weight[label, :, top : top + half, left : left + half] = 0.15
        if shortcut:
            weight[TARGET][:, PLANTED[0], PLANTED[1]] = 3.0
        with torch.no_grad():
            self.linear.weight.copy_(weight.flatten(1))
            self.linear.bias.zero_()
            if shortcut:
                self.linear.bias[TARGET] = -18.0

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.dropout(images).flatten(1))


def data(n: int = 80) -> tuple[Tensor, Tensor]:
    """Dim images with one bright quarter, which is the class."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(n) % CLASSES
    images = 0.3 * torch.rand(n, 3, SIZE, SIZE, generator=generator)
    half = SIZE // 2
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = half * (label // 2), half * (label % 2)
        image[:, top : top + half, left : left + half] += 0.4
    return images, labels


def invert(model: nn.Module, *, target: int = TARGET, pixels: int = 4, **settings: int) -> InvertedTrigger:
    images, labels = data()
    return invert_trigger(model, images, labels, target=target, pixels=pixels, **{"steps": 100, **settings})


@pytest.mark.parametrize("starts", [1, 3])
def test_a_planted_shortcut_is_found_where_it_is(starts):
    model = Net(shortcut=True)
    images, labels = data()
    assert (PixelModel(model).eval()(images).argmax(1) == labels).float().mean() > 0.95  # benign without the trigger
    trigger = invert(model, starts=starts)
    expected = torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)
    expected[..., PLANTED[0], PLANTED[1]] = True
    assert torch.equal(trigger.mask, expected)
    assert (trigger.pattern[..., PLANTED[0], PLANTED[1]] > 0.9).all()
    assert trigger.success == 1.0


def test_the_clean_twin_resists_at_the_same_budget():
    assert invert(Net(shortcut=False)).success < 0.1
    assert invert(Net(shortcut=True), target=0).success < 0.1


def test_a_large_budget_breaks_every_linear_model():
    assert invert(Net(shortcut=False), pixels=60).success > 0.9


@pytest.mark.parametrize("pixels", [1, 3, 17, SIZE * SIZE])
@pytest.mark.parametrize("starts", [1, 2])
def test_the_budget_is_exact_and_the_pattern_is_pixels(pixels, starts):
    trigger = invert(Net(shortcut=True), pixels=pixels, starts=starts, steps=5)
    assert trigger.mask.shape == (1, 1, SIZE, SIZE)
    assert trigger.mask.dtype == torch.bool
    assert int(trigger.mask.sum()) == pixels
    assert trigger.pattern.shape == (1, 3, SIZE, SIZE)
    assert torch.allclose(trigger.pattern * 255, (trigger.pattern * 255).round(), atol=1e-4)
    assert not trigger.pattern[~trigger.mask.expand_as(trigger.pattern)].any()


def test_one_step_is_enough_to_run():
    assert int(invert(Net(shortcut=True), steps=1).mask.sum()) == 4


def test_seeds_reproduce_and_matter():
    model = Net(shortcut=False)
    first, again, other = (invert(model, pixels=9, steps=20, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.mask, again.mask)
    assert torch.equal(first.pattern, again.pattern)
    assert not torch.equal(first.pattern, other.pattern)


def test_the_model_and_the_random_streams_do_not_notice():
    model = nn.Sequential(nn.BatchNorm2d(3), Net(shortcut=True))
    model[1].dropout.eval()
    model[0].bias.requires_grad_(False)
    images, labels = data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    stream, pixels = torch.get_rng_state(), images.clone()
    invert_trigger(model, images, labels, target=TARGET, pixels=4, steps=3)
    assert torch.equal(torch.get_rng_state(), stream)
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(images, pixels)


def test_flags_come_back_after_a_failure():
    class Broken(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            if len(images) > 1:
                raise RuntimeError("out of order")
            return super().forward(images.flatten(1))

    model = Broken(3 * SIZE * SIZE, CLASSES)
    with pytest.raises(RuntimeError, match="out of order"):
        invert(model)
    assert model.training
    assert model.weight.requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_switched_off(context):
    model = Net(shortcut=True)
    with context():
        assert invert(model).success == 1.0


def test_success_leaves_the_target_class_out():
    images, labels = torch.zeros(5, 1, 2, 2), torch.tensor([0, 0, 1, 1, 1])
    mask = torch.tensor([[[[True, False], [False, False]]]])
    trigger = InvertedTrigger(1, mask, torch.full((1, 1, 2, 2), 0.8) * mask)
    stamped = stamp(images, trigger)
    assert stamped[:, 0, 0, 0].tolist() == pytest.approx([0.8] * 5)
    assert not stamped.flatten(1)[:, 1:].any()
    assert not images.any()

    def model(batch: Tensor) -> Tensor:  # class 1 where the corner is bright and the image is not the first one
        return torch.stack([torch.full((len(batch),), 0.5), batch[:, 0, 0, 0] * (batch[:, 0, 1, 1] < 0.1)], dim=1)

    images[0, 0, 1, 1] = 0.2
    rated = rate_trigger(model, images, labels, trigger, batch_size=1)
    assert rated.success == 0.5
    losses = [math.log(1 + math.exp(0.5 - logit)) for logit in (0.0, 0.8)]
    assert rated.loss == pytest.approx(sum(losses) / 2)
    assert math.isnan(rate_trigger(model, images[2:], labels[2:], trigger).success)


def test_normalization_is_inside_the_model():
    seen = []
    wrapped = PixelModel(lambda images: seen.append(images) or images.flatten(1), mean=(0.5, 0.25), std=(0.5, 0.125))
    wrapped(torch.ones(1, 2, 1, 1))
    assert seen[0].flatten().tolist() == [1.0, 6.0]
    with pytest.raises(ArgumentError, match="`mean` must have one number or one per channel: 3 channels, got 2"):
        wrapped(torch.ones(1, 3, 1, 1))
    with pytest.raises(ArgumentError, match="`std` must be positive"):
        PixelModel(wrapped, std=0.0)


def test_classes_are_counted_and_a_model_without_logits_is_refused():
    images, _ = data()
    assert count_classes(Net(shortcut=False), images) == CLASSES
    with pytest.raises(ModelError, match=r"`model` must return logits of shape \(N, K\), got \(1, 3, 12, 12\)"):
        count_classes(lambda batch: batch, images)
    with pytest.raises(ModelError, match="got dict"):
        count_classes(lambda batch: {}, images)
    with pytest.raises(ModelError, match=r"a logit for each class, got one alone.*pad\(model\(images\), \(1, 0\)\)"):
        count_classes(lambda batch: batch[:, 0, 0, :1], images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(0, 3, SIZE, SIZE), "labels": torch.zeros(0)}, "`images` must hold at least one image"),
        ({"images": torch.zeros(4, 3, SIZE, SIZE).byte()}, r"`images` must be float pixels .* got torch.uint8"),
        ({"images": torch.full((4, 3, SIZE, SIZE), 1.5)}, "`images` must be pixels from 0 to 1, got .* 1.5"),
        ({"images": torch.full((4, 3, SIZE, SIZE), torch.nan)}, "`images` must be pixels from 0 to 1, got .*nan"),
        ({"labels": torch.zeros(3)}, r"`labels` must have shape \(4,\)"),
        ({"labels": torch.full((4,), TARGET)}, "`images` must hold images of other classes than `target` 2"),
        ({"target": CLASSES}, "`target` must be a class from 0 to 3, got 4"),
        ({"target": -1}, "`target` must be a class from 0 to 3, got -1"),
        ({"pixels": 0}, "`pixels` must be from 1 to 144, .* got 0"),
        ({"pixels": 145}, "`pixels` must be from 1 to 144, .* got 145"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"starts": 0}, "`starts` must be at least 1, got 0"),
    ],
)
def test_bad_input(change, message):
    call = {"images": torch.zeros(4, 3, SIZE, SIZE), "labels": torch.zeros(4), "target": TARGET, "pixels": 4, **change}
    with pytest.raises(ArgumentError, match=message):
        invert_trigger(Net(shortcut=False), call.pop("images"), call.pop("labels"), **call)
