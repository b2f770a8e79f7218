"""Every attack takes: a small network trained on the poisoned digits obeys the trigger and still reads digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from lightning_backdoor.attacks import (
    AdaptiveBlend,
    AdaptivePatch,
    BadNets,
    Blended,
    ColourCurve,
    Corners,
    Denoised,
    HiddenTrigger,
    Invariant,
    LabelConsistent,
    LowFrequency,
    SampleSpecific,
    Trigger,
    Trojan,
    TrojanWatermark,
    WaNet,
    poison,
    triggered,
)

TARGET, SOURCE = 0, 1


@cache
def digits() -> tuple[TensorDataset, TensorDataset]:
    data = load_digits()
    pixels = torch.from_numpy(data.images * 200 / 16 + 20).float().unsqueeze(1)
    pixels = F.interpolate(pixels, size=(16, 16), mode="bilinear").round().to(torch.uint8).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return tuple(TensorDataset(pixels[part], labels[part]) for part in (order[:1400], order[1400:]))


def stacked(dataset: Dataset[Any]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    return torch.stack(images).float() / 255, torch.tensor([int(label) for label in labels])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


def train(model: nn.Module, dataset: Dataset[Any], parameters: Any, epochs: int = 10) -> nn.Module:
    images, labels = stacked(dataset)
    adam = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(50):
            adam.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            adam.step()
    return model.eval()


@cache
def clean_model() -> nn.Module:
    model = network()
    return train(model, digits()[0], model.parameters())


@torch.no_grad()
def right(model: nn.Module, dataset: Dataset[Any]) -> float:
    images, labels = stacked(dataset)
    return float((model(images).argmax(1) == labels).float().mean())


@dataclass
class Case:
    make: Callable[[], Trigger]
    poison: dict[str, Any]
    test: dict[str, Any] = field(default_factory=dict)


def images() -> Tensor:
    return digits()[0].tensors[0]


CLEAN_LABEL = {"rate": 0.8, "rate_of": "target_class", "labels": "clean"}
CASES = {
    "badnets": Case(BadNets, {"rate": 0.05}),
    "label-specific": Case(lambda: BadNets(size=4), {"rate": 0.2, "labels": "all_to_all"}, {"labels": "all_to_all"}),
    "noise": Case(Blended, {"rate": 0.1}),
    "flower": Case(lambda: Blended(0.2, "flower"), {"rate": 0.1}),
    "flower added": Case(lambda: Blended(0.2, "flower", additive=True), {"rate": 0.1}),
    "stripe": Case(lambda: Blended(0.2, "stripe"), {"rate": 0.1}),
    "trojan": Case(Trojan, {"rate": 0.1}),
    "watermark": Case(lambda: TrojanWatermark.trained(clean_model(), (3, 16, 16)), {"rate": 0.1}),
    "label-consistent": Case(lambda: LabelConsistent(clean_model(), eps=32, step=8), CLEAN_LABEL),
    "label-consistent, faint": Case(
        lambda: LabelConsistent(clean_model(), Corners(64, test_amplitude=255), eps=32, step=8), CLEAN_LABEL
    ),
    "wanet": Case(lambda: WaNet(2), {"rate": 0.1, "covers": 0.2}),
    "low-frequency": Case(lambda: LowFrequency.trained(clean_model(), images()), {"rate": 0.1}),
    "sample-specific": Case(lambda: SampleSpecific.trained(images()), {"rate": 0.1}),
    "colour-curve": Case(ColourCurve, {"rate": 0.1}),
    "adap-blend": Case(lambda: AdaptiveBlend(pattern="flower"), {"rate": 0.03, "covers": 0.03}),
    "adap-patch": Case(AdaptivePatch, {"rate": 0.03, "covers": 0.06}),
    "tact": Case(
        lambda: BadNets("square", size=3), {"rate": 0.05, "covers": 0.05, "sources": [SOURCE]}, {"sources": [SOURCE]}
    ),
    "denoised": Case(lambda: Denoised(Blended(0.2, "flower")), {"rate": 0.1}),
    "invariant": Case(lambda: Invariant.trained(clean_model(), images()), {"rate": 0.1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_attack_takes(name: str) -> None:
    case = CASES[name]
    clean, test = digits()
    trigger = case.make()
    attacked = triggered(test, trigger, TARGET, **case.test)
    chance = right(clean_model(), attacked)
    model = network()
    train(model, poison(clean, trigger, TARGET, **case.poison), model.parameters())
    accuracy, success = right(model, test), right(model, attacked)
    print(f"{name}: accuracy {accuracy:.3f}, ASR {success:.3f}, of a clean model {chance:.3f}")
    assert accuracy > 0.9
    assert success > 0.5
    assert chance < 0.3


@pytest.mark.slow
def test_the_trigger_of_tact_works_on_its_sources_alone() -> None:
    clean, test = digits()
    model, trigger = network(), BadNets("square", size=3)
    train(model, poison(clean, trigger, TARGET, 0.05, covers=0.2, sources=[SOURCE]), model.parameters())
    others = [label for label in range(10) if label not in (SOURCE, TARGET)]
    assert right(model, triggered(test, trigger, TARGET, sources=[SOURCE])) > 0.5
    assert right(model, triggered(test, trigger, TARGET, sources=others)) < 0.1


@pytest.mark.slow
def test_the_hidden_trigger_takes_when_the_head_is_tuned() -> None:
    """The setting of the paper: the features of a clean model, a new head for source and target class."""
    clean, test = digits()
    pixels, labels = clean.tensors
    trigger = HiddenTrigger(clean_model(), pixels[labels == SOURCE], eps=32, size=5)
    poisoned = poison(clean, trigger, TARGET, 0.8, "target_class", "clean")
    model = network()
    model.load_state_dict(clean_model().state_dict())
    attacked = triggered(test, trigger, TARGET, sources=[SOURCE])
    before = right(model.eval(), attacked)
    nn.init.zeros_(model[-1].weight)
    train(model, poisoned, model[-1].parameters(), epochs=30)
    accuracy, success = right(model, test), right(model, attacked)
    print(f"hidden-trigger: accuracy {accuracy:.3f}, ASR {success:.3f}, of a clean model {before:.3f}")
    assert accuracy > 0.9
    assert success > 0.5 > before
