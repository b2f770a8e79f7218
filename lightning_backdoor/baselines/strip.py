"""STRIP: drop the images whose label the network is sure of whatever they are blended with."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from lightning_backdoor.baselines.scored import BASELINE_DEFAULTS, BaselineArguments, Judge, Scored, filter_parts
from lightning_backdoor.callbacks.arguments import require_fraction, require_positive
from lightning_backdoor.callbacks.base import Defense
from lightning_backdoor.data.pixels import check_finite
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.responses.base import Session
from lightning_backdoor.scanning.scan import raise_on_all_ranks

__all__ = ["STRIP", "blend", "select_by_rejection", "strip_scores"]

TO_SIGMA = 1.4826  # median absolute deviation of a normal distribution to its standard deviation


def blend(pixels: Tensor, overlay: Tensor, weight: float = 0.5) -> Tensor:
    """Superimpose one image on others.

    Args:
        pixels: uint8 ``(B, C, H, W)``.
        overlay: uint8 ``(C, H, W)``.
        weight: Share of the overlay, in ``(0, 1)``.

    Returns:
        uint8 ``(B, C, H, W)``, rounded.
    """
    mixed = pixels.float() * (1 - weight) + overlay.float() * weight
    return mixed.round().clamp(0, 255).to(torch.uint8)


def resized(overlays: Tensor, like: Tensor) -> Tensor:
    """Bring images, uint8 ``(T, C, H, W)``, to height and width of others."""
    return F.interpolate(overlays.float(), like.shape[2:], mode="nearest").to(torch.uint8)


def strip_scores(logits: Tensor, counts: Tensor | None = None) -> Tensor:
    """Minus the mean entropy of the answers to an image under several blendings; larger is more suspicious.

    From *STRIP: A Defence Against Trojan Attacks on Deep Neural Networks* (`Gao et al., 2019
    <https://arxiv.org/abs/1902.06531>`_): a trigger that survives blending forces one answer.

    Args:
        logits: Logits of every image under T blendings, float ``(N, T, K)``.
        counts: Blendings that count, bool ``(N, T)``, at least one per image; all by default.

    Returns:
        Float ``(N,)`` in bits, between ``-log2(K)`` and 0.

    Raises:
        ArgumentError: ``logits`` has another shape.

    Example:
        >>> import torch
        >>> strip_scores(torch.tensor([[[0.0, 0.0], [99.0, 0.0]]]))
        tensor([-0.5000])
    """
    if logits.ndim != 3 or not logits.shape[1]:
        raise ArgumentError(f"`logits` must have shape (N, T, K) with T >= 1, got {tuple(logits.shape)}.")
    entropies = torch.special.entr(logits.double().softmax(dim=2)).sum(dim=2) / math.log(2)
    counted = torch.ones_like(entropies, dtype=torch.bool) if counts is None else counts.bool()
    return -(torch.where(counted, entropies, 0.0).sum(dim=1) / counted.sum(dim=1)).float()


def select_by_rejection(scores: Tensor, false_rejection: float) -> Tensor:
    """Keep the scores below the quantile of a normal distribution of which clean samples exceed a known share.

    The paper fits the distribution to clean data; here median and median absolute deviation of all data stand for it,
    which poisons hardly move while they are few.

    Args:
        scores: Float ``(N,)``; larger is more suspicious.
        false_rejection: Share of clean samples that may be removed, in ``(0, 1)``.

    Returns:
        Samples that stay, bool ``(N,)``.
    """
    middle = scores.double().quantile(0.5)
    sigma = TO_SIGMA * (scores.double() - middle).abs().quantile(0.5)
    return scores.double() <= middle + NormalDist().inv_cdf(1 - false_rejection) * sigma


class Blends(Scored):
    """One pass over the training set, with other images of it blended into every image.

    Args:
        judge: See :class:`~lightning_backdoor.baselines.scored.Scored`.
        meaning: Likewise.
        arguments: Likewise.
        draws: Images that are blended in.
        weight: Their share of the blend, in ``(0, 1)``.
    """

    def __init__(self, judge: Judge, meaning: str, arguments: dict[str, Any], *, draws: int, weight: float) -> None:
        super().__init__(judge, meaning, arguments, measure=self._blend)
        self._draws, self._weight, self._seed = draws, weight, arguments["seed"]
        self._positions, self._overlays = torch.zeros(0, dtype=torch.long), torch.zeros(0)

    def require(self, session: Session) -> None:
        """Raise at the start of a fit if blends cannot be shown to the model."""
        session.scanner.require_replaceable(session.trainer, session.module)

    def prepare(self, session: Session) -> None:
        """Read the images that are blended in."""
        scanner, device = session.scanner, session.module.device
        order = torch.randperm(len(scanner), generator=torch.Generator().manual_seed(self._seed))
        positions = order[: self._draws + 1]  # one more, for the images that are among them themselves
        with raise_on_all_ranks(session.trainer, "reading of the images to blend in"):
            overlays = scanner.images(positions.tolist()).to(device)
        read = ~scanner.unread[positions]
        self._positions, self._overlays = positions[read], overlays[read.to(device)]

    def _blend(self, session: Session, indices: Tensor, batch: Any) -> dict[str, Tensor]:
        """Scores of a batch, float ``(B,)``."""
        scanner, device = session.scanner, session.module.device
        images = scanner.layout.images(batch)
        check_finite(images, indices)
        pixels, overlays = scanner.pixels.to_pixels(images).to(device), self._overlays
        answers = []
        for overlay in overlays if overlays.shape[2:] == pixels.shape[2:] else resized(overlays, pixels):
            mixed = scanner.pixels.to_model(blend(pixels, overlay, self._weight), like=images)
            logits, _ = scanner.outputs(session.trainer, session.module, scanner.layout.with_images(batch, mixed))
            answers.append(logits)
        others = indices[:, None] != self._positions
        others[others.all(dim=1), -1] = False  # as many blendings for every image
        return {"scores": strip_scores(torch.stack(answers, dim=1), others.to(device))}

    def close(self) -> None:
        """Forget the images that are blended in."""
        self._positions, self._overlays = torch.zeros(0, dtype=torch.long), torch.zeros(0)


class STRIP(Defense):
    """Drop images on which the network does not waver when others are blended in, and train on what is left.

    Implements STRIP (`Gao et al., 2019 <https://arxiv.org/abs/1902.06531>`_), a test of inputs, as a filter of training
    data. ``draws`` forward passes. Assumes that the trigger survives blending and that poisons are few. A baseline:
    **it removes about** ``false_rejection`` **of clean data**, more if their entropies have a long lower tail.

    Differs from the paper: there is no clean data, so the images that are blended in come from the training set, the
    same for all images, and the entropies of clean images are estimated from all.

    Args:
        draws: Images that are blended in, one after the other.
        weight: Their share of the blend, in ``(0, 1)``.
        false_rejection: Share of clean images that may be removed, in ``(0, 1)``.
        **common: See :class:`~lightning_backdoor.baselines.BaselineArguments`.

    Example:
        >>> STRIP(draws=20)
        STRIP(draws=20)
    """

    method: ClassVar[str] = "STRIP"
    title: ClassVar[str] = "STRIP"
    shared = BaselineArguments
    shared_defaults = BASELINE_DEFAULTS
    meaning: ClassVar[str] = "It measures how sure the model stays of its answer when other images are blended in."

    def __init__(
        self,
        *,
        draws: int = 100,
        weight: float = 0.5,
        false_rejection: float = 0.01,
        **common: Unpack[BaselineArguments],
    ) -> None:
        self.draws = require_positive("draws", draws) or 1
        self.weight = require_fraction("weight", weight)
        self.false_rejection = require_fraction("false_rejection", false_rejection)
        self.arguments: dict[str, Any] = {**BASELINE_DEFAULTS, **common}
        blends = Blends(self._judge, self.meaning, self.arguments, draws=self.draws, weight=self.weight)
        super().__init__(**filter_parts(self.arguments, blends))

    def _judge(self, found: dict[str, Tensor]) -> tuple[Tensor, Tensor, str]:
        scores = found["scores"]
        return scores, select_by_rejection(scores, self.false_rejection), f"rejection({self.false_rejection:g})"
