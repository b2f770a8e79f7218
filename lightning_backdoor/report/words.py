"""A verdict as plain text, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.report.explanation import heading, labels_sentence, trigger_sentence
from lightning_backdoor.report.sentences import approved_sentence, count, listed, number
from lightning_backdoor.verdict import Finding, Verdict

__all__ = ["described"]

IMAGES = 5  # of a finding whose paths or positions are printed


def described(verdict: Verdict, classes: Sequence[str] | None = None) -> str:
    """What a verdict found: a line in all, then some for each finding.

    Args:
        verdict: The verdict, ``N`` samples.
        classes: Class names, indexed by label.
    """
    evidence, flagged = Evidence(classes=classes), len(verdict.removed)
    fine = approved_sentence(verdict)
    looked = f"Looked at {count(len(verdict), 'image')}:"
    if not verdict.findings:
        return f"{looked} {f'{flagged:,} flagged, in no group' if flagged else 'nothing stands out'}.{fine}"
    members = sum(map(len, verdict.findings))
    stand = f"{members:,} stand{'s' * (members == 1)} out, in {count(len(verdict.findings), 'group')}"
    parts = [f"{looked} {stand}; {flagged:,} flagged.{fine}"]
    parts += [_described(finding, place, verdict, evidence) for place, finding in enumerate(verdict.findings)]
    return "\n\n".join(parts)


def _described(finding: Finding, place: int, verdict: Verdict, evidence: Evidence) -> str:
    whole = "" if verdict.labels is None else f" (of {int((verdict.labels == finding.label).sum()):,})"
    by = f", found by {listed(finding.detectors)}" if finding.detectors else ""
    figures = [f"{each.name} {number(each.value)} ({each.relation} {number(each.bound)})" for each in finding.figures]
    first = finding.positions[:IMAGES].tolist()
    names = [("" if verdict.paths is None else verdict.paths[position]) or str(position) for position in first]
    more = f" and {len(finding) - len(first):,} more" if len(finding) > len(first) else ""
    lines = [
        f"Finding {place}: {heading(finding, evidence)}{whole}{by}",
        labels_sentence(finding, evidence),
        trigger_sentence(finding, evidence),
        *([f"Gate “{finding.gate}”: {', '.join(figures)}"] if figures else []),
        f"Images: {', '.join(names)}{more}",
    ]
    return "\n  ".join(lines)
