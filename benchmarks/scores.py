"""What can be measured about every training image under an attack, from one undefended network, kept in the cache."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cache import EARLY, kept
from benchmarks.cases import Case
from benchmarks.looking import look
from lightning_backdoor import functional, metrics

Scores = dict[str, Tensor]
STEPS = 200  # of the detector, and as many of centre repulsion


def scores_of(case: Case) -> Scores:
    """Scores and responses of the N training images.

    The network is the undefended one before its last epoch, and (*early*) as it was after its first epochs.

    Returns:
        ``labels`` long ``(N,)``. Scores, float ``(N,)``, larger is more suspicious: ``susceptibility`` of the logits,
        ``movement`` of the features, ``disagreement`` (the share of the 20 nearest neighbours with another label), each
        also ``early``; ``fct``; ``bias`` and ``raw bias`` of NONE. Responses, half ``(N, U)``: ``denoised`` and
        ``early denoised``, features and how they move; ``units``; ``detector units``.
    """

    def make() -> Scores:
        every = ("denoised", "units", "fct", "detector_units")
        late = look(case, start_from=case.undefended(), what=every, detector_steps=STEPS)
        first = look(case, start_from=case.undefended(at_first=True), what=("denoised",))
        return _named(late, first)

    return kept(path_of(case), make)


def path_of(case: Case) -> Path:
    """Where the scores are kept."""
    return case.shared.with_suffix(f".scores-{EARLY}-{STEPS}.pt")


def auroc(scores: Tensor, poisoned: Tensor) -> float:
    """How well scores (N,) tell poisoned samples, bool (N,), from others; NaN if there are none of either."""
    metric = metrics.DetectionRates()
    metric.update(scores, torch.ones_like(poisoned), poisoned)
    return float(metric.compute()["auroc"])


def _named(late: Scores, first: Scores) -> Scores:
    found = {
        "labels": late["labels"],
        "fct": late["fct"],
        "bias": late["bias"],
        "raw bias": late["raw_bias"],
        "units": late["units"],
        "detector units": late["detector_units"],
    }
    for prefix, part in {"": late, "early ": first}.items():
        found |= {f"{prefix}{name}": part[name] for name in ("susceptibility", "movement", "denoised")}
        found[f"{prefix}disagreement"] = disagreement(part["denoised"], part["labels"])
    return found


def disagreement(responses: Tensor, labels: Tensor) -> Tensor:
    """Share of the 20 nearest neighbours with another label, (N,), from features and their movement, (N, 2 D)."""
    everything = torch.ones(len(labels), dtype=torch.bool)
    return 1 - functional.neighbor_agreement(responses[:, : responses.shape[1] // 2], labels, everything)
