"""The two stages of D-ST inside a fit: features by a contrastive loss, then a classifier by mixed cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor.errors import TrainerError
from lightning_backdoor.functional.contrastive import mixed_cross_entropy, ss_contrastive_loss
from lightning_backdoor.loading.loader_filter import LoaderFilter
from lightning_backdoor.responses.flagged_batches import Batch, FlaggedBatches, Flags
from lightning_backdoor.responses.own_optimizer import OwnOptimizer, Parts, parts_of, projection_head
from lightning_backdoor.responses.training_step_override import TrainingStepOverride
from lightning_backdoor.scanning.isolation import evaluation_mode, quiet
from lightning_backdoor.scanning.scanner import DatasetScanner

__all__ = ["Contrasting", "Plan", "Recipe"]

CLASSIFIER_SHARE = 0.1  # of the epochs


@dataclass(frozen=True)
class Recipe:
    """How the two stages train.

    Attributes:
        classifier_epochs: Epochs of the second stage; ``None``: a tenth of all, at least one.
        lr: Largest learning rate of the features; ``None``: by the optimizer.
        temperature: Of the contrastive loss.
        weight: Of suspects in the mixed cross-entropy.
        projection: Width of the projection.
        reference_mask: Positives of the authors' code instead of the paper's.
        supervised_features: Features learn from the cross-entropy of trusted images, too.
        views: See :class:`~lightning_backdoor.responses.flagged_batches.FlaggedBatches`.
        seed: Seed of order, views and projection.
    """

    classifier_epochs: int | None
    lr: float | None
    temperature: float
    weight: float
    projection: int
    reference_mask: bool
    supervised_features: bool
    views: Callable[[Tensor], Tensor] | None
    seed: int


@dataclass(frozen=True)
class Plan:
    """Epochs that the fit has had at the beginning, at the change to the classifier, and at the end."""

    first: int
    change: int
    until: int


class Contrasting:
    """Trains a module by D-ST, in the place of its ``training_step`` and its optimizer, up to the planned last epoch.

    The first stage learns features from two strong views of every image; beside it the classifier learns trusted
    images, so that validation means something at any time, and guides the features unless the recipe forbids it. The
    second stage leaves the features as they are and trains the classifier alone, on trusted and suspect images.

    Every batch is known by the positions that it holds. Its images go through the transfer hooks of the module as in
    evaluation: the views are all the augmentation there is.

    Attributes:
        plan: When the stages are; ``None`` while D-ST does not act.
        stage: ``"contrastive"``, ``"classifier"``, ``"done"``, or ``None``.
        losses: Mean loss of every epoch.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self.plan: Plan | None = None
        self.stage: str | None = None
        self.losses: list[float] = []
        self._parts: Parts | None = None
        self._projection: torch.nn.Module | None = None
        self._optimizer = OwnOptimizer()
        self._data: DatasetScanner | None = None
        self._flags: Flags | None = None
        self._batches: FlaggedBatches | None = None
        self._batch: Batch | None = None
        self._override: TrainingStepOverride | None = None
        self._total, self._steps = torch.zeros(()), 0  # of the losses of the current epoch
        self._progress = 0.0

    @property
    def features_epochs(self) -> int:
        """Epochs of the first stage; 0 while D-ST does not act."""
        return 0 if self.plan is None else self.plan.change - self.plan.first

    @property
    def done(self) -> int:
        """Epochs that the fit has had when the last noted one was over."""
        return len(self.losses) + (0 if self.plan is None else self.plan.first)

    @property
    def neighbors_are_due(self) -> bool:
        """Whether the first stage has ended or another tenth of it; ask in ``on_train_epoch_end``."""
        done, every = len(self.losses), math.ceil(self.features_epochs / 10)
        return self.stage == "contrastive" and (done >= self.features_epochs or done % every == 0)

    def attach(self, data: DatasetScanner, loader_filter: LoaderFilter, flags: Flags) -> None:
        """Say which samples it is about; call before :meth:`begin` or :meth:`go_on`."""
        self._data, self._flags = data, flags
        self._batches = FlaggedBatches(data, loader_filter, self._recipe.views, self._recipe.seed)

    def require_epochs(self, trainer: Any) -> Plan:
        """The plan from the current epoch on.

        Raises:
            TrainerError: The epochs left are not enough for both stages.
        """
        first, until = trainer.current_epoch, trainer.max_epochs
        classifier = self._recipe.classifier_epochs or max(1, round(CLASSIFIER_SHARE * (until - first)))
        if until - first <= classifier:
            raise TrainerError(
                f"D-ST needs an epoch for the features and {classifier} for the classifier, got {until - first} of "
                f"`max_epochs={until}`. Raise `max_epochs`, or lower `classifier_epochs`."
            )
        return Plan(first, until - classifier, until)

    def require_plan(self, trainer: Any) -> None:
        """Check that a run that is resumed ends where the one that was interrupted would have.

        Raises:
            TrainerError: It would train on after the last epoch of the plan, by the optimizer of the second stage.
        """
        assert self.plan is not None
        if trainer.max_epochs > self.plan.until:
            raise TrainerError(
                f"D-ST has planned {self.plan.until} epochs and cannot go on to `max_epochs={trainer.max_epochs}`. "
                f"Resume with `max_epochs={self.plan.until}`, or fit anew."
            )

    def begin(self, trainer: Any, pl_module: Any) -> None:
        """Start with the next epoch; call in ``on_train_start``."""
        assert self._data is not None
        self.plan, self.stage = self.require_epochs(trainer), "contrastive"
        self._parts = parts_of(trainer, pl_module, self._data)
        self._projection = projection_head(self._parts.width, self._recipe.projection, self._recipe.seed)
        self.at_fit_start(trainer, pl_module)
        self.go_on(trainer, pl_module)

    def at_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the optimizer of the stage into the Trainer, before its state is restored; call in ``on_fit_start``."""
        if self._parts is None:
            return
        if self._projection is not None:
            self._projection.to(pl_module.device)
        self._optimizer.put(trainer, pl_module, self._parts, self._projection, lr=self._recipe.lr)

    def go_on(self, trainer: Any, pl_module: Any) -> None:
        """Draw batches and take the steps over; call in ``on_train_start`` of a run that was interrupted."""
        if self.stage == "done" or self._batches is None:
            return
        self._draw(trainer)
        self._override = TrainingStepOverride(
            trainer, pl_module, self._batches.see, lambda: self._step(trainer, pl_module)
        )
        self._batches.restart()

    def at_epoch_start(self) -> None:
        """Call in ``on_train_epoch_start``."""
        if self._batches is not None:
            self._batches.at_epoch_start()

    def at_batch_start(self, trainer: Any, pl_module: Any, batch_idx: int) -> None:
        """Know what the batch holds, and make its views; call in ``on_train_batch_start``."""
        if self._override is None:
            return
        assert self._batches is not None
        assert self._flags is not None
        views = 2 if self.stage == "contrastive" else 1
        self._batch = self._batches.next(trainer, pl_module, self._flags, views)
        self._progress = self._share_done(trainer, batch_idx)

    def at_backward(self, trainer: Any) -> None:
        """Agree on the gradient of the projection, which DDP does not know; call in ``on_after_backward``."""
        if self._projection is None or trainer.world_size == 1:
            return
        for parameter in self._projection.parameters():
            parameter.grad = trainer.strategy.reduce(parameter.grad, reduce_op="mean")

    def at_epoch_end(self, trainer: Any) -> None:
        """Note the loss of the epoch; call in ``on_train_epoch_end``."""
        mean = trainer.strategy.reduce(self._total / max(self._steps, 1), reduce_op="mean")
        self.losses.append(float(mean))
        self._total, self._steps = torch.zeros(()), 0

    def change(self, trainer: Any, pl_module: Any, flags: Flags) -> None:
        """Go on with the classifier; call in ``on_train_epoch_end``."""
        self.stage, self._projection, self._flags = "classifier", None, flags
        self.at_fit_start(trainer, pl_module)
        self._draw(trainer)

    def finish(self) -> None:
        """The last epoch is over; call in ``on_train_epoch_end``."""
        self.stage = "done"
        self._stop()

    def release(self) -> None:
        """Give everything back that belongs to the user; a run that is not over can be resumed."""
        self._stop()
        self._data = self._flags = self._batches = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        projection = None if self._projection is None else self._projection.state_dict()
        return {
            "plan": None if self.plan is None else asdict(self.plan),
            "stage": self.stage,
            "losses": list(self.losses),
            "total": self._total.cpu(),
            "steps": self._steps,
            "parts": None if self._parts is None else asdict(self._parts),
            "projection": None if projection is None else {k: v.cpu().clone() for k, v in projection.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""
        plan, parts, projection = state_dict["plan"], state_dict["parts"], state_dict["projection"]
        self.plan = None if plan is None else Plan(**plan)
        self.stage, self.losses = state_dict["stage"], list(state_dict["losses"])
        self._total, self._steps = state_dict["total"], state_dict["steps"]
        self._parts = None if parts is None else Parts(**parts)
        self._projection = None
        if projection is not None and self._parts is not None:
            self._projection = projection_head(self._parts.width, self._recipe.projection, self._recipe.seed)
            self._projection.load_state_dict(projection)

    def _draw(self, trainer: Any) -> None:
        """Draw everything for the features, trusted and suspect samples for the classifier, from the next epoch on."""
        assert self._batches is not None
        assert self._flags is not None
        known = self._flags.trusted | self._flags.suspect
        self._batches.draw(trainer, torch.ones_like(known) if self.stage == "contrastive" else known)

    def _step(self, trainer: Any, pl_module: Any) -> Tensor:
        """The loss of a batch, in the place of ``training_step``."""
        with quiet(trainer, pl_module):
            if self.stage == "contrastive":
                loss = self._contrastive(trainer, pl_module)
            else:
                loss = self._mixed(trainer, pl_module)
        self._total, self._steps = self._total.to(loss.device) + loss.detach().float(), self._steps + 1
        if trainer.world_size > 1:  # DDP waits for a gradient of every parameter
            loss = loss + 0 * sum(parameter.sum() for parameter in pl_module.parameters() if parameter.requires_grad)
        return loss

    def _contrastive(self, trainer: Any, pl_module: Any) -> Tensor:
        batch, data, recipe = self._batch, self._data, self._recipe
        assert batch is not None
        assert data is not None
        assert self._projection is not None
        outputs = [
            data.outputs(trainer, pl_module, v, gradients=True, cut=not recipe.supervised_features) for v in batch.views
        ]
        projected = torch.stack([self._projection(features) for _, features in outputs], dim=1)
        loss = ss_contrastive_loss(
            projected, batch.labels, batch.trusted, recipe.temperature, reference_mask=recipe.reference_mask
        )
        self._optimizer.set_rates(trainer, outputs[0][1], self._progress)
        logits, trusted = torch.cat([logits for logits, _ in outputs]), batch.trusted.repeat(2)
        return loss + mixed_cross_entropy(logits, batch.labels.repeat(2), trusted, torch.zeros_like(trusted))

    def _mixed(self, trainer: Any, pl_module: Any) -> Tensor:
        batch, data = self._batch, self._data
        assert batch is not None
        assert data is not None
        with evaluation_mode(pl_module), torch.no_grad():
            logits, features = data.outputs(trainer, pl_module, batch.views[0], cut=True)
        self._optimizer.set_rates(trainer, features, self._progress)
        return mixed_cross_entropy(logits, batch.labels, batch.trusted, batch.suspect, self._recipe.weight)

    def _share_done(self, trainer: Any, batch_idx: int) -> float:
        """Share of the stage that is over."""
        assert self.plan is not None
        begin, end = (
            (self.plan.first, self.plan.change) if self.stage == "contrastive" else (self.plan.change, self.plan.until)
        )
        done: float = (trainer.current_epoch - begin + batch_idx / max(trainer.num_training_batches, 1)) / (end - begin)
        return done

    def _stop(self) -> None:
        if self._override is not None:
            self._override.release()
        if self._batches is not None:
            self._batches.release()
        self._override = self._batch = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running Trainer."""
        running = ("_data", "_flags", "_batches", "_batch", "_override")
        return {**self.__dict__, **dict.fromkeys(running), "_optimizer": OwnOptimizer()}
