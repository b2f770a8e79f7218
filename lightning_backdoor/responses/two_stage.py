"""The two stages of D-ST inside a fit: features by a contrastive loss, then a classifier by mixed cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_backdoor._lightning import is_fast_dev_run, rank_zero_info, rank_zero_warn
from lightning_backdoor.errors import TrainerError
from lightning_backdoor.events import Event
from lightning_backdoor.functional import limit_of_labels, neighbor_agreement, reconsider_uncertain
from lightning_backdoor.functional.contrastive import mixed_cross_entropy, ss_contrastive_loss
from lightning_backdoor.loading.batch_schedule import require_batches
from lightning_backdoor.responses.base import Detection, Response, Session
from lightning_backdoor.responses.flagged_batches import Batch, FlaggedBatches, Flags, require_plain_batches
from lightning_backdoor.responses.limits import about_to_end, require_planned
from lightning_backdoor.responses.own_optimizer import OwnOptimizer, Parts, parts_of, projection_head
from lightning_backdoor.responses.training_step_override import TrainingStepOverride
from lightning_backdoor.responses.unlearn import masks_of
from lightning_backdoor.scanning.isolation import evaluation_mode, quiet, require_automatic
from lightning_backdoor.scanning.scan import raise_on_all_ranks
from lightning_backdoor.verdict import Verdict

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Plan", "Recipe", "TwoStage", "flags_of"]

POOR = 0.5  # accuracy on trusted samples that is worth a warning
CLASSIFIER_SHARE = 0.1  # of the epochs


@dataclass(frozen=True)
class Recipe:
    """How the two stages train.

    Attributes:
        classifier_epochs: Epochs of the second stage; ``None``: a tenth of all, at least one.
        lr: Largest learning rate of the features; ``None``: by the optimizer.
        temperature: Of the contrastive loss.
        suspect_weight: Of suspects in the mixed cross-entropy.
        projection: Width of the projection; 128 is the paper's, others change little.
        reference_mask: Positives of the authors' code instead of the paper's.
        supervised_features: Features learn from the cross-entropy of trusted images, too.
        reassign_uncertain: Uncertain samples become trusted or suspect by their neighbors before the second stage.
        neighbors: Trusted samples that are looked up for that, and for the log.
        max_removed: Largest share of all samples that may be suspect.
        views: As in :class:`~lightning_backdoor.DSTCallback`.
        feature_labels: Samples whose labels the first stage uses: the trusted ones or, for comparison, all or none.
        seed: Seed of order, views and projection.
    """

    classifier_epochs: int | None = None
    lr: float | None = None
    temperature: float = 0.1
    suspect_weight: float = 1e-3
    projection: int = 128
    reference_mask: bool = False
    supervised_features: bool = True
    reassign_uncertain: bool = True
    neighbors: int = 20
    max_removed: float = 0.3
    views: Callable[[Tensor], Tensor] | None = None
    feature_labels: Literal["trusted", "all", "none"] = "trusted"
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """Epochs that the fit has had at the beginning, at the change to the classifier, and at the end."""

    first: int
    change: int
    until: int


@dataclass
class _Running:
    """What is there while the stages are trained.

    Attributes:
        flags: What the verdict says of every sample.
        batches: Draws them and makes their views.
        override: The training step in the place of the user's; ``None`` until steps are taken.
        batch: The present one.
        progress: Share of the stage that is over at this batch, in ``[0, 1]``.
    """

    flags: Flags
    batches: FlaggedBatches
    override: TrainingStepOverride | None = None
    batch: Batch | None = None
    progress: float = 0.0


class TwoStage(Response):
    """Train by D-ST up to the planned last epoch, with a training step and an optimizer of its own.

    The first stage learns features from two strong views of every image; beside it the classifier learns trusted
    images, so that validation means something at any time, and guides the features unless the recipe forbids it. The
    second stage leaves the features as they are and trains the classifier alone, on trusted and suspect images.

    Every batch is identified by the positions that it holds. Its images go through the transfer hooks of the module as
    in evaluation: the views are all the augmentation there is.

    Args:
        recipe: How the stages train.
    """

    name = "two_stage"
    alone = starts_over = at_once = features = True

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._forget()

    def _forget(self) -> None:
        self._plan: Plan | None = None  # None while the stages are not trained
        self._stage: str | None = None  # "contrastive", "classifier", "done"
        self._losses: list[float] = []  # mean of every epoch
        self._parts: Parts | None = None
        self._projection: torch.nn.Module | None = None
        self._optimizer = OwnOptimizer()
        self._total, self._steps = torch.zeros(()), 0  # of the losses of the present epoch
        self._running: _Running | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, title: str) -> None:
        """Forget an earlier fit.

        Raises:
            TrainerError: The module optimizes by hand, or the number of epochs is not known.
        """
        require_automatic(pl_module, f"{title} trains")
        require_planned(trainer, title)
        self._forget()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue a training that was interrupted: put its optimizer into the Trainer before that is restored."""
        self._put_optimizer(trainer, pl_module)

    def on_train_start(self, session: Session) -> None:
        """Check that the stages can be trained, or go on with them."""
        trainer, history = session.trainer, session.case.history
        require_batches(session.scanner.loader)
        require_plain_batches(trainer, session.scanner)
        session.scanner.require_replaceable(trainer, session.module)
        if self._stage == "done":
            rank_zero_warn("D-ST: the training of this checkpoint is complete. Fit anew to train for more epochs.")
            trainer.should_stop = True
        elif self._plan is not None:
            self._require_plan(trainer, self._plan)
            history[-1] = replace(history[-1], accuracies=(), ended_early=False)  # it goes on
            running = self._attach(session)
            if len(self._losses) + self._plan.first < trainer.current_epoch:  # saved by a callback before this one
                self._end_epoch(session, self._plan)
            self._go_on(session, running)
        elif not history and is_fast_dev_run(trainer):
            rank_zero_info("D-ST: fast_dev_run trains too little for two stages; ordinary training.")
        elif not history:
            if trainer.ckpt_path is not None and trainer.global_step:  # a tuner leaves a path, too, and no steps
                raise TrainerError(
                    "D-ST trains from the start, but the checkpoint was written without it. Fit without `ckpt_path`, "
                    "or repair the model by DBRCallback(warmup_epochs=0)."
                )
            self._planned(trainer)
            parts_of(trainer, session.module, session.scanner)  # a model that cannot be trained so is refused

    def why_not(self, session: Session) -> str:
        """Nothing: the detection comes first."""
        return ""

    def metrics(self, session: Session) -> dict[str, float]:
        """Nothing more than the losses and shares of every epoch."""
        return {}

    def awaits_detection(self, session: Session) -> bool:
        """Never after the first epoch."""
        return False

    def respond(self, session: Session, detection: Detection, event: Event) -> Event:
        """Begin with the first stage if there are suspects."""
        labels, suspect, trusted = masks_of(session.verdict)
        event = replace(event, suspects=int(suspect.sum()), trusted=int(trusted.sum()))
        session.module.log("backdoor/dst/suspects", float(event.suspects))
        present = torch.unique(labels[labels >= 0]).tolist()
        lacking = sorted(set(present) - set(labels[trusted].tolist()))
        if event.suspects and lacking:
            rank_zero_warn(f"D-ST: ordinary training, since no image of the classes {lacking} can be trusted.")
            session.loader_filter.restart_iterator()
        elif event.suspects:
            trainer, recipe, running = session.trainer, self._recipe, self._attach(session)
            self._plan, self._stage = self._planned(trainer), "contrastive"
            self._parts = parts_of(trainer, session.module, session.scanner)
            self._projection = projection_head(self._parts.width, recipe.projection, recipe.seed)
            self._put_optimizer(trainer, session.module)
            self._go_on(session, running)
            event = replace(event, feature_epochs=self._plan.change - self._plan.first)
        return event

    def on_train_epoch_start(self, session: Session) -> None:
        """Count batches from the start of the epoch."""
        if self._running is not None:
            self._running.batches.count_from_zero()

    def on_train_batch_start(self, session: Session, batch_idx: int) -> None:
        """Find out what the batch holds, and make views of its images."""
        running = self._running
        if running is None or running.override is None or self._plan is None:
            return
        views = 2 if self._stage == "contrastive" else 1
        running.batch = running.batches.next(session.trainer, session.module, running.flags, views)
        plan, trainer = self._plan, session.trainer
        begin, end = (plan.first, plan.change) if self._stage == "contrastive" else (plan.change, plan.until)
        within = batch_idx / max(trainer.num_training_batches, 1)
        running.progress = (trainer.current_epoch - begin + within) / (end - begin)

    def on_after_backward(self, session: Session) -> None:
        """Average the gradients of the projection across ranks; DDP does not wrap it."""
        if self._projection is None or session.trainer.world_size == 1:
            return
        for parameter in self._projection.parameters():
            parameter.grad = session.trainer.strategy.reduce(parameter.grad, reduce_op="mean")

    def on_train_epoch_end(self, session: Session) -> bool:
        """Note the loss, measure the neighbors when it is time, change to the classifier, and judge the end."""
        if self._plan is None or self._stage == "done":
            return False
        self._end_epoch(session, self._plan)
        return True

    def _end_epoch(self, session: Session, plan: Plan) -> None:
        trainer, history = session.trainer, session.case.history
        mean = trainer.strategy.reduce(self._total / max(self._steps, 1), reduce_op="mean")
        self._losses.append(float(mean))
        self._total, self._steps = torch.zeros(()), 0
        session.module.log("backdoor/dst/loss", self._losses[-1])
        history[-1] = replace(history[-1], losses=(*self._losses,))
        done, of_features = len(self._losses) + plan.first, plan.change - plan.first
        tenth = len(self._losses) % math.ceil(of_features / 10) == 0
        if self._stage == "contrastive" and (len(self._losses) >= of_features or tenth):
            self._measure_neighbors(session, change=done >= plan.change)
        ends = done >= plan.until or about_to_end(trainer)
        if ends:
            accuracy = accuracy_on_trusted(session)
            history[-1] = replace(history[-1], accuracies=(accuracy,), ended_early=done <= plan.change)
            session.module.log("backdoor/dst/trusted_accuracy", accuracy)
            if done >= plan.until:
                self._stage = "done"
                self._stop()
        if ends or done == plan.change:
            session.case.tell()

    def release(self) -> None:
        """Give everything back that belongs to the user; a training that is not over can be resumed."""
        self._stop()
        self._running = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values; while features are learned, with the projection."""
        projection = None if self._projection is None else self._projection.state_dict()
        return {
            "plan": None if self._plan is None else asdict(self._plan),
            "stage": self._stage,
            "losses": list(self._losses),
            "total": self._total.cpu(),
            "steps": self._steps,
            "parts": None if self._parts is None else asdict(self._parts),
            "projection": None if projection is None else {k: v.cpu().clone() for k, v in projection.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""
        plan, parts, projection = state_dict["plan"], state_dict["parts"], state_dict["projection"]
        self._plan = None if plan is None else Plan(**plan)
        self._stage, self._losses = state_dict["stage"], list(state_dict["losses"])
        self._total, self._steps = state_dict["total"], state_dict["steps"]
        self._parts = None if parts is None else Parts(**parts)
        self._projection = None
        if projection is not None and self._parts is not None:
            self._projection = projection_head(self._parts.width, self._recipe.projection, self._recipe.seed)
            self._projection.load_state_dict(projection)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running Trainer."""
        return {**self.__dict__, "_running": None, "_optimizer": OwnOptimizer()}

    def _put_optimizer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the optimizer of the present stage into the Trainer, if the stages are trained."""
        if self._parts is None:
            return
        if self._projection is not None:
            self._projection.to(pl_module.device)
        self._optimizer.put(trainer, pl_module, self._parts, self._projection, lr=self._recipe.lr)

    def _planned(self, trainer: Trainer) -> Plan:
        """The plan from the present epoch on.

        Raises:
            TrainerError: The epochs left are not enough for both stages.
        """
        first, until = trainer.current_epoch, _last_epoch(trainer)
        classifier = self._recipe.classifier_epochs or max(1, round(CLASSIFIER_SHARE * (until - first)))
        if until - first <= classifier:
            raise TrainerError(
                f"D-ST needs an epoch for the features and {classifier} for the classifier, got {until - first} of "
                f"`max_epochs={until}`. Raise `max_epochs`, or lower `classifier_epochs`."
            )
        return Plan(first, until - classifier, until)

    @staticmethod
    def _require_plan(trainer: Trainer, plan: Plan) -> None:
        """Raise a TrainerError if a run that is resumed would train on after the last epoch of the plan."""
        if _last_epoch(trainer) > plan.until:
            raise TrainerError(
                f"D-ST has planned {plan.until} epochs and cannot go on to `max_epochs={trainer.max_epochs}`. "
                f"Resume with `max_epochs={plan.until}`, or fit anew."
            )

    def _attach(self, session: Session) -> _Running:
        batches = FlaggedBatches(session.scanner, session.loader_filter, self._recipe.views, self._recipe.seed)
        flags = flags_of(session.verdict)
        if self._stage != "classifier" and self._recipe.feature_labels != "trusted":
            flags = replace(flags, trusted=torch.full_like(flags.trusted, self._recipe.feature_labels == "all"))
        self._running = _Running(flags, batches)
        return self._running

    def _go_on(self, session: Session, running: _Running) -> None:
        """Draw batches and override the training step, unless the training is over."""
        if self._stage == "done":
            return
        self._draw(session, running)
        running.override = TrainingStepOverride(
            session.trainer, session.module, running.batches.see, lambda: self._step(session, running)
        )
        running.batches.restart()

    def _draw(self, session: Session, running: _Running) -> None:
        """Draw everything for the features, trusted and suspect samples for the classifier, from the next epoch on."""
        known = running.flags.trusted | running.flags.suspect
        running.batches.draw(session.trainer, torch.ones_like(known) if self._stage == "contrastive" else known)

    def _measure_neighbors(self, session: Session, *, change: bool) -> None:
        """Measure the features; when it is time for the classifier, reassign uncertain samples and go on with it."""
        recipe, history = self._recipe, session.case.history
        reassign = change and recipe.reassign_uncertain
        mean, verdict, more, fewer = reassigned_by_neighbors(session, recipe.neighbors, reassign, recipe.max_removed)
        session.module.log("backdoor/dst/neighbor_agreement", mean)
        event = history[-1]
        history[-1] = replace(
            event,
            agreement=(*event.agreement, (len(event.losses), mean)),
            became_trusted=more,
            trusted=event.trusted + more,
            became_suspect=fewer,
            suspects=event.suspects + fewer,
            removed=event.removed + fewer,
        )
        if change and self._running is not None:
            session.case.adopt(verdict)
            self._stage, self._projection, self._running.flags = "classifier", None, flags_of(session.verdict)
            self._put_optimizer(session.trainer, session.module)
            self._draw(session, self._running)

    def _step(self, session: Session, running: _Running) -> Tensor:
        """The loss of a batch, in the place of ``training_step``."""
        module, batch = session.module, running.batch
        if batch is None:
            raise TrainerError("D-ST makes the training steps itself, and a step began before its batch was drawn.")
        with quiet(session.trainer, module):
            if self._projection is not None:
                loss = self._contrastive(session, batch, running.progress, self._projection)
            else:
                loss = self._mixed(session, batch, running.progress)
        self._total, self._steps = self._total.to(loss.device) + loss.detach().float(), self._steps + 1
        if session.trainer.world_size > 1:  # DDP waits for a gradient of every parameter
            loss = loss + 0 * sum(parameter.sum() for parameter in module.parameters() if parameter.requires_grad)
        return loss

    def _contrastive(self, session: Session, batch: Batch, progress: float, projection: torch.nn.Module) -> Tensor:
        """Contrastive loss of the features, and cross-entropy of the trusted samples."""
        recipe, cut = self._recipe, not self._recipe.supervised_features
        outputs = [
            session.scanner.outputs(session.trainer, session.module, view, gradients=True, cut=cut)
            for view in batch.views
        ]
        projected = torch.stack([projection(features) for _, features in outputs], dim=1)
        loss = ss_contrastive_loss(
            projected, batch.labels, batch.trusted, recipe.temperature, reference_mask=recipe.reference_mask
        )
        self._optimizer.set_rates(session.trainer, outputs[0][1], progress)
        logits, trusted = torch.cat([logits for logits, _ in outputs]), batch.trusted.repeat(2)
        return loss + mixed_cross_entropy(logits, batch.labels.repeat(2), trusted, torch.zeros_like(trusted))

    def _mixed(self, session: Session, batch: Batch, progress: float) -> Tensor:
        """Cross-entropy of trusted samples, minus a little of that of suspects, for the classifier alone."""
        with evaluation_mode(session.module), torch.no_grad():
            logits, features = session.scanner.outputs(session.trainer, session.module, batch.views[0], cut=True)
        self._optimizer.set_rates(session.trainer, features, progress)
        return mixed_cross_entropy(logits, batch.labels, batch.trusted, batch.suspect, self._recipe.suspect_weight)

    def _stop(self) -> None:
        if self._running is None:
            return
        if self._running.override is not None:
            self._running.override.release()
        self._running.batches.release()
        self._running.override = self._running.batch = None


def _last_epoch(trainer: Trainer) -> int:
    """The user's ``max_epochs``, which is checked in ``setup``."""
    if trainer.max_epochs is None:
        raise TrainerError("D-ST plans its stages by epochs. Pass Trainer(max_epochs=...).")
    return trainer.max_epochs


def flags_of(verdict: Verdict) -> Flags:
    """What a verdict says of every sample, for the two stages."""
    labels, suspect, trusted = masks_of(verdict)
    return Flags(labels, trusted, suspect)


def reassigned_by_neighbors(
    session: Session, k: int, reassign_uncertain: bool, max_removed: float
) -> tuple[float, Verdict, int, int]:
    """Compute k-NN label agreement; optionally reassign uncertain samples to trusted or suspect.

    The first process does. Every process must call it and gets the same result.

    Args:
        session: Of the running fit.
        k: Number of neighbors.
        reassign_uncertain: Whether uncertain samples change sides.
        max_removed: Largest share of all samples that may be suspect.

    Returns:
        Share of the neighbors of trusted samples that have their label; the verdict; how many samples became trusted
        and suspect.
    """
    trainer, scanner, verdict = session.trainer, session.scanner, session.verdict
    flags = flags_of(verdict)
    measured = flags.trusted.new_ones(len(scanner)) if reassign_uncertain else flags.trusted
    positions = measured.nonzero().squeeze(1)
    features = scanner.features(trainer, session.module, description="D-ST neighbors", positions=positions)
    mean, nobody = 0.0, torch.zeros(len(scanner), dtype=torch.bool)
    more, fewer = nobody, nobody
    with raise_on_all_ranks(trainer, "D-ST neighbors"):
        if trainer.is_global_zero:
            agreement = neighbor_agreement(features, flags.labels[measured], flags.trusted[measured], k)
            mean = float(agreement[flags.trusted[measured]].mean())
            if reassign_uncertain:
                budget = int(max_removed * len(scanner)) - int(flags.suspect.sum())
                uncertain = verdict.keep & ~flags.trusted & ~flags.suspect
                more, fewer = reconsider_uncertain(agreement, flags.labels, flags.trusted, uncertain, most=budget)
                fewer &= torch.ones_like(fewer) if verdict.approved is None else ~verdict.approved
                keep, order = verdict.keep & ~fewer, verdict.scores.masked_fill(flags.suspect, math.inf)
                fewer &= ~limit_of_labels(order, keep, flags.labels)
    mean, more, fewer = trainer.strategy.broadcast((mean, more, fewer), src=0)
    if not reassign_uncertain:
        return mean, verdict, 0, 0
    suspect, trusted = flags.suspect | fewer, flags.trusted | more
    changed = replace(verdict, keep=verdict.keep & ~suspect, trusted=trusted, suspect=suspect)
    return mean, changed, int(more.sum()), int(fewer.sum())


def accuracy_on_trusted(session: Session) -> float:
    """Share of the trusted samples that get their label; warns if it is under a half."""
    flags = flags_of(session.verdict)
    positions = flags.trusted.nonzero().squeeze(1)
    predicted = session.scanner.predict(session.trainer, session.module, description="D-ST check", positions=positions)
    accuracy = float((predicted == flags.labels[positions]).float().mean())
    if accuracy < POOR:
        rank_zero_warn(
            f"D-ST: the model gives {accuracy:.1%} of the trusted images their label. Two stages need many epochs: "
            "raise `max_epochs` or `trusted`, or repair an ordinary training by DBRCallback."
        )
    return accuracy
