"""From what a detector says, or another defence has found, to the samples that are unlearned and learned anew."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_backdoor.callbacks.compromised import judge_samples
from lightning_backdoor.functional.consistency import select_trusted
from lightning_backdoor.functional.evidence import Decision, add_removed, decide
from lightning_backdoor.trainer.distinguish import Distinguished
from lightning_backdoor.trainer.unlearning import Split
from lightning_backdoor.verdict import Verdict

__all__ = ["Judgement", "from_verdict", "judge", "split_of"]

WATCHED = 1024


@dataclass(frozen=True)
class Judgement:
    """A verdict and what led to it.

    Attributes:
        verdict: With ``trusted`` and ``suspect``.
        wanted: Samples that the rule pointed at before ``max_removed`` limited it.
        modes: Label and separation of the second modes that were found.
    """

    verdict: Verdict
    wanted: int
    modes: tuple[tuple[int, float], ...]

    @property
    def counts(self) -> tuple[int, int, list[int]]:
        """Suspects, trusted samples, and the classes without any of the latter."""
        labels, suspect, trusted = _masks(self.verdict)
        present = torch.unique(labels).tolist()
        lacking = sorted(set(present) - set(labels[trusted].tolist()))
        return int(suspect.sum()), int(trusted.sum()), lacking


def judge(
    found: Distinguished, earlier: Verdict | None, *, suspect: str | float, trusted: float, max_removed: float
) -> Judgement:
    """Suspect the second populations of single labels, or a share of all samples; trust the most consistent ones.

    Args:
        found: What the detector says.
        earlier: The verdict of an earlier fit; what it removed stays removed.
        suspect: Share of the samples with the largest FCT; ``"auto"`` looks for second populations.
        trusted: Share of the samples of each class with the smallest FCT.
        max_removed: Largest share of all samples that may be suspected.
    """
    if isinstance(suspect, str):
        assert found.units is not None
        decision = judge_samples(replace(found.units, bias=found.fct), earlier, rule="auto", max_removed=max_removed)
    else:
        decision = _share(found, earlier, suspect, max_removed)
    suspects = ~decision.keep
    trust = select_trusted(found.fct, found.labels, decision.keep, trusted)
    verdict = Verdict(
        decision.scores, decision.keep, decision.threshold, decision.rule, found.labels, trusted=trust, suspect=suspects
    )
    return Judgement(verdict, decision.wanted, tuple((mode.label, mode.separation) for mode in decision.modes))


def from_verdict(given: Verdict, labels: Tensor, *, trusted: float) -> Judgement:
    """Take another defence's word for it: what it removed is suspect, what it found least suspicious is trusted.

    Args:
        given: Its verdict; masks of its own are taken as they are.
        labels: Labels of the samples, long ``(N,)``.
        trusted: Share of the samples of each class.
    """
    suspect = ~given.keep if given.suspect is None else given.suspect
    keep = given.keep & ~suspect
    trust = select_trusted(given.scores, labels, keep, trusted) if given.trusted is None else given.trusted & keep
    verdict = replace(given, keep=keep, labels=labels, trusted=trust, suspect=suspect)
    return Judgement(verdict, int(suspect.sum()), ())


def split_of(verdict: Verdict, seed: int) -> Split:
    """What a verdict means for a repair, and samples to watch accuracy on: up to 1024 that the repair does not see.

    Where there are none of these, trusted ones.
    """
    labels, suspect, trusted = _masks(verdict)
    pool = verdict.keep & ~trusted
    positions = (pool if bool(pool.any()) else trusted).nonzero().squeeze(1)
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))
    watched = torch.zeros_like(trusted)
    watched[positions[order[:WATCHED]]] = True
    return Split(labels, suspect, trusted, watched)


def _masks(verdict: Verdict) -> tuple[Tensor, Tensor, Tensor]:
    labels, suspect, trusted = verdict.labels, verdict.suspect, verdict.trusted
    assert labels is not None
    assert suspect is not None
    assert trusted is not None
    return labels, suspect, trusted


def _share(found: Distinguished, earlier: Verdict | None, share: float, max_removed: float) -> Decision:
    decision = decide(
        found.fct[:, None],
        found.fct,
        found.labels,
        fraction=share,
        by_ranking=True,
        removed=None if earlier is None else ~earlier.keep,
        max_removed=max_removed,
    )
    if earlier is None:
        return decision
    return add_removed(decision, earlier.scores, earlier.keep, threshold=decision.threshold, max_removed=max_removed)
