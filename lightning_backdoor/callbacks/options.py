"""The arguments that several constructors share, declared and documented once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_backdoor.detection.majorities import MAX_REMOVED_OF_CLASS
from lightning_backdoor.detection.subpopulations import FALSE_ALARM_RATE
from lightning_backdoor.scanning.scanner import ScanOptions
from lightning_backdoor.verdict import Verdict

__all__ = [
    "DECISION_DEFAULTS",
    "DEFAULTS",
    "DETECTOR_DEFAULTS",
    "Approved",
    "DecisionArguments",
    "DetectorArguments",
    "ScanArguments",
    "ScanOptions",
    "document_scan",
    "scan_arguments",
]


Approved = Sequence[int] | Tensor | Verdict | str | Path
"""Forms in which approved samples are passed."""


class ScanArguments(TypedDict, total=False):
    """What the user says of the data, how the images are read and measured, and where the report goes.

    Every ``None`` of these is found out.

    Args:
        approved: Images that you have looked at and found to be fine: they are never removed, unlearned or suspected,
            and no group that is found rests on them. Dataset positions; a verdict or a file that ``Verdict.save`` wrote
            (``.pt``), of which the approved samples are taken or, if it approves none by a mask of its own, all that it
            removed and found; or the path of a CSV file with the columns ``index`` and ``approved``, such as the
            report's, in which you have written ``yes`` (or ``true``, ``1``, ``x``) where an image is fine.
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
        mean: Mean of the pixel normalization, one number per channel in ``[0, 1]`` units; ``None`` finds it out.
            ``"per_image"``: every image was standardized by itself; its pixels span its smallest to largest value.
        std: Its standard deviation.
        batch_size: Images per forward pass of a scan; ``None`` takes the loader's, and on a CUDA device four times as
            many, up to 512: a scan keeps no activations for a backward pass.
        num_workers: Worker processes of a scan; ``None`` takes the loader's.
        seed: Seed of what the defense or the training transform draws.
        name: Tells two instances apart in checkpoints and report folders.
    """

    approved: Approved | None
    report_dir: str | Path | None
    forward_fn: Callable[[Any, Any], Any] | None
    batch_fn: Callable[[Any], tuple[Tensor, Tensor]] | None
    feature_layer: str | None
    eval_transform: Callable[[Any], Any] | None
    eval_dataset: Callable[[Any], Any] | Dataset[Any] | None
    mean: Sequence[float] | Literal["per_image"] | None
    std: Sequence[float] | None
    batch_size: int | None
    num_workers: int | None
    seed: int
    name: str | None


DEFAULTS: dict[str, Any] = {**dict.fromkeys(ScanArguments.__annotations__), "seed": 0}


def document_scan(extended: type, base: type = ScanArguments) -> None:
    """Append the arguments of ``base`` to the docstring of a TypedDict that extends it.

    Command lines take the help of an argument from there. The docstring must end with its own arguments.
    """
    arguments = inspect.cleandoc(base.__doc__ or "").partition("Args:\n")[2]
    extended.__doc__ = f"{inspect.cleandoc(extended.__doc__ or '')}\n{arguments}"


class DecisionArguments(ScanArguments, total=False):
    """How much evidence a decision takes; and all of :class:`ScanArguments`.

    Args:
        false_alarm_rate: Chance at most, in ``(0, 1)``, that noise in the features of clean data is taken for a group
            that stands out, in a training. A smaller one takes more evidence, which few images cannot give.
        max_removed_of_class: Largest share of a label, in ``(0, 1]``, removed for standing out. A group by which
            more would be gone may be the class itself. It is kept, with a warning, unless its labels are wrong, it came
            in addition to as many images as other labels have, or what it has in common makes the model give its label
            to other images. 1: no such limit.
    """

    false_alarm_rate: float
    max_removed_of_class: float


document_scan(DecisionArguments)
DECISION_DEFAULTS: dict[str, Any] = {
    **DEFAULTS,
    "false_alarm_rate": FALSE_ALARM_RATE,
    "max_removed_of_class": MAX_REMOVED_OF_CLASS,
}


class DetectorArguments(DecisionArguments, total=False):
    """How D-BR and D-ST tell suspects and trusted samples; and all of :class:`DecisionArguments`.

    Args:
        verdict: Verdict of another defense: what it removed is suspect. No detector is trained then.
        trusted: Share of the images of every class that are trusted, in ``(0, 1)``; one of each at least.
        suspect: ``"auto"`` looks for subpopulations; a number in ``(0, 1)`` is the share of all images, those whose
            features move most, that is suspect in any case.
        detector: ``"copy"`` starts from the model, ``"fresh"`` from the weights before training (kept in checkpoints).
            These are the weights at the start of ``fit``, before ``ckpt_path`` is loaded: where a suspicious model is
            handed to ``fit``, ``"fresh"`` is a copy, too. Or a network of your own: it takes the images of a batch
            after the transfer hooks and returns logits of as many classes; a copy of it is trained, from its weights,
            at the rate of ``"fresh"``. ``forward_fn`` and ``feature_layer`` are for the model alone.
        detector_steps: Steps in which the detector learns the labels, and as many of center repulsion.
        fct_metric: How far features move; ``"auto"``: ``"cosine"`` where some are negative, else ``"mse"``.
        num_transforms: Transformations per image.
        transform: Replaces turning and shifting: takes and returns the pixels of one image, uint8 ``(1, C, H, W)``. It
            is called for every image under a seed of its own.
    """

    verdict: Verdict | None
    trusted: float
    suspect: Literal["auto"] | float
    detector: Literal["copy", "fresh"] | nn.Module
    detector_steps: int
    fct_metric: Literal["auto", "mse", "cosine"]
    num_transforms: int
    transform: Callable[[Tensor], Tensor] | None


document_scan(DetectorArguments, DecisionArguments)
DETECTOR_DEFAULTS: dict[str, Any] = {
    **DECISION_DEFAULTS,
    "verdict": None,
    "trusted": 0.5,
    "suspect": "auto",
    "detector": "copy",
    "detector_steps": 200,
    "fct_metric": "auto",
    "num_transforms": 2,
    "transform": None,
}


def scan_arguments(arguments: DecisionArguments, known: Collection[str]) -> ScanArguments:
    """Those of the arguments that concern the scan.

    Args:
        arguments: Of a constructor.
        known: Names of all arguments that it has.

    Raises:
        TypeError: There is no such argument.
    """
    if unknown := sorted(arguments.keys() - known):
        raise TypeError(f"got an unexpected keyword argument {unknown[0]!r}")
    given: Any = {name: value for name, value in arguments.items() if name in DEFAULTS}
    scan: ScanArguments = given
    return scan
