"""What the defenses measure of every training sample, without a decision."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.scanning.measure_denoised import DenoisedScan
from lightning_backdoor.scanning.measure_fct import Detector, distinguish
from lightning_backdoor.scanning.measure_units import UnitScan, find_layers
from lightning_backdoor.scanning.scanner import ScanOptions, open_scanner

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["QUANTITIES", "measure"]

QUANTITIES = ("denoised", "units", "fct", "detector_units")
CACHE_BYTES = 2**31  # of denoised images; more go to a temporary file


def measure(
    trainer: Trainer,
    pl_module: LightningModule,
    dataloader: Any,
    *,
    what: Collection[str] = ("denoised", "units", "fct"),
    detector: Literal["copy", "fresh"] = "copy",
    detector_steps: int = 200,
    repulsion_steps: int | None = None,
    num_transforms: int = 2,
    forward_fn: Callable[[Any, Any], Any] | None = None,
    batch_fn: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
    feature_layer: str | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Measure every sample of a training set as the defenses do, without a decision.

    Call it in a hook of a callback, from ``on_train_start`` on, with ``trainer.train_dataloader``. Weights, buffers,
    random streams and logs of the training stay as they are. All tensors are on the CPU, in the order of the dataset.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
        dataloader: Its training loader.
        what: Any of ``"denoised"`` (UltraClean; three forward passes), ``"units"`` (NONE; one,
            or two where the responses of all units take over 256 MiB), ``"fct"`` (D-BR and D-ST; ``detector_steps`` of
            training, one pass, and one for each transformation), ``"detector_units"`` (the units of the detector of
            ``"fct"``; as many more as ``"units"``).
        detector: Weights that the detector starts from: those of the module. ``"fresh"`` trains it at a higher rate.
        detector_steps: Steps in which the detector learns the labels.
        repulsion_steps: Steps of center repulsion after these. ``None``: as many.
        num_transforms: Transformations of each image, whose FCT is averaged.
        forward_fn: ``forward_fn(pl_module, batch)`` returns logits ``(B, K)``, where images alone are not enough.
        batch_fn: ``batch_fn(batch)`` returns images and labels, where they cannot be found.
        feature_layer: Name of the layer whose output are the features. ``None``: the input of the classifier head.
        batch_size: Images per forward pass. ``None``: that of the loader; on a CUDA device four times as many, up to
            512.
        num_workers: Worker processes. ``None``: those of the loader.
        seed: Of the detector's batches and of the transformations.

    Returns:
        ``labels`` long ``(N,)``, unless nothing was measured. Scores are float ``(N,)``, larger is more suspicious.
        ``"denoised"``: ``susceptibility`` (L1 distance of the logits under denoising), ``movement`` (mean square of
        that of the features) and ``denoised``, half ``(N, 2 D)``, the features and how they move. ``"units"``: ``bias``
        and ``raw_bias`` (NONE's scores) and ``units``, half ``(N, U)``, responses of the most compromised units.
        ``"fct"``: ``fct``. ``"detector_units"``: ``detector_units``, half ``(N, U)``.

    Raises:
        ArgumentError: ``what`` has another name; or images, labels or the pixel space cannot be found, naming the
            argument that helps.
        DataError: The data cannot be read by position.
        ModelError: There are no logits, no features or no units to measure.
    """
    if unknown := sorted(set(what) - set(QUANTITIES)):
        raise ArgumentError(f"`what` must name some of {', '.join(map(repr, QUANTITIES))}, got {unknown}.")
    options = ScanOptions(
        forward_fn=forward_fn,
        batch_fn=batch_fn,
        feature_layer=feature_layer,
        batch_size=batch_size,
        num_workers=num_workers,
        seed=seed,
    )
    data = open_scanner(trainer, pl_module, dataloader, options)
    found: dict[str, Tensor] = {}
    if "denoised" in what:
        scan = DenoisedScan(data, world_size=trainer.world_size, cache_bytes=CACHE_BYTES, softmax=False)
        with closing(scan):
            measured = scan.run(trainer, pl_module)
        found |= {name: measured[name] for name in ("labels", "susceptibility", "movement")}
        found["denoised"] = measured["responses"].cpu()
    if "units" in what:
        units = UnitScan(data, find_layers(trainer, pl_module, data)).measure(trainer, pl_module)
        found |= {
            "labels": units.labels,
            "bias": units.bias,
            "raw_bias": units.raw_bias,
            "units": units.activations.cpu(),
        }
    if "fct" in what or "detector_units" in what:
        settings = Detector(detector, None, detector_steps, num_transforms, None, seed, repulsion_steps)
        told = distinguish(trainer, pl_module, data, settings, units="detector_units" in what)
        found |= {"labels": told.labels, "fct": told.fct}
        if told.units is not None:
            found["detector_units"] = told.units.activations.cpu()
    return found
