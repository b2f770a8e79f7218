"""D-ST: tell suspects before the first epoch, and train features and classifier in two secure stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor
from typing_extensions import Unpack

from lightning_backdoor.callbacks.arguments import require_fraction, require_positive, require_rate
from lightning_backdoor.callbacks.base import Defense
from lightning_backdoor.callbacks.consistency import ConsistencyDetector
from lightning_backdoor.callbacks.options import DETECTOR_DEFAULTS, DetectorArguments, scan_arguments
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.responses.base import Continue, Report, Response
from lightning_backdoor.responses.by_name import chosen_response
from lightning_backdoor.responses.two_stage import Recipe, TwoStage

__all__ = ["DSTCallback"]


class DSTCallback(Defense):
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
        classifier_epochs: Epochs of the second stage; ``None``: a tenth of all, at least one.
        lr: Largest learning rate of the features (AdamW, with warm-up and cosine). ``None``: 0.002 with batch
            norms in the model, 0.0005 without.
        temperature: Of the contrastive loss, positive; small values weigh the nearest images most.
        suspect_weight: Weight of the suspects in the second stage, at least 0 (the paper's lambda_p).
        reference_mask: Positives of the authors' code: all images with the label of a trusted one.
        supervised_features: Features learn from the cross-entropy of trusted images, too. ``False``: by contrast alone
            (the paper).
        reassign_uncertain: Reassign uncertain images to trusted or suspect before the second stage, by the labels of
            their neighbors.
        neighbors: Trusted images that are looked up for that, and for the log.
        views: Replaces the strong augmentation: from a batch, uint8 ``(B, C, H, W)``, to another, drawn for each image.
        max_removed: Largest share of the training set that may be suspect, in ``(0, 1)``. With ``suspect="auto"`` 15 %
            of each label are not suspect in any case (of the median label, where a label is larger).
        response: ``"two_stage"``; ``"continue"`` trains without the suspect images, ``"report"`` changes nothing. Or a
            :class:`~lightning_backdoor.responses.Response` with settings of its own.
        **scan: See :class:`~lightning_backdoor.callbacks.options.DetectorArguments`; ``trusted`` is 0.8 and
            ``detector`` is ``"fresh"`` if they are not given.

    Raises:
        ArgumentError: If an argument is out of range.
        DataError: At the start of fit, if the training data cannot be read or put into batches anew.
        ModelError: At the start of fit, if features and classifier cannot be told apart or cannot learn.
        TrainerError: At the start of fit, if the module optimizes by hand, the strategy shards the model, the epochs
            are not known or too few, or another defence is on the same Trainer.

    Example:
        >>> DSTCallback(classifier_epochs=5, suspect_weight=0.01)
        DSTCallback(classifier_epochs=5, suspect_weight=0.01)
    """

    method: ClassVar[str] = "DST"
    title: ClassVar[str] = "D-ST"
    shared = DetectorArguments
    shared_defaults: ClassVar[dict[str, Any]] = {**DETECTOR_DEFAULTS, "trusted": 0.8, "detector": "fresh"}

    def __init__(
        self,
        *,
        classifier_epochs: int | None = None,
        lr: float | None = None,
        temperature: float = 0.1,
        suspect_weight: float = 1e-3,
        reference_mask: bool = False,
        supervised_features: bool = True,
        reassign_uncertain: bool = True,
        neighbors: int = 20,
        views: Callable[[Tensor], Tensor] | None = None,
        max_removed: float = 0.3,
        response: Literal["two_stage", "continue", "report"] | Response = "two_stage",
        **scan: Unpack[DetectorArguments],
    ) -> None:
        self.arguments: dict[str, Any] = {**self.shared_defaults, **scan}
        self.classifier_epochs = require_positive("classifier_epochs", classifier_epochs)
        self.lr = require_rate("lr", lr)
        if temperature <= 0:
            raise ArgumentError(f"`temperature` must be positive, got {temperature}.")
        if suspect_weight < 0:
            raise ArgumentError(f"`suspect_weight` must be at least 0, got {suspect_weight}.")
        self.temperature, self.suspect_weight = temperature, suspect_weight
        self.reference_mask, self.views = reference_mask, views
        self.supervised_features, self.reassign_uncertain = supervised_features, reassign_uncertain
        self.neighbors, self.response = require_positive("neighbors", neighbors) or 1, response
        seed, most = self.arguments["seed"], require_fraction("max_removed", max_removed)
        recipe = Recipe(
            classifier_epochs=classifier_epochs,
            lr=lr,
            temperature=temperature,
            suspect_weight=suspect_weight,
            reference_mask=reference_mask,
            supervised_features=supervised_features,
            reassign_uncertain=reassign_uncertain,
            neighbors=self.neighbors,
            max_removed=most,
            views=views,
            seed=seed,
        )
        own = {"two_stage": TwoStage(recipe), "continue": Continue(at_once=True), "report": Report(at_once=True)}
        super().__init__(
            detector=ConsistencyDetector(self.arguments, most, seed),
            response=chosen_response(response, own, others=False),
            warmup_epochs=None,
            max_removed=max_removed,
            max_removed_of_class=1.0
            if self.arguments["verdict"] is not None
            else self.arguments["max_removed_of_class"],
            **scan_arguments(scan, DETECTOR_DEFAULTS),
        )

    @classmethod
    def from_paper(cls, **overrides: Any) -> DSTCallback:
        """Use the authors' shares and losses, and reassign no image between the stages; this always suspects images."""
        return cls(
            **{
                "suspect": 0.05,
                "trusted": 0.2,
                "num_transforms": 1,
                "supervised_features": False,
                "reassign_uncertain": False,
                **overrides,
            }
        )
