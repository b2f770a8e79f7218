"""NONE's statistics: how far inputs of one class drive a unit out of the range that it has on all others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_backdoor.errors import ArgumentError

__all__ = [
    "HyperplaneStatistics",
    "bias_scores",
    "candidate_units",
    "compromise_scores",
    "select_units",
    "strong_thresholds",
    "unit_shifts",
]

SIGMAS = 3.0  # of the responses to inputs that are surely of another class: the usual range of a unit
FALLBACK_SHARE = 0.01  # of the predictions of a class, taken as the confident ones where none is confident
FALLBACK_LEAST = 20
_LARGEST = 1e38


class HyperplaneStatistics:
    """The compromise score of every unit, from one pass over the data (stage 2 of NONE).

    As `Wang et al., 2022 <https://arxiv.org/abs/2202.06382>`_ define it. For a unit c and a class k, S_k are the inputs
    that the model assigns to k with a probability above ``strong``, W_k those whose probability of k is below ``weak``.
    A unit that works as a hyperplane is driven by some input of S_k far out of the range that it has on W_k: ``d[c, k]
    = max over S_k - (mean over W_k + 3 std over W_k)``. A class without inputs in S_k or in W_k has d = 0. Memory is
    O(units x classes), whatever the number of samples; sums are held in double precision, on the device of the first
    batch, so that no batch waits for a copy.

    Args:
        units: Number of units U.
        classes: Number of classes K.
        strong: Probability above which an input is confidently of a class, in ``(0, 1]``; a number, or one for each
            class, float ``(K,)`` (see :func:`strong_thresholds`).
        weak: Probability below which an input is confidently not of a class, in ``(0, 1)``.

    Raises:
        ArgumentError: A threshold is out of range.
    """

    def __init__(self, units: int, classes: int, *, strong: float | Tensor = 0.9, weak: float = 0.1) -> None:
        self.strong = torch.as_tensor(strong, dtype=torch.float32).expand(classes)
        self.weak = weak
        if not bool(((self.strong > 0) & (self.strong <= 1)).all()) or not 0 < weak < 1:
            raise ArgumentError(
                f"`strong` and `weak` must be probabilities, got {strong} and {weak}. Pass for example 0.9 and 0.1."
            )
        self.largest = torch.full((classes, units), -math.inf, dtype=torch.float64)
        self.sums = torch.zeros(classes, units, dtype=torch.float64)
        self.squares = torch.zeros(classes, units, dtype=torch.float64)
        self.confident = torch.zeros(classes, dtype=torch.float64)
        self.others = torch.zeros(classes, dtype=torch.float64)
        # Probabilities add up to one, so that no more than these classes have one above `strong`.
        self._most = min(int(1 / float(self.strong.min())), classes)

    def update(self, activations: Tensor, probabilities: Tensor) -> None:
        """Add a batch.

        Args:
            activations: Largest response of every unit, float ``(B, U)``, on any device, that of all batches.
            probabilities: Softmax outputs, float ``(B, K)``.

        Raises:
            ArgumentError: The shapes do not fit.
        """
        classes, units = self.sums.shape
        if activations.shape != (len(probabilities), units) or probabilities.shape[1:] != (classes,):
            raise ArgumentError(
                f"`activations` must have shape (B, {units}) and `probabilities` (B, {classes}), got "
                f"{tuple(activations.shape)} and {tuple(probabilities.shape)}."
            )
        self.to("cpu" if activations.device.type == "mps" else activations.device)  # which has no double precision
        values = activations.detach().to(self.sums.device, torch.float64, copy=True)
        chances = probabilities.detach().to(self.sums.device, torch.float32)
        values.clamp_(-_LARGEST, _LARGEST)  # half precision may have overflowed to infinity
        strong = chances > self.strong
        likely = chances.topk(self._most, dim=1).indices
        for column in likely.unbind(dim=1):  # no list of the confident pairs: the CPU would wait for its length
            confident = values.where(strong.gather(1, column[:, None]), -math.inf)
            self.largest.scatter_reduce_(0, column[:, None].expand(-1, units), confident, "amax")
        self.confident += strong.sum(dim=0)
        weak = (chances < self.weak).double()
        self.sums.addmm_(weak.T, values)
        self.squares.addmm_(weak.T, values.square_())
        self.others += weak.sum(dim=0)

    def to(self, device: torch.device | str) -> HyperplaneStatistics:
        """Move what was counted to a device, and return the statistics."""
        for name in ("strong", "largest", "sums", "squares", "confident", "others"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def state(self) -> Tensor:
        """Everything counted so far as one tensor, double ``(K, 3 U + 2)``, to be sent to another process."""
        return torch.cat([self.largest, self.sums, self.squares, self.confident[:, None], self.others[:, None]], dim=1)

    def load(self, states: Sequence[Tensor]) -> None:
        """Replace what was counted by that of several processes, from their :meth:`state`."""
        units = self.sums.shape[1]
        parts = torch.split(torch.stack(list(states)), [units, units, units, 1, 1], dim=2)
        self.largest = parts[0].amax(dim=0)
        self.sums, self.squares = parts[1].sum(dim=0), parts[2].sum(dim=0)
        self.confident, self.others = parts[3].sum(dim=0).squeeze(1), parts[4].sum(dim=0).squeeze(1)

    def usual(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over W_k, double ``(K, U)`` each; zero and NaN-free where W_k is empty."""
        count = self.others.clamp(min=1)[:, None]
        mean = self.sums / count
        return mean, (self.squares / count - mean.square()).clamp(min=0).sqrt()

    def activation_excess(self) -> Tensor:
        """How far each class drives each unit out of its usual range, d, double ``(U, K)``."""
        mean, std = self.usual()
        scored = (self.confident > 0) & (self.others > 0)
        return torch.where(scored[:, None], self.largest - (mean + SIGMAS * std), 0.0).T

    def scores(self) -> Tensor:
        """Compromise scores: the largest excess over the classes, double ``(U,)``."""
        return self.activation_excess().amax(dim=1)


def compromise_scores(activations: Tensor, probabilities: Tensor, strong: float = 0.9, weak: float = 0.1) -> Tensor:
    """Compromise score of every unit of one layer (NONE); see :class:`HyperplaneStatistics`.

    Args:
        activations: Largest response of every unit to every sample, float ``(N, C)``.
        probabilities: Softmax outputs, float ``(N, K)``.
        strong: Probability above which a sample is confidently of a class.
        weak: Probability below which it is confidently not of a class.

    Returns:
        Scores, float ``(C,)``; larger is more suspicious. Zero for all where no sample is confident.

    Example:
        >>> import torch
        >>> activations = torch.tensor([[9.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
        >>> compromise_scores(activations, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))
        tensor([8., 0.])
    """
    statistics = HyperplaneStatistics(activations.shape[1], probabilities.shape[1], strong=strong, weak=weak)
    statistics.update(activations, probabilities)
    return statistics.scores().to(activations)


def strong_thresholds(
    confidence: Tensor, predicted: Tensor, classes: int, strong: float = 0.9
) -> tuple[Tensor, list[int]]:
    """Thresholds of :class:`HyperplaneStatistics` for models that are never confident (many classes, label smoothing).

    A class that is predicted, but never with a probability above ``strong``, gets the threshold above which the most
    confident 1 % of its predictions lie, 20 at least.

    Args:
        confidence: Largest probability of each sample, float ``(N,)``.
        predicted: Class that it belongs to, long ``(N,)``.
        classes: Number of classes K.
        strong: Threshold where it can be used.

    Returns:
        Thresholds, float ``(K,)``, and the classes that needed another one.
    """
    order = confidence.argsort(descending=True, stable=True)
    order = order[predicted[order].argsort(stable=True)]  # by class, and within a class the most confident first
    counts = torch.zeros(classes, dtype=torch.long, device=predicted.device)
    counts.scatter_add_(0, predicted, torch.ones_like(predicted))
    starts = counts.cumsum(0) - counts
    few = (FALLBACK_SHARE * counts.double()).ceil().long().clamp(min=FALLBACK_LEAST)
    last = starts + torch.minimum(few, counts) - 1
    ordered = confidence[order]
    largest, least = ordered[starts.clamp(max=len(ordered) - 1)], ordered[last.clamp(min=0)]
    without = (counts > 0) & (largest <= strong)
    thresholds = torch.where(without, least.nextafter(torch.zeros_like(least)), strong)
    return thresholds, without.nonzero().squeeze(1).tolist()


def bias_scores(activations: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
    """How strongly each sample drives the most compromised unit of every layer (NONE's biased samples).

    Args:
        activations: Largest response of the chosen units, one or more of each layer, float ``(N, L)``.
        mean: Usual response of each, float ``(L,)``; ``None`` adds the raw responses up, as the authors do.
        std: Usual spread of each, float ``(L,)``. Layers of different width and scale weigh the same with it.

    Returns:
        Scores, float ``(N,)``; larger is more suspicious.

    Example:
        >>> import torch
        >>> responses = torch.tensor([[1.0, 100.0], [3.0, 100.0]])
        >>> bias_scores(responses)
        tensor([101., 103.])
        >>> bias_scores(responses, torch.tensor([1.0, 90.0]), torch.tensor([2.0, 10.0]))
        tensor([1., 2.])
    """
    values = activations.double()
    if mean is not None:
        values = values - mean
    if std is not None:
        values = values / std.clamp(min=1e-12)
    return values.sum(dim=1).to(activations.dtype)


def candidate_units(statistics: HyperplaneStatistics, limit: int) -> Tensor:
    """Select the units that some class drives furthest out of their usual range.

    Taken are the best unit of every class, then the second best ones, and so on. The excess is measured in usual
    standard deviations, so that layers of different scale compare.

    Args:
        statistics: Of all U units.
        limit: How many units to choose; all of them where there are no more.

    Returns:
        Unit numbers in ascending order, long ``(M,)`` with M ≤ ``limit``.
    """
    units = statistics.sums.shape[1]
    if units <= limit:
        return torch.arange(units, device=statistics.sums.device)
    _, std = statistics.usual()
    ranked = (
        (statistics.activation_excess() / std.T.clamp(min=1e-12)).argsort(dim=0, descending=True, stable=True).flatten()
    )
    order = torch.arange(len(ranked), device=ranked.device)
    place = torch.full_like(order[:units], len(ranked)).scatter_reduce_(0, ranked, order, "amin")
    return place.argsort(stable=True)[:limit].sort().values


def unit_shifts(statistics: HyperplaneStatistics) -> Tensor:
    """How far some samples drive each unit away from its responses to all others.

    Args:
        statistics: Of two classes: 0 for the others and 1 for the samples in question, given as certainties.

    Returns:
        Distance of the two means over the sum of the two standard deviations, double ``(U,)``; positive where the
        samples drive the unit up.
    """
    mean, std = statistics.usual()  # row 0: those that are surely not 0
    return (mean[0] - mean[1]) / (std[0] + std[1]).clamp(min=1e-12)


def select_units(scores: Tensor, share: float, *, least: float = -math.inf) -> Tensor:
    """The units of one layer with the largest scores.

    Args:
        scores: Float, shape ``(C,)``.
        share: Largest share of the units to select, in ``(0, 1]``; rounded up, so that one unit always may be.
        least: Only units with a score above it.

    Returns:
        Unit numbers, largest score first, long ``(M,)``.

    Example:
        >>> import torch
        >>> select_units(torch.tensor([0.1, 5.0, 3.0, 0.2]), 0.5, least=4.0)
        tensor([1])
    """
    order = scores.argsort(descending=True, stable=True)[: math.ceil(share * len(scores))]
    return order[scores[order] > least]
