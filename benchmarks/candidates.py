"""Candidates for a verdict on the training images, from what can be measured about each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.scores import Scores
from lightning_backdoor import functional, metrics

SHARE = 0.05  # that a cut without a gate removes

Judged = tuple[Tensor, Tensor]
"""Scores, float (N,), larger is more suspicious; kept samples, bool (N,)."""
Candidate = Callable[[Scores], Judged]
Score = Callable[[Scores], Tensor]


def ranks(score: Tensor, labels: Tensor | None = None) -> Tensor:
    """Share of the samples that score less, and half of those that score the same; with labels, of its own label."""
    if labels is None:
        _, place, counts = score.unique(return_inverse=True, return_counts=True)
        return ((counts.cumsum(0) - counts / 2) / len(score))[place]
    found = torch.empty(len(score))
    for label in labels.unique():
        found[labels == label] = ranks(score[labels == label])
    return found


def single(name: str) -> Score:
    """One score as it is."""
    return lambda found: found[name]


def average(*names: str, within_labels: bool = False) -> Score:
    """The mean of the ranks that several scores give."""

    def score(found: Scores) -> Tensor:
        labels = found["labels"] if within_labels else None
        return torch.stack([ranks(found[name], labels) for name in names]).mean(dim=0)

    return score


def top(score: Score) -> Candidate:
    """Remove a share, those with the largest scores; there is no gate."""

    def judge(found: Scores) -> Judged:
        scores = score(found)
        return scores, functional.select_fraction(scores, SHARE)[0]

    return judge


def gated(score: Score) -> Candidate:
    """Remove the second modes of one score inside the labels, if they pass the gate."""

    def judge(found: Scores) -> Judged:
        scores = score(found)
        decision = functional.decide(scores[:, None], scores, found["labels"])
        return decision.scores, decision.keep

    return judge


def modes(*names: str, ranking: str, shared: bool = False, early: bool = False) -> Candidate:
    """Remove the second modes of responses that are put side by side, if they pass the gate.

    With ``early``, weaker ones too, where neighbours in the early features deny them their label.
    """

    def judge(found: Scores) -> Judged:
        values = torch.cat([found[name] for name in names], dim=1)
        agreement = 1 - found["early disagreement"] if early else None
        decision = functional.decide(values, found[ranking], found["labels"], all_to_all=shared, agreement=agreement)
        return decision.scores, decision.keep

    return judge


PARTS = ("susceptibility", "fct", "raw bias")  # of the three published systems
SINGLES: dict[str, Candidate] = {
    **{
        f"{name}, top 5 %": top(single(name))
        for name in (
            *PARTS, "movement", "bias", "disagreement", "early susceptibility", "early movement", "early disagreement"
        )
    },
    **{f"{name}, gated": gated(single(name)) for name in (*PARTS, "bias", "movement")},
    "modes of denoised features": modes("denoised", ranking="movement"),
    "modes of denoised features, early": modes("early denoised", ranking="early movement"),
    "modes of units": modes("units", ranking="bias", shared=True),
    "modes of the detector's units": modes("detector units", ranking="fct"),
}  # fmt: skip
"""What one score or one kind of response says."""
COMBINED: dict[str, Candidate] = {
    "susceptibility early and late, top 5 %": top(average("susceptibility", "early susceptibility")),
    "three averaged, top 5 %": top(average(*PARTS)),
    "three averaged within labels, top 5 %": top(average(*PARTS, within_labels=True)),
    "six averaged within labels, top 5 %": top(
        average(*PARTS, "early movement", "movement", "bias", within_labels=True)
    ),
    "three averaged within labels, gated": gated(average(*PARTS, within_labels=True)),
    "modes of denoised features, early neighbours": modes("denoised", ranking="movement", early=True),
    "modes of units, early neighbours": modes("units", ranking="bias", shared=True, early=True),
    "modes of features and units": modes("denoised", "units", ranking="bias", shared=True),
    "modes of all responses": modes("denoised", "units", "detector units", ranking="bias", shared=True),
}
"""What several say together."""
UNIONS = {
    name: tuple(f"modes of {part}" for part in parts)
    for name, parts in {
        "denoised features or units": ("denoised features", "units"),
        "early or late denoised features, or units": ("denoised features", "denoised features, early", "units"),
        "units or detector's units": ("units", "the detector's units"),
        "denoised features, units or detector's units": ("denoised features", "units", "the detector's units"),
        "UltraClean and NONE, as they ship": ("denoised features, early neighbours", "units"),
        "all of these": (
            "denoised features, early neighbours", "denoised features, early", "units, early neighbours",
            "the detector's units",
        ),
    }.items()
}  # fmt: skip
"""Candidates that are judged :func:`together`."""
NAMES = (*SINGLES, *COMBINED, *UNIONS)


def together(parts: Iterable[Judged]) -> Judged:
    """What each of several removes; the score is the largest of theirs."""
    scores, keep = (torch.stack(column) for column in zip(*parts, strict=True))
    return scores.amax(dim=0), keep.all(dim=0)


def judged(found: Scores) -> dict[str, Judged]:
    """What every candidate says."""
    result = {name: candidate(found) for name, candidate in (SINGLES | COMBINED).items()}
    for name, parts in UNIONS.items():
        result[name] = together(result[part] for part in parts)
    return result


def rates(judgements: dict[str, Judged], poisoned: Tensor, covers: Tensor) -> dict[str, dict[str, float | None]]:
    """Detection rates of every candidate.

    Covers, triggered images with their own label, are told apart: to remove one is neither a hit nor a false alarm.
    """
    result = {}
    for name, (scores, keep) in judgements.items():
        metric = metrics.DetectionRates()
        metric.update(scores[~covers], keep[~covers], poisoned[~covers])
        result[name] = {key: None if rate.isnan() else round(float(rate), 5) for key, rate in metric.compute().items()}
        result[name] |= {"removed": int((~keep).sum()), "covers_removed": int((~keep & covers).sum())}
    return result
