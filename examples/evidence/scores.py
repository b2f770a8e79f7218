"""What can be measured about every training image under an attack, from one undefended network, kept in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from examples.evidence import model
from examples.evidence.looking import look
from examples.evidence.protocols import Setting
from examples.evidence.run import EARLY, Snapshot, checkpoint, early, train_network
from lightning_backdoor import functional
from lightning_backdoor.surgery import find_units
from lightning_backdoor.trainer.denoised_scan import DenoisedScan
from lightning_backdoor.trainer.distinguish import Detector, distinguish
from lightning_backdoor.trainer.etiquette import unobtrusive
from lightning_backdoor.trainer.training_set import TrainingSet
from lightning_backdoor.trainer.unit_scan import UnitScan

Scores = dict[str, Tensor]
STEPS = 200  # of the detector, and as many of centre repulsion


def measured(dataset: Any, setting: Setting, attack: str, seed: int, cache: Path) -> Scores:
    """Scores and responses of the N training images.

    The network is the undefended one before its last epoch, and as it was after its first epochs (trained now where
    that is not in the cache).

    Returns:
        ``labels`` long ``(N,)``. Scores, float ``(N,)``, larger is more suspicious: ``susceptibility`` and
        ``movement`` of the features, each also ``early``; ``fct``; ``bias`` and ``raw_bias`` of NONE; ``disagreement``,
        the share of the 20 nearest neighbours with another label. Responses, half ``(N, U)``: ``denoised`` and
        ``early denoised``, features and how they move; ``units``; ``detector units``.
    """
    shared = checkpoint(cache, setting, attack, seed)
    path = scores_of(shared)
    if not path.exists():
        if not early(shared).exists():
            until = Snapshot(early(shared), EARLY, stop=True)
            train_network(dataset, [until], setting, seed, None)
        weights = torch.load(early(shared), weights_only=True)["state_dict"]
        torch.save(look(dataset, setting.model, lambda *seen: _measure(*seen, weights), start_from=shared), path)
    scores: Scores = torch.load(path, weights_only=True)
    return scores


def scores_of(shared: Path) -> Path:
    """Where the scores of the images that a network was trained on are kept."""
    return shared.with_suffix(".scores.pt")


def _measure(
    trainer: pl.Trainer, module: model.Classifier, data: TrainingSet, early_weights: dict[str, Tensor]
) -> Scores:
    denoised = DenoisedScan(data, world_size=1, cache_bytes=2**31, softmax=False)
    late = denoised.run(trainer, module)
    with unobtrusive(trainer, module):
        layers = find_units(module, data.few(trainer, module))
    units = UnitScan(data, layers, strong=0.9, weak=0.1).measure(trainer, module)
    detector = distinguish(trainer, module, data, Detector("copy", None, STEPS, 2, None, 0), units=True)
    module.load_state_dict(early_weights)
    first = denoised.run(trainer, module)
    denoised.close()
    labels, features = late["labels"], late["responses"].shape[1] // 2
    everything = torch.ones(len(labels), dtype=torch.bool)
    agreement = functional.neighbour_agreement(late["responses"][:, :features], labels, everything)
    assert detector.units is not None
    return {
        "labels": labels,
        "susceptibility": late["susceptibility"],
        "early susceptibility": first["susceptibility"],
        "movement": late["movement"],
        "early movement": first["movement"],
        "fct": detector.fct,
        "bias": units.bias,
        "raw bias": units.raw_bias,
        "disagreement": 1 - agreement,
        "denoised": late["responses"],
        "early denoised": first["responses"],
        "units": units.responses,
        "detector units": detector.units.responses,
    }
