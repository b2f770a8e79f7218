"""D-BR: tell suspects by a detector of their own, unlearn them, and learn trustworthy images anew."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from typing_extensions import Unpack

from lightning_backdoor.callbacks.arguments import (
    require_count,
    require_fraction,
    require_one_of,
    require_positive,
    require_rate,
)
from lightning_backdoor.callbacks.base import Defense
from lightning_backdoor.callbacks.consistency import ConsistencyDetector
from lightning_backdoor.callbacks.options import DETECTOR_DEFAULTS, DetectorArguments, scan_arguments
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.responses.base import Continue, Report, Response
from lightning_backdoor.responses.by_name import ResponseName, chosen_response
from lightning_backdoor.responses.reset_units import ResetUnits
from lightning_backdoor.responses.restart import Restart
from lightning_backdoor.responses.unlearn import Unlearn

__all__ = ["DBRCallback"]


class DBRCallback(Defense):
    """Repair a model: unlearn the images that a backdoor was learned from, and learn trustworthy ones anew.

    Implements D-BR (*Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples*, `Chen et al., 2022
    <https://openreview.net/forum?id=AsH-Tx2U0Ug>`_) inside a Trainer. When as many epochs are left as the repair may
    need (or after ``warmup_epochs``), a copy of the model is trained without augmentation, so that it relies on a
    trigger wherever there is one. Images are trusted if its features stay where they are when the image is turned and
    shifted; they are suspect if they are a second population inside their class. Another copy is then trained without
    such a population, from the weights at the start of the fit: if its labels look wrong to that one, every epoch of
    repair unlearns the suspects and learns the trusted images anew, by the user's own ``training_step`` and optimizer.
    Other suspects, of a clean-label attack or a harmless kind of image, leave the training set and are not unlearned;
    see ``fallback``. If nothing is suspect, nothing changes. Half-way to a detection that comes after two epochs or
    more it notes how many of an image's neighbors have its label, as UltraClean does.

    Assumes nothing: no clean data, no poison rate, no target class. Detection costs about three epochs of training and
    a forward pass, and 200 to 1,000 steps more if something is suspect; the repair up to ``epochs`` epochs over
    suspects and trusted images. They are epochs of the plan (``max_epochs``, ``max_steps``, ``max_time``), unless
    ``extra_epochs`` are allowed; what is left of the plan is ordinary training on the images that are not suspect. An
    epoch of repair is judged and undone with its last batch, before validation.

    Differs from the paper: suspects come from evidence instead of a share, which unlearns clean images on clean data;
    the detector may start from the model; all classes are trusted equally; batches of suspects and of trusted images
    alternate; the ascent is on ``-log(1 - p)`` and ends for each image when it has lost its label; batch norms are
    frozen; an epoch that costs over five points of accuracy, or one class over ten, is undone; the repair ends when it
    is complete.

    Args:
        warmup_epochs: Epochs of ordinary training before detection; ``None``: as late as the plan leaves time for the
            repair, which takes half of it at most. With a number there is a second detection at the end if the first
            found nothing. 0 repairs the weights as they are (loaded, or of the ``ckpt_path`` given to ``fit``) and ends
            the fit; where a ``ckpt_path`` is at its ``max_epochs``, the repair goes on beyond it.
        epochs: Largest number of epochs of repair; at most what is left.
        extra_epochs: Epochs that the repair may have beyond the plan. If they are as many as ``epochs``, the detection
            comes when training is about to end.
        lr: Learning rate of the repair, falling to zero. ``None``: 5 % of the largest so far.
        paper_loop: The authors' loop without these bounds: every epoch, suspects first, with a constant rate.
        max_removed: Largest share of the training set that may be suspect, in ``(0, 1)``. With ``suspect="auto"`` 15 %
            of each label are not suspect in any case (of the median label, where a label is larger).
        response: ``"unlearn"``; ``"restart"`` trains anew without the suspect images, ``"continue"`` trains on without
            them, ``"reset"`` resets the units that they drive, ``"report"`` changes nothing. Or a
            :class:`~lightning_backdoor.responses.Response` with settings of its own.
        fallback: What follows a repair that leaves the backdoor in the model, because it was undone, had no epoch,
            left suspects out, or over a tenth of the removed images still get their label: ``"restart"`` trains all
            epochs anew from the weights at the start of the fit, without these images; ``None``: a warning. A quota of
            images is flagged whether or not there is a backdoor, and never leads to a restart.
        **scan: See :class:`~lightning_backdoor.callbacks.options.DetectorArguments`.

    Attributes:
        history: What each detection found and what came out of its repair.

    Raises:
        ArgumentError: If an argument is out of range.
        DataError: At the start of fit, if the training data cannot be read or put into batches anew.
        TrainerError: At the start of fit, if the module optimizes by hand, or the strategy shards the model.

    Example:
        >>> DBRCallback(warmup_epochs=0, epochs=5)
        DBRCallback(warmup_epochs=0, epochs=5)
    """

    method: ClassVar[str] = "DBR"
    title: ClassVar[str] = "D-BR"
    shared = DetectorArguments
    shared_defaults = DETECTOR_DEFAULTS

    def __init__(
        self,
        *,
        warmup_epochs: int | None = None,
        epochs: int = 10,
        extra_epochs: int = 0,
        lr: float | None = None,
        paper_loop: bool = False,
        max_removed: float = 0.3,
        response: ResponseName | Response = "unlearn",
        fallback: Literal["restart"] | None = "restart",
        **scan: Unpack[DetectorArguments],
    ) -> None:
        arguments: dict[str, Any] = {**DETECTOR_DEFAULTS, **scan}
        self.epochs = require_positive("epochs", epochs) or 1
        self.extra_epochs = require_count("extra_epochs", extra_epochs)
        self.lr, self.paper_loop, self.response = require_rate("lr", lr), paper_loop, response
        self.fallback = require_one_of("fallback", fallback, ("restart", None))
        now, seed = warmup_epochs == 0, arguments["seed"]
        quota = arguments["suspect"] != "auto" and arguments["verdict"] is None
        if now and response in ("restart", "reset"):
            raise ArgumentError(
                f"`warmup_epochs=0` treats the weights as they are, which does not go with response={response!r}. Pass "
                'response="unlearn", "continue" or "report", or a number of epochs.'
            )
        own: dict[str, Response] = {
            "restart": Restart(last_detection=True),
            "reset": ResetUnits(extra_epochs=extra_epochs, lr=lr, seed=seed),
            "unlearn": Unlearn(
                epochs=self.epochs,
                extra_epochs=extra_epochs,
                lr=lr,
                at_once=now,
                repeats=warmup_epochs is not None,
                paper_loop=paper_loop,
                seed=seed,
            ),
            "continue": Continue(at_once=now, halfway=True),
            "report": Report(at_once=now),
        }
        self.arguments = arguments
        super().__init__(
            detector=ConsistencyDetector(arguments, require_fraction("max_removed", max_removed), seed),
            response=chosen_response(response, own, fallback=None if quota or paper_loop else self.fallback),
            warmup_epochs=0 if now else require_positive("warmup_epochs", warmup_epochs),
            max_removed=max_removed,
            max_removed_of_class=1.0 if arguments["verdict"] is not None else arguments["max_removed_of_class"],
            **scan_arguments(scan, DETECTOR_DEFAULTS),
        )

    @classmethod
    def from_paper(cls, **overrides: Any) -> DBRCallback:
        """Use the authors' shares, rate and unbounded loop, with a detector from fresh weights.

        This always unlearns images, in 20 epochs beyond the plan. What is left of the differences: trusted images are
        chosen class by class, and the detector is trained by ``detector_steps`` of AdamW, the model repaired by the
        user's optimizer.
        """
        paper = {"suspect": 0.05, "trusted": 0.2, "detector": "fresh", "num_transforms": 1, "lr": 1e-4, "epochs": 20}
        return cls(**{**paper, "extra_epochs": 20, "paper_loop": True, **overrides})
