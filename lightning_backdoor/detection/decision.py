"""From what a scan measured to a verdict: scores, a gate for clean data, a cut, a cap."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_backdoor.detection.all_to_all import find_all_to_all_subpopulation
from lightning_backdoor.detection.cuts import (
    LEFT,
    limit_of_labels,
    limit_removed,
    natural_break,
    select_fraction,
)
from lightning_backdoor.detection.subpopulations import (
    EARLY_AGREEMENT,
    EARLY_GAP,
    STRICT_GAP,
    Subpopulation,
    find_subpopulations,
    subpopulation_scores,
)
from lightning_backdoor.errors import ArgumentError

OF_LABEL = f"left_of_label({LEFT:g})"
"""Stands in a rule where :func:`~lightning_backdoor.functional.limit_of_labels` kept some samples."""

__all__ = ["OF_LABEL", "Decision", "add_removed", "decide", "decide_by_break"]


@dataclass(frozen=True)
class Decision:
    """Scores and cut, with what led to them.

    Attributes:
        scores: Float ``(N,)``; larger is more suspicious.
        keep: Bool ``(N,)``.
        threshold: Samples with a score above it are removed.
        rule: How the threshold was chosen, in words.
        modes: Second modes that passed the gate (``rule="auto"``).
        num_flagged_before_cap: Samples that the rule pointed at before ``max_removed`` limited it.
        shared: Whether the modes are one that most labels share.
    """

    scores: Tensor
    keep: Tensor
    threshold: float
    rule: str
    modes: tuple[Subpopulation, ...]
    num_flagged_before_cap: int
    shared: bool = False


def decide(
    values: Tensor,
    ranking: Tensor,
    labels: Tensor,
    *,
    considered: Tensor | None = None,
    fraction: float | None = None,
    by_ranking: bool = False,
    removed: Tensor | None = None,
    shared: bool = False,
    agreement: Tensor | None = None,
    max_removed: float = 0.3,
) -> Decision:
    """Judge every sample.

    Args:
        values: Response of every unit to every sample, float, shape ``(N, U)``; second modes are looked for here.
        ranking: One general suspicion per sample, float, shape ``(N,)``; orders the samples outside such modes.
        labels: Labels as given, long, shape ``(N,)``.
        considered: Samples that may be removed, bool, shape ``(N,)``; all by default.
        fraction: Remove this share of the considered samples, whatever the data look like; ``None`` removes the second
            modes that pass the gate, if there are any.
        by_ranking: With ``fraction``: cut ``ranking`` itself instead of the mode scores.
        removed: With ``fraction``: samples that earlier decisions removed, bool, shape ``(N,)``; they come first and
            count, so that the share is that of all decisions together.
        shared: If no label has a second mode of its own, look for one that most labels share
            (:func:`~lightning_backdoor.functional.find_all_to_all_subpopulation`).
        agreement: What early neighbours say of every sample's label, float, shape ``(N,)``, for modes that are weaker
            than others (:func:`~lightning_backdoor.functional.find_subpopulations`).
        max_removed: Largest share of all samples that may be removed, in ``(0, 1)``.

    Returns:
        The decision. When nothing stands out and ``fraction`` is ``None``, ``keep`` is all true and the threshold
        infinite. Without a ``fraction`` some samples of every label stay, whatever their scores
        (:func:`~lightning_backdoor.functional.limit_of_labels`): a population that is nearly all of a label may be the
        label itself.

    Raises:
        ArgumentError: If ``by_ranking`` or ``removed`` comes without a ``fraction``.
    """
    if by_ranking and fraction is None:
        raise ArgumentError("`by_ranking` cuts a share of the ranking: pass `fraction`, the share, with it.")
    if removed is not None and fraction is None:
        raise ArgumentError("`removed` counts towards `fraction`: pass it, or leave the removed samples out.")
    considered = torch.ones(len(labels), dtype=torch.bool) if considered is None else considered
    found = [] if by_ranking else find_subpopulations(values, labels, agreement=agreement)
    modes = [mode for mode in found if bool(considered[labels == mode.label].any())]
    together = find_all_to_all_subpopulation(values, labels) if shared and not modes else []
    modes += together
    scores = ranking.float().clone() if by_ranking else subpopulation_scores(values, labels, modes, ranking)
    order = scores if removed is None else scores.masked_fill(removed, math.inf)
    if fraction is not None:
        inside = considered.nonzero().squeeze(1)
        keep = torch.ones(len(labels), dtype=torch.bool)
        keep[inside], threshold = select_fraction(order[inside], fraction)
        rule = f"fraction({fraction:g})"
    else:
        keep, threshold = ~(considered & (scores > 0.5)), 0.5 if modes else math.inf
        rule = f"{'shared' if together else 'second'}_mode(separation>={STRICT_GAP:g})"
        if any(mode.by_early_neighbors for mode in modes):
            early = f"early agreement < {EARLY_AGREEMENT:g} of the rest's"
            rule = f"{rule} or denied(separation>={EARLY_GAP:g}, {early})"
    num_flagged_before_cap = int((~keep).sum())
    spared = limit_of_labels(order, keep, labels) & ~keep if fraction is None else torch.zeros_like(keep)
    if bool(spared.any()):
        keep, rule = keep | spared, f"{rule}, {OF_LABEL}"
    limited = limit_removed(order, keep, max_removed)
    if not torch.equal(limited, keep):
        keep, rule = limited, f"{rule}, max_removed({max_removed:g})"
        threshold = float(scores[keep & considered & ~spared].max())
    return Decision(scores, keep, threshold, rule, tuple(modes), num_flagged_before_cap, bool(together))


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

    The later model was trained without the removed samples, so it no longer finds anything wrong with them.

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


def decide_by_break(scores: Tensor, *, max_removed: float = 0.3) -> Decision:
    """Judge every sample by the natural break of the scores, as NONE does; there is one in any data.

    Args:
        scores: Float, shape ``(N,)``; larger is more suspicious.
        max_removed: Largest share of the samples that may be removed, in ``(0, 1)``.
    """
    if bool((scores == scores[0]).all()):
        return Decision(scores, torch.ones(len(scores), dtype=torch.bool), math.inf, "natural_break", (), 0)
    threshold, rule = natural_break(scores), "natural_break"
    keep = scores <= threshold
    num_flagged_before_cap = int((~keep).sum())
    limited = limit_removed(scores, keep, max_removed)
    if not torch.equal(limited, keep):
        keep, threshold, rule = limited, float(scores[limited].max()), f"{rule}, max_removed({max_removed:g})"
    return Decision(scores, keep, threshold, rule, (), num_flagged_before_cap)
