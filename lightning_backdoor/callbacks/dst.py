"""D-ST: learn features by contrast, and a classifier from trustworthy images alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_backdoor._lightning import rank_zero_info, rank_zero_warn
from lightning_backdoor.callbacks.base import require_alone, require_positive, require_rate
from lightning_backdoor.callbacks.detecting import Detecting
from lightning_backdoor.callbacks.neighborhood import accuracy_on_trusted, flags_of, second_look
from lightning_backdoor.callbacks.stages import Training, evidence, sentence
from lightning_backdoor.errors import ArgumentError, TrainerError
from lightning_backdoor.loading.batch_schedule import require_batches
from lightning_backdoor.responses.flagged_batches import require_plain_batches
from lightning_backdoor.responses.limits import about_to_end, require_planned
from lightning_backdoor.responses.own_optimizer import parts_of
from lightning_backdoor.responses.two_stage import Contrasting, Recipe
from lightning_backdoor.scanning.isolation import require_automatic
from lightning_backdoor.scanning.scanner import ScanOptions
from lightning_backdoor.verdict import Verdict

__all__ = ["DSTCallback"]


class DSTCallback(Detecting):
    """Train a model on poisoned data without its backdoor: features by contrast, a classifier from trusted images.

    Implements D-ST (*Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples*, `Chen et al., 2022
    <https://openreview.net/forum?id=AsH-Tx2U0Ug>`_) inside a Trainer, within its ``max_epochs``. Before the first
    epoch, a copy of the model is trained without augmentation and tells trusted and suspect images as for
    :class:`DBRCallback`. If any are suspect, all epochs but the last ones learn features by a semi-supervised
    contrastive loss on two strong views of every image, and by cross-entropy of trusted ones; labels of all others do
    not count. The last epochs train the classifier alone, on trusted and suspect images, and turn it a little away
    from the latter. If nothing is suspect, training is the user's own, bit by bit.

    While it acts, D-ST takes the place of ``training_step``, optimizer, schedulers and sampler; the Trainer does all
    else (precision, processes, accumulation, clipping, validation, checkpoints). A checkpoint holds an ordinary model,
    but only D-ST can resume it. The classifier learns from the first epoch on, so that validation means something at
    any time; what ``training_step`` logs is not there to be monitored.

    Assumes nothing. An epoch passes every image twice. Differs from the paper: suspects come from evidence instead of a
    share, which unlearns clean images on clean data; more images are trusted, of all classes equally, and guide the
    features; uncertain images can change sides between the stages; AdamW trains convolutional networks and transformers
    alike.

    Args:
        verdict: Verdict of another defence: what it removed is suspect. There is no detector then.
        classifier_epochs: Epochs of the second stage; ``None``: a tenth of all, at least one.
        lr: Largest learning rate of the features (AdamW, with warm-up and cosine). ``None``: 0.002 with batch
            norms in the model, 0.0005 without.
        temperature: Of the contrastive loss, positive; small values weigh the nearest images most.
        weight: Weight of the suspects in the second stage, at least 0 (the paper's lambda_p).
        projection: Width of the projection that the contrastive loss sees.
        reference_mask: Positives of the authors' code: all images with the label of a trusted one.
        supervised_features: Features learn from the cross-entropy of trusted images, too. ``False``: by contrast alone (the paper).
        reassign_uncertain: Let the neighbours of uncertain images decide whether they are trusted or suspect in the second stage.
        neighbors: Trusted images that are asked, for that and for the log.
        views: Replaces the strong augmentation: from a batch, uint8 ``(B, C, H, W)``, to another, drawn for each image.
        trusted: Share of the images of every class whose labels count, in ``(0, 1)``.
        suspect: ``"auto"`` looks for second populations; a number in ``(0, 1)`` is the share of all images, those that
            move most, that is suspect in any case.
        detector: Starts from the weights of the model: ``"fresh"``, or ``"copy"``, at a lower rate, if they are
            pretrained. Or a network of your own; see :class:`DBRCallback`.
        detector_steps: Steps in which it learns the labels, and as many of centre repulsion.
        fct_metric: How far features move; ``"auto"``: ``"cosine"`` where some are negative, else ``"mse"``.
        num_transforms: Transformations per image.
        transform: Replaces turning and shifting in the detector: from one image, uint8 ``(1, C, H, W)``, to another.
        max_removed: Largest share of the training set that may be suspect, in ``(0, 1)``. With ``suspect="auto"`` 15 %
            of each label are not suspect in any case (of the median label, where a label is larger).
        report_dir: Folder for the report (with ``name``, a sub-folder of it). ``None``: beside the logger's files;
            without a logger there is no report.
        forward_fn: ``forward_fn(pl_module, batch)`` returns logits ``(B, K)``, where images alone are not enough.
        batch_fn: ``batch_fn(batch)`` returns images and labels, where they cannot be found.
        feature_layer: Name of the layer whose output are the features. ``None``: the input of the classifier head.
        eval_transform: Transform without augmentation. ``None``: that of the validation set, else the training
            transform without its random steps.
        eval_dataset: In place of ``eval_transform``, for augmentation inside the dataset: the same samples without it,
            as a dataset, or as a function from the training dataset to one.
        mean: Mean of the pixel normalisation, one number per channel in ``[0, 1]`` units; ``None`` finds it out.
            ``"per_image"``: every image was standardised by itself; its pixels span its smallest to largest value.
        std: Its standard deviation.
        batch_size: Images per step of the detector and per forward pass; ``None`` takes the loader's.
        num_workers: Worker processes of these passes; ``None`` takes the loader's.
        seed: Seed of the detector, the order of the images, their views and the projection.
        name: Tells two instances apart in checkpoints and report folders.

    Attributes:
        history: What was found and how it was trained.

    Raises:
        ArgumentError: If an argument is out of range.
        DataError: At the start of fit, if the training data cannot be read or put into batches anew.
        ModelError: At the start of fit, if features and classifier cannot be told apart or cannot learn.
        TrainerError: At the start of fit, if the module optimizes by hand, the strategy shards the model, the epochs
            are not known or too few, or another defence is on the same Trainer.

    Example:
        >>> DSTCallback(classifier_epochs=5, weight=0.01)
        DSTCallback(classifier_epochs=5, weight=0.01)
    """

    method: ClassVar[str] = "DST"
    title: ClassVar[str] = "D-ST"

    def __init__(
        self,
        *,
        verdict: Verdict | None = None,
        classifier_epochs: int | None = None,
        lr: float | None = None,
        temperature: float = 0.1,
        weight: float = 1e-3,
        projection: int = 128,
        reference_mask: bool = False,
        supervised_features: bool = True,
        reassign_uncertain: bool = True,
        neighbors: int = 20,
        views: Callable[[Tensor], Tensor] | None = None,
        trusted: float = 0.8,
        suspect: Literal["auto"] | float = "auto",
        detector: Literal["copy", "fresh"] | nn.Module = "fresh",
        detector_steps: int = 200,
        fct_metric: Literal["auto", "mse", "cosine"] = "auto",
        num_transforms: int = 2,
        transform: Callable[[Tensor], Tensor] | None = None,
        max_removed: float = 0.3,
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
            verdict=verdict, trusted=trusted, suspect=suspect, detector=detector, detector_steps=detector_steps,
            fct_metric=fct_metric, num_transforms=num_transforms, transform=transform, max_removed=max_removed, options=options,
            report_dir=report_dir, name=name,
        )  # fmt: skip
        self.classifier_epochs = require_positive("classifier_epochs", classifier_epochs)
        self.lr = require_rate("lr", lr)
        if temperature <= 0:
            raise ArgumentError(f"`temperature` must be positive, got {temperature}.")
        if weight < 0:
            raise ArgumentError(f"`weight` must be at least 0, got {weight}.")
        self.temperature, self.weight = temperature, weight
        self.projection = require_positive("projection", projection) or 1
        self.reference_mask, self.supervised_features, self.reassign_uncertain, self.views = (
            reference_mask,
            supervised_features,
            reassign_uncertain,
            views,
        )
        self.neighbors = require_positive("neighbours", neighbors) or 1
        self.history: list[Training] = []
        self._run = self._new_run()

    @classmethod
    def from_paper(cls, **overrides: Any) -> DSTCallback:
        """Use the authors' shares and losses, and no second look; this always suspects images."""
        return cls(
            **{
                "suspect": 0.05,
                "trusted": 0.2,
                "num_transforms": 1,
                "supervised_features": False,
                "readmit": False,
                **overrides,
            }
        )

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the curation of the training loader."""
        if stage == "fit":
            require_automatic(pl_module, "D-ST trains")
            require_planned(trainer, "D-ST")
            require_alone(trainer, self)
            self._run, self.history = self._new_run(), []
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Continue a training that was interrupted, with its own optimizer."""
        self._run.at_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Tell trusted and suspect images, and begin, or go on."""
        super().on_train_start(trainer, pl_module)
        data = self._training_set
        assert data is not None
        require_batches(data.loader)
        require_plain_batches(trainer, data)
        data.require_replaceable(trainer, pl_module)
        if self._run.stage == "done":
            rank_zero_warn("D-ST: the training of this checkpoint is complete. Fit anew to train for more epochs.")
            trainer.should_stop = True
        elif self._run.stage is not None:
            self._run.require_plan(trainer)
            self.history[-1] = replace(self.history[-1], accuracy=None, early=False)  # it goes on
            self._attach()
            if self._run.done < trainer.current_epoch:  # saved by a callback whose turn came first
                self.on_train_epoch_end(trainer, pl_module)
            self._run.go_on(trainer, pl_module)
        elif not self.history and trainer.fast_dev_run:
            rank_zero_info("D-ST: fast_dev_run trains too little for two stages; ordinary training.")
        elif not self.history:
            if trainer.ckpt_path is not None and trainer.global_step:  # a tuner leaves a path, too, and no steps
                raise TrainerError(
                    "D-ST trains from the start, but the checkpoint was written without it. Fit without `ckpt_path`, "
                    "or repair the model by DBRCallback(warmup_epochs=0)."
                )
            self._run.require_epochs(trainer)
            self._judge().require(trainer, pl_module, data)
            parts_of(trainer, pl_module, data)  # a model that cannot be trained so is refused
            self._look(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Count batches from the start of the epoch."""
        self._run.at_epoch_start()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Know what the batch holds, and make views of its images."""
        self._run.at_batch_start(trainer, pl_module, batch_idx)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Let all processes train one projection."""
        self._run.at_backward(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Ask the neighbours when it is time, change to the classifier, and judge the end."""
        run, plan = self._run, self._run.plan
        if plan is None or run.stage in (None, "done"):
            return
        began = time.monotonic()
        run.at_epoch_end(trainer)
        pl_module.log("backdoor/dst/loss", run.losses[-1])
        self.history[-1] = replace(self.history[-1], losses=(*run.losses,))
        if run.neighbors_are_due:
            self._ask_neighbors(trainer, pl_module, change=run.done >= plan.change)
        ends = run.done >= plan.until or about_to_end(trainer)
        if ends:
            accuracy = accuracy_on_trusted(trainer, pl_module, *self._known()[1:])
            self.history[-1] = replace(self.history[-1], accuracy=accuracy, early=run.done <= plan.change)
            pl_module.log("backdoor/dst/trusted_accuracy", accuracy)
            if run.done >= plan.until:
                run.finish()
        if ends or run.done == plan.change:
            self._tell(trainer, time.monotonic() - began)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only; while features are learned, with the projection."""
        return {**super().state_dict(), "done": [d.state_dict() for d in self.history], "run": self._run.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue an interrupted run."""
        super().load_state_dict(state_dict)
        if state_dict:
            self.history = [Training(**done) for done in state_dict["done"]]
            self._run.load_state_dict(state_dict["run"])

    def _leave(self) -> None:
        self._run.release()
        super()._leave()

    def _new_run(self) -> Contrasting:
        recipe = (self.classifier_epochs, self.lr, self.temperature, self.weight, self.projection, self.reference_mask)
        return Contrasting(
            Recipe(*recipe, supervised_features=self.supervised_features, views=self.views, seed=self.options.seed)
        )

    def _attach(self) -> None:
        loader_filter, data, verdict = self._known()
        self._run.attach(data, loader_filter, flags_of(verdict))

    def _look(self, trainer: Any, pl_module: Any) -> None:
        """Tell suspects, and let the two stages follow."""
        began, data = time.monotonic(), self._training_set
        assert data is not None
        judgement = self._judge().judge(trainer, pl_module, data, self.verdict)
        suspects, trusted, lacking = judgement.counts
        self.history.append(
            Training(
                self._adopt(judgement.verdict), judgement.num_flagged_before_cap, judgement.modes, suspects, trusted
            )
        )
        pl_module.log("backdoor/dst/suspects", float(suspects))
        if suspects and lacking:
            rank_zero_warn(f"D-ST: ordinary training, since no image of the classes {lacking} can be trusted.")
            self._known()[0].restart_iterator()
        elif suspects:
            self._attach()
            self._run.begin(trainer, pl_module)
            self.history[-1] = replace(self.history[-1], change=self._run.features_epochs)
        self._tell(trainer, time.monotonic() - began)

    def _ask_neighbors(self, trainer: Any, pl_module: Any, *, change: bool) -> None:
        """Measure the features; when it is time for the classifier, reconsider uncertain images and go on with it."""
        _, data, before = self._known()
        mean, verdict, more, fewer = second_look(
            trainer, pl_module, data, before, self.neighbors, reassign_uncertain=change and self.reassign_uncertain,
            max_removed=self.max_removed,
        )  # fmt: skip
        pl_module.log("backdoor/dst/neighbour_agreement", mean)
        self.history[-1] = self.history[-1].asked(mean, more, fewer)
        if change:
            self._adopt(verdict)
            self._run.change(trainer, pl_module, flags_of(verdict))

    def _tell(self, trainer: Any, seconds: float) -> None:
        """Print one sentence, and write the report."""
        data = self._known()[1]
        rank_zero_info(f"D-ST {sentence(self.history[-1], len(data))}")
        self._write_report(trainer, evidence(self.history[-1], data, self._judge(), seconds))
