"""What neighbours in the model's features say about labels: UltraClean's early look, D-ST's second one."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor._lightning import rank_zero_warn
from lightning_backdoor.callbacks.suspects import masks_of
from lightning_backdoor.data.pixels import check_finite
from lightning_backdoor.detection.decision import limit_of_labels
from lightning_backdoor.detection.neighbors import neighbor_agreement, reconsider_uncertain
from lightning_backdoor.errors import DataError
from lightning_backdoor.responses.flagged_batches import Flags
from lightning_backdoor.scanning.distributed import raise_on_all_ranks
from lightning_backdoor.scanning.scanner import DatasetScanner
from lightning_backdoor.verdict import Verdict

__all__ = ["EarlyLook", "accuracy_on_trusted", "early_look", "flags_of", "second_look"]

POOR = 0.5  # accuracy on trusted samples that is worth a warning
REFERENCES = 2**13  # samples among which the neighbours of all are looked for
_HALF = torch.finfo(torch.half).max


@dataclass(frozen=True)
class EarlyLook:
    """What neighbours said of N samples early in training, in tensors that a checkpoint can hold.

    Attributes:
        agreement: Share of every sample's neighbours that had its label, half ``(N,)``.
        probe: Labels of a few samples, to know the dataset again.
    """

    agreement: Tensor
    probe: Tensor

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors alone."""
        return asdict(self)

    def require_same_data(self, data: DatasetScanner) -> None:
        """Raise a DataError if it was taken of other samples than those that are about to be trained on."""
        if len(self.agreement) != len(data) or not torch.equal(self.probe, data.probe[1]):
            raise DataError(
                f"The early look was at {len(self.agreement)} samples of another dataset; the training dataset has "
                f"{len(data)}. Resume with the dataset of the interrupted run, or use no `ckpt_path`."
            )


def early_look(trainer: Any, pl_module: Any, data: DatasetScanner) -> EarlyLook:
    """Ask which of every sample's neighbours have its label, by the features as they are now.

    Neighbours are looked for in a random sample of the training set, by the first process, on the CPU. Every process
    must call it and gets the same answer.
    """

    def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
        check_finite(data.layout.images(batch), indices)
        labels = data.labels(batch).clone()  # transfer hooks may change a batch in place
        features = data.outputs(trainer, pl_module, batch)[1]
        return {"labels": labels, "features": features.clamp(-_HALF, _HALF).half()}

    found = data.scan(trainer, pl_module, step, description="UltraClean early look")
    agreement = torch.empty(0)
    with raise_on_all_ranks(trainer, "UltraClean early look"):
        if trainer.is_global_zero:
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(data.options.seed))
            references = torch.zeros(len(data), dtype=torch.bool)
            references[order[:REFERENCES]] = True
            agreement = neighbor_agreement(found["features"], found["labels"], references, gpu=False).half()
    return EarlyLook(trainer.strategy.broadcast(agreement, src=0), data.probe[1])


def flags_of(verdict: Verdict) -> Flags:
    """What a verdict says of every sample, for the two stages."""
    labels, suspect, trusted = masks_of(verdict)
    return Flags(labels, trusted, suspect)


def second_look(
    trainer: Any,
    pl_module: Any,
    data: DatasetScanner,
    verdict: Verdict,
    k: int,
    *,
    reassign_uncertain: bool,
    max_removed: float,
) -> tuple[float, Verdict, int, int]:
    """Ask the neighbours of trusted samples, and those of uncertain ones on which side they are.

    The first process asks them. Every process must call it and gets the same answer.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
        data: The training set.
        verdict: Judgement on its samples.
        k: Number of neighbours.
        reassign_uncertain: Let uncertain samples change sides.
        max_removed: Largest share of all samples that may be suspect.

    Returns:
        Share of the neighbours of trusted samples that have their label; the verdict; how many samples became trusted
        and suspect.
    """
    flags = flags_of(verdict)
    asked = flags.trusted.new_ones(len(data)) if reassign_uncertain else flags.trusted
    positions = asked.nonzero().squeeze(1)
    features = data.features(trainer, pl_module, description="D-ST neighbours", positions=positions)
    mean, nobody = 0.0, torch.zeros(len(data), dtype=torch.bool)
    more, fewer = nobody, nobody
    with raise_on_all_ranks(trainer, "D-ST neighbours"):
        if trainer.is_global_zero:
            agreement = neighbor_agreement(features, flags.labels[asked], flags.trusted[asked], k)
            mean = float(agreement[flags.trusted[asked]].mean())
            if reassign_uncertain:
                budget = int(max_removed * len(data)) - int(flags.suspect.sum())
                uncertain = verdict.keep & ~flags.trusted & ~flags.suspect
                more, fewer = reconsider_uncertain(agreement, flags.labels, flags.trusted, uncertain, most=budget)
                keep, order = verdict.keep & ~fewer, verdict.scores.masked_fill(flags.suspect, math.inf)
                fewer &= ~limit_of_labels(order, keep, flags.labels)
    mean, more, fewer = trainer.strategy.broadcast((mean, more, fewer), src=0)
    if not reassign_uncertain:
        return mean, verdict, 0, 0
    suspect, trusted = flags.suspect | fewer, flags.trusted | more
    changed = replace(verdict, keep=verdict.keep & ~suspect, trusted=trusted, suspect=suspect)
    return mean, changed, int(more.sum()), int(fewer.sum())


def accuracy_on_trusted(trainer: Any, pl_module: Any, data: DatasetScanner, verdict: Verdict) -> float:
    """Share of the trusted samples that get their label; warns if it is poor."""
    flags = flags_of(verdict)
    positions = flags.trusted.nonzero().squeeze(1)
    predicted = data.predict(trainer, pl_module, description="D-ST check", positions=positions)
    accuracy = float((predicted == flags.labels[positions]).float().mean())
    if accuracy < POOR:
        rank_zero_warn(
            f"D-ST: the model gives {accuracy:.1%} of the trusted images their label. Two stages need many epochs: "
            "raise `max_epochs` or `trusted`, or repair an ordinary training by DBRCallback."
        )
    return accuracy
