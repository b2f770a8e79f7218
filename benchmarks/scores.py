"""What can be measured about every training image under an attack, from one undefended network, kept in the cache."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

from benchmarks import model
from benchmarks.cache import EARLY, kept
from benchmarks.cases import Case
from benchmarks.looking import look
from lightning_backdoor import functional, metrics
from lightning_backdoor.scanning.isolation import isolated_eval
from lightning_backdoor.scanning.measure_denoised import DenoisedScan
from lightning_backdoor.scanning.measure_fct import Detector, distinguish
from lightning_backdoor.scanning.measure_units import UnitScan
from lightning_backdoor.scanning.scanner import DatasetScanner
from lightning_backdoor.surgery import find_units

Scores = dict[str, Tensor]
STEPS = 200  # of the detector, and as many of centre repulsion


def scores_of(case: Case) -> Scores:
    """Scores and responses of the N training images.

    The network is the undefended one before its last epoch, and (*early*) as it was after its first epochs.

    Returns:
        ``labels`` long ``(N,)``. Scores, float ``(N,)``, larger is more suspicious: ``susceptibility`` of the logits,
        ``movement`` of the features, ``disagreement`` (the share of the 20 nearest neighbours with another label), each
        also ``early``; ``fct``; ``bias`` and ``raw bias`` of NONE. Responses, half ``(N, U)``: ``denoised`` and
        ``early denoised``, features and how they move; ``units``; ``detector units``.
    """

    def make() -> Scores:
        weights = torch.load(case.undefended(at_first=True), weights_only=True)["state_dict"]
        found: Scores = look(case, partial(_measure, weights), start_from=case.undefended())
        return found

    return kept(path_of(case), make)


def path_of(case: Case) -> Path:
    """Where the scores are kept."""
    return case.shared.with_suffix(f".scores-{EARLY}-{STEPS}.pt")


def auroc(scores: Tensor, poisoned: Tensor) -> float:
    """How well scores (N,) tell poisoned samples, bool (N,), from others; NaN if there are none of either."""
    metric = metrics.DetectionRates()
    metric.update(scores, torch.ones_like(poisoned), poisoned)
    return float(metric.compute()["auroc"])


def _measure(
    early_weights: dict[str, Tensor], trainer: pl.Trainer, module: model.Classifier, data: DatasetScanner
) -> Scores:
    with closing(DenoisedScan(data, world_size=1, cache_bytes=2**31, softmax=False)) as denoised:
        late = denoised.run(trainer, module)
        with isolated_eval(trainer, module):
            layers = find_units(module, data.few(trainer, module))
        units = UnitScan(data, layers, strong=0.9, weak=0.1).measure(trainer, module)
        detector = distinguish(trainer, module, data, Detector("copy", None, STEPS, 2, None, 0), units=True)
        module.load_state_dict(early_weights)
        first = denoised.run(trainer, module)
    assert detector.units is not None
    found = {
        "labels": late["labels"],
        "fct": detector.fct,
        "bias": units.bias,
        "raw bias": units.raw_bias,
        "units": units.activations,
        "detector units": detector.units.activations,
    }
    for prefix, part in {"": late, "early ": first}.items():
        found[f"{prefix}susceptibility"], found[f"{prefix}movement"] = part["susceptibility"], part["movement"]
        found[f"{prefix}denoised"] = part["responses"]
        found[f"{prefix}disagreement"] = disagreement(part["responses"], part["labels"])
    return found


def disagreement(responses: Tensor, labels: Tensor) -> Tensor:
    """Share of the 20 nearest neighbours with another label, (N,), from features and their movement, (N, 2 D)."""
    everything = torch.ones(len(labels), dtype=torch.bool)
    return 1 - functional.neighbor_agreement(responses[:, : responses.shape[1] // 2], labels, everything)
