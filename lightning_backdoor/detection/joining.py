"""One verdict of those that several detectors came to on the same samples, each by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from lightning_backdoor.detection.decision import limit_of_labels, limit_removed
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.verdict import Finding, Verdict

__all__ = ["join_verdicts"]

SAME = 0.5  # of a finding, over that share also found by another detector: it has found the same group


def join_verdicts(verdicts: Mapping[str, Verdict], *, max_removed: float) -> Verdict:
    """Join verdicts on the same N samples: what one of them removes is removed.

    Scores are the largest of each sample. Findings follow each other in the order of the detectors. A sample of several
    findings stays in the first one, which names all detectors with a finding that holds over half of it.

    Args:
        verdicts: By the name of the detector, at least one. Their scores have one scale, on which samples of findings
            are above 0.5.
        max_removed: Largest share of the samples that may be removed in all, in ``(0, 1)``. As in
            :func:`~lightning_backdoor.functional.decide`, some samples of every label stay as well.
    """
    if not verdicts:
        raise ArgumentError("`verdicts` must hold at least one verdict, got none.")
    every = list(verdicts.values())
    scores = torch.stack([verdict.scores for verdict in every]).amax(dim=0)
    kept = torch.stack([verdict.keep for verdict in every]).all(dim=0)
    keep = limit_removed(scores, kept, max_removed)
    if every[0].labels is not None:
        keep = limit_of_labels(scores, keep, every[0].labels)
    threshold = min(verdict.threshold for verdict in every)
    if not torch.equal(keep, kept) and bool((~keep).any()):
        threshold = max(threshold, float(scores[keep & ~kept].max()))
    return Verdict(
        scores,
        keep,
        threshold if bool((~keep).any()) else math.inf,
        "; ".join(f"{name}: {verdict.rule}" for name, verdict in verdicts.items()),
        every[0].labels,
        findings=_joined_findings(verdicts),
        approved=every[0].approved,
        paths=every[0].paths,
    )


def _joined_findings(verdicts: Mapping[str, Verdict]) -> tuple[Finding, ...]:
    """The findings of all verdicts, each sample in the first one that it is in."""
    names = list(verdicts)
    taken = torch.zeros(len(next(iter(verdicts.values()))), dtype=torch.bool)
    found: list[Finding] = []
    for place, name in enumerate(names):
        for finding in verdicts[name].findings:
            rest = finding.without(taken)
            if not len(rest):
                continue
            others = [other for other in names[place + 1 :] if _holds(verdicts[other], finding)]
            taken[finding.positions] = True
            found.append(replace(rest, detectors=(name, *others)))
    return tuple(found)


def _holds(verdict: Verdict, finding: Finding) -> bool:
    """Whether the findings of a verdict hold over half of the samples of another one's finding."""
    return float((verdict.finding_indices[finding.positions] >= 0).float().mean()) > SAME
