"""From NONE's measurement to the samples that leave the training set and the units that are reset."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_backdoor._lightning import rank_zero_info, rank_zero_warn
from lightning_backdoor.detection.decision import Decision, add_removed, decide, decide_by_break
from lightning_backdoor.errors import ModelError
from lightning_backdoor.functional.hyperplane import select_units
from lightning_backdoor.scanning.distributed import raise_on_all_ranks
from lightning_backdoor.scanning.isolation import isolated_eval
from lightning_backdoor.scanning.measure_units import Measured
from lightning_backdoor.scanning.scanner import DatasetScanner
from lightning_backdoor.surgery.graph import ResidualMode
from lightning_backdoor.surgery.reset import reset_units
from lightning_backdoor.surgery.units import UnitLayer, find_units
from lightning_backdoor.verdict import Verdict

__all__ = [
    "Chosen",
    "check_resettable",
    "choose_units",
    "find_layers",
    "frozen_layers",
    "judge_samples",
    "reset_chosen",
]

MIN_SHIFT = 1.0  # distance of two means over the sum of both standard deviations

Chosen = tuple[int, int, int, float]
"""Place of the layer, unit, class that drives it furthest, and score."""


def judge_samples(
    measured: Measured, earlier: Verdict | None, *, rule: str, max_removed: float, shared: bool = True
) -> Decision:
    """Judge all samples; what an earlier verdict removed stays removed.

    Args:
        measured: The measurement, of N samples.
        earlier: The verdict of an earlier round.
        rule: ``"auto"`` looks for second populations, ``"paper"`` cuts the raw bias at its natural break.
        max_removed: Largest share of the samples that may be removed in all, in ``(0, 1)``.
        shared: Look for a second population of all labels, too, as under an all-to-all attack.
    """
    keep = None if earlier is None or bool(earlier.keep.all()) else earlier.keep
    rows = slice(None) if keep is None else keep  # a mask would copy the responses, which may be a gigabyte
    if rule == "paper":
        decision = decide_by_break(measured.raw_bias[rows], max_removed=max_removed)
    else:
        decision = decide(
            measured.activations[rows],
            measured.bias[rows],
            measured.labels[rows],
            all_to_all=shared,
            max_removed=max_removed,
        )
    if earlier is None or keep is None:
        return decision
    limits: dict[str, Any] = {"max_removed": max_removed, "labels": None if rule == "paper" else measured.labels}
    return add_removed(decision, earlier.scores, keep, threshold=earlier.threshold, **limits)


def choose_units(
    layers: Sequence[UnitLayer], activation_excess: Tensor, unit_shift: Tensor | None, *, reset_fraction: float
) -> list[Chosen]:
    """Choose the units of every layer that are reset; those of layers that do not learn are left alone.

    Args:
        layers: The layers, with U units in all.
        activation_excess: How far each class drives each unit out of its usual range, float ``(U, K)``.
        unit_shift: How far the suspicious samples drive each unit, float ``(U,)``: those are chosen that they drive more
            than one spread away or, where none is, the ones that they drive furthest. ``None``: the most compromised
            units of each layer, whatever their score.
        reset_fraction: Largest share of the units of a layer.
    """
    strongest, of_class = activation_excess.max(dim=1)
    if unit_shift is None:
        return _top(layers, strongest, of_class, reset_fraction, -math.inf)
    return _top(layers, unit_shift, of_class, reset_fraction, MIN_SHIFT) or _top(
        layers, unit_shift, of_class, reset_fraction, 0.0
    )


def _top(
    layers: Sequence[UnitLayer], scores: Tensor, of_class: Tensor, reset_fraction: float, least: float
) -> list[Chosen]:
    chosen = []
    for place, (layer, rows) in enumerate(_rows(layers)):
        part = scores[rows]
        for unit in select_units(part, reset_fraction, least=least).tolist() if layer.trainable else ():
            chosen.append((place, unit, int(of_class[rows][unit]), float(part[unit])))
    return chosen


def frozen_layers(layers: Sequence[UnitLayer], unit_shift: Tensor) -> list[str]:
    """Names of the layers that do not learn, but have units that the suspicious samples drive.

    Args:
        layers: The layers, with U units in all.
        unit_shift: How far the suspicious samples drive each unit, float ``(U,)``.
    """
    frozen = [(layer.name, unit_shift[rows]) for layer, rows in _rows(layers) if not layer.trainable]
    return [name for name, part in frozen if bool((part > MIN_SHIFT).any())]


def _rows(layers: Sequence[UnitLayer]) -> list[tuple[UnitLayer, slice]]:
    """Each layer and its place among the units of all."""
    ends = list(accumulate(layer.size for layer in layers))
    return [(layer, slice(end - layer.size, end)) for layer, end in zip(layers, ends, strict=True)]


def find_layers(trainer: Any, pl_module: Any, data: DatasetScanner, residual_mode: ResidualMode) -> list[UnitLayer]:
    """All layers whose units can be looked at.

    Those are ``trainable`` whose units can be reset now: nothing that they need is frozen, and an optimizer has their
    weights. What the others show counts for the samples all the same.
    """
    with isolated_eval(trainer, pl_module), raise_on_all_ranks(trainer, "search for units"):
        found = find_units(pl_module, data.few(trainer, pl_module), residual_mode=residual_mode)
    trained = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    return [replace(layer, trainable=layer.trainable and id(layer.layer.weight) in trained) for layer in found]


def check_resettable(trainer: Any, layers: Sequence[UnitLayer], *, needed: bool) -> None:
    """Say at the start of a fit how many of the layers can be reset.

    There may be none as long as a callback is there that thaws layers later.

    Args:
        trainer: The running Trainer.
        layers: From :func:`find_layers`.
        needed: Whether the defence does nothing without resets.

    Raises:
        ModelError: There is none, no callback thaws layers later, and resets are needed.
    """
    able = sum(layer.trainable for layer in layers)
    thaws = any(cls.__name__ == "BaseFinetuning" for callback in trainer.callbacks for cls in type(callback).__mro__)
    why = "all weights that they need are frozen (requires_grad=False) or in no optimizer"
    if not able and not thaws and needed:
        raise ModelError(
            f"Units must be able to learn to be reset, but {why}. Unfreeze some layers, or use UltraCleanCallback."
        )
    if not able and not thaws:
        rank_zero_warn(
            f"NONE looks at the units of {len(layers)} layers and drops images, but can reset no unit: {why}. "
            "Unfreeze some layers, or use UltraCleanCallback, which trains anew without these images."
        )
    elif able < len(layers):
        rank_zero_info(f"NONE looks at {len(layers)} layers; {len(layers) - able} do not learn and are not reset.")


def reset_chosen(
    layers: Sequence[UnitLayer],
    chosen: Sequence[Chosen],
    *,
    mode: Literal["reinit", "prune"],
    optimizers: Iterable[torch.optim.Optimizer],
    seed: int,
) -> None:
    """Reset the chosen units; see :func:`~lightning_backdoor.surgery.reset_units`."""
    for i, layer in enumerate(layers):
        units = torch.tensor([unit for place, unit, *_ in chosen if place == i], dtype=torch.long)
        if len(units) == 0:  # reset_units refuses layers that do not learn
            continue
        reset_units(layer, units, mode=mode, optimizers=optimizers, seed=seed + i)
