"""UltraClean: drop the training images on which gentle denoising reveals a trigger."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_backdoor._lightning import rank_zero_info
from lightning_backdoor.callbacks.base import require_class, require_fraction, require_one_of
from lightning_backdoor.callbacks.filtering import FilterCallback
from lightning_backdoor.callbacks.looks import evidence, largest_gap, sentence
from lightning_backdoor.callbacks.neighborhood import EarlyLook, early_look
from lightning_backdoor.callbacks.schedule import warmup_or_half
from lightning_backdoor.detection.decision import Decision, add_removed, decide
from lightning_backdoor.responses.limits import planned_max_epochs
from lightning_backdoor.scanning.measure_denoised import DenoisedScan
from lightning_backdoor.scanning.scanner import ScanOptions

__all__ = ["UltraCleanCallback"]

MEANINGS = {
    "auto": "It measures whether the image belongs to a second population inside its class, by what the model sees in "
    "it and how that moves when the image is gently denoised.",
    "paper": "It measures how much the answer of the model changes when the image is gently denoised.",
}


class UltraCleanCallback(FilterCallback):
    """Drop training images that gentle denoising exposes as triggered, and train on what is left.

    Implements UltraClean (`Zhao and Lao, 2023 <https://arxiv.org/abs/2312.10657>`_) inside a Trainer. After a warm-up
    every training image goes through the network three times: as it is, after a local median and after non-local means.
    What moves when the image is denoised is the evidence. If samples are removed, weights, optimizer, schedulers and
    averages go back to the start of fit and the Trainer trains its full number of epochs on the kept images (the paper
    trains a fresh model, too: a network does not forget a backdoor by itself). Weak backdoors are learned late: there
    is a last look at the end, which may rewind as well, twice at most. If nothing stands out, nothing changes.
    Half-way through a warm-up of two epochs or more it notes how many of an image's neighbours have its label. Images
    that lay among other classes then, and are a population of their class later, need not stand out as far as others.

    Assumes nothing: no clean data, no poison rate, no target class. Costs the epochs before a rewind once more; one
    forward pass, and three per scan; the denoising, once; two uint8 copies of the images (in memory up to
    ``cache_bytes``, else in a temporary file); four bytes per image and feature in a scan; the initial weights in
    checkpoints.

    Differs from the paper: the score looks at the features class by class instead of adding up the outputs; the cut is
    estimated behind a no-poison gate instead of given; early neighbours; images are denoised as the network sees them.

    Args:
        warmup_epochs: Epochs of ordinary training before the scan. ``None``: half of ``max_epochs`` (10 if that is not
            set); with the paper's score and cut and a rewind, when training is about to end. Strong backdoors show
            early, weak ones late. The scan never comes later than the last epoch.
        score: ``"auto"`` looks for a second mode in the features and their movement; ``"paper"`` is L1 on the outputs.
        output: What ``score="paper"`` compares: ``"logits"`` or ``"softmax"`` (which saturates and ranks poorly).
        rule: ``"auto"`` removes second modes that pass the no-poison gate; ``"fraction"`` removes the top ``fraction``.
        fraction: Share of the looked-at samples that ``rule="fraction"`` removes, in all, in ``(0, 1)``.
        max_removed: Largest share of the training set that may be removed, in ``(0, 1)``. With ``rule="auto"`` 15 % of
            each label stay in any case (of the median label, where a label is larger).
        target_class: Look only at samples with this label (the paper's known-class scenario).
        rewind: Go back to the start of fit after samples were removed; ``False`` trains on from there, without a last
            look. Counters (numbers, strings and None among the attributes of the module and of callbacks) go back as
            well; for anything else the module may have a method ``on_backdoor_restart()``, a callback
            ``on_backdoor_restart(trainer, pl_module)``.
        rescore_every: Scan again every so many epochs after the first scan; removed samples stay removed. With
            ``rule="fraction"`` the first scan removes all that may go, and later ones renew the scores of the rest.
        report_dir: Folder for the report; with a ``name``, a folder of that name in it (``UltraClean.<name>``).
            ``None``: beside the logger's files; without a logger there is no report.
        forward_fn: ``forward_fn(pl_module, batch)`` returns logits ``(B, K)``, for models that cannot be called with
            the images alone.
        batch_fn: ``batch_fn(batch)`` returns images and labels, for batches in which they cannot be found.
        feature_layer: Name of the layer whose output are the features. ``None``: the input of the classifier head.
        eval_transform: Transform without augmentation. ``None``: that of the validation set, else the training
            transform without its random steps.
        eval_dataset: In place of ``eval_transform``, for augmentation inside the dataset: the same samples without it,
            as a dataset, or as a function from the training dataset to one.
        mean: Mean of the pixel normalisation, one number per channel in ``[0, 1]`` units; ``None`` finds it out.
            ``"per_image"``: every image was standardised by itself; its pixels span its smallest to largest value.
        std: Its standard deviation.
        batch_size: Images per forward pass of the scan; ``None`` takes the loader's.
        num_workers: Worker processes of the scan; ``None`` takes the loader's.
        cache_bytes: Denoised images beyond this size are kept in a temporary file.
        seed: Seed of what is random in the training transform.
        name: Tells two instances apart in checkpoints and report folders.

    Raises:
        ArgumentError: If an argument is out of range.
        DataError: At the start of fit, if the training data cannot be scanned.
        TrainerError: At the start of fit, if a Trainer setting rules the defence out.

    Example:
        >>> UltraCleanCallback(warmup_epochs=5, name="first")
        UltraCleanCallback(warmup_epochs=5, name='first')
    """

    method: ClassVar[str] = "UltraClean"

    def __init__(
        self,
        *,
        warmup_epochs: int | None = None,
        score: Literal["auto", "paper"] = "auto",
        output: Literal["logits", "softmax"] = "logits",
        rule: Literal["auto", "fraction"] = "auto",
        fraction: float = 0.2,
        max_removed: float = 0.3,
        target_class: int | None = None,
        rewind: bool = True,
        rescore_every: int | None = None,
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
        cache_bytes: int = 2**31,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        options = ScanOptions(
            forward_fn, batch_fn, feature_layer, eval_transform, mean, std, batch_size, num_workers, seed,
            eval_dataset=eval_dataset,
        )  # fmt: skip
        super().__init__(
            warmup_epochs=warmup_epochs,
            max_removed=max_removed,
            rewind=rewind,
            rescore_every=rescore_every,
            options=options,
            report_dir=report_dir,
            name=name,
        )
        self.score = require_one_of("score", score, ("auto", "paper"))
        self.output = require_one_of("output", output, ("logits", "softmax"))
        self.rule = require_one_of("rule", rule, ("auto", "fraction"))
        self.fraction = require_fraction("fraction", fraction)
        self.target_class = require_class("target_class", target_class)
        self.cache_bytes = cache_bytes
        self._scanner: DenoisedScan | None = None
        self._early: EarlyLook | None = None

    @classmethod
    def from_paper(cls, **overrides: Any) -> UltraCleanCallback:
        """Use the paper's score (L1 on softmax outputs) and cut (a fraction of 0.2), which always removes images.

        The network that is asked is trained to the end, and so is the one that starts again on the rest: the fit takes
        twice its epochs. ``warmup_epochs`` asks earlier. Without a rewind nothing would be trained after the end, so
        that ``rewind=False`` asks after half of the epochs.
        """
        return cls(**{"score": "paper", "output": "softmax", "rule": "fraction", **overrides})

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the curation; before a checkpoint is loaded, keep the weights that the user started from."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.verdict is None:
            self._early = None  # of an earlier fit

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the training set can be read, and note where a rewind goes back to."""
        super().on_train_start(trainer, pl_module)
        assert self._training_set is not None
        self._training_set.require_class("target_class", self.target_class)
        self._training_set.require_replaceable(trainer, pl_module)
        if self._early is not None:
            self._early.require_same_data(self._training_set)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Ask the neighbours early; scan, decide and prune when it is time."""
        if self._asks_neighbors(trainer):
            assert self._training_set is not None
            self._early = early_look(trainer, pl_module, self._training_set)
        super().on_train_epoch_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only; while a rewind may come, they include what it goes back to."""
        return {**super().state_dict(), "early": None if self._early is None else self._early.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue an interrupted run."""
        super().load_state_dict(state_dict)
        if state_dict:
            early = state_dict["early"]
            self._early = None if early is None else EarlyLook(**early)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running Trainer."""
        return {**super().__getstate__(), "_scanner": None}

    def _first_scan(self, trainer: Any) -> int:
        if self.warmup_epochs is None and self.rewind and (self.score, self.rule) == ("paper", "fraction"):
            return sys.maxsize  # when training is about to end
        return warmup_or_half(self.warmup_epochs, planned_max_epochs(trainer))

    def _asks_neighbors(self, trainer: Any) -> bool:
        """Whether it is time for the early look: half-way to the first scan, and before it by an epoch at least."""
        wanted = (self.score, self.rule) == ("auto", "auto") and self.verdict is None and not trainer.fast_dev_run
        half_way = 2 * (trainer.current_epoch + 1) >= self._first_scan(trainer)
        return wanted and self._early is None and half_way and not self._is_due(trainer)

    def _last_look(self) -> bool:
        return bool(self.rule == "auto")

    def _scan(self, trainer: Any, pl_module: Any) -> dict[str, Tensor]:
        if self._scanner is None:
            assert self._training_set is not None
            self._scanner = DenoisedScan(
                self._training_set,
                world_size=trainer.world_size,
                cache_bytes=self.cache_bytes,
                softmax=self.output == "softmax",
            )
        return self._scanner.run(trainer, pl_module)

    def _decide(self, found: dict[str, Tensor]) -> Decision:
        old, paper, by_fraction = self.verdict, self.score == "paper", self.rule == "fraction"
        labels = None if by_fraction else found["labels"]
        if self._early is not None:
            found = {**found, "agreement": self._early.agreement}
        # beside what was removed, the clean rest of a class is a mode; a mask that keeps all would copy a gigabyte
        if old is not None and not by_fraction and not bool(old.keep.all()):
            found = {name: column[old.keep] for name, column in found.items()}
        decision = decide(
            found["susceptibility"][:, None] if paper else found["responses"],
            found["susceptibility"] if paper else found["movement"],
            found["labels"],
            considered=None if self.target_class is None else found["labels"] == self.target_class,
            fraction=self.fraction if by_fraction else None,
            by_ranking=paper and by_fraction,
            removed=None if old is None or not by_fraction else ~old.keep,
            agreement=found.get("agreement"),
            max_removed=self.max_removed,
        )
        if old is None:
            return decision
        threshold = decision.threshold if by_fraction else old.threshold  # scores of two models share no scale
        limits: dict[str, Any] = {"max_removed": self.max_removed, "labels": labels}
        joined = add_removed(decision, old.scores, old.keep, threshold=threshold, **limits)
        return replace(joined, rule=old.rule) if torch.equal(joined.keep, old.keep) else joined

    def _tell(self, trainer: Any, pl_module: Any, seconds: float) -> None:
        assert self.verdict is not None
        assert self._training_set is not None
        removed, standardized_gap = float(len(self.verdict.removed)), largest_gap(self._looks)
        pl_module.log_dict({"backdoor/ultraclean/removed": removed, "backdoor/ultraclean/separation": standardized_gap})
        rank_zero_info(f"UltraClean {sentence(self._looks, len(self.verdict))}")
        shown = evidence(
            self._looks,
            self._training_set,
            meaning=MEANINGS[self.score],
            denoised=True,
            by_modes=(self.score, self.rule) != ("paper", "fraction"),
            seconds=seconds,
            max_removed=self.max_removed,
        )
        self._write_report(trainer, shown)

    def _forget_images(self) -> None:
        if self._scanner is not None:
            self._scanner.close()
            self._scanner = None
