"""What all defences share: a name in logs and checkpoints, a place at the training loader, a verdict."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_backdoor._lightning import rank_zero_warn, validation_loaders
from lightning_backdoor.callbacks.hooks import TrainerCallback
from lightning_backdoor.callbacks.majorities import warn_of_majorities
from lightning_backdoor.data.prefetching import unwrapped
from lightning_backdoor.data.random_state import isolated_rng
from lightning_backdoor.errors import ArgumentError, DataError, TrainerError
from lightning_backdoor.loading.loader_filter import LoaderFilter, loader_filter_of
from lightning_backdoor.report.evidence import Evidence
from lightning_backdoor.report.writer import write_report
from lightning_backdoor.responses.checkpointing import save_weights
from lightning_backdoor.responses.mirrors import Watch
from lightning_backdoor.responses.weight_copies import put_weights, unwatch_averages, watch_averages
from lightning_backdoor.scanning.isolation import require_unsharded
from lightning_backdoor.scanning.scanner import DatasetScanner, ScanOptions, open_scanner
from lightning_backdoor.verdict import Verdict

__all__ = [
    "Defense",
    "require_class",
    "require_count",
    "require_fraction",
    "require_one_of",
    "require_positive",
    "require_rate",
    "require_same_data",
    "spared",
]

SCHEMA = 2  # of what checkpoints hold of any defence: a release that changes it counts up


def require_fraction(name: str, value: float) -> float:
    """Return ``value`` if it lies strictly between 0 and 1, else explain the unit."""
    if not 0 < value < 1:
        hint = f" For {value:g} per cent, pass {value / 100:g}." if 1 <= value < 100 else ""
        raise ArgumentError(f"`{name}` must be a fraction between 0 and 1, got {value}.{hint}")
    return value


def require_positive(name: str, value: int | None) -> int | None:
    """Return ``value`` if it is None or a whole number of at least one."""
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ArgumentError(f"`{name}` must be a whole number of at least 1, or None, got {value!r}.")
    return value


def require_count(name: str, value: int) -> int:
    """Return ``value`` if it is a whole number, 0 or larger."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ArgumentError(f"`{name}` must be a whole number of at least 0, got {value!r}.")
    return value


def require_rate(name: str, value: float | None) -> float | None:
    """Return ``value`` if it is None or a learning rate."""
    if value is not None and value <= 0:
        raise ArgumentError(f"`{name}` must be a positive learning rate or None, got {value}.")
    return value


def require_class(name: str, value: int | None) -> int | None:
    """Return ``value`` if it is None or a class index."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ArgumentError(f"`{name}` must be a class index (0, 1, ...) or None, got {value!r}.")
    return value


def require_one_of(name: str, value: Any, options: tuple[str, ...]) -> Any:
    """Return ``value`` if it is one of the options."""
    if value not in options:
        raise ArgumentError(f"`{name}` must be one of {', '.join(map(repr, options))}, got {value!r}.")
    return value


def require_alone(trainer: Any, defense: Defense) -> None:
    """Check that no other defence is on the Trainer.

    Raises:
        TrainerError: There is one.
    """
    other = next((c for c in trainer.callbacks if isinstance(c, Defense) and c is not defense), None)
    if other is not None:
        raise TrainerError(
            f"{defense.title} trains all epochs and cannot share a Trainer with {type(other).__name__}. Fit with that "
            f"one first, and pass its verdict: {type(defense).__name__}(verdict=...)."
        )


def warn_of_evaluation_mode(pl_module: nn.Module, method: str) -> None:
    """Warn where everything that learns is in evaluation mode, as in a model that was loaded and evaluated.

    Lightning trains every module in the mode that it arrives in: through fixed batch-norm statistics, without dropout.
    A part alone, such as a frozen backbone, is the user's choice.

    Args:
        pl_module: The LightningModule at the start of a fit.
        method: Name of the defence, for readers.
    """
    learning = [part for part in pl_module.modules() if any(p.requires_grad for p in part.parameters(recurse=False))]
    if learning and not any(part.training for part in learning):
        rank_zero_warn(
            f"{method}: all layers of `{type(pl_module).__name__}` that learn are in evaluation mode, and Lightning "
            "trains them in it: with fixed batch-norm statistics and without dropout. Call `model.train()` before "
            "`fit`, unless this is what you want."
        )


class Defense(TrainerCallback):
    """Base of the defences.

    Subclasses set :attr:`method` and act in Lightning's hooks; this class joins and leaves the curation of the
    training loader, opens the training set at the start, and keeps the verdict in checkpoints.

    Attributes:
        method: Name of the defence in logs and checkpoints.
        title: Name of the defence for readers; the method where it is empty.
        kept_as: Arguments that are kept under another name than their own.
        verdict: The latest verdict, ``None`` while the defence has not acted.
    """

    method: ClassVar[str]
    title: ClassVar[str] = ""
    kept_as: ClassVar[dict[str, str]] = {}

    def __init__(
        self, *, max_removed: float, options: ScanOptions, report_dir: str | Path | None, name: str | None
    ) -> None:
        super().__init__()
        self.max_removed = require_fraction("max_removed", max_removed)
        self.options = options
        self.report_dir = None if report_dir is None else str(report_dir)
        self.name = name
        self.verdict: Verdict | None = None
        self._loader_filter: LoaderFilter | None = None
        self._training_set: DatasetScanner | None = None
        self._acts = False
        self._began = 0.0  # of the fit, in seconds since the epoch
        self._treated_until = 0.0  # the last change of the weights, likewise; 0 without one
        self._watch: Watch | None = None
        self._watched: dict[str, Any] = {}  # its state in the checkpoint that training goes on from

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints: the defence and the user's ``name``."""
        return ".".join(filter(None, ("lightning_backdoor", self.method, self.name)))

    def __repr__(self) -> str:
        """Return a call that makes an equal callback."""
        values = {}
        for argument, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, self.kept_as.get(argument, argument), getattr(self.options, argument, None))
            if value != parameter.default:
                values[argument] = value
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in values.items())})"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the curation of the training loader."""
        if stage != "fit":
            return
        require_unsharded(trainer)
        self._acts, self._began, self._treated_until = False, time.time(), 0.0
        self._watched = {}
        self._loader_filter = loader_filter_of(trainer)
        self._loader_filter.join(self.state_key)
        if self.verdict is not None:
            self._loader_filter.set_keep(self.state_key, self.verdict.keep)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at a few training images, so that whatever cannot work is said before anything is trained."""
        loader = None if self._loader_filter is None else self._loader_filter.loader
        if loader is None:
            raise TrainerError(f"{type(self).__name__} found no training loader. Pass one map-style loader to `fit`.")
        warn_of_evaluation_mode(pl_module, self.title or self.method)
        self._watch = watch_averages(trainer, pl_module, self, self._watched)
        self._training_set = open_scanner(trainer, pl_module, loader, self.options, _validation_dataset(trainer))
        if self.verdict is not None:
            require_same_data(self.verdict, self._training_set)
            if self.verdict.labels is not None:
                self._training_set.unread[self.verdict.labels < 0] = True

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the training loader back."""
        unwatch_averages(trainer, self)
        self._leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Save what was trained if it is the defence that fails; give the training loader back.

        Lightning does not tear down after an error.
        """
        try:
            fails = self._loader_filter is not None and (self._acts or self._before_repair is not None)  # in a fit
            if isinstance(exception, Exception) and trainer.global_step and fails:
                self._save_training(trainer, pl_module, exception)
        finally:
            unwatch_averages(trainer, self)
            self._leave()

    @property
    def _before_repair(self) -> dict[str, Any] | None:
        """While a repair lasts, the weights that it began with, as :func:`~.weight_copies.weights` returns them."""
        return None

    @contextmanager
    def _acting(self) -> Iterator[None]:
        """While the defence measures or decides: an exception is none of the training's."""
        self._acts = True
        yield
        self._acts = False

    def _save_training(self, trainer: Any, pl_module: Any, exception: Exception) -> None:
        """Let the module have its weights from before the repair, save them, and say so in the exception."""
        name, before = self.title or self.method, self._before_repair
        if before is not None:
            put_weights(trainer, pl_module, before)
        when = "from before the repair" if before is not None else "as they were trained"
        told = f"{name} failed after epoch {trainer.current_epoch}. The module has its weights {when}"
        if self.report_dir is not None or trainer.loggers or trainer.checkpoint_callbacks:
            own = self.state_key.removeprefix("lightning_backdoor.")
            path = Path(self.report_dir or trainer.default_root_dir) / f"trained-before-{own}-failed.ckpt"
            try:
                save_weights(trainer, pl_module, path)
            except (OSError, RuntimeError) as error:  # the user has to know of the first exception
                told = f"{told}; no file of them could be written to {path.parent}: {error}"
            else:
                told = f'{told}, and so has the file {path}: module.load_state_dict(torch.load("{path}")["state_dict"])'
        if hasattr(exception, "add_note"):  # Python 3.11
            exception.add_note(f"{told}.")
        else:
            rank_zero_warn(f"{told}.")

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only."""
        verdict = None if self.verdict is None else self.verdict.state_dict()
        return {"schema": SCHEMA, "verdict": verdict, "copies": self._watch.state_dict() if self._watch else {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the verdict from a checkpoint; it is in force before the first batch is drawn.

        What a checkpoint holds is read as it was written; one of another :data:`SCHEMA` is refused.

        Raises:
            ArgumentError: Another release wrote the checkpoint, and kept other things.
        """
        if not state_dict:
            return
        if state_dict["schema"] != SCHEMA:
            raise ArgumentError(
                f"The checkpoint was written by another release of lightning_backdoor (state {state_dict['schema']}, "
                f"this one writes {SCHEMA}). Resume with that release, or start anew without `ckpt_path`."
            )
        verdict = None if state_dict["verdict"] is None else Verdict.from_state_dict(state_dict["verdict"])
        if self._loader_filter is not None:
            self._loader_filter.set_keep(self.state_key, None if verdict is None else verdict.keep)
        self.verdict = verdict
        self._watched = state_dict.get("copies", {})

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running Trainer."""
        return {**self.__dict__, "_loader_filter": None, "_training_set": None, "_watch": None, "_acts": False}

    def _leave(self) -> None:
        if self._loader_filter is not None:
            self._loader_filter.leave(self.state_key)
        self._loader_filter = None
        self._training_set = None
        self._watch = None

    @property
    def _in_training(self) -> Tensor | None:
        """Samples that all defences keep, bool ``(N,)``; ``None`` while nothing is removed."""
        return None if self._loader_filter is None else self._loader_filter.keep

    def _adopt(self, verdict: Verdict) -> int:
        """Curate by a new verdict and return how many samples it removes that the one before had kept.

        A verdict that cannot be carried out is an error and leaves the one before in place.
        """
        if self._training_set is not None:
            self._tell_unread(self._training_set)
            verdict = spared(verdict, self._training_set.unread, self.verdict)
        before = None if self.verdict is None else self.verdict.keep
        removed = int((~verdict.keep if before is None else before & ~verdict.keep).sum())
        readmits = before is not None and bool((~before & verdict.keep).any())
        if (removed or readmits) and self._loader_filter is not None:
            self._loader_filter.set_keep(self.state_key, verdict.keep)
            self._loader_filter.refresh()
        self.verdict = verdict
        if removed:
            warn_of_majorities(verdict, before, self.title or self.method)
        return removed

    def _tell_unread(self, data: DatasetScanner) -> None:
        """Say once how many samples nothing is known of."""
        count, name = int(data.unread.sum()), self.title or self.method
        if count and (self.verdict is None or self.verdict.labels is None or not bool((self.verdict.labels < 0).any())):
            rank_zero_warn(
                f"{name}: `collate_fn` drops {count:,} of {len(data):,} training samples, which could not be looked "
                "at. They are kept; in the verdict they have the lowest score and the label -1."
            )

    def _write_report(self, trainer: Any, evidence: Evidence) -> None:
        """Write the report of the verdict: into the user's folder, else beside the logs. Every rank must call it."""
        logs = trainer.log_dir  # a broadcast
        if self.report_dir is None and (logs is None or not trainer.loggers):
            return
        if not trainer.is_global_zero or self.verdict is None or self._training_set is None:
            return
        own = self.state_key.removeprefix("lightning_backdoor.")
        if self.report_dir is None:
            folder = Path(logs or ".") / "lightning_backdoor" / own
        else:
            folder = Path(self.report_dir) if self.name is None else Path(self.report_dir) / own
        unread = int(self._training_set.unread.sum())
        facts = {
            **evidence.facts,
            **({"images that `collate_fn` drops (kept, not looked at)": unread} if unread else {}),
        }
        named = replace(evidence, classes=getattr(self._training_set.loader.dataset, "classes", None), facts=facts)
        with isolated_rng():
            try:
                write_report(folder, self.verdict, method=self.title or self.method, evidence=named)
            except Exception as error:  # a picture must never end somebody's training
                rank_zero_warn(f"The report in {folder} is incomplete: {type(error).__name__}: {error}")


def spared(verdict: Verdict, unread: Tensor, earlier: Verdict | None) -> Verdict:
    """Keep the samples that could not be read, with the lowest score and the label -1, whatever was said of them.

    Args:
        verdict: On N samples.
        unread: Those that could not be read, bool ``(N,)``.
        earlier: The verdict before; what it removed stays removed.
    """
    spare = unread if earlier is None else unread & earlier.keep
    if not bool(spare.any()):
        return verdict
    trusted, suspect = (None if mask is None else mask & ~unread for mask in (verdict.trusted, verdict.suspect))
    labels = None if verdict.labels is None else verdict.labels.masked_fill(unread, -1)
    scores = verdict.scores.masked_fill(spare, float(verdict.scores[~spare].min()))
    findings = tuple(replace(one, positions=one.positions[~unread[one.positions]]) for one in verdict.findings)
    return replace(
        verdict,
        scores=scores,
        keep=verdict.keep | spare,
        labels=labels,
        trusted=trusted,
        suspect=suspect,
        findings=findings,
    )


def require_same_data(verdict: Verdict, data: DatasetScanner) -> None:
    """Raise if a verdict was passed on other samples than those that are about to be trained on."""
    positions, labels = data.probe
    if len(verdict) == len(data):
        known = None if verdict.labels is None else verdict.labels[positions]
        if known is None or bool(((known == labels) | (known < 0)).all()):
            return
    differs = f"{len(data)} samples" if len(verdict) != len(data) else f"{len(data)} samples with other labels"
    raise DataError(
        f"The verdict is on another dataset: it knows {len(verdict)} samples, the training dataset has {differs}. "
        "Resume with the dataset of the interrupted run, or use a new callback and no `ckpt_path`."
    )


def _validation_dataset(trainer: Any) -> Any:
    """Dataset of the first validation loader, if there is one."""
    with isolated_rng():
        loaders = validation_loaders(trainer)
    while isinstance(loaders, (list, tuple, dict)) and loaders:
        loaders = next(iter(loaders.values())) if isinstance(loaders, dict) else loaders[0]
    loader = unwrapped(loaders)
    return loader.dataset if isinstance(loader, torch.utils.data.DataLoader) else None
