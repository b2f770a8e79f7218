"""Look at a trained model and its dataset, and change nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_backdoor._lightning import rank_zero_warn
from lightning_backdoor.callbacks.arguments import require_fraction, require_positive
from lightning_backdoor.callbacks.base import (
    Defense,
    diagnosed_by_copy,
    examine,
    require_examinable,
    validation_dataset,
)
from lightning_backdoor.callbacks.dbr import DBRCallback
from lightning_backdoor.callbacks.none import NONECallback
from lightning_backdoor.callbacks.options import Approved, ScanOptions
from lightning_backdoor.callbacks.ultraclean import UltraCleanCallback
from lightning_backdoor.data.nesting import class_names
from lightning_backdoor.data.random_state import isolated_rng
from lightning_backdoor.data.views import batch_size_of, unwrapped
from lightning_backdoor.detection.joining import join_verdicts
from lightning_backdoor.detection.majorities import MAX_REMOVED_OF_CLASS, MOST_OF_LABEL, without_majorities
from lightning_backdoor.detection.subpopulations import FALSE_ALARM_RATE
from lightning_backdoor.errors import ArgumentError, ModelError
from lightning_backdoor.events import Event
from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.report.of_events import LITTLE, evidence, kept_majority, majorities
from lightning_backdoor.report.of_whole_classes import signaled, signals_told
from lightning_backdoor.report.writer import write_report
from lightning_backdoor.scanning.idle import CHILD, with_idle_trainer
from lightning_backdoor.scanning.measure_denoised import DENOISERS
from lightning_backdoor.scanning.scanner import DatasetScanner, open_scanner
from lightning_backdoor.verdict import Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DETECTORS", "DetectorName", "audit"]

DetectorName = Literal["features", "units", "consistency"]
DETECTORS: dict[str, Callable[..., Defense]] = {
    "features": UltraCleanCallback,
    "units": NONECallback,
    "consistency": DBRCallback,
}
"""The defenses whose detectors look, by the names that users pass."""

EPOCHS_OF_COPY = 20  # of training
BATCH = 128  # images, where a dataset comes without a loader
VERDICT = "verdict.pt"
MEANING = (
    "It is the largest score that one of the detectors gives the image; above 0.5 it belongs to a second population "
    "inside its class."
)


def audit(
    model: nn.Module,
    dataset: Any,
    *,
    detectors: Sequence[DetectorName] = ("features", "units"),
    false_alarm_rate: float = FALSE_ALARM_RATE,
    max_removed: float = 0.3,
    max_removed_of_class: float = MAX_REMOVED_OF_CLASS,
    diagnose: bool = True,
    approved: Approved | None = None,
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
    accelerator: str = "auto",
    progress: bool = True,
) -> Verdict:
    """Look for a backdoor in a trained model and the dataset that it was trained on, without changing either.

    Every detector looks at all images by itself, as in the last epoch of a training with its defense and
    ``response="report"``; then their verdicts are joined. An image of two findings is in the first one. During a
    training UltraClean also compares with the neighbors that images had in its first half. An audit has the last
    weights alone, so that attacks which stand out early alone may be missed.

    Of what is found, a copy of the model that is trained without it says whether its labels are right. The weights of
    the layers that can draw them (``reset_parameters``, and ``nn.MultiheadAttention``) are drawn anew for it; others,
    as class tokens and position embeddings, are those of the model. Where the copy learns too little from that, as a
    pretrained backbone does on a few thousand images, the diagnosis is ``"unclear"``.

    Weights, buffers, modes, hooks, random streams and the dataset stay as they are; a datamodule that has no data yet
    is set up. The time is that of about four passes over the images without gradients (``"features"`` three,
    ``"units"`` one, or two where the responses of all units take over 256 MiB) and of the denoising. Where something is
    found, the copy adds the training of twenty epochs, of 200 steps at least and 1,000 at most, and further passes take
    a few thousand images. ``"consistency"`` adds 400 steps of training, of a copy of the model, and four passes.

    Args:
        model: A classifier that is trained: a LightningModule, or any other module that takes images and returns
            logits ``(B, K)``.
        dataset: The images that it was trained on: a map-style dataset of images and labels, a DataLoader, or a
            LightningDataModule, whose training set is taken. Positions in the verdict are those of this dataset.
        detectors: Any of ``"features"`` (of UltraClean: features, and how they move when the image is denoised),
            ``"units"`` (of NONE: activations of all units) and ``"consistency"`` (of D-BR: the same of a copy that is
            trained to rely on triggers).
        false_alarm_rate: Chance at most, in ``(0, 1)``, that noise in the features of clean data is taken for a group
            that stands out, by one detector.
        max_removed: Largest share of the images that the verdict may flag, in ``(0, 1)``.
        max_removed_of_class: Largest share of a label, in ``(0, 1]``, flagged for standing out. A group by which
            more would be gone may be the class itself: it is a finding, but kept, unless more speaks against it.
        diagnose: Whether a copy is trained without what is found, for its diagnosis.
        approved: Images that you have looked at and found to be fine: they are in no finding, and no finding rests on
            them. Dataset positions, a verdict or a saved one (``.pt``), or a reviewed table (``.csv``); see
            :class:`~lightning_backdoor.callbacks.options.ScanArguments`.
        report_dir: Folder for the report, and for the verdict in ``verdict.pt``. ``None``: none is written.
        forward_fn: ``forward_fn(model, batch)`` returns logits ``(B, K)``, for models that cannot be called with the
            images alone.
        batch_fn: ``batch_fn(batch)`` returns images and labels, for batches in which they cannot be found.
        feature_layer: Name of the layer whose output are the features. ``None``: the input of the classifier head.
        eval_transform: Transform without augmentation. ``None``: that of the datamodule's validation set, else the
            dataset's own without its random steps.
        eval_dataset: In place of ``eval_transform``, for augmentation inside the dataset: the same samples without it,
            as a dataset, or as a function from the dataset to one.
        mean: Mean of the pixel normalization, one number per channel in ``[0, 1]`` units; ``None`` finds it out.
            ``"per_image"``: every image was standardized by itself.
        std: Its standard deviation.
        batch_size: Images per forward pass; ``None``: as the loader has them, or 128. On a CUDA device ``None`` takes
            four times as many, up to 512.
        num_workers: Worker processes that read images. ``None``: as the loader has them, or none.
        seed: Seed of what the dataset or the detector draws.
        accelerator: Where the model runs, as for a Trainer. ``"auto"``: the GPU that it is on, else any that is there.
        progress: Show the progress of passes that take more than two seconds.

    Returns:
        The verdict. ``findings`` are the groups that stand out; each names the ``detectors`` that found it. ``keep`` is
        the recommendation for a new training. Without a finding it keeps all.

    Raises:
        ArgumentError: If an argument is out of range, or images, labels or the pixel space cannot be told.
        DataError: If the dataset cannot be read by position.
        ModelError: If a detector has nothing to measure in the model.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> images, labels = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8), torch.arange(40) % 2
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
        >>> verdict = audit(model, TensorDataset(images / 255, labels), detectors=("features",), progress=False)
        >>> len(verdict), len(verdict.findings)
        (40, 0)
    """
    require_fraction("max_removed", max_removed)
    require_positive("batch_size", batch_size)
    defenses = _defenses(
        detectors,
        false_alarm_rate=false_alarm_rate,
        max_removed=max_removed,
        max_removed_of_class=max_removed_of_class,
        approved=approved,
        seed=seed,
    )
    is_datamodule = not hasattr(dataset, "__getitem__") and hasattr(dataset, "train_dataloader")
    with (
        isolated_rng(),
        with_idle_trainer(model, dataset if is_datamodule else None, accelerator=accelerator, progress=progress) as (
            trainer,
            module,
        ),
    ):
        own = module is model
        options = ScanOptions(
            forward_fn=forward_fn if own or forward_fn is None else _of_child(forward_fn),
            batch_fn=batch_fn,
            feature_layer=feature_layer if own or feature_layer is None else f"{CHILD}.{feature_layer}",
            eval_transform=eval_transform,
            eval_dataset=eval_dataset,
            mean=mean,
            std=std,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            features="features" in defenses or "consistency" in defenses,
        )
        loader = _loader_of(dataset, batch_size) if not is_datamodule else _loader_of_datamodule(dataset)
        scanner = open_scanner(trainer, module, loader, options, _validation_dataset(trainer))
        began, verdicts, events = time.monotonic(), {}, []
        for name, defense in defenses.items():
            with _named(name, len(defenses)):
                require_examinable(defense, trainer, module, scanner)
        with scanner.loaded(trainer, module):
            for name, defense in defenses.items():
                verdicts[name], event = examine(defense, trainer, module, scanner)
                events.append(event)
            verdict = join_verdicts(verdicts, max_removed=max_removed)
            if diagnose:
                steps = EPOCHS_OF_COPY * math.ceil(len(verdict) / batch_size_of(scanner.loader))
                verdict = diagnosed_by_copy(
                    trainer, module, scanner, verdict, title="The audit", initial=None, seed=seed, steps=steps
                )
        verdict, _ = without_majorities(verdict, torch.ones_like(verdict.keep), max_removed_of_class)
        _warn_of_little(events)
        if signals := signals_told(signaled(events), class_names(scanner.loader.dataset)):
            rank_zero_warn(f"The audit warns: {' '.join(signals)}")
        _warn_of_kept(verdict, max_removed_of_class)
        _warn_of_removed(verdict)
        if report_dir is not None:
            seconds = time.monotonic() - began
            shown = _shown(verdict, scanner, events, seconds=seconds, max_removed=max_removed)
            _write(Path(report_dir), verdict, replace(shown, false_alarm_rate=false_alarm_rate))
    return verdict


def _defenses(detectors: Sequence[str], **arguments: Any) -> dict[str, Defense]:
    """The defenses whose detectors are wanted, by name."""
    names = [detectors] if isinstance(detectors, str) else list(detectors)
    if not names or set(names) - DETECTORS.keys():
        raise ArgumentError(f"`detectors` must name some of {', '.join(map(repr, DETECTORS))}, got {detectors!r}.")
    return {name: DETECTORS[name](response="report", **arguments) for name in names}


def _of_child(forward_fn: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The same function of the LightningModule that a model is the child of."""
    return lambda module, batch: forward_fn(getattr(module, CHILD), batch)


def _loader_of(dataset: Any, batch_size: int | None) -> Any:
    """The user's loader, or one around a dataset."""
    if isinstance(unwrapped(dataset), DataLoader):
        return dataset
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ArgumentError(
            "`dataset` must be a map-style dataset, a DataLoader over one or a LightningDataModule, got "
            f"{type(dataset).__name__}."
        )
    return DataLoader(dataset, batch_size=batch_size or BATCH)


def _loader_of_datamodule(datamodule: Any) -> Any:
    """Its training loader; a datamodule that has none yet is set up first, as by a Trainer."""
    try:
        loader = datamodule.train_dataloader()
        usable = hasattr(getattr(unwrapped(loader), "dataset", None), "__getitem__")
    except Exception:  # what it raises before its setup may be anything
        usable = False
    if not usable:
        datamodule.prepare_data()
        datamodule.setup("fit")
        loader = datamodule.train_dataloader()
    if not isinstance(unwrapped(loader), DataLoader):
        raise ArgumentError(
            f"`train_dataloader` of the datamodule must return one DataLoader, got {type(loader).__name__}. Pass the "
            "loader or the dataset that is to be looked at."
        )
    return loader


def _validation_dataset(trainer: Any) -> Any:
    """The validation set, whose transform is preferred for reading; ``None`` where there is none to be had."""
    try:
        return validation_dataset(trainer)
    except Exception:  # a module's own loaders may need a fit
        return None


@contextmanager
def _named(name: str, count: int) -> Iterator[None]:
    """Add to the error of a model that a detector cannot look at how to do without it."""
    try:
        yield
    except ModelError as error:
        others = f" Or leave {name!r} out of `detectors`." if count > 1 else " Or name another one of `detectors`."
        raise ModelError(f"{error}{others}") from error


def _warn_of_little(events: Sequence[Event]) -> None:
    """Warn of a model that gives under half of the images their label: what it was shown may not be what it knows."""
    accuracies = [accuracy for event in events for accuracy in event.accuracies]
    if accuracies and accuracies[0] < LITTLE:
        rank_zero_warn(
            f"The model gives only {accuracies[0]:.0%} of the images their label, so that little can be told from "
            "it. Are these the images that it was trained on, prepared in the same way (`eval_transform`), and are the "
            "classes in the same order?"
        )


def _warn_of_kept(verdict: Verdict, share: float) -> None:
    """Warn of the findings that are most of their label and stay, by their index in the joined verdict."""
    if MOST_OF_LABEL not in verdict.rule or verdict.labels is None:
        return
    for place, finding in enumerate(verdict.findings):
        size = int((verdict.labels == finding.label).sum())
        if len(finding) > share * size and bool(verdict.keep[finding.positions].all()):
            rank_zero_warn(f"The audit {kept_majority(finding, place, verdict, name='verdict')}")


def _warn_of_removed(verdict: Verdict) -> None:
    """Warn of labels most images of which are flagged."""
    if told := majorities(verdict, None, name="verdict", callback=None):
        rank_zero_warn(f"The audit {told}")


def _shown(
    verdict: Verdict, scanner: DatasetScanner, events: Sequence[Event], *, seconds: float, max_removed: float
) -> Evidence:
    """What the report shows beside the verdict."""
    return evidence(
        events,
        verdict,
        images=scanner.images,
        denoised=lambda indices: [denoise(scanner.images(indices)) for denoise in DENOISERS],
        read_with=scanner.transform.description,
        classes=class_names(scanner.loader.dataset),
        meaning=MEANING,
        by_subpopulations=True,
        seconds=seconds,
        max_removed=max_removed,
    )


def _write(folder: Path, verdict: Verdict, shown: Evidence) -> None:
    """Write the verdict and its report."""
    folder.mkdir(parents=True, exist_ok=True)
    verdict.save(folder / VERDICT)
    write_report(folder, verdict, method="The audit", evidence=shown)
