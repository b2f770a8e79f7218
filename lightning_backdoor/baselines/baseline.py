"""What the filters from the literature share: one scan, the rule of the paper, and the way back to the start of fit."""

from __future__ import annotations

import inspect
import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_backdoor._lightning import rank_zero_info
from lightning_backdoor.callbacks.filtering import FilterCallback
from lightning_backdoor.callbacks.looks import evidence, sentence
from lightning_backdoor.detection.decision import Decision, limit_removed
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.scanning.scanner import DatasetScanner, ScanOptions

__all__ = ["Baseline", "decision_of", "merged_signature", "require_features"]


class Baseline(FilterCallback):
    """Base of the filters from the literature, which stand beside our defences as baselines.

    Each one scans the training set once, when training is about to end (or after ``warmup_epochs``), removes what its
    paper says, and goes back to the start of fit to train on the rest. They are as their papers have them: **most
    remove images from clean data as well**, and there is no gate that says that nothing is wrong.

    Args:
        warmup_epochs: Epochs of ordinary training before the scan. ``None``: when training is about to end, since the
            papers look at trained networks.
        max_removed: Largest share of the training set that may be removed, in ``(0, 1)``.
        rewind: Go back to the start of fit after samples were removed; ``False`` trains on from there. See
            :class:`~lightning_backdoor.UltraCleanCallback` for what goes back.
        report_dir: Folder for the report; with a ``name``, a folder of that name in it. ``None``: beside the logger's
            files; without a logger there is no report.
        forward_fn: ``forward_fn(pl_module, batch)`` returns logits ``(B, K)``, for models that cannot be called with
            the images alone.
        batch_fn: ``batch_fn(batch)`` returns images and labels, for batches in which they cannot be found.
        feature_layer: Name of the layer whose output are the features. ``None``: the input of the classifier head.
        eval_transform: Transform without augmentation. ``None``: that of the validation set, else the training
            transform without its random steps.
        eval_dataset: In place of ``eval_transform``, for augmentation inside the dataset: the same samples without it,
            as a dataset, or as a function from the training dataset to one.
        mean: Mean of the pixel normalisation, one number per channel in ``[0, 1]`` units; ``None`` finds it out.
            ``"per_image"``: every image was standardised by itself; its pixels span its smallest to largest value.
        std: Its standard deviation.
        batch_size: Images per forward pass of the scan; ``None`` takes the loader's.
        num_workers: Worker processes of the scan; ``None`` takes the loader's.
        seed: Seed of whatever the method or the training transform draws.
        name: Tells two instances apart in checkpoints and report folders.

    Attributes:
        meaning: What the score measures, for the report.

    Raises:
        ArgumentError: If an argument is out of range.
        DataError: At the start of fit, if the training data cannot be scanned.
        TrainerError: At the start of fit, if a Trainer setting rules the baseline out.
    """

    meaning: ClassVar[str]

    def __init__(
        self,
        *,
        warmup_epochs: int | None = None,
        max_removed: float = 0.5,
        rewind: bool = True,
        report_dir: str | Path | None = None,
        forward_fn: Callable[[Any, Any], Any] | None = None,
        batch_fn: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
        feature_layer: str | None = None,
        eval_transform: Callable[[Any], Any] | None = None,
        eval_dataset: Callable[[Any], Any] | Dataset[Any] | None = None,
        mean: Sequence[float] | Literal["per_image"] | None = None,
        std: Sequence[float] | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        options = ScanOptions(
            forward_fn, batch_fn, feature_layer, eval_transform, mean, std, batch_size, num_workers, seed,
            eval_dataset=eval_dataset,
        )  # fmt: skip
        super().__init__(
            warmup_epochs=warmup_epochs,
            max_removed=max_removed,
            rewind=rewind,
            rescore_every=None,
            options=options,
            report_dir=report_dir,
            name=name,
        )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the arguments that are handed on as ``**common`` in signature, help and representation."""
        super().__init_subclass__(**kwargs)
        cls.__signature__ = merged_signature(cls)  # type: ignore[attr-defined]

    @abstractmethod
    def _judge(self, found: dict[str, Tensor]) -> tuple[Tensor, Tensor, str]:
        """Scores, float ``(N,)``, the samples to keep, bool ``(N,)``, and the rule in words."""

    def _measure(
        self, trainer: Any, pl_module: Any, data: DatasetScanner, indices: Tensor, batch: Any
    ) -> dict[str, Tensor]:
        """What is kept of a batch of samples at the positions ``indices``, long ``(B,)``: tensors ``(B, ...)``."""
        return {"features": data.outputs(trainer, pl_module, batch)[1]}

    def _scan(self, trainer: Any, pl_module: Any) -> dict[str, Tensor]:
        data = self._training_set
        assert data is not None

        def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
            labels = data.labels(batch).clone()  # transfer hooks may change a batch in place
            return {"labels": labels, **self._measure(trainer, pl_module, data, indices, batch)}

        return data.scan(trainer, pl_module, step, description=f"{self.title or self.method} scan")

    def _decide(self, found: dict[str, Tensor]) -> Decision:
        scores, keep, rule = self._judge(found)
        return decision_of(scores, keep, rule, max_removed=self.max_removed)

    def _tell(self, trainer: Any, pl_module: Any, seconds: float) -> None:
        assert self.verdict is not None
        assert self._training_set is not None
        pl_module.log_dict({f"backdoor/{self.method.lower()}/removed": float(len(self.verdict.removed))})
        rank_zero_info(f"{self.title or self.method} {sentence(self._looks, len(self.verdict))}")
        limit, meaning = self.max_removed, self.meaning
        self._write_report(
            trainer,
            evidence(self._looks, self._training_set, meaning=meaning, seconds=seconds, max_removed=limit),
        )

    def _first_scan(self, trainer: Any) -> int:
        return self.warmup_epochs or sys.maxsize


def decision_of(scores: Tensor, keep: Tensor, rule: str, *, max_removed: float) -> Decision:
    """Carry out the rule of a paper within ``max_removed``.

    Every removed sample has a score above the threshold. Where the rule cuts class by class, kept ones may, too.

    Args:
        scores: Float ``(N,)``; larger is more suspicious.
        keep: Samples that the rule keeps, bool ``(N,)``.
        rule: Its name.
        max_removed: Largest share of all samples that may be removed, in ``(0, 1)``.
    """
    num_flagged_before_cap = int((~keep).sum())
    limited = limit_removed(scores, keep, max_removed)
    if not torch.equal(limited, keep):
        keep, rule = limited, f"{rule}, max_removed({max_removed:g})"
    threshold = math.inf
    if not bool(keep.all()):
        lowest = scores[~keep].min()
        below = scores[scores < lowest]
        threshold = float(below.max() if len(below) else lowest - 1)
    return Decision(scores, keep, threshold, rule, (), num_flagged_before_cap)


def merged_signature(cls: type) -> inspect.Signature:
    """The keyword arguments of a constructor, and of those that it hands its ``**`` arguments on to."""
    merged: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            for parameter in parameters:
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                    merged.setdefault(parameter.name, parameter)
            if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters):
                break
    return inspect.Signature(list(merged.values()))


def require_features(features: Tensor, labels: Tensor) -> None:
    """Raise an ArgumentError unless features are ``(N, D)`` and labels are whole numbers ``(N,)``, N at least 1."""
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels) or labels.is_floating_point():
        raise ArgumentError(
            f"`features` must have shape (N, D) and `labels` (N,) with whole numbers, got {tuple(features.shape)} and "
            f"{labels.dtype} {tuple(labels.shape)}. Flatten or pool the maps first."
        )
