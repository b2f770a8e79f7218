"""What findings are: their estimated attack success rate, and what a model without them makes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_backdoor._lightning import rank_zero_warn
from lightning_backdoor.detection.diagnosis import MIN_SAMPLES, diagnose, undiagnosed
from lightning_backdoor.errors import BackdoorDefenseError
from lightning_backdoor.responses.base import labels_of
from lightning_backdoor.scanning.estimate_asr import drawn, estimate_asr
from lightning_backdoor.scanning.probe import trained_without
from lightning_backdoor.scanning.scanner import DatasetScanner
from lightning_backdoor.verdict import Finding, Verdict

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = [
    "diagnosed",
    "diagnosed_by_copy",
    "diagnosed_by_repaired",
    "held_out",
    "ordinary_samples",
    "with_estimated_asr",
]

COMPARED, OF_LABEL = 2048, 256  # ordinary samples of all labels, and further ones of the label of each finding
HELD_OUT = 512, 64  # the same, at most, that a copy is not trained on
PROBE_STEPS, LARGEST_PROBE = 200, 1000
"""Steps in which a copy learns the labels of other samples: as many as the fit has had, within these bounds."""
FEWEST = 10  # of a label among these, where it has twice as many
STILL = 0.5  # of the excess of an estimated attack success rate over its control: a later model still has the backdoor


def ordinary_samples(verdict: Verdict) -> Tensor:
    """Samples with a label that are kept and in no finding, bool ``(N,)``."""
    free = verdict.keep & (verdict.finding_indices < 0)
    return free if verdict.labels is None else free & (verdict.labels >= 0)


def with_estimated_asr(
    trainer: Trainer, pl_module: LightningModule, scanner: DatasetScanner, verdict: Verdict
) -> Verdict:
    """The verdict with the estimated attack success rate of every finding that has none.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule, with weights that the findings were part of the training of.
        scanner: Reads the training set.
        verdict: With labels.
    """
    every = enumerate(verdict.findings)
    missing = [place for place, one in every if one.estimated_asr is None and len(one) >= MIN_SAMPLES]
    if not missing or verdict.labels is None:
        return verdict
    groups = [(verdict.findings[place].label, verdict.findings[place].positions) for place in missing]
    ordinary = ordinary_samples(verdict)
    estimates = estimate_asr(trainer, pl_module, scanner, groups, labels=verdict.labels, ordinary=ordinary)
    findings = list(verdict.findings)
    for place, found in zip(missing, estimates, strict=True):
        if found is not None:
            rates = {"estimated_asr": found.asr, "control_asr": found.control, "asr_method": found.method}
            findings[place] = replace(findings[place], **rates)  # type: ignore[arg-type]
    return replace(verdict, findings=tuple(findings))


def diagnosed(
    trainer: Trainer,
    pl_module: LightningModule,
    scanner: DatasetScanner,
    verdict: Verdict,
    *,
    unseen: Tensor,
    compared: Tensor | None = None,
    again: bool = True,
) -> Verdict:
    """The verdict with the diagnosis of its findings, by a model that was trained without some samples.

    A group that gets its label is no group with right labels if what it has in common
    still turns images of other classes into the label: then the model has learned the backdoor from samples that were
    not found.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule with these weights.
        scanner: Reads the training set.
        verdict: With labels.
        unseen: Samples that it was never trained on, bool ``(N,)``.
        compared: Ordinary samples that it was never trained on either, bool ``(N,)``. ``None``: there are none, and the
            findings are compared with at most 2,048 others, and 256 more of the label of each finding.
        again: Whether findings that have a diagnosis get that of this model instead.
    """
    findings = verdict.findings if again else undiagnosed(verdict.findings)
    wanted = [finding for finding in findings if bool(unseen[finding.positions].any())]
    if verdict.labels is None or not wanted:
        return verdict
    found = _by_answers(trainer, pl_module, scanner, verdict, wanted, unseen=unseen, compared=compared)
    return replace(verdict, findings=tuple(_doubted(trainer, pl_module, scanner, verdict, found)))


def diagnosed_by_repaired(
    trainer: Trainer, pl_module: LightningModule, scanner: DatasetScanner, verdict: Verdict, *, left_out: Tensor
) -> Verdict:
    """The verdict with the diagnosis of the findings that have none and whose labels are wrong to a repaired model.

    The model has learned the findings with their labels before some of its units were reset and it was fine-tuned
    without them. What is left of that can only make it give them their labels. So if it gives them other ones, as sure
    and as varied as those of samples of other classes (:func:`~lightning_backdoor.detection.diagnosis.diagnose`), their
    labels are wrong, and no other model is needed. Where it does not, nothing follows, and findings stay as they are.

    Costs one pass over the findings, at most 2,048 ordinary samples and 256 more of the label of each finding.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule with the repaired weights.
        scanner: Reads the training set.
        verdict: With labels.
        left_out: Samples that it was fine-tuned without, bool ``(N,)``.
    """
    wanted = [one for one in undiagnosed(verdict.findings) if bool(left_out[one.positions].any())]
    if verdict.labels is None or not wanted:
        return verdict
    told = _by_answers(trainer, pl_module, scanner, verdict, wanted, unseen=left_out)
    settled = {
        place
        for place, finding in enumerate(verdict.findings)
        if any(finding is one for one in wanted) and told[place].diagnosis == "wrong labels"
    }
    findings = [
        replace(told[place], reference_model="repaired") if place in settled else finding
        for place, finding in enumerate(verdict.findings)
    ]
    return replace(verdict, findings=tuple(findings))


def diagnosed_by_copy(
    trainer: Trainer,
    pl_module: LightningModule,
    scanner: DatasetScanner,
    verdict: Verdict,
    *,
    title: str,
    initial: dict[str, Any] | None,
    seed: int,
    steps: int | None = None,
    left_out: Tensor | None = None,
    consequence: str = "",
) -> Verdict:
    """The verdict with the diagnosis of the findings that have none, by a copy of the model trained without them.

    Costs the training of the copy, and two passes over at most 512 samples, 64 more of each finding's label, and the
    findings. The model, its training and all random streams stay as they are. Where no copy can be trained, for
    whatever reason, the verdict stays as it is, in all processes, and a warning says why: of the steps below, those
    that can fail in one process alone raise in all of them.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule.
        scanner: Reads the training set.
        verdict: With labels.
        title: Name of the defense, with which the warning begins.
        initial: State of the module that the copy starts from, of before it saw the findings. ``None``: the weights of
            all layers that can draw them are drawn anew.
        seed: Of the weights and of the order of samples.
        steps: Steps of training, of a batch each; at least 200 and at most 1,000 are taken. ``None``: as many as the
            fit has had, and 1,000 from weights that are drawn anew.
        left_out: Further samples that the copy must not see, bool ``(N,)``.
        consequence: What follows for the findings where there is no copy, for the warning: ``"..., since it "``.
    """
    missing = undiagnosed(verdict.findings)
    if not missing or verdict.labels is None:
        return verdict
    compared, unseen = held_out(verdict), ~verdict.keep | (verdict.finding_indices >= 0)
    if left_out is not None:
        unseen = unseen | left_out
    if steps is None:
        steps = LARGEST_PROBE if initial is None else trainer.global_step
    steps = min(max(steps, PROBE_STEPS), LARGEST_PROBE)
    options: dict[str, Any] = {"left_out": unseen | compared, "initial": initial, "steps": steps, "seed": seed}
    try:
        twin, data = trained_without(trainer, pl_module, scanner, **options)
        return diagnosed(trainer, twin, data, verdict, unseen=unseen, compared=compared, again=False)
    except Exception as error:  # out of memory, an image that cannot be read, and whatever the user's code raises
        why = str(error) if isinstance(error, BackdoorDefenseError) else f"{type(error).__name__}: {error}"
        rank_zero_warn(
            f"{title} {consequence}cannot find out whether the labels of {sum(map(len, missing)):,} images that stand "
            f"out are right. No copy of the model could be trained without them: {why}"
        )
        return verdict


def _by_answers(
    trainer: Trainer,
    pl_module: LightningModule,
    scanner: DatasetScanner,
    verdict: Verdict,
    wanted: list[Finding],
    *,
    unseen: Tensor,
    compared: Tensor | None = None,
) -> list[Finding]:
    """All findings, of which the wanted ones have the diagnosis by the answers of the model."""
    labels = labels_of(verdict)
    if compared is None:
        compared = _some(verdict, ordinary_samples(verdict) & ~scanner.unread)
    members = torch.cat([finding.positions for finding in wanted])
    positions = compared.index_fill(0, members, True).nonzero().squeeze(1)
    answers = scanner.answers(trainer, pl_module, description="diagnosis", positions=positions)
    predicted = torch.full_like(labels, -1).index_copy(0, positions, answers[0].cpu())
    confidence = torch.zeros(len(labels)).index_copy(0, positions, answers[1].float().cpu())
    return [
        diagnose(finding, labels, predicted, confidence, unseen=unseen, ordinary=compared)
        if any(finding is one for one in wanted)
        else finding
        for finding in verdict.findings
    ]


def held_out(verdict: Verdict) -> Tensor:
    """Ordinary samples to compare findings with that a copy of the model is not trained on, bool ``(N,)``.

    At most 512, a tenth, of all labels, and of the label of each finding at most 64, a fifth; or ten, up to a half.
    """
    ordinary = ordinary_samples(verdict)
    found = _mask(ordinary, min(HELD_OUT[0], int(ordinary.sum()) // 10))
    for finding in verdict.findings if verdict.labels is not None else ():
        own = ordinary & (verdict.labels == finding.label)
        count = int(own.sum())
        found |= _mask(own, min(HELD_OUT[1], max(count // 5, min(FEWEST, count // 2))))
    return found


def _some(verdict: Verdict, ordinary: Tensor) -> Tensor:
    """At most 2,048 ordinary samples, and 256 more of the label of each finding."""
    found = _mask(ordinary, COMPARED)
    for finding in verdict.findings if verdict.labels is not None else ():
        found |= _mask(ordinary & (verdict.labels == finding.label), OF_LABEL)
    return found


def _mask(mask: Tensor, count: int) -> Tensor:
    """At most so many samples of a mask, drawn at random, as a mask."""
    return torch.zeros_like(mask).index_fill(0, drawn(mask, count), True)


def _doubted(
    trainer: Trainer,
    pl_module: LightningModule,
    scanner: DatasetScanner,
    verdict: Verdict,
    findings: list[Finding],
) -> list[Finding]:
    """The findings, of which those are unclear whose labels seem right to this model, which still has the backdoor."""
    told = [place for place, found in enumerate(findings) if found is not verdict.findings[place]]
    right = [place for place in told if findings[place].diagnosis == "right labels"]
    places = [place for place in right if findings[place].works_as_trigger]
    if not places or verdict.labels is None:
        return findings
    groups = [(findings[place].label, findings[place].positions) for place in places]
    ordinary = ordinary_samples(verdict)
    now = estimate_asr(trainer, pl_module, scanner, groups, labels=verdict.labels, ordinary=ordinary)
    for place, found in zip(places, now, strict=True):
        if found is not None and found.asr - found.control > STILL * findings[place].asr_excess:
            findings[place] = replace(findings[place], diagnosis="unclear")
    return findings
