"""From what a scan measured to the samples that stay: cuts of one score per sample, limits, and the decision."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor.detection.directions import LabelGroups, group_by_label, running_sums
from lightning_backdoor.detection.subpopulations import (
    FALSE_ALARM_RATE,
    Search,
    Subpopulation,
    common_subpopulations,
    members_of,
    own_subpopulations,
    scores_in,
    search_labels,
)
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.verdict import Finding, Verdict

__all__ = [
    "OF_LABEL",
    "Decision",
    "add_removed",
    "decide",
    "decide_by_break",
    "findings_of",
    "limit_of_labels",
    "limit_removed",
    "natural_break",
    "select_fraction",
    "verdict_of",
]

LEFT = (
    0.15  # of a label stays; poisons with right labels are seldom more than 80 % of it, and a class needs some samples
)

SEARCHES = 4  # at most, each without the approved samples of the groups that the one before has found

OF_LABEL = f"left_of_label({LEFT:g})"
"""Stands in a rule where :func:`~lightning_backdoor.functional.limit_of_labels` kept some samples."""


# Cuts and limits.


def natural_break(values: Tensor) -> float:
    """Return the exact two-group optimum of one-dimensional values: the largest value of the lower group.

    The split minimises the sum of squared deviations within both groups (Jenks natural breaks, 2-means in one
    dimension), found in O(N log N) with prefix sums. Members of the upper group are ``values > natural_break(values)``.

    Args:
        values: Float, shape ``(N,)`` with N ≥ 2.

    Raises:
        ArgumentError: If there are fewer than two values, one is not finite, or all are equal.

    Example:
        >>> import torch
        >>> natural_break(torch.tensor([1.0, 9.0, 2.0, 8.0]))
        2.0
    """
    if values.ndim != 1 or len(values) < 2:
        raise ArgumentError(f"`values` must have shape (N,) with N >= 2, got {tuple(values.shape)}.")
    if not bool(values.isfinite().all()):
        raise ArgumentError("`values` must be finite, got NaN or infinity. Leave these samples out first.")
    ordered = values.sort().values
    if ordered[0] == ordered[-1]:
        raise ArgumentError("`values` are all equal: there is no break. Test for a spread before asking for a split.")
    sums = running_sums(ordered.double() - ordered.double().mean())
    count = torch.arange(1, len(values), dtype=torch.float64, device=values.device)
    # With a mean of zero the explained sum of squares of a split after the n-th value is S_n^2 (1/n + 1/(N-n)).
    explained = sums[:-1].square() * (1 / count + 1 / (len(values) - count))
    explained[ordered[:-1] == ordered[1:]] = -1.0  # equal values stay together
    return float(ordered[int(explained.argmax())])


def select_fraction(scores: Tensor, fraction: float) -> tuple[Tensor, float]:
    """Keep all but the ``int(fraction * N)`` largest scores (UltraClean, whole-dataset scenario).

    Args:
        scores: Float, shape ``(N,)``; larger is more suspicious. ``-inf`` marks samples that must stay.
        fraction: Share of the samples to remove, in ``[0, 1)``.

    Returns:
        ``keep``, bool ``(N,)``, and the threshold: the largest score that stays (ties are cut by position).

    Example:
        >>> import torch
        >>> select_fraction(torch.tensor([0.1, 3.0, 2.0, 0.2]), 0.5)
        (tensor([ True, False, False,  True]), 0.20000000298023224)
    """
    if not 0 <= fraction < 1:
        raise ArgumentError(f"`fraction` must lie in [0, 1), got {fraction}. For twenty per cent, pass 0.2.")
    order = scores.argsort(descending=True, stable=True)
    removed = order[: int(fraction * len(scores))]
    removed = removed[scores[removed] > -math.inf]
    keep = torch.ones_like(scores, dtype=torch.bool)
    keep[removed] = False
    return keep, float(scores[keep].max()) if len(removed) else math.inf


def limit_removed(scores: Tensor, keep: Tensor, max_removed: float) -> Tensor:
    """Return ``keep`` with the least suspicious removed samples put back until at most ``max_removed`` are gone.

    Args:
        scores: Float, shape ``(N,)``; larger is more suspicious.
        keep: Bool, shape ``(N,)``.
        max_removed: Largest share of the samples that may be removed, in ``(0, 1)``.
    """
    budget = int(max_removed * len(keep))
    removed = (~keep).nonzero().squeeze(1)
    if len(removed) <= budget:
        return keep
    allowed = removed[scores[removed].argsort(descending=True, stable=True)[:budget]]
    limited = torch.ones_like(keep)
    limited[allowed] = False
    return limited


def limit_of_labels(scores: Tensor, keep: Tensor, labels: Tensor, left: float = LEFT) -> Tensor:
    """Return ``keep`` with the least suspicious removed samples of a label put back until enough of it are left.

    Enough is a share of the label, or of as many samples as the median label has, where the label has more: poisons of
    other classes can be the larger part of the label that they are given, and its own samples are enough then.

    Args:
        scores: Float, shape ``(N,)``; larger is more suspicious.
        keep: Bool, shape ``(N,)``.
        labels: Labels as given, long, shape ``(N,)``.
        left: The share, in ``[0, 1]``; numbers of samples are rounded up.

    Example:
        >>> import torch
        >>> labels, keep = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([False] * 4 + [True] * 4)
        >>> limit_of_labels(torch.tensor([4.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0]), keep, labels, 0.5)
        tensor([False,  True,  True, False,  True,  True,  True,  True])
    """
    _, places, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    if not len(counts):
        return keep.clone()
    usual = counts.median()
    enough = (left * torch.minimum(counts, usual).double() - 1e-9).ceil().long()
    lacking = (enough - torch.zeros_like(counts).scatter_add_(0, places, keep.long())).clamp(min=0)
    # The removed samples of every label, least suspicious last: the last of each are put back.
    removed = (~keep).nonzero().squeeze(1)
    removed = removed[scores[removed].argsort(descending=True, stable=True)]
    removed = removed[places[removed].argsort(stable=True)]
    of = places[removed]
    ends = torch.zeros_like(counts).scatter_add_(0, of, torch.ones_like(of)).cumsum(0)
    limited = keep.clone()
    limited[removed[torch.arange(len(of), device=of.device) >= (ends - lacking)[of]]] = True
    return limited


# The decision.


@dataclass(frozen=True)
class Decision:
    """Scores and cut, with what led to them.

    Attributes:
        scores: Float ``(N,)``; larger is more suspicious.
        keep: Bool ``(N,)``.
        threshold: Samples with a score above it are removed.
        rule: How the threshold was chosen, in words.
        subpopulations: Subpopulations that passed a gate (``rule="auto"``).
        num_flagged_before_cap: Samples that the rule selected before ``max_removed`` limited it.
        all_to_all: Whether the subpopulations are the one that most labels have in common.
    """

    scores: Tensor
    keep: Tensor
    threshold: float
    rule: str
    subpopulations: tuple[Subpopulation, ...]
    num_flagged_before_cap: int
    all_to_all: bool = False

    def cpu(self) -> Decision:
        """The same with its tensors on the CPU."""
        found = tuple(one.to(torch.device("cpu")) for one in self.subpopulations)
        return replace(self, scores=self.scores.cpu(), keep=self.keep.cpu(), subpopulations=found)


def decide(
    values: Tensor,
    ranking: Tensor,
    labels: Tensor,
    *,
    considered: Tensor | None = None,
    approved: Tensor | None = None,
    fraction: float | None = None,
    by_ranking: bool = False,
    removed: Tensor | None = None,
    all_to_all: bool = False,
    agreement: Tensor | None = None,
    pictures: Tensor | None = None,
    false_alarm_rate: float = FALSE_ALARM_RATE,
    max_removed: float = 0.3,
) -> Decision:
    """Decide which samples are removed: the subpopulations that pass a gate, or a share of all samples.

    Args:
        values: Response of every unit to every sample, float, shape ``(N, U)``, in which subpopulations are searched.
        ranking: One general suspicion per sample, float, shape ``(N,)``; orders the samples outside subpopulations.
        labels: Labels as given, long, shape ``(N,)``.
        considered: Samples that may be removed, bool, shape ``(N,)``; all by default.
        approved: Samples that the user has declared to be fine, bool, shape ``(N,)``: they stay, with the lowest score,
            and count for no share. No subpopulation rests on them: where one that is found holds some, the search is
            repeated without these, so that they hide no other one either. Elsewhere they are a part of their label.
        fraction: Remove this share of the considered samples, whatever the data look like; ``None`` removes the
            subpopulations that pass a gate, if there are any.
        by_ranking: With ``fraction``: cut ``ranking`` itself instead of the scores of the subpopulations.
        removed: With ``fraction``: samples that earlier decisions removed, bool, shape ``(N,)``; they come first and
            count, so that the share is that of all decisions together.
        all_to_all: If no label has a subpopulation of its own, search for one that most labels have in common
            (:func:`~lightning_backdoor.functional.find_all_to_all_subpopulation`).
        agreement: Share of every sample's neighbours that had its label early in training, float, shape ``(N,)``, for
            the gate of early neighbours (:func:`~lightning_backdoor.functional.find_subpopulations`).
        pictures: Small grey pictures of the samples, half, shape ``(N, 144)``, by which near-duplicates are known
            (:func:`~lightning_backdoor.functional.thumbnails`).
        false_alarm_rate: Chance at most that noise is taken for a subpopulation in a training.
        max_removed: Largest share of all samples that may be removed, in ``(0, 1)``.

    The values may be on another device than the rest; what takes long is computed there.

    Returns:
        The decision, on the device of the labels. When nothing stands out and ``fraction`` is ``None``, ``keep`` is all
        true and the threshold infinite. Without a ``fraction`` some samples of every label stay, whatever their scores
        (:func:`~lightning_backdoor.functional.limit_of_labels`): a population that is nearly all of a label may be the
        label itself.

    Raises:
        ArgumentError: If ``by_ranking`` or ``removed`` comes without a ``fraction``.
    """
    if by_ranking and fraction is None:
        raise ArgumentError("`by_ranking` cuts a share of the ranking: pass `fraction`, the share, with it.")
    if removed is not None and fraction is None:
        raise ArgumentError("`removed` counts towards `fraction`: pass it, or leave the removed samples out.")
    considered = torch.ones_like(labels, dtype=torch.bool) if considered is None else considered
    if approved is not None:
        considered = considered & ~approved
    found: list[Subpopulation] = []
    common: list[Subpopulation] = []
    if by_ranking:
        scores = ranking.float().clone()
    else:
        rate = false_alarm_rate if fraction is None else math.inf  # a share is removed whatever the evidence
        evidence: dict[str, Any] = {"agreement": agreement, "pictures": pictures, "false_alarm_rate": rate}
        found, common, groups = _search_beside(
            approved, values, labels, considered=considered, all_to_all=all_to_all, **evidence
        )
        scores = scores_in(values, groups, found, ranking)
    if approved is not None and not bool(approved.all()):
        scores = scores.masked_fill(approved, float(scores[~approved].min()))
    order = scores if removed is None else scores.masked_fill(removed, math.inf)
    if fraction is not None:
        inside = considered.nonzero().squeeze(1)
        keep = torch.ones_like(labels, dtype=torch.bool)
        keep[inside], threshold = select_fraction(order[inside], fraction)
        rule = f"fraction({fraction:g})"
    else:
        keep, threshold = ~(considered & (scores > 0.5)), 0.5 if found else math.inf
        rule = _rule_of(found)
    num_flagged_before_cap = int((~keep).sum())
    spared = limit_of_labels(order, keep, labels) & ~keep if fraction is None else torch.zeros_like(keep)
    if bool(spared.any()):
        keep, rule = keep | spared, f"{rule}, {OF_LABEL}"
    limited = limit_removed(order, keep, max_removed)
    if not torch.equal(limited, keep):
        keep, rule = limited, f"{rule}, max_removed({max_removed:g})"
        threshold = float(scores[keep & considered & ~spared].max())
    found = [one.to(labels.device) for one in found]
    return Decision(scores, keep, threshold, rule, tuple(found), num_flagged_before_cap, bool(common))


def _search_beside(
    approved: Tensor | None,
    values: Tensor,
    labels: Tensor,
    *,
    considered: Tensor,
    all_to_all: bool,
    **evidence: Any,
) -> tuple[list[Subpopulation], list[Subpopulation], LabelGroups]:
    """The subpopulations of labels with considered samples, those of them that labels share, and all samples by label.

    Approved samples of what was found are left out of the next search, until nothing that is found holds any.
    """
    eligible = set(torch.unique(labels[considered]).tolist())
    left_out = torch.zeros_like(labels, dtype=torch.bool)
    for _ in range(SEARCHES):
        search = _search_without(left_out, values, labels, **evidence)
        found = [one for one in own_subpopulations(search) if one.label in eligible]
        common = common_subpopulations(search) if all_to_all and not found else []
        found += common
        groups = group_by_label(labels.to(values.device)) if bool(left_out.any()) else search.groups
        if approved is None:
            break
        fine = approved & ~left_out & members_of(values, groups, found).to(labels.device)
        if not bool(fine.any()):
            break
        left_out |= fine
    return found, common, groups


def _search_without(
    left_out: Tensor,
    values: Tensor,
    labels: Tensor,
    *,
    agreement: Tensor | None,
    pictures: Tensor | None,
    **settings: Any,
) -> Search:
    """Search all samples but some; a mask that keeps all would copy a gigabyte."""
    if not bool(left_out.any()):
        return search_labels(values, labels, agreement=agreement, pictures=pictures, **settings)
    agreement, pictures = (
        column if column is None else column[~left_out.to(column.device)] for column in (agreement, pictures)
    )
    rest = ~left_out
    return search_labels(
        values[rest.to(values.device)], labels[rest], agreement=agreement, pictures=pictures, **settings
    )


def _rule_of(found: list[Subpopulation]) -> str:
    """The gates that were passed with their bounds, such as ``subpopulation(strict: standardized_gap>=2.5, ...)``."""
    gates = dict.fromkeys(f"{one.gate}: {', '.join(each.criterion for each in one.figures)}" for one in found)
    return f"subpopulation({'; '.join(gates) or 'none'})"


def add_removed(
    decision: Decision,
    scores: Tensor,
    keep: Tensor,
    *,
    threshold: float,
    max_removed: float,
    labels: Tensor | None = None,
) -> Decision:
    """Join a later decision with an earlier verdict: what was removed stays removed, with its score, within one cap.

    The later model was trained without the removed samples, so their later scores may be low.

    Args:
        decision: The later decision, on all N samples or on those that were kept.
        scores: Scores of the earlier verdict, float, shape ``(N,)``.
        keep: Samples that the earlier verdict kept, bool, shape ``(N,)``.
        threshold: Threshold of the earlier verdict.
        max_removed: Largest share of all samples that may be removed in all, in ``(0, 1)``.
        labels: Labels of all N samples, long ``(N,)``; some samples of every label stay, as in :func:`decide`. ``None``
            sets no limit.
    """
    removed = ~keep
    if len(decision.keep) < len(keep):
        decision = replace(
            decision,
            scores=scores.masked_scatter(keep, decision.scores),
            keep=torch.ones_like(keep).masked_scatter(keep, decision.keep),
        )
    budget = max(int(max_removed * len(removed)) - int(removed.sum()), 0)
    spared, order = torch.zeros_like(keep), decision.scores.masked_fill(removed, math.inf)
    if labels is not None:
        spared = limit_of_labels(order, decision.keep & keep, labels) & ~decision.keep & keep
    rule = f"{decision.rule}, {OF_LABEL}" if bool(spared.any()) and OF_LABEL not in decision.rule else decision.rule
    new = (~decision.keep & ~removed & ~spared).nonzero().squeeze(1)
    new = new[decision.scores[new].argsort(descending=True, stable=True)[:budget]]
    still = keep.clone()
    still[new] = False
    threshold = min(decision.threshold, threshold)
    if 0 < len(new) == budget:
        threshold = float(decision.scores[still & ~spared].max())
    return replace(
        decision,
        scores=torch.where(removed, scores, decision.scores),
        keep=still,
        rule=rule,
        threshold=threshold,
        num_flagged_before_cap=decision.num_flagged_before_cap + int((removed & decision.keep).sum()),
    )


def decide_by_break(scores: Tensor, *, approved: Tensor | None = None, max_removed: float = 0.3) -> Decision:
    """Remove the samples above the natural break of the scores, as NONE does; any data has such a break.

    Args:
        scores: Float, shape ``(N,)``; larger is more suspicious.
        approved: Samples that stay, with the lowest score, bool ``(N,)``.
        max_removed: Largest share of the samples that may be removed, in ``(0, 1)``.
    """
    if approved is not None:
        scores = scores.masked_fill(approved, float(scores.min()))
    if bool((scores == scores[0]).all()):
        return Decision(scores, torch.ones_like(scores, dtype=torch.bool), math.inf, "natural_break", (), 0)
    threshold, rule = natural_break(scores), "natural_break"
    keep = scores <= threshold
    num_flagged_before_cap = int((~keep).sum())
    limited = limit_removed(scores, keep, max_removed)
    if not torch.equal(limited, keep):
        keep, threshold, rule = limited, float(scores[limited].max()), f"{rule}, max_removed({max_removed:g})"
    return Decision(scores, keep, threshold, rule, (), num_flagged_before_cap)


def verdict_of(
    decision: Decision,
    labels: Tensor,
    earlier: Verdict | None = None,
    *,
    trusted: Tensor | None = None,
    suspect: Tensor | None = None,
) -> Verdict:
    """The verdict that a decision on all N samples leads to, on the CPU, with its findings; see :func:`findings_of`."""
    decision, labels = decision.cpu(), labels.cpu()
    return Verdict(
        decision.scores,
        decision.keep,
        decision.threshold,
        decision.rule,
        labels,
        trusted=trusted,
        suspect=suspect,
        findings=findings_of(decision, labels, earlier),
    )


def findings_of(decision: Decision, labels: Tensor, earlier: Verdict | None = None) -> tuple[Finding, ...]:
    """The subpopulations of a decision as findings, after those of an earlier verdict.

    Args:
        decision: On all N samples; joined with the earlier verdict, if there is one (:func:`add_removed`).
        labels: Labels as given, long, shape ``(N,)``.
        earlier: The verdict before it. Samples that it removed or that are in one of its findings are in no new one; a
            subpopulation without other samples is no finding.

    Returns:
        The earlier findings as they are, and one per subpopulation that has new members.
    """
    decision, labels = decision.cpu(), labels.cpu()
    before = () if earlier is None else earlier.findings
    free = torch.ones_like(decision.keep) if earlier is None else earlier.keep.clone()
    for finding in before:
        free[finding.positions] = False
    added = []
    for found in decision.subpopulations:
        positions = (free & (labels == found.label) & (decision.scores > 0.5)).nonzero().squeeze(1)
        positions = positions[decision.scores[positions].argsort(descending=True, stable=True)]
        if len(positions):
            rule = found.gate, found.figures, found.units, found.weights, found.threshold
            added.append(Finding(found.label, positions, *rule))
    return (*before, *added)
