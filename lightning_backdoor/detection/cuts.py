"""From one score per sample to the samples that stay."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_backdoor.errors import ArgumentError

__all__ = ["LEFT", "limit_of_labels", "limit_removed", "natural_break", "select_fraction"]

LEFT = 0.15  # of a label; poisons with right labels are seldom more than 80 % of it, and a class needs some samples


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
    sums = ordered.double().sub(ordered.double().mean()).cumsum(0)
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
    keep = torch.ones(len(scores), dtype=torch.bool)
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
    usual = int(counts.median()) if len(counts) else 0
    kept = torch.bincount(places[keep], minlength=len(counts)).tolist()
    limited = keep.clone()
    for place, count in enumerate(counts.tolist()):
        lacking = math.ceil(left * min(count, usual) - 1e-9) - kept[place]
        if lacking > 0:
            removed = (~keep & (places == place)).nonzero().squeeze(1)
            limited[removed[scores[removed].argsort(descending=True, stable=True)[-lacking:]]] = True
    return limited
