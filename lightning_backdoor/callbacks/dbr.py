"""D-BR: tell suspects by a detector of their own, unlearn them, and learn trustworthy images anew."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_backdoor._lightning import rank_zero_info, rank_zero_warn
from lightning_backdoor.callbacks.base import require_positive
from lightning_backdoor.callbacks.detecting import Detecting
from lightning_backdoor.callbacks.repairing import RepairCallback
from lightning_backdoor.callbacks.repairs import Repair
from lightning_backdoor.callbacks.schedule import is_due
from lightning_backdoor.responses.limits import about_to_end
from lightning_backdoor.scanning.scanner import ScanOptions
from lightning_backdoor.verdict import Verdict

__all__ = ["DBRCallback"]


class DBRCallback(Detecting, RepairCallback):
    """Repair a model: unlearn the images that a backdoor was learned from, and learn trustworthy ones anew.

    Implements D-BR (*Effective Backdoor Defense by Exploiting Sensitivity of Poisoned Samples*, `Chen et al., 2022
    <https://openreview.net/forum?id=AsH-Tx2U0Ug>`_) inside a Trainer. When as many epochs are left as the repair may
    need (or after ``warmup_epochs``), a copy of the model is trained without augmentation, so that it relies on a
    trigger wherever there is one. Images are trusted if its features stay where they are when the image is turned and
    shifted; they are suspect if they are a second population inside their class. Then every epoch unlearns the suspects
    and learns the trusted images anew, by the user's own ``training_step`` and optimizer. If nothing is suspect,
    nothing changes.

    Assumes nothing: no clean data, no poison rate, no target class. Costs about three epochs of training for the look,
    and up to ``epochs`` epochs over suspects and trusted images. They are epochs of the plan (``max_epochs``,
    ``max_steps``, ``max_time``), unless ``extra_epochs`` are allowed; what is left of the plan is ordinary training on
    the images that are not suspect. An epoch of repair is judged and undone with its last batch, before validation.

    Differs from the paper: suspects come from evidence instead of a share, which unlearns clean images on clean data;
    the detector may start from the model; all classes are trusted equally; batches of suspects and of trusted images
    alternate; the ascent is on ``-log(1 - p)`` and ends for each image when it has lost its label; batch norms are
    frozen; an epoch that costs over five points of accuracy is undone; the repair ends when it is complete.

    Args:
        verdict: Verdict of another defence: what it removed is unlearned. There is no detector then.
        warmup_epochs: Epochs of ordinary training before the look; ``None``: as late as the plan leaves time for the
            repair, which takes half of it at most. With a number there is a second look at the end if the first one
            found nothing. 0 repairs the weights as they are (loaded, or of the ``ckpt_path`` given to ``fit``) and ends
            the fit; where a ``ckpt_path`` is at its ``max_epochs``, the repair goes on beyond it.
        epochs: Largest number of epochs of repair; at most what is left.
        extra_epochs: Epochs that the repair may have beyond the plan. If they are as many as ``epochs``, the look comes
            when training is about to end.
        lr: Learning rate of the repair, falling to zero. ``None``: 5 % of the largest so far.
        trusted: Share of the images of every class that are learned anew, in ``(0, 1)``.
        suspect: ``"auto"`` looks for second populations; a number in ``(0, 1)`` is the share of all images, those that
            move most, that is unlearned in any case.
        detector: ``"copy"`` starts from the model, ``"fresh"`` from the weights before training (kept in checkpoints).
            These are the weights at the start of ``fit``, before ``ckpt_path`` is loaded: where a suspicious model is
            handed to ``fit``, ``"fresh"`` is a copy, too. Or a network of your own: it takes the images of a batch
            after the transfer hooks and returns logits of as many classes; a copy of it is trained, from its weights,
            at the rate of ``"fresh"``. ``forward_fn`` and ``feature_layer`` are for the model alone.
        detector_steps: Steps in which the detector learns the labels, and as many of centre repulsion.
        fct_metric: How far features move; ``"auto"``: ``"cosine"`` where some are negative, else ``"mse"``.
        num_transforms: Transformations per image.
        transform: Replaces turning and shifting: takes and returns the pixels of one image, uint8 ``(1, C, H, W)``. It
            is called for every image under a seed of its own.
        paper_loop: The authors' loop without these bounds: every epoch, suspects first, with a constant rate.
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
        seed: Seed of the detector, of its transformations and of the order of the repair.
        name: Tells two instances apart in checkpoints and report folders.

    Attributes:
        history: What each look found and what came out of its repair.

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

    def __init__(
        self,
        *,
        verdict: Verdict | None = None,
        warmup_epochs: int | None = None,
        epochs: int = 10,
        extra_epochs: int = 0,
        lr: float | None = None,
        trusted: float = 0.5,
        suspect: Literal["auto"] | float = "auto",
        detector: Literal["copy", "fresh"] | nn.Module = "copy",
        detector_steps: int = 200,
        fct_metric: Literal["auto", "mse", "cosine"] = "auto",
        num_transforms: int = 2,
        transform: Callable[[Tensor], Tensor] | None = None,
        paper_loop: bool = False,
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
            report_dir=report_dir, name=name, epochs=epochs, extra_epochs=extra_epochs, lr=lr,
            paper_loop=paper_loop,
        )  # fmt: skip
        self.warmup_epochs = 0 if warmup_epochs == 0 else require_positive("warmup_epochs", warmup_epochs)

    @classmethod
    def from_paper(cls, **overrides: Any) -> DBRCallback:
        """Use the authors' shares, rate and unbounded loop, with a detector from fresh weights.

        This always unlearns images, in 20 epochs beyond the plan. What is left of the differences: trusted images are
        chosen class by class, and the detector is trained by ``detector_steps`` of AdamW, the model repaired by the
        user's optimizer.
        """
        paper = {"suspect": 0.05, "trusted": 0.2, "detector": "fresh", "num_transforms": 1, "lr": 1e-4, "epochs": 20}
        return cls(**{**paper, "extra_epochs": 20, "paper_loop": True, **overrides})

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the curation of the training loader; before a checkpoint is loaded, keep the first weights."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.detector == "fresh" and self.external_verdict is None:
            self._initial = {k: v.detach().to("cpu", copy=True) for k, v in pl_module.state_dict().items()}

    @property
    def _acted(self) -> bool:
        """Whether a look found something, since the last rewind of another defence; none follows then."""
        return self._last_look is not None and bool(self.history[-1].suspects)

    def _at_once(self) -> bool:
        return self.warmup_epochs == 0

    def _require(self, trainer: Any, pl_module: Any) -> None:
        data = self._training_set
        assert data is not None
        self._judge().require(trainer, pl_module, data)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Look when it is time; judge an epoch of repair when it is over."""
        if self._repaired(trainer, pl_module):
            return
        if self._acted:
            self._look_at_suspects(trainer, pl_module)
            return
        warmup, done = self.warmup_epochs or self._repair_begins(trainer), trainer.current_epoch + 1
        ends = about_to_end(trainer) and (self._last_look is None or self.warmup_epochs is not None)
        if not is_due(done, last_scan=self._last_look, warmup=warmup, every=None, ends=ends):
            return
        if trainer.fast_dev_run:
            rank_zero_info("D-BR: fast_dev_run trains too little for a verdict; no look.")
            return
        with self._acting():
            self._look(trainer, pl_module, done)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only; while a repair lasts, with the weights to go back to."""
        return {**super().state_dict(), "initial": None if self._acted else self._initial}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue an interrupted run."""
        super().load_state_dict(state_dict)
        if state_dict:
            self._initial = state_dict["initial"] or self._initial

    def _look(self, trainer: Any, pl_module: Any, done: int) -> None:
        """Tell suspects, drop them, and let their repair follow."""
        began = time.monotonic()
        assert self._training_set is not None
        judgement = self._judge().judge(trainer, pl_module, self._training_set, self.verdict)
        removed = self._adopt(judgement.verdict)
        suspects, trusted, lacking = judgement.counts
        self._last_look = done
        self.history.append(Repair(done, removed, judgement.num_flagged_before_cap, judgement.modes, suspects, trusted))
        if lacking:
            rank_zero_warn(f"D-BR: no repair, since no image of the classes {lacking} can be trusted. Raise `trusted`.")
        elif suspects:
            self._begin(trainer, pl_module, done)
        self._tell(trainer, pl_module, time.monotonic() - began)

    def _meaning(self) -> str:
        return self._judge().meaning
