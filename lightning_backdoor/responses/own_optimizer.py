"""An optimizer of a defence's own, in the place of the user's: what it trains, and at which rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_backdoor.data.nesting import copied
from lightning_backdoor.data.random_state import isolated_rng
from lightning_backdoor.errors import ModelError
from lightning_backdoor.scanning.isolation import isolated_eval
from lightning_backdoor.scanning.measure_fct import eps_of
from lightning_backdoor.scanning.scan import raise_on_all_ranks
from lightning_backdoor.scanning.scanner import DatasetScanner

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["OwnOptimizer", "Parts", "parts_of", "projection_head"]

LR, LR_CONV = 5e-4, 2e-3  # of features and projection; the latter with batch norms
LOGIT_STEP = 0.25  # largest change of a logit in a step of the classifier
WARMUP = 0.1  # of the contrastive stage
FLOOR = 1e-3  # of the largest rate, at the end


@dataclass(frozen=True)
class Parts:
    """Names of the parameters that features and classifier depend on, and how many features there are."""

    backbone: tuple[str, ...]
    classifier: tuple[str, ...]
    width: int


def parts_of(trainer: Trainer, pl_module: LightningModule, data: DatasetScanner) -> Parts:
    """Tell the parameters behind the features from those of the classifier, by the gradients that reach them.

    Raises:
        ModelError: Either has none that can learn, or some are in both.
    """
    named = {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}

    def reached(value: Tensor) -> tuple[str, ...]:
        if not (named and value.requires_grad):
            return ()
        gradients = torch.autograd.grad(value.sum(), list(named.values()), allow_unused=True, retain_graph=True)
        return tuple(name for name, gradient in zip(named, gradients, strict=True) if gradient is not None)

    with (
        isolated_eval(trainer, pl_module),
        raise_on_all_ranks(trainer, "search for the classifier"),
        torch.enable_grad(),
    ):
        logits, features = data.outputs(trainer, pl_module, copied(data.some), gradients=True, cut=True)
        backbone, classifier = reached(features), reached(logits)
    if not backbone or not classifier:
        remedy = (
            "Unfreeze some (requires_grad=True), or use DBRCallback, which also repairs a head on a frozen backbone."
            if not backbone
            else "Unfreeze some (requires_grad=True), or name an earlier layer, whose output are the features, by "
            "`feature_layer`."
        )
        raise ModelError(
            "D-ST trains features and a classifier, but no parameter "
            f"{'before layer' if not backbone else 'from layer'} {data.head.name!r}{' on' * bool(backbone)} can learn. "
            f"{remedy}"
        )
    if set(backbone) & set(classifier):
        raise ModelError(
            f"The logits must depend on the features alone, but there is another way to them around layer "
            f"{data.head.name!r}. Name the layer whose output all of them depend on by `feature_layer`."
        )
    return Parts(backbone, classifier, features.shape[1])


def projection_head(width: int, out: int, seed: int) -> nn.Module:
    """The two layers between features and contrastive loss, the same ones in every process."""
    with isolated_rng(seed):
        return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out)).float()


class OwnOptimizer:
    """Puts an AdamW into the Trainer, without schedulers: rates are set before every step.

    A step of AdamW changes every weight by about its rate, and so a logit by the rate times the sum of all features.
    The rate of the classifier is chosen by that sum, whatever the scale of the features.
    """

    def __init__(self) -> None:
        self._optimizer: torch.optim.Optimizer | None = None
        self._peak = 0.0

    def put(
        self, trainer: Trainer, pl_module: nn.Module, parts: Parts, projection: nn.Module | None, *, lr: float | None
    ) -> None:
        """Train features, classifier and projection; without a projection, the classifier alone.

        Args:
            trainer: The running Trainer.
            pl_module: The LightningModule under training.
            parts: The parameters.
            projection: The projection.
            lr: Largest rate of features and projection.
        """
        parameters = dict(pl_module.named_parameters())
        groups: list[dict[str, Any]] = [
            {"params": [parameters[name] for name in parts.classifier], "weight_decay": 0.0}
        ]
        if projection is not None:
            groups.append({"params": [*(parameters[name] for name in parts.backbone), *projection.parameters()]})
        normed = any("BatchNorm" in type(module).__name__ for module in pl_module.modules())
        self._peak = lr or (LR_CONV if normed else LR)
        eps = eps_of(parameter for group in groups for parameter in group["params"])
        self._optimizer = torch.optim.AdamW(groups, self._peak, eps=eps)
        trainer.optimizers = [self._optimizer]
        trainer.strategy.lr_scheduler_configs = []

    def set_rates(self, trainer: Trainer, features: Tensor, progress: float) -> None:
        """Set the rates of the step that comes, the same ones in every process; call before it.

        Args:
            trainer: The running Trainer.
            features: Those of the batch, float ``(B, D)``.
            progress: Share of the stage that is over, in ``[0, 1)``.
        """
        assert self._optimizer is not None
        classifier, *backbone = self._optimizer.param_groups
        for group in backbone:
            group["lr"] = self._peak * warm_cosine(progress, WARMUP)
        size = float(trainer.strategy.reduce(features.detach().abs().sum(dim=1).mean(), reduce_op="mean"))
        classifier["lr"] = LOGIT_STEP / max(size, 1e-6) * warm_cosine(progress, 0.0)


def warm_cosine(progress: float, warmup: float) -> float:
    """Share of the largest rate: a straight line up for ``warmup`` of the time, then half a cosine down."""
    if progress < warmup:
        return FLOOR + (1 - FLOOR) * progress / warmup
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min((progress - warmup) / (1 - warmup), 1.0)))
