"""Subpopulations: planted ones are found, clean data has none."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_backdoor.detection.directions import RIDGE, discriminant, group_by_label, sharpened_directions
from lightning_backdoor.detection.subpopulations import Subpopulation, own_auroc
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional import (
    decide,
    find_all_to_all_subpopulation,
    find_subpopulations,
    split_units,
    subpopulation_scores,
)


def classes(n: int, k: int, units: int, seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Class centres of every sample ``(n, units)``, labels ``(n,)`` and the generator behind them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, k, (n,), generator=generator)
    return torch.randn(k, units, generator=generator)[labels], labels, generator


def planted(n: int, k: int, units: int, share: float, seed: int, *, of_class: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of class 0 of which some answer on three units as no others do: ``share`` of all, or of the class."""
    centers, labels, generator = classes(n, k, units, seed)
    first = (labels == 0).nonzero().squeeze(1)
    poisoned = torch.zeros(n, dtype=torch.bool)
    poisoned[first[: round(share * (len(first) if of_class else n))]] = True
    values = centers + torch.randn(n, units, generator=generator)
    values[:, :3] = torch.randn(n, 3, generator=generator) + 9 * poisoned[:, None]
    return values, labels, poisoned


def split_by_loops(column: list[float], smallest: int) -> tuple[float, float, int]:
    """Smallest squared deviation, separation and size of the upper group, by trying every cut."""
    ordered, best = sorted(column), (float("inf"), 0.0, 0)
    for cut in range(smallest, len(ordered) - smallest + 1):
        low, high = np.array(ordered[:cut]), np.array(ordered[cut:])
        if low[-1] == high[0]:
            continue
        cost = float(len(low) * low.var() + len(high) * high.var())
        if cost < best[0]:
            best = (cost, float((high.mean() - low.mean()) / max(low.std() + high.std(), 1e-9)), len(high))
    return best


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("smallest", [1, 4])
def test_split_equals_brute_force(dtype: torch.dtype, smallest: int) -> None:
    values = torch.randn(30, 12, generator=torch.Generator().manual_seed(0)).exp().to(dtype)
    split = split_units(values, smallest)
    for unit in range(12):
        _, standardized_gap, members = split_by_loops(values[:, unit].double().tolist(), smallest)
        assert int(split.members[unit]) == members == int((values[:, unit].double() > split.threshold[unit]).sum())
        assert float(split.standardized_gap[unit]) == pytest.approx(standardized_gap, rel=1e-6)
        upper = values[:, unit].double() > split.threshold[unit]
        assert float(split.high[unit]) == pytest.approx(float(values[upper, unit].double().mean()))
        assert float(split.low[unit]) == pytest.approx(float(values[~upper, unit].double().mean()))


def test_split_agrees_with_kmeans() -> None:
    vq = pytest.importorskip("scipy.cluster.vq")
    column = torch.cat([torch.randn(60, generator=torch.Generator().manual_seed(0)), torch.full((12,), 7.0)])[:, None]
    centers, _ = vq.kmeans(column.double().numpy(), np.array([[0.0], [6.0]]))
    split = split_units(column)
    assert sorted(centers[:, 0].tolist()) == pytest.approx([float(split.low), float(split.high)])


@pytest.mark.parametrize("offset", [1e4, -1e6, 1e9])
def test_split_is_stable_far_from_zero(offset: float) -> None:
    values = torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-2
    near, far = split_units(values), split_units(values + offset)
    assert torch.equal(near.members, far.members)
    torch.testing.assert_close(near.standardized_gap, far.standardized_gap, rtol=1e-3, atol=0)


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_separation_has_no_unit(factor: float) -> None:
    values = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(split_units(values * factor).standardized_gap, split_units(values).standardized_gap)


def test_equal_values_stay_together_and_silent_units_have_no_split() -> None:
    silent, few, many = torch.zeros(50), torch.zeros(50), torch.zeros(50)
    few[:9], many[:20] = 1.0, 1.0
    split = split_units(torch.stack([silent, few, many], dim=1))
    assert split.standardized_gap[:2].tolist() == [0, 0]
    assert split.members.tolist() == [0, 0, 20]
    assert bool(split.standardized_gap.isfinite().all())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (torch.zeros(19, 2), "at least 20 rows, got 19"),
        (torch.full((30, 2), torch.inf), "finite"),
        (torch.full((30, 2), torch.nan), "finite"),
    ],
)
def test_split_says_what_it_cannot_split(values: Tensor, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        split_units(values)


def test_positions_leave_each_sample_out() -> None:
    """The closed form against refitting without each sample."""
    n, units = 30, 40
    values = torch.randn(n, units, generator=torch.Generator().manual_seed(0)) + 3
    upper = torch.arange(n) < 11
    weights, positions = discriminant(values, upper)
    center, scale = values.double().mean(0), values.double().std(0)
    scaled = (values.double() - center) / scale

    def fit(rows: Tensor, ridge: float | None) -> tuple[Tensor, float]:
        high, low = scaled[rows & upper], scaled[rows & ~upper]
        deviations = torch.cat([high - high.mean(0), low - low.mean(0)])
        within = deviations.T @ deviations / n
        ridge = RIDGE * float(within.diagonal().mean()) if ridge is None else ridge
        return torch.linalg.solve(within + ridge * torch.eye(units), high.mean(0) - low.mean(0)), ridge

    whole, ridge = fit(torch.ones(n, dtype=torch.bool), None)
    torch.testing.assert_close(weights.double(), whole / whole.norm() / scale, rtol=1e-3, atol=1e-5)
    for i in range(n):
        without, _ = fit(torch.arange(n) != i, ridge)
        expected = (scaled[i] @ without + (center / scale) @ whole) / whole.norm()
        assert float(positions[i]) == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("share", "of_class"), [(0.005, False), (0.01, False), (0.05, False), (0.8, True)], ids=["0.5%", "1%", "5%", "SIG"]
)
@pytest.mark.parametrize(("n", "k", "units"), [(3000, 10, 48), (4000, 2, 24)])
def test_finds_the_planted_subpopulation_and_nothing_in_its_clean_twin(  # noqa: PLR0917  (parameters)
    n: int, k: int, units: int, share: float, of_class: bool, dtype: torch.dtype
) -> None:
    values, labels, poisoned = planted(n, k, units, share, 0, of_class=of_class)
    values = values.to(dtype)
    (one,) = find_subpopulations(values, labels)
    assert one.label == 0
    found = (labels == 0) & (one.project(values) > one.threshold)
    assert int((found & poisoned).sum()) >= 0.95 * int(poisoned.sum())
    assert int((found & ~poisoned).sum()) <= 2
    assert one.members == pytest.approx(int(poisoned.sum()), abs=2)
    assert one.low < one.threshold < one.high
    clean, labels, _ = planted(n, k, units, 0.0, 0, of_class=of_class)
    assert find_subpopulations(clean.to(dtype), labels) == []


def student(centers: Tensor, generator: torch.Generator) -> Tensor:
    gauss = torch.randn(4, *centers.shape, generator=generator)
    return centers + gauss[0] / gauss[1:].square().mean(dim=0).sqrt()


def exponential(centers: Tensor, generator: torch.Generator) -> Tensor:
    return centers.abs() * -torch.rand(centers.shape, generator=generator).clamp(min=1e-6).log()


def lognormal(centers: Tensor, generator: torch.Generator) -> Tensor:
    return (centers + torch.randn(centers.shape, generator=generator)).exp()


def sparse(centers: Tensor, generator: torch.Generator) -> Tensor:
    return (centers + torch.randn(centers.shape, generator=generator) - 2).relu()


def gaussian(centers: Tensor, generator: torch.Generator) -> Tensor:
    return centers + torch.randn(centers.shape, generator=generator)


def contrasts(centers: Tensor, generator: torch.Generator) -> Tensor:
    """Every sample has its own contrast."""
    return centers + torch.randn(centers.shape, generator=generator) * 3 * torch.rand(len(centers), 1)


def two_kinds(centers: Tensor, generator: torch.Generator) -> Tensor:
    """Every class has the same two clear kinds, such as day and night."""
    kind = torch.randint(0, 2, (len(centers), 1), generator=generator)
    return gaussian(centers, generator) + 4 * kind * torch.randn(centers.shape[1], generator=generator)


CLEAN = [gaussian, student, exponential, lognormal, sparse, contrasts, two_kinds]


@pytest.mark.parametrize(
    ("n", "k", "units"), [(800, 4, 32), (300, 10, 100), (300, 2, 40)], ids=["plain", "many-units", "two-classes"]
)
@pytest.mark.parametrize("draw", CLEAN)
def test_finds_nothing_in_clean_data(
    draw: Callable[[Tensor, torch.Generator], Tensor], n: int, k: int, units: int
) -> None:
    for seed in range(3):
        centers, labels, generator = classes(n, k, units, seed)
        assert find_subpopulations(draw(centers, generator), labels) == []


def with_wrong_labels(share: float) -> tuple[Tensor, Tensor]:
    centers, labels, generator = classes(1500, 10, 48, 0)
    wrong = torch.rand(1500, generator=generator) < share
    values = 2 * centers + torch.randn(1500, 48, generator=generator)
    return values, torch.where(wrong, torch.randint(0, 10, (1500,), generator=generator), labels)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3])
def test_wrong_labels_are_no_backdoor(share: float) -> None:
    """The true class would be the exclusive upper group; removing it would ruin the data."""
    assert find_subpopulations(*with_wrong_labels(share)) == []


def with_covers(share: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Poisons with label 0, a trigger that covers in all other labels carry too, and agreement that does not see it."""
    values, labels, poisoned = planted(3000, 10, 24, share, seed, of_class=False)
    generator = torch.Generator().manual_seed(seed)
    covers = (labels != 0) & (torch.rand(3000, generator=generator) < 2.5 * share)
    values[covers, :3] += 9
    return values, labels, poisoned, 0.6 + 0.1 * torch.randn(3000, generator=generator)


@pytest.mark.parametrize("share", [0.01, 0.05])
@pytest.mark.parametrize("seed", range(3))
def test_a_subpopulation_that_covers_hide_passes_by_its_early_neighbors(share: float, seed: int) -> None:
    values, labels, poisoned, agreement = with_covers(share, seed)
    assert find_subpopulations(values, labels) == []
    assert find_subpopulations(values, labels, agreement=agreement) == [], "its neighbours agree as much as others"
    assert find_subpopulations(values, labels, agreement=agreement + 0.2 * poisoned) == []
    (one,) = find_subpopulations(values, labels, agreement=torch.where(poisoned, agreement / 2, agreement).half())
    found = (labels == 0) & (one.project(values) > one.threshold)
    assert one.label == 0
    assert one.gate == "early_neighbors"
    assert int((found & poisoned).sum()) >= 0.95 * int(poisoned.sum())
    assert int((found & ~poisoned).sum()) <= 2


def test_a_subpopulation_carries_the_gate_that_it_passed_with_its_figures() -> None:
    names, tested = ("standardized_gap", "enrichment"), ("own_auroc", "replication_p_value", "different_things")
    (strict,) = find_subpopulations(*planted(1000, 5, 16, 0.05, 0, of_class=False)[:2])
    assert strict.gate == "strict"
    assert [figure.criterion for figure in strict.figures] == [
        "standardized_gap>=2.5",
        "enrichment>=20",
        "own_auroc>=0.75",
        "replication_p_value<=0.000555556",
        "different_things>=10",
    ]
    assert [figure.value for figure in strict.figures[:2]] == [strict.standardized_gap, strict.enrichment]
    (overlap,) = find_subpopulations(*leaning(0, shared=False)[:2])
    assert overlap.gate == "overlap"
    assert [figure.name for figure in overlap.figures] == [
        *names,
        "member_share",
        "other_labels",
        "excess_variation",
        "largest_other_gap",
        "effective_labels",
        *tested,
    ]
    values, labels, poisoned, agreement = with_covers(0.05, 0)
    (early,) = find_subpopulations(values, labels, agreement=torch.where(poisoned, agreement / 2, agreement))
    assert [figure.name for figure in early.figures] == [*names, "member_share", "early_agreement_ratio", *tested]
    assert 0.4 < early.figures[3].value < 0.7, "half as often, and an allowance for chance"
    values, labels, _ = planted_in_all()
    first, *_ = find_all_to_all_subpopulation(values, labels)
    assert first.gate == "all_to_all"
    assert [(figure.criterion, figure.value) for figure in first.figures[1:]] == [
        ("member_share<0.5", 0.1),
        ("split_labels>=0.5", 1.0),
    ]
    holds = {">=": float.__ge__, ">": float.__gt__, "<=": float.__le__, "<": float.__lt__}
    for figure in (*strict.figures, *overlap.figures, *early.figures, *first.figures):
        assert holds[figure.relation](float(figure.value), figure.bound), figure


def test_a_rule_names_every_gate_that_was_passed() -> None:
    values, labels, poisoned, agreement = with_covers(0.05, 0)
    values[(labels == 3).nonzero().squeeze(1)[:60], 5:8] += 9
    agreement = torch.where(poisoned, agreement / 2, agreement)
    decision = decide(values, torch.zeros(len(labels)), labels, agreement=agreement)
    assert [one.gate for one in decision.subpopulations] == ["early_neighbors", "strict"]
    early, strict = decision.rule.removeprefix("subpopulation(").removesuffix(")").split("; ")
    assert early.startswith("early_neighbors: standardized_gap>=2, ")
    assert strict == (
        "strict: standardized_gap>=2.5, enrichment>=20, own_auroc>=0.75, replication_p_value<=0.00030303, "
        "different_things>=10"
    )
    assert decide(torch.randn(200, 3), torch.zeros(200), torch.arange(200) % 4).rule == "subpopulation(none)"


def leaning(seed: int, *, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Poisons of class 0 that keep something of their true classes; with ``shared`` others carry the trigger, too."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 6, (3000,), generator=generator)
    values = 6 * nn.functional.one_hot(labels, 24) + torch.randn(3000, 24, generator=generator)
    poisoned = torch.zeros(3000, dtype=torch.bool)
    poisoned[(labels == 0).nonzero().squeeze(1)[:200]] = True
    true = torch.randint(1, 6, (3000,), generator=generator)
    values[poisoned] += 4 * nn.functional.one_hot(true, 24)[poisoned]
    covers = (labels != 0) & (torch.rand(3000, generator=generator) < 0.3)
    values[poisoned | (covers & shared), 10:13] += 3.5
    return values, labels, poisoned


@pytest.mark.parametrize("seed", [0, 1])
def test_others_may_lie_beside_a_subpopulation_if_they_are_not_split(seed: int) -> None:
    values, labels, poisoned = leaning(seed, shared=False)
    (one,) = find_subpopulations(values, labels)
    assert one.label == 0
    assert one.enrichment < 20, "true classes lie above the threshold"
    assert int((((labels == 0) & (one.project(values) > one.threshold)) != poisoned).sum()) <= 1
    values, labels, _ = leaning(seed, shared=True)
    assert find_subpopulations(values, labels) == []


def test_the_class_itself_is_not_denied_by_neighbors_of_an_easy_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near-duplicates agree more than anybody; the rest of their class is no backdoor."""
    centers, labels, generator = classes(3000, 10, 24, 0)
    values = centers + torch.randn(3000, 24, generator=generator)
    easy = torch.zeros(3000, dtype=torch.bool)
    easy[(labels == 0).nonzero().squeeze(1)[:50]] = True
    values[labels == 0, :2] += 3.0
    values[easy, :2] -= 4.0
    assert find_subpopulations(values, labels) == []
    assert find_subpopulations(values, labels, agreement=torch.where(easy, 1.0, 0.6)) == []
    monkeypatch.setattr("lightning_backdoor.detection.subpopulations.EARLY_MEMBERS", 1.0)
    assert find_subpopulations(values, labels, agreement=torch.where(easy, 1.0, 0.6)), "without the guard it would be"


def with_rare_kind(seed: int) -> tuple[Tensor, Tensor]:
    """A quarter of class 0 leans to class 1, so that the rest of the class is a subpopulation of its own."""
    centers, labels, generator = classes(3000, 10, 24, seed)
    towards = centers[labels == 1][0] - centers[labels == 0][0]
    values = 2 * centers + torch.randn(3000, 24, generator=generator)
    values[(torch.rand(3000, generator=generator) < 0.25) & (labels == 0)] += 1.4 * towards
    return values, labels


def like_one_other(seed: int) -> tuple[Tensor, Tensor]:
    """A clean kind of class 0 that resembles class 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 6, (3000,), generator=generator)
    values = 6 * nn.functional.one_hot(labels, 24) + torch.randn(3000, 24, generator=generator)
    kind = (labels == 0).nonzero().squeeze(1)[:100]
    values[kind, 1] += 5
    values[kind, 10:13] += 3
    return values, labels


def like_two_others(seed: int) -> tuple[Tensor, Tensor]:
    """A clean kind of class 0 that resembles classes 1 and 2, as some handwritten digits do."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (5000,), generator=generator)
    values = 6 * nn.functional.one_hot(labels, 24) + torch.randn(5000, 24, generator=generator)
    kind = (labels == 0).nonzero().squeeze(1)[:100]
    values[kind[:50], 1] += 5
    values[kind[50:], 2] += 5
    values[kind, 10:13] += 3
    return values, labels


@pytest.mark.parametrize(
    ("draw", "without", "seeds"),
    [
        (with_rare_kind, {"OVERLAP_MEMBERS": 1.0, "OVERLAP_LABELS": 2.0, "OVERLAP_VARIATION": -np.inf}, (0, 3, 5)),
        (like_one_other, {"OVERLAP_LABELS": 0.0, "OVERLAP_VARIATION": -np.inf}, (0, 1, 2)),
        (like_two_others, {"OVERLAP_LABELS": 0.0, "OVERLAP_VARIATION": -np.inf}, (0, 1, 2)),
    ],
    ids=["the class itself", "like one other class", "like two other classes"],
)
def test_a_clean_kind_is_no_backdoor(
    draw: Callable[[int], tuple[Tensor, Tensor]],
    without: dict[str, float],
    seeds: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = [draw(seed) for seed in seeds]
    assert [find_subpopulations(values, labels) for values, labels in data] == [[]] * 3
    for guard, bound in without.items():
        monkeypatch.setattr(f"lightning_backdoor.detection.subpopulations.{guard}", bound)
    assert all(find_subpopulations(values, labels) for values, labels in data), "without the guards it would be one"


def beside_poisons(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """As many poisons as clean samples of class 0, whose trigger silences units: the class is the upper group."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(10).repeat_interleave(140)
    values = 3 * nn.functional.one_hot(labels, 24) + torch.randn(1400, 24, generator=generator)
    values[labels == 0, 0] -= 3
    values[labels == 0, 10:13] += 6
    values[labels != 0, 10:13] += 2.4
    true = torch.randint(1, 10, (140,), generator=generator)
    images = 3 * nn.functional.one_hot(true, 24) + torch.randn(140, 24, generator=generator)
    poisoned = torch.arange(1540) >= 1400
    return torch.cat([values, images]), torch.cat([labels, torch.zeros(140, dtype=torch.long)]), poisoned


def like_many_others(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A clean kind of class 0, a third of it, beside which some samples of all other classes lie."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(10).repeat_interleave(140)
    values = 3 * nn.functional.one_hot(labels, 24) + torch.randn(1400, 24, generator=generator)
    kind = torch.arange(1400) < 46
    values[kind, 10:13] += 6
    values[labels != 0, 10:13] += 2.2
    return values, labels, kind


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("draw", [beside_poisons, like_many_others])
def test_what_varies_no_more_than_the_rest_of_its_label_is_not_of_many_classes(
    draw: Callable[[int], tuple[Tensor, Tensor, Tensor]], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, labels, second = draw(seed)
    assert find_subpopulations(values, labels) == []
    monkeypatch.setattr("lightning_backdoor.detection.subpopulations.OVERLAP_VARIATION", -np.inf)
    (found,) = find_subpopulations(values, labels)
    assert found.enrichment < 20, "without the guard it would lean on other classes"
    upper = (found.project(values) > found.threshold)[labels == 0]
    assert float((upper == (second ^ (draw is beside_poisons))[labels == 0]).float().mean()) > 0.98


@pytest.mark.parametrize("poisons", [100, 200])
def test_poisons_that_are_half_of_their_label_are_found(poisons: int) -> None:
    values, labels, poisoned = leaning(0, shared=False)
    stay = (labels != 0) | poisoned
    stay[((labels == 0) & ~poisoned).nonzero().squeeze(1)[:200]] = True
    stay[poisoned.nonzero().squeeze(1)[poisons:]] = False
    values, labels, poisoned = values[stay], labels[stay], poisoned[stay]
    (found,) = find_subpopulations(values, labels)
    assert int((((labels == 0) & (found.project(values) > found.threshold)) != poisoned).sum()) <= 2


def test_three_other_labels_at_least_say_that_a_subpopulation_is_exclusive() -> None:
    values, labels, _ = leaning(0, shared=False)
    assert find_subpopulations(values[labels < 4], labels[labels < 4])
    assert find_subpopulations(values[labels < 3], labels[labels < 3]) == []


def long_tail(seed: int, sizes: list[int], true: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Poisons of class 0 that keep something of their true classes, which are drawn by the weights ``true``."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    values = 6 * nn.functional.one_hot(labels, 24) + torch.randn(len(labels), 24, generator=generator)
    poisoned = torch.arange(len(labels)) < sizes[0] / 3
    lean = torch.multinomial(torch.tensor(true).float(), len(labels), replacement=True, generator=generator)
    values[poisoned] += 5 * nn.functional.one_hot(lean, 24)[poisoned]
    values[poisoned, 10:13] += 3.5
    return values, labels, poisoned


def test_one_large_label_does_not_stand_for_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most samples above the threshold are of the large label, as most of all samples are; so are those of the twin."""
    sizes = [600, 1500, *[150] * 8]
    values, labels, poisoned = long_tail(1, sizes, [0, *sizes[1:]])
    (one,) = find_subpopulations(values, labels)
    assert one.enrichment < 20, "true classes lie above the threshold"
    above = labels[(one.project(values) > one.threshold) & (labels != 0)]
    assert float((above == 1).float().mean()) > 0.8
    assert int((((labels == 0) & (one.project(values) > one.threshold)) != poisoned).sum()) <= 1
    twins = [like_large_one(seed, sizes) for seed in (2, 3)]
    assert [find_subpopulations(*twin) for twin in twins] == [[]] * 2, (
        "a clean kind that resembles the large label alone"
    )
    monkeypatch.setattr("lightning_backdoor.detection.subpopulations.OVERLAP_LABELS", 0.0)
    monkeypatch.setattr("lightning_backdoor.detection.subpopulations.OVERLAP_VARIATION", -np.inf)
    assert all(find_subpopulations(*twin) for twin in twins), "without the guard it would be one"


def like_large_one(seed: int, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """A clean kind of class 0 that resembles class 1, the large one."""
    values, labels, _ = long_tail(seed, sizes, [0, 1, *[0] * (len(sizes) - 2)])
    values[labels == 1, 10:13] += 0.5
    return values, labels


def like_rare_ones(seed: int, rare: list[int]) -> tuple[Tensor, Tensor]:
    """A clean kind of class 0 that resembles small classes, beside four other classes that are large."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat(
        [torch.arange(5).repeat(600), torch.arange(5, 5 + len(rare)).repeat_interleave(torch.tensor(rare))]
    )
    values = 6 * nn.functional.one_hot(labels % 24, 24) + torch.randn(len(labels), 24, generator=generator)
    kind = (labels == 0).nonzero().squeeze(1)[:90]
    values[kind, 10:13] += 5
    values[labels >= 5, 10:13] += 5
    return values, labels


@pytest.mark.parametrize(
    "rare", [[20] * 3, [19] * 2, [19] * 3, [19] * 5, [5] * 8, [1] * 40], ids=lambda sizes: f"{len(sizes)} of {sizes[0]}"
)
def test_a_clean_kind_like_rare_labels_is_no_backdoor(rare: list[int]) -> None:
    """They are too small to be split, but they lie beside it."""
    for seed in range(2):
        assert find_subpopulations(*like_rare_ones(seed, rare)) == []


@pytest.mark.parametrize("seed", [0, 1])
def test_poisons_beside_rare_labels_are_found_all_the_same(seed: int) -> None:
    values, labels, poisoned = leaning(seed, shared=False)
    generator = torch.Generator().manual_seed(seed)
    rare = torch.arange(6).repeat_interleave(torch.tensor([19, 19, 10, 1, 1, 1]))
    seldom = 6 * nn.functional.one_hot(1 + rare % 5, 24) + torch.randn(len(rare), 24, generator=generator)
    (one,) = find_subpopulations(torch.cat([values, seldom]), torch.cat([labels, 6 + rare]))
    assert one.enrichment < 20, "true classes lie above the threshold"
    assert int((((labels == 0) & (one.project(values) > one.threshold)) != poisoned).sum()) <= 1


@pytest.mark.parametrize(("size", "found"), [(25, 0), (40, 1)])
def test_where_nothing_lies_beside_it_there_must_be_enough_that_could(size: int, found: int) -> None:
    """Ten per cent of the label and none of 75 others, which is 15 times half a sample; none of 120."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(torch.tensor([600, size, size, size]))
    values = 6 * nn.functional.one_hot(labels, 24) + torch.randn(len(labels), 24, generator=generator)
    values[:60, 10:13] += 8
    assert len(find_subpopulations(values, labels)) == found


def test_agreement_of_another_length_is_an_error() -> None:
    values, labels, _, agreement = with_covers(0.05, 0)
    with pytest.raises(ArgumentError, match=r"`agreement` must have shape"):
        find_subpopulations(values, labels, agreement=agreement[:-1])


def test_a_few_neighbors_that_deny_by_chance_are_not_enough() -> None:
    values, labels, poisoned, agreement = with_covers(0.01, 0)
    rarely = torch.zeros(3000)
    rarely[poisoned.nonzero().squeeze(1)[:1]] = 0.35 * int(poisoned.sum())  # all but one of them say nothing
    assert float(rarely[poisoned].mean()) < 0.6 * float(agreement[labels == 0].mean())
    assert find_subpopulations(values, labels, agreement=torch.where(poisoned, rarely, agreement)) == []


def test_what_early_neighbors_say_takes_nothing_away() -> None:
    values, labels, poisoned = planted(3000, 10, 48, 0.05, 0, of_class=False)
    plain = find_subpopulations(values, labels)
    (one,) = find_subpopulations(values, labels, agreement=torch.where(poisoned, 0.1, 0.6))
    assert (one.gate, one.standardized_gap, one.members) == (
        "strict",
        plain[0].standardized_gap,
        plain[0].members,
    )


def test_wrong_labels_would_be_found_without_looking_at_the_lower_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_backdoor.detection.subpopulations.OWN_AUROC", 0.0)
    assert find_subpopulations(*with_wrong_labels(0.1))


@pytest.mark.parametrize("wrong", [True, False])
def test_a_mixture_of_other_classes_is_known_as_one_where_labels_take_turns(
    wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fourth of the other samples is of the same label; beside it alone a mixture would look like a class."""
    labels = torch.arange(2000) % 5
    true = labels.clone()
    if wrong:
        true[labels == 0] = torch.where(torch.arange(400) % 10 == 0, torch.arange(400) // 10 % 4 + 1, 0)
    noise = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    values = 6 * nn.functional.one_hot(true, 8) + noise
    one = Subpopulation(0, torch.tensor([0]), torch.ones(1), 3.0, 0.0, 6.0, 2.5, 100.0, 360)
    one = one if wrong else replace(one, threshold=7.0)
    for others in (2000, 400):
        monkeypatch.setattr("lightning_backdoor.detection.subpopulations.OWN_OTHERS", others)
        found = [own_auroc(one, values, labels == 0, torch.arange(8)) for _ in range(2)]
        assert found[0] == found[1], "the same draw every time"
        assert found[0] == pytest.approx(0.5, abs=0.1) if wrong else found[0] > 0.99


def test_a_single_unit_is_enough() -> None:
    values, labels, poisoned = planted(1000, 5, 3, 0.02, 0, of_class=False)
    (one,) = find_subpopulations(values[:, :1], labels)
    assert torch.equal((one.project(values[:, :1]) > one.threshold) & (labels == 0), poisoned)


def test_one_label_only_has_nothing_to_be_exclusive_from() -> None:
    values, labels, poisoned = planted(600, 1, 16, 0.1, 0, of_class=True)
    assert int(poisoned.sum()) == 60
    assert find_subpopulations(values, labels) == []


def test_small_labels_are_left_alone() -> None:
    values, labels, _ = planted(900, 5, 16, 0.4, 0, of_class=True)
    first = (labels == 0).nonzero().squeeze(1)
    for size, expected in ((19, 0), (len(first), 1)):
        keep = labels != 0
        keep[first[-size:]] = True
        keep[first[: size // 2]] = size > 19
        assert len(find_subpopulations(values[keep], labels[keep])) == expected


def test_does_not_depend_on_the_order_of_samples_or_the_names_of_labels() -> None:
    values, labels, _ = planted(1200, 6, 32, 0.03, 3, of_class=False)
    (one,) = find_subpopulations(values, labels)
    order = torch.randperm(1200, generator=torch.Generator().manual_seed(0))
    names = torch.tensor([40, 3, 17, 0, 9, 5])
    (moved,) = find_subpopulations(values[order], names[labels][order])
    assert moved.label == 40
    assert moved.members == one.members
    assert moved.standardized_gap == pytest.approx(one.standardized_gap, rel=1e-3)
    assert moved.threshold == pytest.approx(one.threshold, abs=1e-3)
    assert torch.equal(moved.project(values) > moved.threshold, one.project(values) > one.threshold)


def test_a_thousand_classes_take_seconds() -> None:
    values, labels, _ = planted(30_000, 1000, 32, 0.005, 0, of_class=True)
    values[(labels == 0).nonzero().squeeze(1)[:20], :3] += 9  # the clean class has about 30 samples
    started = time.perf_counter()
    subpopulations = find_subpopulations(values.half(), labels)
    assert time.perf_counter() - started < 60
    assert [one.label for one in subpopulations] == [0]


def test_degenerate_units_do_no_harm() -> None:
    values, labels, poisoned = planted(800, 4, 24, 0.04, 0, of_class=False)
    values[:, 10:20] = 0.0
    values[:, 20] = 5.0
    values[:, 21] = poisoned.float()  # no spread within either group
    (one,) = find_subpopulations(values, labels)
    assert bool(one.weights.isfinite().all())
    scores = subpopulation_scores(values, labels, [one], torch.rand(800))
    assert torch.equal(scores > 0.5, poisoned)
    binary = poisoned.float()[:, None].repeat(1, 3)
    assert find_subpopulations(binary, labels) == []  # the lower group is like everything else: no class to be seen


def test_directions_of_noise_stay_low_with_more_units_than_samples() -> None:
    noise = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    directions = sharpened_directions(noise, group_by_label(torch.zeros(40, dtype=torch.long)), 0.0)[0]
    assert all(len(one.fitted) == 300 for one in directions)
    assert max(one.standardized_gap for one in directions) < 2


def test_scores_rank_the_subpopulation_first_and_keep_the_ranking_elsewhere() -> None:
    values, labels, poisoned = planted(800, 4, 24, 0.04, 0, of_class=False)
    ranking = torch.randn(800, generator=torch.Generator().manual_seed(5))
    subpopulations = find_subpopulations(values, labels)
    scores = subpopulation_scores(values, labels, subpopulations, ranking)
    assert torch.equal(scores > 0.5, poisoned)
    assert bool(scores.isfinite().all())
    inside = labels == 0
    position = subpopulations[0].project(values[inside])
    assert bool((scores[inside][position.argsort()].diff() >= 0).all())
    assert bool((scores[~inside][ranking[~inside].argsort()].diff() > 0).all())
    centers = torch.tensor([subpopulations[0].low, subpopulations[0].high])
    along = subpopulations[0].weights / subpopulations[0].weights.square().sum()
    at = torch.zeros(2, 24)
    at[:, subpopulations[0].units] = centers[:, None] * along
    assert subpopulation_scores(at, torch.zeros(2).long(), subpopulations, torch.zeros(2)).tolist() == pytest.approx(
        [0, 1], abs=1e-3
    )


def test_without_subpopulations_the_scores_are_half_ranks() -> None:
    scores = subpopulation_scores(torch.zeros(4, 2), torch.zeros(4).long(), [], torch.tensor([5.0, -1.0, 7.0, 0.0]))
    assert scores.tolist() == [0.25, 0.0, 0.375, 0.125]


LABELS, EACH, UNITS = 5, 200, 30


def responses(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Units that tell classes, under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(LABELS).repeat_interleave(EACH)
    centers = 2 * torch.randn(LABELS, UNITS, generator=generator)
    return centers[labels] + torch.randn(len(labels), UNITS, generator=generator), labels


def planted_in_all(share: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    values, labels = responses()
    marked = torch.arange(len(labels)) % EACH < share * EACH
    values[marked, 3:6] += 12
    return values, labels, marked


def test_one_subpopulation_in_every_label_is_found() -> None:
    values, labels, marked = planted_in_all()
    assert find_subpopulations(values, labels) == [], "it is no label's own"
    subpopulations = find_all_to_all_subpopulation(values, labels)
    assert sorted(one.label for one in subpopulations) == list(range(LABELS))
    assert all(torch.equal(one.weights, subpopulations[0].weights) for one in subpopulations)
    decision = decide(values, torch.zeros(len(labels)), labels, all_to_all=True)
    assert torch.equal(~decision.keep, marked)
    assert decision.all_to_all
    assert decision.rule.startswith("subpopulation(all_to_all: ")


def test_the_clean_twin_of_an_all_to_all_attack_is_quiet() -> None:
    for seed in range(10):
        values, labels = responses(seed)
        assert find_all_to_all_subpopulation(values, labels) == []
    decision = decide(values, torch.zeros(len(labels)), labels, all_to_all=True)
    assert decision.keep.all()
    assert not decision.all_to_all


def test_without_all_to_all_it_is_not_searched() -> None:
    values, labels, _ = planted_in_all()
    assert decide(values, torch.zeros(len(labels)), labels).keep.all()


def test_a_subpopulation_of_one_label_or_of_a_majority_is_not_all_to_all() -> None:
    values, labels, _ = planted_in_all()
    alone, marked = responses()[0], (torch.arange(len(labels)) < 20)
    alone[marked, 3:6] += 12
    assert find_all_to_all_subpopulation(alone, labels) == []
    assert [one.label for one in find_subpopulations(alone, labels)] == [0]
    values, labels, _ = planted_in_all(share=0.8)
    assert find_all_to_all_subpopulation(values, labels) == []


def test_two_labels_are_too_few_to_share() -> None:
    values, labels, _ = planted_in_all()
    few = labels < 2
    assert find_all_to_all_subpopulation(values[few], labels[few]) == []
