"""Decisions where the values are: on a second device and on a GPU they are those of the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_backdoor.detection.decision import Decision, add_removed, decide, decide_by_break, verdict_of
from lightning_backdoor.functional import (
    HyperplaneStatistics,
    bias_scores,
    find_all_to_all_subpopulation,
    limit_of_labels,
    neighbor_agreement,
    reconsider_uncertain,
    select_fraction,
    select_trusted,
    split_by_rank,
    split_units,
    strong_thresholds,
)
from lightning_backdoor.functional.hyperplane import candidate_units, select_units, unit_shifts
from tests.accelerators import on_cpu
from tests.gpu.strict import DEVICE, second_device

CUDA = pytest.param(torch.device("cuda"), marks=pytest.mark.gpu, id="cuda")


@pytest.fixture(params=[pytest.param(DEVICE, id="strict"), CUDA])
def there(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The other device, where kernels without a fixed order are refused."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    with second_device():
        yield request.param
    torch.use_deterministic_algorithms(before, warn_only=before)


def measured(kind: str, *, labels: int = 5, each: int = 80, units: int = 12) -> dict[str, Tensor]:
    """Values of some labels: clean, with poisons in one, hidden by covers, with other true classes, or in all."""
    generator = torch.Generator().manual_seed(0)
    given = torch.arange(labels * each) % labels
    values = 4 * torch.randn(labels, units, generator=generator)[given]
    values += torch.randn(len(given), units, generator=generator)
    poisoned = (given == 1) & (torch.arange(len(given)) < labels * each // 3)
    if kind == "in all":
        poisoned = torch.arange(len(given)) % each < each // 4
    if kind != "clean":
        values[poisoned, :3] += 25
    if kind == "covers":
        values[(given != 1) & (torch.arange(len(given)) % 12 == 0), :3] += 25
    if kind == "leaning":
        poisoned = (given == 1) & (torch.arange(len(given)) < 100)
        true = torch.arange(len(given)) // 5 % 4
        values = 6 * one_hot(given, units) + torch.randn(len(given), units, generator=generator)
        values[poisoned] += 5 * one_hot(torch.where(true >= 1, true + 1, true), units)[poisoned]
        values[poisoned, 8:11] += 3.5
    early = poisoned & (kind in {"poisons", "covers"})
    agreement = torch.where(early, 0.1, 0.8) + 0.02 * torch.randn(len(given), generator=generator)
    ranking = torch.randn(len(given), generator=generator)
    return {"values": values.half(), "ranking": ranking, "labels": given, "agreement": agreement}


def same(one: Decision, other: Decision) -> None:
    one, other = on_cpu_decision(one), on_cpu_decision(other)
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-3, atol=1e-3)
    assert torch.equal(one.keep, other.keep)
    assert (one.rule, one.all_to_all) == (other.rule, other.all_to_all)
    assert len(one.subpopulations) == len(other.subpopulations)
    for a, b in zip(one.subpopulations, other.subpopulations, strict=True):
        assert (a.label, a.gate, a.members) == (b.label, b.gate, b.members)
        assert a.standardized_gap == pytest.approx(b.standardized_gap, rel=1e-4)


def on_cpu_decision(decision: Decision) -> Decision:
    found = verdict_of(decision, torch.zeros(len(decision.keep), dtype=torch.long))
    assert all(tensor.device.type == "cpu" for tensor in (found.scores, found.keep, found.labels))
    assert all(one.positions.device.type == "cpu" == one.weights.device.type for one in found.findings)
    return decision.cpu()


GATES: dict[str, set[str]] = {
    "clean": set(),
    "poisons": {"strict"},
    "covers": {"early_neighbors"},
    "leaning": {"overlap"},
    "in all": {"all_to_all"},
}


@pytest.mark.parametrize("kind", GATES)
def test_a_decision_is_that_of_the_cpu(there: torch.device, kind: str) -> None:
    of_cpu = measured(kind)
    of_device = {name: value.to(there) for name, value in of_cpu.items()}
    expected = decide(**of_cpu, all_to_all=True)
    assert {one.gate for one in expected.subpopulations} == GATES[kind]
    found = decide(**of_device, all_to_all=True)
    assert found.scores.device.type == found.keep.device.type == there.type
    same(found, expected)
    values = of_device["values"]
    mixed = decide(values, of_cpu["ranking"], of_cpu["labels"], agreement=of_cpu["agreement"], all_to_all=True)
    assert mixed.scores.device.type == mixed.keep.device.type == "cpu"
    same(mixed, expected)


def test_cuts_are_those_of_the_cpu(there: torch.device) -> None:
    of_cpu = measured("poisons")
    of_device = {name: value.to(there) for name, value in of_cpu.items()}
    for settings in ({"fraction": 0.1}, {"fraction": 0.1, "by_ranking": True}, {"max_removed": 0.02}):
        same(decide(**of_device, **settings), decide(**of_cpu, **settings))
    same(decide_by_break(of_device["ranking"]), decide_by_break(of_cpu["ranking"]))
    scores, keep, labels = of_cpu["ranking"], of_cpu["ranking"] < 0, of_cpu["labels"]
    limited = limit_of_labels(scores.to(there), keep.to(there), labels.to(there), 0.8)
    assert torch.equal(on_cpu(limited), limit_of_labels(scores, keep, labels, 0.8))
    assert torch.equal(on_cpu(select_fraction(scores.to(there), 0.3)[0]), select_fraction(scores, 0.3)[0])
    for one, other in zip(split_by_rank(scores.to(there)), split_by_rank(scores), strict=True):
        assert torch.equal(on_cpu(one), other)
    chosen = select_trusted(scores.to(there), labels.to(there), keep.to(there), 0.2)
    assert torch.equal(on_cpu(chosen), select_trusted(scores, labels, keep, 0.2))


def test_a_later_decision_is_joined_on_the_device(there: torch.device) -> None:
    of_cpu = measured("poisons")
    earlier = torch.arange(len(of_cpu["labels"])) % 50 > 0
    joined = []
    for device in ("cpu", there):
        here = {name: value.to(device) for name, value in of_cpu.items()}
        later = {"threshold": 0.5, "max_removed": 0.3, "labels": here["labels"]}
        joined.append(add_removed(decide(**here), here["ranking"], earlier.to(device), **later))
    same(joined[1], joined[0])


def test_splits_and_neighbors_are_those_of_the_cpu(there: torch.device) -> None:
    of_cpu = measured("poisons")
    one, other = split_units(of_cpu["values"].to(there)), split_units(of_cpu["values"])
    torch.testing.assert_close(on_cpu(one.standardized_gap), other.standardized_gap)
    assert torch.equal(on_cpu(one.members), other.members)
    values, labels = measured("in all")["values"], of_cpu["labels"]
    assert len(find_all_to_all_subpopulation(values.to(there), labels.to(there))) == 5
    trusted = torch.arange(len(labels)) % 2 == 0
    agreement = neighbor_agreement(of_cpu["values"], labels, trusted, k=5)
    found = neighbor_agreement(of_cpu["values"].to(there), labels.to(there), trusted.to(there), k=5)
    torch.testing.assert_close(on_cpu(found), agreement)
    expected = reconsider_uncertain(agreement, labels, trusted, ~trusted, most=3)
    masks = (agreement.to(there), labels.to(there), trusted.to(there), (~trusted).to(there))
    for mask, wanted in zip(reconsider_uncertain(*masks, most=3), expected, strict=True):
        assert torch.equal(on_cpu(mask), wanted)


@pytest.mark.parametrize("strong", [0.9, 0.2])
def test_statistics_of_units_are_summed_on_the_device(there: torch.device, strong: float) -> None:
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(200, 700, generator=generator)
    probabilities = (3 * torch.randn(200, 6, generator=generator)).softmax(dim=1)
    confidence, predicted = probabilities.max(dim=1)
    found = []
    for device in (torch.device("cpu"), there):
        statistics = HyperplaneStatistics(700, 6, strong=strong)
        for rows in torch.arange(200).split(64):
            statistics.update(activations[rows].to(device), probabilities[rows].to(device))
        assert statistics.sums.device.type == device.type
        thresholds, replaced = strong_thresholds(0.8 * confidence.to(device), predicted.to(device), 6)
        scores = statistics.scores()
        found.append(
            [
                scores, unit_shifts(statistics), candidate_units(statistics, 30), select_units(scores, 0.1), thresholds,
                torch.tensor(replaced), bias_scores(activations.to(device), *(part[0] for part in statistics.usual())),
            ]
        )  # fmt: skip
    for one, other in zip(on_cpu(found[1]), found[0], strict=True):
        torch.testing.assert_close(one, other)
