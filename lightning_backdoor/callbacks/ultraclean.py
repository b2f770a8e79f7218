"""UltraClean: drop the training images on which gentle denoising reveals a trigger."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_backdoor.callbacks.defense import Defense, require_fraction, require_positive
from lightning_backdoor.data.pixels import check_finite
from lightning_backdoor.data.store import RowStore
from lightning_backdoor.errors import ArgumentError, TrainerError
from lightning_backdoor.functional.denoising import local_median, nl_means
from lightning_backdoor.functional.evidence import Decision, decide
from lightning_backdoor.functional.susceptibility import susceptibility_scores
from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.report.writer import write_report
from lightning_backdoor.trainer.compat import rank_zero_info, rank_zero_warn
from lightning_backdoor.trainer.etiquette import isolated_rng
from lightning_backdoor.trainer.rewind import LoopHold, about_to_end, restore, snapshot
from lightning_backdoor.trainer.training_set import Reading
from lightning_backdoor.verdict import Verdict

__all__ = ["UltraCleanCallback"]

DEFAULT_WARMUP = 10
DENOISERS = (local_median, nl_means)
MEANINGS = {
    "auto": "It measures whether the image belongs to a second population inside its class, by what the model sees in it "
    "and how that moves when the image is gently denoised.",
    "paper": "It measures how much the answer of the model changes when the image is gently denoised.",
}


class UltraCleanCallback(Defense):
    """Drop training images that gentle denoising exposes as triggered, and train on what is left.

    Implements UltraClean (`Zhao and Lao, 2023 <https://arxiv.org/abs/2312.10657>`_) inside a Trainer. After a warm-up
    every training image goes through the network three times: as it is, after a local median and after non-local means.
    What moves when the image is denoised is the evidence. If samples are removed, weights, optimizer, schedulers and
    averages go back to the start of fit and the Trainer trains its full number of epochs on the kept images (the paper
    trains a fresh model, too: a network that has learned a backdoor does not forget it by itself). If nothing stands
    out, nothing changes.

    Assumes nothing: no clean data, no poison rate, no target class. Costs the warm-up epochs once more when it rewinds,
    three forward passes, the denoising (once), two uint8 copies of the training images (in memory up to
    ``cache_bytes``, else in a temporary file) and two bytes per image and feature.

    Differs from the paper: the default score looks at the features class by class instead of adding up the outputs; the
    cut is estimated behind a no-poison gate instead of given; images are denoised as the network sees them.
    ``UltraCleanCallback.from_paper()`` keeps to the paper.

    Args:
        warmup_epochs: Epochs of ordinary training before the scan. ``None``: half of ``max_epochs`` (10 if that is not
            set). Strong backdoors show early, weak ones late. The scan never comes later than the last epoch.
        score: ``"auto"`` looks for a second mode in how much each feature moves, label by label; ``"paper"`` is the
            L1 susceptibility of the outputs.
        output: What ``score="paper"`` compares: ``"logits"`` or ``"softmax"`` (which saturates and ranks poorly).
        rule: ``"auto"`` removes second modes that pass the no-poison gate; ``"fraction"`` removes the top ``fraction``.
        fraction: Share of the looked-at samples that ``rule="fraction"`` removes, in ``(0, 1)``.
        max_removed: Largest share of the training set that may be removed, in ``(0, 1)``.
        target_class: Look only at samples with this label (the paper's known-class scenario).
        rewind: Go back to the start of fit after samples were removed; ``False`` trains on from there.
        rescore_every: Scan again every so many epochs after the first scan; removed samples stay removed.
        report_dir: Folder for the report. ``None``: beside the logger's files; without a logger there is no report.
        forward_fn: ``forward_fn(pl_module, batch)`` returns logits ``(B, K)``, for models that cannot be called with the
            images alone.
        batch_fn: ``batch_fn(batch)`` returns images and labels, for batches in which they cannot be found.
        feature_layer: Name of the layer whose output are the features. ``None``: the input of the classifier head.
        eval_transform: Transform without augmentation. ``None``: that of the validation set, else the training
            transform under a fixed seed per image.
        mean: Mean of the pixel normalisation, one number per channel in ``[0, 1]`` units; ``None`` finds it out.
        std: Standard deviation of the pixel normalisation, as ``mean``.
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
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        cache_bytes: int = 2**31,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        reading = Reading(
            forward_fn, batch_fn, feature_layer, eval_transform, mean, std, batch_size, num_workers, seed
        )
        super().__init__(max_removed=max_removed, reading=reading, report_dir=report_dir, name=name)
        self.warmup_epochs = require_positive("warmup_epochs", warmup_epochs)
        self.score = _one_of("score", score, ("auto", "paper"))
        self.output = _one_of("output", output, ("logits", "softmax"))
        self.rule = _one_of("rule", rule, ("auto", "fraction"))
        self.fraction = require_fraction("fraction", fraction)
        self.target_class = target_class
        self.rewind = rewind
        self.rescore_every = require_positive("rescore_every", rescore_every)
        self.cache_bytes = cache_bytes
        self._last_scan: int | None = None  # epochs trained before the latest scan, counted from the last rewind
        self._start: dict[str, Any] | None = None  # what a rewind goes back to
        self._fresh_module: dict[str, Tensor] | None = None
        self._rewind_is_due = False
        self._hold = LoopHold()
        self._denoised: list[RowStore] = []

    @classmethod
    def from_paper(cls, **overrides: Any) -> UltraCleanCallback:
        """The paper's score (L1 on softmax outputs) and cut (a fraction of 0.2), which removes images always."""
        return cls(**{"score": "paper", "output": "softmax", "rule": "fraction", **overrides})

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the curation; before a checkpoint is loaded, keep the weights that the user started from."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if self.rewind and any(type(callback).__name__ == "Timer" for callback in trainer.callbacks):
            raise TrainerError(
                "`Trainer(max_time=...)` must be left out when `rewind=True`: the time of the warm-up would count against "
                "the run that follows it. Limit the run by `max_epochs` or `max_steps`, or pass `rewind=False`."
            )
        if self.rewind and self.verdict is None and trainer.ckpt_path is not None:
            self._fresh_module = {key: value.detach().to("cpu", copy=True) for key, value in pl_module.state_dict().items()}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Keep the loop open if the run was interrupted between the decision and the rewind."""
        if self._rewind_is_due:
            self._hold.close(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the training set can be read, and note where a rewind goes back to."""
        super().on_train_start(trainer, pl_module)
        if self.rewind and self._start is None and (self.verdict is None or self.rescore_every is not None):
            self._start = snapshot(trainer, pl_module)
            if self._fresh_module is not None:
                self._start["module"] = self._fresh_module
        self._fresh_module = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Go back to the start of fit if the epoch before removed samples."""
        if not self._rewind_is_due or self._start is None or self._curation is None:
            return
        restore(trainer, pl_module, self._start)
        self._hold.release(trainer)
        self._curation.restart_iterator()
        self._rewind_is_due = False
        self._last_scan = 0
        if self.rescore_every is None:
            self._start = None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Scan, decide and prune when it is time."""
        if self._rewind_is_due or not self._is_due(trainer):
            return
        if trainer.fast_dev_run:
            rank_zero_info("UltraClean: fast_dev_run trains too little for a verdict; no scan.")
            return
        began = time.monotonic()
        found = self._scan(trainer, pl_module)
        decision = self._decide(found)
        removes = self._adopt(decision, found["labels"])
        self._last_scan = trainer.current_epoch + 1
        if removes and self.rewind:
            self._rewind_is_due = True
            self._hold.close(trainer)
        self._tell(trainer, pl_module, decision, time.monotonic() - began)
        if self.rescore_every is None:
            self._forget_images()
            if not self._rewind_is_due:
                self._start = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if training ended before the scan."""
        if self.verdict is None and not trainer.fast_dev_run:
            rank_zero_warn(
                "UltraClean: training was stopped before the scan, so there is no verdict and nothing was removed. "
                "Let it train longer, or pass a smaller `warmup_epochs`."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only; during the warm-up they include what a rewind goes back to."""
        return {
            **super().state_dict(),
            "last_scan": self._last_scan,
            "rewind_is_due": self._rewind_is_due,
            "start": self._start,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue an interrupted run."""
        super().load_state_dict(state_dict)
        self._last_scan = state_dict.get("last_scan")
        self._rewind_is_due = state_dict.get("rewind_is_due", False)
        self._start = state_dict.get("start")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running Trainer."""
        return {**super().__getstate__(), "_denoised": []}

    def _leave(self) -> None:
        super()._leave()
        self._forget_images()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the loader and the Trainer's limits back."""
        self._hold.release(trainer)
        super().on_exception(trainer, pl_module, exception)

    def _is_due(self, trainer: Any) -> bool:
        epochs = trainer.current_epoch + 1
        if self.verdict is None:
            ends = self.rewind and about_to_end(trainer)
            return ends or epochs >= self._warmup(trainer)
        return self.rescore_every is not None and epochs - (self._last_scan or 0) >= self.rescore_every

    def _warmup(self, trainer: Any) -> int:
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        planned = trainer.max_epochs
        return max(1, math.ceil(planned / 2)) if planned is not None and planned > 0 else DEFAULT_WARMUP

    def _scan(self, trainer: Any, pl_module: Any) -> dict[str, Tensor]:
        """One pass over all training images: labels, the paper's score and how far each feature moved."""
        data = self._training_set
        assert data is not None
        if not self._denoised:
            rows = math.ceil(len(data) / trainer.world_size)
            self._denoised = [RowStore(rows, self.cache_bytes // len(DENOISERS)) for _ in DENOISERS]

        def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
            images = data.layout.images(batch)
            check_finite(images, indices)
            versions = [
                data.layout.with_images(batch, data.pixels.to_model(pixels, like=images))
                for pixels in self._denoise(indices // trainer.world_size, images, pl_module.device)
            ]
            labels = data.labels(batch)
            logits, features = data.outputs(trainer, pl_module, batch)
            moved = [data.outputs(trainer, pl_module, version) for version in versions]
            outputs = [logits, *(version for version, _ in moved)]
            if self.output == "softmax":
                outputs = [output.softmax(dim=1) for output in outputs]
            shift = len(moved) * features - torch.stack([version for _, version in moved]).sum(dim=0)
            return {
                "labels": labels,
                "susceptibility": susceptibility_scores(outputs[0], outputs[1:]),
                "movement": shift.square().mean(dim=1),
                "responses": torch.cat([features, shift], dim=1).half(),
            }

        return data.scan(trainer, pl_module, step, description="UltraClean scan")

    def _denoise(self, rows: Tensor, images: Tensor, device: torch.device) -> list[Tensor]:
        """The denoised versions of a batch, uint8, computed on the device at the first scan and remembered."""
        assert self._training_set is not None
        if not all(store.has(rows) for store in self._denoised):
            pixels = self._training_set.pixels.to_pixels(images).to(device)
            for store, denoiser in zip(self._denoised, DENOISERS, strict=True):
                store.write(rows, denoiser(pixels))
        return [store.read(rows) for store in self._denoised]

    def _decide(self, found: dict[str, Tensor]) -> Decision:
        labels, paper = found["labels"], self.score == "paper"
        removed = None if self.verdict is None else ~self.verdict.keep
        considered = torch.ones_like(labels, dtype=torch.bool) if self.target_class is None else labels == self.target_class
        decision = decide(
            found["susceptibility"][:, None] if paper else found["responses"],
            found["susceptibility"] if paper else found["movement"],
            labels,
            considered=considered,
            fraction=self.fraction if self.rule == "fraction" else None,
            by_ranking=paper and self.rule == "fraction",
            max_removed=self.max_removed,
        )
        return decision if removed is None else _joined(decision, removed, self.max_removed)

    def _adopt(self, decision: Decision, labels: Tensor) -> bool:
        """Make the decision the verdict and curate by it; True if it removes samples that were still in training."""
        before = None if self.verdict is None else self.verdict.keep
        verdict = Verdict(decision.scores, decision.keep, decision.threshold, decision.rule, labels)
        removes = bool((~decision.keep if before is None else before & ~decision.keep).any())
        if removes and self._curation is not None:
            self._curation.set_keep(self.state_key, decision.keep)
            self._curation.refresh()
        self.verdict = verdict
        return removes

    def _tell(self, trainer: Any, pl_module: Any, decision: Decision, seconds: float) -> None:
        """Log, print one sentence, and write the report."""
        assert self.verdict is not None and self._training_set is not None
        total, removed = len(self.verdict), len(self.verdict.removed)
        separation = max((mode.separation for mode in decision.modes), default=0.0)
        pl_module.log_dict(
            {
                "backdoor/ultraclean/removed": float(removed),
                "backdoor/ultraclean/removed_fraction": removed / total,
                "backdoor/ultraclean/separation": separation,
            }
        )
        done = "nothing stands out, all are kept" if removed == 0 else f"{removed:,} removed"
        then = "; training starts again on the rest" if self._rewind_is_due else ""
        rank_zero_info(f"UltraClean looked at {total:,} training images: {done}{then}.")
        folder = self._report_folder(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        facts: dict[str, str | int | float] = {
            "scan after epoch": trainer.current_epoch + 1,
            "seconds": round(seconds, 1),
            "images read with": self._training_set.transform.description,
            "classes with a second mode": ", ".join(
                f"{mode.label} (separation {mode.separation:.1f})" for mode in decision.modes
            )
            or "none",
        }
        evidence = Evidence(
            classes=getattr(self._training_set.loader.dataset, "classes", None),
            images=self._training_set.images,
            denoised=lambda indices: [denoise(self._images(indices)) for denoise in DENOISERS],
            facts=facts,
            score_meaning=MEANINGS[self.score],
            wanted=decision.wanted,
            max_removed=self.max_removed,
            rewound=self.rewind if removed else None,
        )
        with isolated_rng():
            try:
                write_report(folder, self.verdict, method=self.method, evidence=evidence)
            except Exception as error:  # a picture must never end somebody's training
                rank_zero_warn(f"UltraClean: the report in {folder} is incomplete: {type(error).__name__}: {error}")

    def _images(self, indices: Sequence[int]) -> Tensor:
        assert self._training_set is not None
        return self._training_set.images(indices)

    def _forget_images(self) -> None:
        for store in self._denoised:
            store.close()
        self._denoised = []


def _joined(decision: Decision, removed: Tensor, max_removed: float) -> Decision:
    """A later decision with the samples that an earlier one removed; these stay removed, within the same cap."""
    budget = max(int(max_removed * len(removed)) - int(removed.sum()), 0)
    new = (~decision.keep & ~removed).nonzero().squeeze(1)
    new = new[decision.scores[new].argsort(descending=True, stable=True)[:budget]]
    keep = ~removed
    keep[new] = False
    return replace(decision, keep=keep, threshold=decision.threshold if len(new) else math.inf)


def _one_of(name: str, value: Any, options: tuple[str, ...]) -> Any:
    if value not in options:
        raise ArgumentError(f"`{name}` must be one of {', '.join(map(repr, options))}, got {value!r}.")
    return value
