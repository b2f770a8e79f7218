"""Findings that are most of a label: what must speak for wrong labels or a trigger before they are removed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_backdoor.detection.decision import LEFT
from lightning_backdoor.verdict import Finding, Verdict

__all__ = ["MAX_REMOVED_OF_CLASS", "MOST_OF_LABEL", "without_majorities"]

MAX_REMOVED_OF_CLASS = 0.5
MOST_OF_LABEL = "most_of_label("
"""Stands in a rule where :func:`without_majorities` kept a finding."""

ABOUT_OTHERS = {"overlap", "early_neighbors"}
"""Gates whose evidence is that the samples belong to other classes. A class that holds many kinds by design passes
``look_alikes``, too."""


def without_majorities(
    verdict: Verdict, kept: Tensor, share: float = MAX_REMOVED_OF_CLASS
) -> tuple[Verdict, tuple[Finding, ...]]:
    """Keep the findings by which most of a label would be gone, if the images may be the class itself.

    Where a group is most of its label, it can be the class, of which the rest is a rare kind: nine of ten images with a
    border, say. Without it the model would not know the class any more, so a gap and a rare look are not enough. It
    goes if one of these speaks for wrong labels or for a trigger:

    - its diagnosis is ``"wrong labels"``;
    - it passed a gate whose evidence is that its samples belong to other classes;
    - the label without it has as many samples as the median label, so that it seems to have come in addition;
    - what it has in common makes the model give its label to images of other classes, which ordinary samples of the
      label do not, and a part of the label is left (15 %, of the median label where it is smaller).

    Args:
        verdict: On N samples, with labels.
        kept: Samples that the verdict before kept, bool ``(N,)``.
        share: Share of a label above which one of these is needed, in ``(0, 1]``; 1: never.

    Returns:
        The verdict, in which the samples of such findings are kept as before; and these findings.
    """
    if verdict.labels is None or share >= 1 or torch.equal(verdict.keep, kept):
        return verdict, ()
    known = verdict.labels >= 0
    present, counts = torch.unique(verdict.labels[known], return_counts=True)
    sizes, usual = dict(zip(present.tolist(), counts.tolist(), strict=True)), int(counts.median())
    keep, spared = verdict.keep.clone(), []
    for finding in verdict.findings:
        size, own = sizes.get(finding.label, 0), verdict.labels == finding.label
        positions = finding.positions[kept[finding.positions] & ~keep[finding.positions]]
        left = int((own & keep).sum())
        if not len(positions) or size - left <= share * size or _may_go(finding, size, left, usual):
            continue
        keep[positions] = True
        spared.append(finding)
    if not spared:
        return verdict, ()
    removed = bool((~keep).any())
    changed = replace(
        verdict,
        keep=keep,
        threshold=verdict.threshold if removed else float("inf"),
        rule=f"{verdict.rule}, {MOST_OF_LABEL}{share:g})",
        suspect=None if verdict.suspect is None else verdict.suspect & ~keep,
    )
    return changed, tuple(spared)


def _may_go(finding: Finding, size: int, left: int, usual: int) -> bool:
    """Whether more than a rare look speaks for a finding without which ``left`` of ``size`` samples are left."""
    if finding.diagnosis == "wrong labels" or finding.gate in ABOUT_OTHERS or left >= usual:
        return True
    return left >= LEFT * min(size, usual) and finding.works_as_trigger
