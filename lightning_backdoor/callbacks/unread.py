"""Samples that the user's ``collate_fn`` drops: nothing is measured of them, and they are kept."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lightning_backdoor._lightning import rank_zero_warn
from lightning_backdoor.verdict import Verdict

__all__ = ["spared", "warn_of_unread"]


def spared(verdict: Verdict, unread: Tensor, earlier: Verdict | None) -> Verdict:
    """Keep the samples that could not be read, with the lowest score and the label -1, whatever was said of them.

    Args:
        verdict: On N samples.
        unread: Those that could not be read, bool ``(N,)``.
        earlier: The verdict before; what it removed stays removed.
    """
    spare = unread if earlier is None else unread & earlier.keep
    if not bool(spare.any()):
        return verdict
    trusted, suspect = (None if mask is None else mask & ~unread for mask in (verdict.trusted, verdict.suspect))
    labels = None if verdict.labels is None else verdict.labels.masked_fill(unread, -1)
    scores = verdict.scores.masked_fill(spare, float(verdict.scores[~spare].min()))
    findings = tuple(one.without(unread) for one in verdict.findings)
    return replace(
        verdict,
        scores=scores,
        keep=verdict.keep | spare,
        labels=labels,
        trusted=trusted,
        suspect=suspect,
        findings=findings,
    )


def warn_of_unread(unread: Tensor, before: Verdict | None, title: str) -> None:
    """Say once how many samples nothing is known of.

    Args:
        unread: Those that could not be read, bool ``(N,)``.
        before: The verdict before; where it has such samples, they were named already.
        title: Name of the defense for readers.
    """
    count = int(unread.sum())
    if count and (before is None or before.labels is None or not bool((before.labels < 0).any())):
        rank_zero_warn(
            f"{title}: `collate_fn` drops {count:,} of {len(unread):,} training samples, which could not be "
            "looked at. They are kept; in the verdict they have the lowest score and the label -1."
        )
