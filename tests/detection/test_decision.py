"""From measurements to a decision: cuts of one score per sample, against brute force; gate, limits and cap."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_backdoor.detection.decision import Decision, add_removed, decide, decide_by_break, findings_of
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional import limit_removed, natural_break, select_fraction
from lightning_backdoor.verdict import Verdict

numbers = st.integers(-40, 40).map(lambda i: i / 8)


def within(values: list[float], at: float) -> float:
    """Sum of squared deviations of the groups on both sides of ``at``, by loops."""
    total = 0.0
    for group in ([v for v in values if v <= at], [v for v in values if v > at]):
        center = sum(group) / len(group)
        total += sum((v - center) ** 2 for v in group)
    return total


@settings(max_examples=200, deadline=None)
@given(st.lists(numbers, min_size=2, max_size=25).filter(lambda v: min(v) < max(v)))
def test_natural_break_is_the_best_of_all_breaks(values: list[float]) -> None:
    found = natural_break(torch.tensor(values, dtype=torch.float64))
    assert found in values
    assert found < max(values)
    best = min(within(values, at) for at in values if at < max(values))
    assert within(values, found) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_natural_break_far_from_zero(dtype: torch.dtype) -> None:
    values = torch.tensor([1000.0, 1001.0, 1002.0, 1008.0, 1009.0], dtype=dtype)
    assert natural_break(values) == 1002.0
    assert (values > natural_break(values)).tolist() == [False, False, False, True, True]


def test_natural_break_does_not_part_equal_values() -> None:
    assert natural_break(torch.tensor([0.0] * 50 + [1.0])) == 0.0
    assert natural_break(torch.tensor([1.0] * 50 + [0.0])) == 0.0


def test_natural_break_agrees_with_kmeans() -> None:
    vq = pytest.importorskip("scipy.cluster.vq")
    generator = torch.Generator().manual_seed(1)
    values = torch.cat([torch.randn(80, generator=generator), 6 + torch.randn(20, generator=generator)]).double()
    upper = values > natural_break(values)
    centers, _ = vq.kmeans(values[:, None].numpy(), np.array([[0.0], [6.0]]))
    assert sorted(centers[:, 0].tolist()) == pytest.approx([float(values[~upper].mean()), float(values[upper].mean())])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (torch.ones(5), "all equal"),
        (torch.ones(1), r"N >= 2.*\(1,\)"),
        (torch.ones(3, 2), r"N >= 2.*\(3, 2\)"),
        (torch.tensor([1.0, math.nan, 2.0]), "finite"),
        (torch.tensor([1.0, math.inf, 2.0]), "finite"),
    ],
)
def test_natural_break_says_what_it_cannot_split(values: Tensor, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        natural_break(values)


@settings(deadline=None)
@given(st.lists(numbers, min_size=1, max_size=30), st.floats(0, 0.999))
def test_select_fraction_is_the_papers_count(values: list[float], fraction: float) -> None:
    scores = torch.tensor(values)
    keep, threshold = select_fraction(scores, fraction)
    assert int((~keep).sum()) == int(fraction * len(values))
    assert bool((scores[keep] <= threshold).all())
    assert bool((scores[~keep] >= threshold).all())
    if len(set(values)) == len(values):
        assert torch.equal(keep, ~(scores > threshold))


def test_select_fraction_of_nothing_keeps_all() -> None:
    keep, threshold = select_fraction(torch.tensor([1.0, 5.0, 2.0]), 0.3)
    assert bool(keep.all())
    assert threshold == math.inf
    assert select_fraction(torch.tensor([1.0, 5.0]), 0.0)[1] == math.inf


def test_select_fraction_cuts_ties_by_position() -> None:
    assert select_fraction(torch.ones(4), 0.5)[0].tolist() == [False, False, True, True]


def test_select_fraction_never_removes_what_must_stay() -> None:
    keep, threshold = select_fraction(torch.tensor([-math.inf, 3.0, -math.inf, 2.0]), 0.75)
    assert keep.tolist() == [True, False, True, False]
    assert threshold == -math.inf


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 20.0])
def test_select_fraction_wants_a_fraction(fraction: float) -> None:
    with pytest.raises(ArgumentError, match=rf"`fraction` must lie in \[0, 1\), got {fraction}.*pass 0.2"):
        select_fraction(torch.zeros(3), fraction)


@settings(deadline=None)
@given(st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_limit_removed_keeps_the_most_suspicious(rows: list[tuple[float, bool]], share: float) -> None:
    scores, keep = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    before = keep.clone()
    limited = limit_removed(scores, keep, share)
    assert torch.equal(keep, before)
    assert bool(limited[keep].all())
    assert int((~limited).sum()) == min(int((~keep).sum()), int(share * len(rows)))
    spared = ~keep & limited
    if bool(spared.any()) and not bool(limited.all()):
        assert float(scores[~limited].min()) >= float(scores[spared].max())


STRICT = "subpopulation(strict: standardized_gap>=2.5, enrichment>=20, own_auroc>=0.75, replication_p_value<="


def data(n: int = 600, poisons: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, ranking, labels and which samples of label 1 are poisoned."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=generator)
    values = torch.randn(3, 12, generator=generator)[labels] + torch.randn(n, 12, generator=generator)
    poisoned = torch.zeros(n, dtype=torch.bool)
    poisoned[(labels == 1).nonzero().squeeze(1)[:poisons]] = True
    values[:, :2] = torch.randn(n, 2, generator=generator) + 9 * poisoned[:, None]
    return values, torch.randn(n, generator=generator), labels, poisoned


def follows_its_threshold(decision: Decision, considered: Tensor) -> bool:
    return torch.equal(decision.keep[considered], ~(decision.scores > decision.threshold)[considered]) and bool(
        decision.keep[~considered].all()
    )


def test_says_if_early_neighbors_made_it_count() -> None:
    values, ranking, labels, poisoned = data()
    values[(labels != 1) & (ranking > 1.6), :2] += 9  # covers
    assert bool(decide(values, ranking, labels).keep.all())
    decision = decide(values, ranking, labels, agreement=torch.where(poisoned, 0.2, 0.6))
    assert torch.equal(~decision.keep, poisoned)
    assert decision.rule.startswith(
        "subpopulation(early_neighbors: standardized_gap>=2, enrichment>=2, member_share<=0.55, "
        "early_agreement_ratio<0.7, own_auroc>=0.75, replication_p_value<="
    )


def test_finds_what_was_planted() -> None:
    values, ranking, labels, poisoned = data()
    decision = decide(values, ranking, labels)
    assert torch.equal(~decision.keep, poisoned)
    assert decision.threshold == 0.5
    assert decision.num_flagged_before_cap == 40
    assert [one.label for one in decision.subpopulations] == [1]
    assert decision.rule.startswith(STRICT)


def test_finds_nothing_in_the_clean_twin() -> None:
    values, ranking, labels, _ = data(poisons=0)
    decision = decide(values, ranking, labels)
    assert bool(decision.keep.all())
    assert decision.threshold == math.inf
    assert decision.subpopulations == ()
    assert decision.num_flagged_before_cap == 0
    assert torch.equal(decision.scores.argsort(), ranking.argsort())


def test_the_cap_keeps_the_most_suspicious_and_says_so() -> None:
    values, ranking, labels, poisoned = data()
    decision = decide(values, ranking, labels, max_removed=0.05)
    assert int((~decision.keep).sum()) == 30
    assert bool(poisoned[~decision.keep].all())
    assert decision.num_flagged_before_cap == 40
    assert decision.rule.endswith("max_removed(0.05)")
    assert follows_its_threshold(decision, torch.ones(600, dtype=torch.bool))


def label_of_two(share: float, *, own: int = 200, other: int = 200, seed: int = 0) -> tuple[Tensor, ...]:
    """Three labels of ``other`` samples; a share of label 0 is of a kind that no other label has. And which ones."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat_interleave(torch.tensor([own, other, other, other]))
    kind = torch.arange(len(labels)) < round(share * own)
    values = 2 * torch.randn(4, 12, generator=generator)[labels] + torch.randn(len(labels), 12, generator=generator)
    values[:, :2] = torch.randn(len(labels), 2, generator=generator) + 9 * kind[:, None]
    return values, torch.randn(len(labels), generator=generator), labels, kind


@pytest.mark.parametrize(("share", "removed"), [(0.0, 0), (0.8, 160), (0.9, 170)])
def test_some_samples_of_every_label_stay(share: float, removed: int) -> None:
    """Nine of ten images of a label with a black border may be all that there is of the label."""
    values, ranking, labels, kind = label_of_two(share)
    decision = decide(values, ranking, labels)
    gone = ~decision.keep
    assert (int(gone.sum()), decision.num_flagged_before_cap) == (removed, int(kind.sum()))
    assert bool(kind[gone].all())
    assert ("left_of_label(0.15)" in decision.rule) == (share == 0.9)
    if share == 0.9:
        assert decision.scores[gone].min() >= decision.scores[kind & decision.keep].max(), "the most suspicious first"
        assert decision.threshold == 0.5
        both = decide(values, ranking, labels, max_removed=0.1)
        assert int((~both.keep).sum()) == 80
        assert both.rule.endswith("left_of_label(0.15), max_removed(0.1)")
        assert bool((both.scores[~both.keep] > both.threshold).all())
        by_fraction = decide(values, ranking, labels, fraction=0.225)
        assert torch.equal(~by_fraction.keep, kind), "a quota is as the paper has it"


def test_a_label_that_others_were_given_keeps_its_own_samples_and_no_more() -> None:
    """Of many classes, the target's own images are few beside the poisons: 92 % of the label are removed."""
    values, ranking, labels, kind = label_of_two(0.92, own=600, other=50)
    decision = decide(values, ranking, labels, max_removed=0.9)
    assert torch.equal(~decision.keep, kind)
    assert decision.rule.startswith(STRICT)


def test_some_samples_of_every_label_stay_over_all_looks_together() -> None:
    values, ranking, labels, _ = label_of_two(0.9)
    first = decide(values, ranking, labels)
    rest = first.keep & (labels == 0)
    later = Decision(ranking[first.keep], ~rest[first.keep], 0.5, "later", (), int(rest.sum()))
    common = {"scores": first.scores, "keep": first.keep, "threshold": 0.5, "max_removed": 0.9}
    joined = add_removed(later, **common, labels=labels)
    assert torch.equal(joined.keep, first.keep)
    assert joined.rule == "later, left_of_label(0.15)"
    assert int((~add_removed(later, **common).keep).sum()) == 200, "without a limit the label would be gone"


def test_only_considered_samples_are_removed() -> None:
    values, ranking, labels, poisoned = data()
    inside = decide(values, ranking, labels, considered=labels == 1)
    assert torch.equal(~inside.keep, poisoned)
    elsewhere = decide(values, ranking, labels, considered=labels == 2)
    assert bool(elsewhere.keep.all())
    assert elsewhere.threshold == math.inf
    assert elsewhere.subpopulations == ()


def test_a_fraction_of_the_ranking_is_the_papers_rule() -> None:
    values, ranking, labels, _ = data()
    decision = decide(values, ranking, labels, fraction=0.17, by_ranking=True)
    count = int(0.17 * 600)
    assert torch.equal((~decision.keep).nonzero().squeeze(1), ranking.topk(count).indices.sort().values)
    assert torch.equal(decision.scores, ranking)
    assert decision.rule == "fraction(0.17)"
    assert decision.threshold == float(ranking[decision.keep].max())


def test_a_fraction_of_the_target_class() -> None:
    values, ranking, labels, _ = data()
    target = labels == 2
    decision = decide(values, ranking, labels, considered=target, fraction=0.25, by_ranking=True)
    assert int((~decision.keep).sum()) == int(0.25 * int(target.sum()))
    assert follows_its_threshold(decision, target)


def test_a_fraction_removes_the_subpopulation_first() -> None:
    values, ranking, labels, poisoned = data()
    decision = decide(values, ranking, labels, fraction=0.1)
    assert int((~decision.keep).sum()) == 60
    assert not bool(decision.keep[poisoned].any())


def test_cutting_the_ranking_needs_a_share() -> None:
    values, ranking, labels, _ = data()
    with pytest.raises(ArgumentError, match="pass `fraction`"):
        decide(values, ranking, labels, by_ranking=True)
    with pytest.raises(ArgumentError, match="counts towards `fraction`"):
        decide(values, ranking, labels, removed=labels == 1)


@settings(max_examples=30, deadline=None)
@given(
    poisons=st.sampled_from([0, 15, 40]),
    fraction=st.none() | st.floats(0, 0.9),
    by_ranking=st.booleans(),
    max_removed=st.floats(0.001, 0.9),
    considered=st.sampled_from(["all", "target", "other"]),
)
def test_a_decision_follows_its_threshold(
    poisons: int, fraction: float | None, by_ranking: bool, max_removed: float, considered: str
) -> None:
    values, ranking, labels, _ = data(300, poisons)
    mask = {"all": labels >= 0, "target": labels == 1, "other": labels == 0}[considered]
    decision = decide(
        values,
        ranking,
        labels,
        considered=mask,
        fraction=fraction,
        by_ranking=by_ranking and fraction is not None,
        max_removed=max_removed,
    )
    removed = int((~decision.keep).sum())
    assert removed <= int(max_removed * 300)
    assert removed == min(decision.num_flagged_before_cap, int(max_removed * 300))
    assert bool(decision.keep[~mask].all())
    kept, gone = decision.scores[mask & decision.keep], decision.scores[~decision.keep]
    assert bool((kept <= decision.threshold).all())
    assert bool((gone >= decision.threshold).all())
    if not set(kept.tolist()) & set(gone.tolist()):  # equal scores are cut by position
        assert follows_its_threshold(decision, mask)


def later(n: int, keep: Tensor, scores: Tensor) -> Decision:
    return Decision(scores, keep, 0.5, "subpopulation(none)", (), int((~keep).sum()))


masks = st.integers(5, 40).flatmap(
    lambda n: st.tuples(*(st.lists(st.booleans(), min_size=n, max_size=n) for _ in range(2)))
)


@settings(deadline=None)
@given(masks, st.floats(0.05, 0.95), st.integers(0, 100))
def test_a_later_decision_adds_and_never_brings_back(
    drawn: tuple[list[bool], list[bool]], max_removed: float, seed: int
) -> None:
    before, now = torch.tensor(drawn[0]), torch.tensor(drawn[1])
    n = len(before)
    old, new = torch.rand(2, n, generator=torch.Generator().manual_seed(seed))
    joined = add_removed(later(n, now, new), scores=old, keep=before, threshold=0.7, max_removed=max_removed)
    assert not bool((joined.keep & ~before).any())
    assert bool((joined.keep | ~before | ~now).all())  # only what one of the two removed is gone
    budget = max(int(max_removed * n), int((~before).sum()))
    added = before & ~joined.keep
    assert int((~joined.keep).sum()) <= budget
    spared = before & ~now & joined.keep
    if bool(spared.any()):
        assert int((~joined.keep).sum()) == budget
        if bool(added.any()):
            assert float(new[added].min()) >= float(new[spared].max())
    assert torch.equal(joined.scores, torch.where(before, new, old))
    if bool(added.any()) and int((~joined.keep).sum()) == budget:  # the cap decides, no longer the rule
        assert bool((joined.scores[joined.keep] <= joined.threshold).all())
    else:
        assert joined.threshold == 0.5


def test_a_later_decision_that_finds_nothing_changes_nothing() -> None:
    before, everything = torch.tensor([True, False, True]), torch.ones(3, dtype=torch.bool)
    nothing = Decision(torch.zeros(3), everything, math.inf, "subpopulation(none)", (), 0)
    joined = add_removed(nothing, scores=torch.ones(3), keep=before, threshold=0.5, max_removed=0.9)
    assert torch.equal(joined.keep, before)
    assert joined.threshold == 0.5
    assert joined.scores.tolist() == [0, 1, 0]
    assert joined.num_flagged_before_cap == 1


@pytest.mark.parametrize("target", [None, 1])
def test_a_fraction_is_that_of_all_decisions_together(target: int | None) -> None:
    values, ranking, labels, _ = data()
    considered = labels >= 0 if target is None else labels == target
    count = int(considered.sum())

    def look(ranking: Tensor, fraction: float, before: Decision | None, max_removed: float = 0.9) -> Decision:
        found = decide(
            values,
            ranking,
            labels,
            considered=considered,
            fraction=fraction,
            by_ranking=True,
            removed=None if before is None else ~before.keep,
            max_removed=max_removed,
        )
        if before is None:
            return found
        return add_removed(found, before.scores, before.keep, threshold=found.threshold, max_removed=max_removed)

    first = look(ranking, 0.1, None)
    same = look(-ranking, 0.1, first)
    assert torch.equal(same.keep, first.keep)
    assert same.num_flagged_before_cap == int(0.1 * count)
    more = look(-ranking, 0.25, first)
    assert int((~more.keep).sum()) == more.num_flagged_before_cap == int(0.25 * count)
    assert not bool((more.keep & ~first.keep).any())
    added, kept = -ranking[first.keep & ~more.keep], -ranking[more.keep & considered]
    assert float(added.min()) > float(kept.max()) == more.threshold
    capped = look(-ranking, 0.25, first, max_removed=0.12 * count / 600)
    assert int((~capped.keep).sum()) == int(0.12 * count / 600 * 600)
    assert not bool((capped.keep & ~first.keep).any())
    assert capped.num_flagged_before_cap == int(0.25 * count)


def test_findings_are_the_subpopulations_with_their_samples() -> None:
    values, ranking, labels, poisoned = data()
    decision = decide(values, ranking, labels, max_removed=0.05)
    (found,) = findings_of(decision, labels)
    assert (found.label, found.gate) == (1, "strict")
    assert found.figures == decision.subpopulations[0].figures
    assert torch.equal(found.positions.sort().values, poisoned.nonzero().squeeze(1)), "those of the cap, too"
    assert bool((decision.scores[found.positions].diff() <= 0).all()), "most suspicious first"
    assert torch.equal(found.members(values, labels), poisoned)
    clean, ranking, labels, _ = data(poisons=0)
    assert findings_of(decide(clean, ranking, labels), labels) == ()


def test_a_later_look_keeps_the_findings_and_adds_new_ones() -> None:
    values, ranking, labels, _ = data()
    first = decide(values, ranking, labels, max_removed=0.05)
    cut = first.scores, first.keep, first.threshold, first.rule
    earlier = Verdict(*cut, labels, findings=findings_of(first, labels))
    rest = first.keep
    limits = {"threshold": 0.5, "max_removed": 0.5, "labels": labels}
    same = add_removed(decide(values[rest], ranking[rest], labels[rest]), first.scores, rest, **limits)
    assert int((~same.keep).sum()) == 40, "the ten that the cap had kept"
    assert findings_of(same, labels, earlier) == earlier.findings, "they were in the finding before"
    second = (labels == 2) & (torch.arange(600) < 120)
    values[second, 2:4] += 9
    more = add_removed(decide(values[rest], ranking[rest], labels[rest]), first.scores, rest, **limits)
    before, new = findings_of(more, labels, earlier)
    assert before is earlier.findings[0]
    assert torch.equal(new.positions.sort().values, second.nonzero().squeeze(1))


def kind_beside_attack(attack: bool = True, approve: str = "kind") -> tuple[Tensor, ...]:
    """Label 1 of three holds a clean kind (columns 0 and 1), more far away, and an attack (columns 2 and 3)."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(600) % 3
    own = (labels == 1).nonzero().squeeze(1)
    kind, attacked = torch.zeros(600, dtype=torch.bool), torch.zeros(600, dtype=torch.bool)
    kind[own[:70]] = True
    attacked[own[70:100]] = attack
    values = torch.randn(3, 12, generator=generator)[labels] + torch.randn(600, 12, generator=generator)
    values[:, :4] = torch.randn(600, 4, generator=generator)
    values[:, :2] += 12 * kind[:, None]
    values[:, 2:4] += 8 * attacked[:, None]
    approved = {"kind": kind, "others": (labels == 1) & ~attacked, "none": torch.zeros_like(kind)}[approve]
    return values, torch.randn(600, generator=generator), labels, kind, attacked, approved


def test_an_approved_kind_hides_no_attack_on_its_label() -> None:
    values, ranking, labels, kind, attacked, approved = kind_beside_attack()
    assert not bool((~decide(values, ranking, labels).keep & attacked).any()), "the kind stands out further"
    decision = decide(values, ranking, labels, approved=approved)
    assert torch.equal(~decision.keep, attacked)
    assert decision.num_flagged_before_cap == 30
    (found,) = findings_of(decision, labels)
    assert torch.equal(found.positions.sort().values, attacked.nonzero().squeeze(1))
    assert bool((decision.scores[kind] == decision.scores.min()).all())
    capped = decide(values, ranking, labels, approved=approved, max_removed=0.04)
    assert int((~capped.keep).sum()) == 24
    assert not bool((~capped.keep & ~attacked).any())


def test_an_approved_kind_alone_is_no_finding() -> None:
    values, ranking, labels, _, _, approved = kind_beside_attack(attack=False)
    assert not bool(decide(values, ranking, labels).keep.all())
    decision = decide(values, ranking, labels, approved=approved)
    assert bool(decision.keep.all())
    assert (decision.threshold, decision.subpopulations, decision.num_flagged_before_cap) == (math.inf, (), 0)


def test_approving_all_others_of_a_label_hides_no_attack_on_it() -> None:
    values, ranking, labels, _, attacked, approved = kind_beside_attack(approve="others")
    assert torch.equal(~decide(values, ranking, labels, approved=approved).keep, attacked)


def test_where_none_is_approved_nothing_changes() -> None:
    values, ranking, labels, *_, nobody = kind_beside_attack(approve="none")
    plain, decision = decide(values, ranking, labels), decide(values, ranking, labels, approved=nobody)
    assert torch.equal(plain.scores, decision.scores)
    assert torch.equal(plain.keep, decision.keep)


def test_some_approved_of_a_group_leave_the_others_in_it() -> None:
    values, ranking, labels, poisoned = data()
    approved = poisoned & (poisoned.cumsum(0) % 4 == 0)
    decision = decide(values, ranking, labels, approved=approved)
    assert torch.equal(~decision.keep, poisoned & ~approved)
    assert decision.num_flagged_before_cap == 30


def test_a_share_is_that_of_the_samples_that_are_not_approved() -> None:
    values, ranking, labels, _ = data()
    approved = ranking > ranking.quantile(0.75)
    decision = decide(values, ranking, labels, approved=approved, fraction=0.2, by_ranking=True)
    assert int((~decision.keep).sum()) == 90
    assert not bool((~decision.keep & approved).any())


def test_the_natural_break_is_that_of_the_samples_that_are_not_approved() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, 8.0, 9.0, 99.0])
    decision = decide_by_break(scores, approved=scores > 90, max_removed=0.9)
    assert decision.keep.tolist() == [True, True, True, False, False, True]


def test_all_of_one_kind_of_every_label_can_be_approved() -> None:
    """A style that all labels have, as an all-to-all trigger has it."""
    generator = torch.Generator().manual_seed(0)
    labels, kind = torch.arange(600) % 4, torch.arange(600) < 120
    values = 2 * torch.randn(4, 12, generator=generator)[labels] + torch.randn(600, 12, generator=generator)
    values[:, :2] += 15 * kind[:, None]
    settings: dict[str, Any] = {"all_to_all": True}
    assert torch.equal(~decide(values, torch.zeros(600), labels, **settings).keep, kind)
    assert bool(decide(values, torch.zeros(600), labels, **settings, approved=kind).keep.all())
