"""The verdict in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lightning_backdoor.detection.decision import OF_LABEL
from lightning_backdoor.detection.diagnosis import undiagnosed
from lightning_backdoor.detection.majorities import MOST_OF_LABEL
from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.report.table import ClassRow
from lightning_backdoor.verdict import Finding, Verdict

OF_ALL = (
    "Compare the images on both sides of the line. If the kept ones show the same mark, raise `max_removed` and train "
    "again. If they look ordinary, they may be fine: mark them, and train again with `approved`."
)
OF_ONE_LABEL = (
    "Nearly a whole label stood out, and some of its images stay so that the model knows the label. Compare the images "
    "on both sides of the line. If they show the same mark, take all of them out of the data set and train again. If "
    "they look ordinary, they are a kind of image that no other label has: mark them, and train again with `approved`."
)
LIMIT = "`max_removed_of_class`"  # no baseline has it, and none has findings
OF_MOST = (
    "Most of a label stood out, and nothing says that these images are poisoned rather than the class itself, so they "
    "stay. Look at them. If they are fine, pass their positions as `approved`. If they share a mark that nobody can "
    f"explain, take them out of the data set and train again, or pass a larger {LIMIT}."
)

WRONG_LABELS = (
    "Look at these images. Their labels look wrong. If they share a patch or a pattern, it is a backdoor: ask where "
    "they came from. `verdict.relabeled(dataset)` has them back with the suggested labels."
)
MAY_BE_FINE = (
    "Look at these images. A mark that many of them share is a trigger, or harmless: a watermark, a border, another "
    "camera, a kind of image that only one class has. Where they came from tells the two apart. Mark what is fine, "
    "download `reviewed.csv`, and pass its path as `approved` when you train again."
)
SIGNALED = "No image was removed, but a class may carry a signal in all of its images"
NO_SINGLE_IMAGE = "No image stands out from its class."
NAMED = 3  # findings in the summary

__all__ = ["Summary", "approved_sentence", "count", "listed", "number", "percent", "score", "summarize"]


class Summary(NamedTuple):
    """The five texts of the summary: the title, what was looked at, found and done, and what to do next."""

    headline: str
    looked: str
    found: str
    done: str
    then: str


def count(amount: int, noun: str = "") -> str:
    """Write a count with its noun: ``1 image``, ``20,000 images``."""
    ending = "" if amount == 1 else "es" if noun.endswith("s") else "s"
    return f"{amount:,} {noun}{ending}" if noun else f"{amount:,}"


def listed(names: Sequence[str]) -> str:
    """Write names as a list: ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def number(value: str | int | float) -> str:
    """Write a fact: whole numbers with separators, other numbers with four digits, text as it is."""
    if isinstance(value, (str, bool)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.4g}".replace("-", "−")


def score(value: float) -> str:
    """Write a score with four digits, so that a column of them lines up."""
    return f"{value:#.4g}".rstrip(".").replace("-", "−").replace("inf", "∞")


def percent(part: float, whole: float = 1) -> str:
    """Write a share: ``5.1 %``, ``< 0.1 %``, ``> 99.9 %``."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.1:
        return "< 0.1 %"
    if 99.9 < share < 100:
        return "> 99.9 %"
    return f"{share:.0f} %" if share == round(share) else f"{share:.1f} %"


def approved_sentence(verdict: Verdict) -> str:
    """Say how many images are approved, after a space; empty where none is."""
    approved = 0 if verdict.approved is None else int(verdict.approved.sum())
    return f" {count(approved, 'image')} {'is' if approved == 1 else 'are'} approved." if approved else ""


def _were(amount: int) -> str:
    return "was" if amount == 1 else "were"


def _where(rows: list[ClassRow], evidence: Evidence) -> str:
    """State whether the removed images have one label in common."""
    removed, total = sum(row.removed for row in rows), sum(row.images for row in rows)
    if len(rows) < 2 or removed < 2:
        return ""
    top = rows[0]
    if top.removed > removed / 2 and top.removed / removed > 2 * top.images / total:
        name = evidence.class_name(top.label)
        share = "All of them carry" if top.removed == removed else f"{count(top.removed)} of them carry"
        return f" {share} one label, “{name}”: most backdoors aim at a single class."
    labels = sum(row.removed > 0 for row in rows)
    spread = f"all {labels:,}" if labels == len(rows) else f"{labels:,} of {len(rows):,}"
    return f" They are spread over {spread} classes."


def _done(removed: int, kept: int, evidence: Evidence) -> str:
    rest = f"on the {count(kept, 'image')} that {_were(kept)} kept"
    taken = "It was" if removed == 1 else "They were"
    if not evidence.acted:
        them = "it" if removed == 1 else "them"
        return f"Nothing was changed. A new training without {them} would have {count(kept, 'image')}."
    if evidence.rewound:
        return f"{taken} taken out, and training started again from its first weights {rest}."
    if evidence.rewound is False:
        return f"{taken} taken out, and training went on, with the weights it had, {rest}."
    return f"{taken} taken out; from then on the model was trained {rest}."


def _then(verdict: Verdict) -> str:
    """What to do about images that stand out, by what is known of their labels."""
    wrong = bool(verdict.findings) and all(finding.diagnosis == "wrong labels" for finding in verdict.findings)
    return WRONG_LABELS if wrong else MAY_BE_FINE


def _looked(verdict: Verdict, method: str, rows: list[ClassRow], evidence: Evidence) -> str:
    amount = count(len(verdict), "training image")
    scope = f" of {count(len(rows), 'class')}" if rows else ""
    meaning = f" {evidence.score_meaning}" if evidence.score_meaning else ""
    scored = f"{method} looked at {amount}{scope} and gave each a score; larger is more suspicious."
    return f"{scored}{meaning}{approved_sentence(verdict)}"


def _nothing(looked: str, total: int, treatment: str) -> Summary:
    if treatment:
        return Summary(
            headline="No image was removed, the model was treated",
            looked=looked,
            found="This check was asked to leave the data as they are and to treat the model whatever they look like.",
            done=f"All {count(total, 'image')} stay in training. {treatment}",
            then="Compare accuracy, and how easily the model is misled, with a model that was not treated.",
        )
    return Summary(
        headline="Nothing suspicious was found",
        looked=looked,
        found="No image stands out enough to be removed: the scores look like those of ordinary data.",
        done=f"Nothing was removed: training has the full set of {count(total, 'image')}, "
        "as if this check had not been there.",
        then="There is nothing that you must do. This is no proof that the data is clean: a weak backdoor can show "
        "itself later. A scan at a later epoch, or another defence, looks at the data from another side.",
    )


def _capped(looked: str, where: str, rule: str, *, removed: int, total: int, evidence: Evidence) -> Summary:
    num_flagged_before_cap, max_removed = evidence.num_flagged_before_cap or 0, evidence.max_removed
    limit = "`max_removed`" if max_removed is None else f"`max_removed={max_removed:g}`"
    of_label = OF_LABEL in rule or MOST_OF_LABEL in rule
    if of_label:  # a kind of image, or a trigger: whichever it is, `max_removed` would change nothing
        limit = f"{limit} or the limit of a label" if "max_removed(" in rule else "the limit of a label"
    only = f"only the {removed:,} most suspicious {_were(removed)}" if removed else "none was"
    left = num_flagged_before_cap - removed
    headline = f"{removed:,} of {total:,} training images {_were(removed)} removed, then the limit was reached"
    done = (
        f"The limit cut the removal short: {only} taken out.{where} "
        f"The other {count(left, 'image')} that stood out {'is' if left == 1 else 'are'} still in the training set."
    )
    if not evidence.acted:
        headline = f"{num_flagged_before_cap:,} of {total:,} training images stand out, more than the limit allows"
        done = f"Nothing was changed. Within the limit a new training would leave out {removed:,} of them.{where}"
    return Summary(
        headline=headline,
        looked=looked,
        found=f"{count(num_flagged_before_cap, 'image')} ({percent(num_flagged_before_cap, total)}) stood out, more "
        f"than {limit} allows.",
        done=done,
        then=OF_MOST if MOST_OF_LABEL in rule else OF_ONE_LABEL if of_label else OF_ALL,
    )


def summarize(verdict: Verdict, method: str, rows: list[ClassRow], evidence: Evidence) -> Summary:
    """State what was scanned, what was found, what was done and what to do next.

    Args:
        verdict: The verdict, ``N`` samples.
        method: Name of the defence.
        rows: The table of classes, from :func:`~lightning_backdoor.report.table.class_rows`.
        evidence: Names, the limit and what happened to the training.

    Returns:
        Five short texts. A run that found nothing and a run that ``max_removed`` cut short have their own.
    """
    summary = _summary_of_samples(verdict, method, rows, evidence)
    if not evidence.signals:
        return summary
    told, advice = evidence.signals
    if not len(verdict.removed) and not verdict.findings:
        return summary._replace(headline=SIGNALED, found=f"{NO_SINGLE_IMAGE} {told}", then=advice)
    return summary._replace(found=f"{summary.found} {told}", then=f"{summary.then} {advice}")


def _summary_of_samples(verdict: Verdict, method: str, rows: list[ClassRow], evidence: Evidence) -> Summary:
    """The summary by what is known of single samples."""
    total, removed = len(verdict), int((~verdict.keep).sum())
    looked = _looked(verdict, method, rows, evidence)
    where = "" if verdict.findings else _where(rows, evidence)
    if evidence.num_flagged_before_cap is not None and evidence.num_flagged_before_cap > removed:
        capped = _capped(looked, where, verdict.rule, removed=removed, total=total, evidence=evidence)
        if verdict.findings:
            capped = capped._replace(found=f"{_groups(verdict, evidence)} {capped.found}")
        return capped._replace(done=" ".join(filter(None, (capped.done, evidence.treatment))))
    if removed == 0 and not verdict.findings:
        return _nothing(looked, total, evidence.treatment)
    stands = "One image stands" if removed == 1 else f"{count(removed, 'image')} stand"
    found = f"{stands} out from the rest ({percent(removed, total)} of the training set).{where}"
    done = _done(removed, total - removed, evidence)
    happened = f"{_were(removed)} removed" if evidence.acted else f"stand{'s' * (removed == 1)} out"
    headline = f"{removed:,} of {total:,} training images {happened}"
    if verdict.findings:
        found = _groups(verdict, evidence)
    if removed == 0:
        members = sum(map(len, verdict.findings))
        headline = (
            f"{members:,} of {total:,} training images {'stands' if members == 1 else 'stand'} out, none was removed"
        )
        done = f"All {count(total, 'image')} stay in training." if evidence.acted else "Nothing was changed."
    done = " ".join(filter(None, (done, evidence.treatment)))
    return Summary(headline=headline, looked=looked, found=found, done=done, then=_then(verdict))


def _groups(verdict: Verdict, evidence: Evidence) -> str:
    """Name the findings by size, label and diagnosis, and the one that works best as a trigger."""
    findings = verdict.findings
    phrases = {
        "wrong labels": "labels look wrong",
        "right labels": "labels look right",
        "unclear": "labels may be right",
    }
    later = undiagnosed(findings) if evidence.diagnosis_follows else []
    told = [
        f"{len(found):,} of “{evidence.class_name(found.label)}” "
        f"({'labels not checked yet' if any(found is one for one in later) else phrases[found.diagnosis]})"
        for found in findings[:NAMED]
    ]
    if len(findings) > NAMED:
        told.append(f"{len(findings) - NAMED:,} more")
    what = f"{len(findings):,} groups of images stand out from their classes"
    if len(findings) == 1:
        what = "One group of images stands out from its class"
    return f"{what}: {listed(told)}.{_trigger(findings, evidence)}"


def _trigger(findings: Sequence[Finding], evidence: Evidence) -> str:
    finding = max(findings, key=lambda one: one.asr_excess)
    if not finding.works_as_trigger:
        return ""
    return (
        f" What those of “{evidence.class_name(finding.label)}” have in common works as a trigger: with it, an "
        f"estimated {percent(finding.estimated_asr or 0.0)} of other images get this label."
    )
