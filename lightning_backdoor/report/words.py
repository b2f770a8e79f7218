"""A verdict as plain text, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.report.sentences import count, number, percent
from lightning_backdoor.verdict import Finding, Verdict

__all__ = ["described"]

IMAGES = 5  # of a finding whose paths or positions are printed
NAMED = 3  # suggested classes
LABELS = {
    "wrong labels": "look wrong: the content belongs to other classes",
    "right labels": "look right: a clean-label attack, or a clean kind of image",
    "unclear": "may be right or wrong; look at the images",
}


def described(verdict: Verdict, classes: Sequence[str] | None = None) -> str:
    """What a verdict found: a line in all, then some for each finding.

    Args:
        verdict: The verdict, ``N`` samples.
        classes: Class names, indexed by label.
    """
    evidence, flagged = Evidence(classes=classes), len(verdict.removed)
    approved = 0 if verdict.approved is None else int(verdict.approved.sum())
    fine = f" {count(approved, 'image')} {'is' if approved == 1 else 'are'} approved." if approved else ""
    looked = f"Looked at {count(len(verdict), 'image')}:"
    if not verdict.findings:
        return f"{looked} {f'{flagged:,} flagged, in no group' if flagged else 'nothing stands out'}.{fine}"
    groups = count(len(verdict.findings), "group")
    stand = sum(map(len, verdict.findings))
    parts = [f"{looked} {stand:,} stand out, in {groups}; {flagged:,} flagged.{fine}"]
    parts += [_described(finding, place, verdict, evidence) for place, finding in enumerate(verdict.findings)]
    return "\n\n".join(parts)


def _described(finding: Finding, place: int, verdict: Verdict, evidence: Evidence) -> str:
    whole = "" if verdict.labels is None else f" (of {int((verdict.labels == finding.label).sum()):,})"
    by = f", found by {', '.join(finding.detectors)}" if finding.detectors else ""
    figures = ", ".join(
        f"{each.name} {number(each.value)} ({each.relation} {number(each.bound)})" for each in finding.figures
    )
    first = finding.positions[:IMAGES].tolist()
    shown = ", ".join(
        str(position) if verdict.paths is None else verdict.paths[position] or str(position) for position in first
    )
    more = f" and {len(finding) - len(first):,} more" if len(finding) > len(first) else ""
    lines = [
        f"Finding {place}: {count(len(finding), 'image')} labeled “{evidence.class_name(finding.label)}”{whole}{by}",
        f"labels: {LABELS[finding.diagnosis]}{_suggested(finding, evidence)}",
    ]
    if finding.estimated_asr is not None:
        control = "" if finding.control_asr is None else f", {percent(finding.control_asr)} with ordinary images"
        lines.append(f"estimated attack success rate: {percent(finding.estimated_asr)}{control}")
    lines += [f"gate “{finding.gate}”: {figures}"] if figures else []
    return "\n  ".join([*lines, f"images: {shown}{more}"])


def _suggested(finding: Finding, evidence: Evidence) -> str:
    """The labels that are suggested most often."""
    if finding.suggested_labels is None:
        return ""
    labels, counts = torch.unique(finding.suggested_labels[finding.suggested_labels >= 0], return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:NAMED].tolist()
    told = [f"“{evidence.class_name(int(labels[i]))}” {int(counts[i]):,}" for i in order]
    return f" (suggested: {', '.join(told)})" if told else ""
