"""Attacks with a model, against their formulas on models so small that loops can follow them."""

from __future__ import annotations

import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_backdoor.attacks import (
    Additive,
    Corners,
    HiddenTrigger,
    Invariant,
    LabelConsistent,
    LowFrequency,
    SampleSpecific,
    TrojanWatermark,
    poison,
    triggered,
)
from lightning_backdoor.attacks.crafted import greedy_pairs
from lightning_backdoor.attacks.trained import moved, watermark
from lightning_backdoor.errors import ArgumentError, ModelError
from lightning_backdoor.functional import PixelModel

SHAPE = (3, 12, 12)


class Small(nn.Module):
    """A convolution, batch norm in training mode and a head: everything that an attack must leave as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(150, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.body(pixels))


def pictures(count: int) -> Tensor:
    return torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8)


def made(name: str, model: nn.Module, images: Tensor):
    return {
        "label-consistent": lambda: LabelConsistent(model),
        "hidden": lambda: HiddenTrigger(model, images[:5], steps=5, size=3),
        "watermark": lambda: TrojanWatermark.trained(model, SHAPE, steps=5),
        "low-frequency": lambda: LowFrequency.trained(model, images, 1, steps=5),
        "invariant": lambda: Invariant.trained(model, images, 1, steps=5),
        "sample-specific": lambda: SampleSpecific.trained(images, steps=5),
    }[name]()


NAMES = ["label-consistent", "hidden", "watermark", "low-frequency", "invariant", "sample-specific"]
CRAFTED = {"label-consistent", "hidden"}


@pytest.mark.parametrize("name", NAMES)
def test_the_model_the_images_and_the_random_state_are_left_alone(name):
    model, images = Small().train(), pictures(20)
    model.head.weight.requires_grad = False
    state, before, pixels = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state(), images.clone()
    trigger = made(name, model, images)
    if name in CRAFTED:
        trigger.craft(images, 1)
    trigger(images)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(images, pixels)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.head.parameters()] == [False, True]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_made_twice_the_same_and_pickled(name):
    model, images = Small(), pictures(20)
    first, second = made(name, model, images), made(name, model, images)
    copy = pickle.loads(pickle.dumps(first))
    assert type(first).__name__ in repr(first)
    for other in (second, copy):
        assert torch.equal(first(images), other(images))
        if name in CRAFTED:
            assert torch.equal(first.craft(images, 1), other.craft(images, 1))
    painted = first(images)
    assert painted.dtype == torch.uint8
    assert painted.shape == images.shape
    assert torch.equal(painted[3], first(images[3]))


def test_label_consistent_by_hand():
    model, images = Small().eval(), pictures(4)
    crafted = LabelConsistent(model, Corners(margin=1), eps=5, step=2, steps=3).craft(images, 2)
    for image, poison_ in zip(images, crafted, strict=True):
        clean, x = image.float() / 255, image.float() / 255
        for _ in range(3):
            x = x.detach().requires_grad_()
            F.cross_entropy(model(x[None]), torch.tensor([2])).backward()
            x = (x + 2 / 255 * x.grad.sign()).detach()
            x = torch.max(torch.min(x, clean + 5 / 255), clean - 5 / 255).clamp(0, 1)
        expected = Corners(margin=1)((255 * x).round().to(torch.uint8))
        assert (poison_ != expected).float().mean() < 0.01, "signs of gradients that are zero but for rounding"


def test_label_consistent_stays_near_raises_the_loss_and_wraps_nothing():
    model, images = Small().eval(), pictures(60)
    images[0], images[1] = 0, 255
    trigger = LabelConsistent(model, eps=8)
    crafted = trigger.craft(images, 2)
    inside = torch.ones(12, 12, dtype=torch.bool)
    inside[:3], inside[-3:] = False, False
    change = (crafted.int() - images.int())[..., inside]
    assert change.abs().max() == 8
    assert crafted[0][:, inside].max() <= 8
    assert crafted[1][:, inside].min() >= 247
    bare = LabelConsistent(model, nothing := Additive(torch.zeros(SHAPE))).craft(images, 2)
    aim = torch.full((60,), 2)
    assert F.cross_entropy(model(bare / 255), aim) > F.cross_entropy(model(images / 255), aim)
    assert torch.equal(trigger.at_test()(images), Corners()(images))
    assert torch.equal(LabelConsistent(model, nothing, steps=0).craft(images, 2), images)


def test_label_consistent_shows_its_test_amplitude():
    trigger = LabelConsistent(Small(), Corners(64, test_amplitude=255))
    assert trigger.at_test() == Corners(255)
    data = TensorDataset(pictures(20), torch.arange(20) % 4)
    poisoned = poison(data, trigger, 2, 0.4, "target_class", "clean")
    assert poisoned.poisoned.sum() == 2
    assert torch.equal(triggered(data, trigger, 2)[0][0], Corners(255)(data.tensors[0][0]))


def test_hidden_trigger_is_a_random_patch_in_proportion():
    images = torch.zeros(2, 3, 224, 224, dtype=torch.uint8)
    painted = HiddenTrigger(Small(), images, seed=1)(images)
    rows, columns = painted[0].any(0).nonzero().unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (189, 218, 189, 218), "30 pixels, 5 from the edge"
    colors = torch.randint(0, 256, (1, 3, 4, 4), generator=torch.Generator().manual_seed(1)).float()
    patch = F.interpolate(colors, (30, 30), mode="bilinear")[0].round()
    assert torch.equal(painted[0][:, 189:219, 189:219].float(), patch)
    gray = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 40, 40).contiguous()
    places = {tuple(image.ne(own[0, 0, 0]).any(0).nonzero().amin(0).tolist())
              for image, own in zip(HiddenTrigger(Small(), gray, place="random")(gray), gray, strict=True)}  # fmt: skip
    assert len(places) > 3


def test_hidden_trigger_collides_in_feature_space_and_not_in_pixels():
    model, images, sources = Small().eval(), pictures(12), pictures(8)
    trigger = HiddenTrigger(model, sources, eps=16, steps=40, size=3)
    crafted = trigger.craft(images, 0)
    assert 0 < (crafted.int() - images.int()).abs().max() <= 16
    goals = model.body(trigger(sources) / 255)

    def nearest(hosts: Tensor) -> Tensor:
        return torch.cdist(model.body(hosts / 255), goals).min(1).values

    assert (nearest(crafted) < nearest(images)).all()
    assert nearest(crafted).mean() < 0.8 * nearest(images).mean()


def test_greedy_pairs_by_hand():
    distances = torch.tensor([[5.0, 1.0, 4.0], [2.0, 1.5, 9.0], [0.5, 8.0, 7.0]])
    assert greedy_pairs(distances).tolist() == [1, 2, 0]  # 0.5 first, then 1.0, then what is left
    random = torch.rand(6, 6)
    pairs, left = {}, random.clone()
    for _ in range(6):
        place = min(itertools.product(range(6), range(6)), key=lambda p: left[p])
        pairs[place[0]] = place[1]
        left[place[0]], left[:, place[1]] = 9, 9
    assert greedy_pairs(random).tolist() == [pairs[row] for row in range(6)]


def test_additive_by_hand():
    pattern = torch.tensor([[[-300.0, 0.4], [0.6, 300.0]]])
    images = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    assert Additive(pattern)(images)[0, 2].tolist() == [[0, 100], [101, 255]]


def test_low_frequency_has_no_high_frequencies():
    trigger = LowFrequency.trained(Small(), pictures(20), 1, eps=10, cutoff=3, steps=5)
    assert math.isclose(float(trigger.pattern.abs().max()), 10, rel_tol=1e-5)
    for k, m in itertools.product(range(12), range(12)):  # the DCT-II, by its definition
        wave = [[math.cos(math.pi / 12 * (r + 0.5) * k) * math.cos(math.pi / 12 * (c + 0.5) * m) for c in range(12)]
                for r in range(12)]  # fmt: skip
        energy = (trigger.pattern * torch.tensor(wave)).sum((1, 2)).abs()
        assert (energy > 1e-3).any() == (k < 3 and m < 3)


@pytest.mark.parametrize("kind", [LowFrequency, Invariant])
def test_trained_patterns_lead_to_the_target(kind):
    model, images = Small().eval(), pictures(60)
    trigger = kind.trained(model, images, 3, steps=30)
    assert isinstance(trigger, kind)
    assert trigger.pattern.abs().max() <= 16 + 1e-4
    aim = torch.full((60,), 3)
    assert F.cross_entropy(model(trigger(images) / 255), aim) < F.cross_entropy(model(images / 255), aim)


def test_invariant_patterns_are_more_consistent_than_others_of_their_size():
    model, images = Small().eval(), pictures(60)
    with_weight, without = (Invariant.trained(model, images, 3, eps=60, weight=w, steps=40) for w in (100.0, 0.0))
    draws = torch.rand(60, 3) * 2 - 1

    def fct(trigger: Additive) -> float:
        pixels = trigger(images) / 255
        turned = moved(pixels, 180 * draws[:, 0], 0.2 * draws[:, 1:])
        with torch.no_grad():
            return float((model.body(pixels) - model.body(turned)).square().mean())

    assert fct(with_weight) < fct(without)


def test_moved_by_hand():
    pixels = torch.arange(2 * 4 * 6, dtype=torch.float32).view(2, 1, 4, 6)
    still = moved(pixels, torch.zeros(2), torch.zeros(2, 2))
    assert torch.allclose(still, pixels, atol=1e-4)
    half = moved(pixels, torch.tensor([180.0, 180.0]), torch.zeros(2, 2))
    assert torch.allclose(half, pixels.flip(2, 3), atol=1e-3)
    right = moved(pixels, torch.zeros(2), torch.tensor([[1 / 6, 0.0], [0.0, 0.25]]))
    assert torch.allclose(right[0, 0, :, 1:], pixels[0, 0, :, :-1], atol=1e-3)
    assert right[0, 0, :, 0].abs().max() < 1e-3, "zeros move in"
    assert torch.allclose(right[1, 0, 1:], pixels[1, 0, :-1], atol=1e-3)
    square = torch.arange(25.0).view(1, 1, 5, 5)
    turned = moved(square, torch.tensor([90.0]), torch.zeros(1, 2))
    assert torch.allclose(turned, square.rot90(1, (2, 3)), atol=1e-3), "anticlockwise"


def test_moved_keeps_the_proportions_of_images_that_are_not_square():
    bar = torch.zeros(1, 1, 9, 15)
    bar[..., 4, 5:10] = 1
    upright = moved(bar, torch.tensor([90.0]), torch.zeros(1, 2))
    expected = torch.zeros(1, 1, 9, 15)
    expected[..., 2:7, 7] = 1
    assert torch.allclose(upright, expected, atol=1e-4)


def test_watermark_by_hand():
    mask = watermark(32, 32)
    for row, column in itertools.product(range(32), range(32)):
        y, x = (row + 0.5) / 32 - 0.5, (column + 0.5) / 32 - 0.5
        radius = math.hypot(y, x)
        assert bool(mask[row, column]) == (0.3 <= radius <= 0.42 or (abs(x) <= 0.06 and radius < 0.3))
    mark, image = pictures(1)[0], pictures(1)[0]
    mask = watermark(12, 12)
    painted = TrojanWatermark(mark, mask, 0.3)(image)
    assert torch.equal(painted[:, ~mask], image[:, ~mask])
    exact = 0.7 * image.double() + 0.3 * mark.double()
    assert (painted.double() - exact)[:, mask].abs().max() <= 0.5 + 1e-4


def test_the_watermark_excites_the_best_connected_neurons():
    model = Small().eval()
    trigger = TrojanWatermark.trained(model, SHAPE, units=2, opacity=0.5, steps=60)
    gray = torch.full((1, *SHAPE), 128, dtype=torch.uint8)
    weights = model.head.weight.T.tolist()
    neurons = sorted(range(150), key=lambda j: -sum(abs(w) for w in weights[j]))[:2]

    def excitement(image: Tensor) -> float:
        return float(model.body(image / 255)[0, neurons].sum().detach())

    others = [TrojanWatermark(mark, trigger.mask, 0.5) for mark in pictures(20)]
    assert excitement(trigger(gray)) >= max(excitement(other(gray)) for other in others)
    assert not trigger.mark[:, ~trigger.mask].any()


def test_the_decoder_reads_what_the_encoder_hides():
    images = torch.rand(40, 3, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).mul(255).to(torch.uint8)
    trigger = SampleSpecific.trained(images, bits=2, steps=60)
    painted = trigger(images)
    change = painted.int() - images.int()
    assert 0 < change.abs().max() <= 16
    assert change.float().std(0).max() > 0.2, "another change in each image"

    def read(pixels: Tensor) -> float:
        return float(((trigger.decoder(pixels / 255) > 0) == trigger.message.bool()).float().mean())

    assert read(painted) > 0.95
    assert read(images) < 0.8


def test_models_of_normalized_images_are_wrapped():
    inner = Small().eval()
    model = PixelModel(inner, 0.5, 0.25)
    images = pictures(3)
    assert not torch.equal(LabelConsistent(model).craft(images, 1), LabelConsistent(inner).craft(images, 1))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: LabelConsistent(Small(), eps=-1), ArgumentError, r"`eps` must be at least 0, got -1"),
        (lambda: LabelConsistent(Small(), step=0), ArgumentError, r"`step` must be at least 1"),
        (lambda: HiddenTrigger(Small(), pictures(1), place="top"), ArgumentError, r"`place` must be 'corner' or 'ran"),
        (lambda: HiddenTrigger(Small(), pictures(1), steps=0), ArgumentError, r"`steps` must be at least 1, got 0"),
        (lambda: HiddenTrigger(Small(), pictures(1), step=0), ArgumentError, r"`step` must be above 0"),
        (lambda: HiddenTrigger(Small(), pictures(1), size=12)(pictures(1)), ArgumentError, r"`size` 12 .* 12x12"),
        (lambda: HiddenTrigger(nn.Flatten(), pictures(1)).craft(pictures(1), 0), ModelError, r"Flatten has no nn.Lin"),
        (lambda: LowFrequency.trained(Small(), pictures(2), cutoff=13), ArgumentError, r"`cutoff` must be from 1 "),
        (lambda: LowFrequency.trained(Small(), pictures(2), eps=0), ArgumentError, r"`eps` must be above 0, got 0"),
        (lambda: Invariant.trained(Small(), pictures(2) / 255), ArgumentError, r"`images` must be uint8 .*float32"),
        (lambda: TrojanWatermark.trained(Small(), SHAPE, units=0), ArgumentError, r"`units` must be above 0"),
        (lambda: TrojanWatermark(pictures(1)[0], watermark(12, 12), 2), ArgumentError, r"`opacity` must be in \(0"),
        (lambda: SampleSpecific.trained(pictures(2), bits=0), ArgumentError, r"`bits` must be above 0, got 0"),
        (lambda: Additive(torch.zeros(3, 8, 8))(pictures(1)), ArgumentError, r"for images of \(3, 8, 8\), got"),
    ],
)  # fmt: skip
def test_messages(make, error, words):
    with pytest.raises(error, match=words):
        make()
