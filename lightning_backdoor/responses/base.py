"""What a response is, and what it works with during a fit."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lightning_backdoor.errors import ArgumentError, DataError
from lightning_backdoor.events import Event, Signaled
from lightning_backdoor.loading.loader_filter import LoaderFilter
from lightning_backdoor.responses.limits import about_to_end, planned_end
from lightning_backdoor.scanning.scanner import DatasetScanner
from lightning_backdoor.verdict import Verdict

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer

    from lightning_backdoor.scanning.measure_units import Measured

__all__ = ["WARMUP", "Case", "Continue", "Detection", "Report", "Response", "Session", "labels_of", "representation"]

NAMED = 5  # labels in an event
WARMUP = "warmup_epochs"  # argument of the defenses that do not detect before the first epoch


@dataclass(frozen=True)
class Detection:
    """What a detector says of N samples.

    Attributes:
        verdict: With labels.
        num_flagged_before_cap: Samples that the rule flagged before ``max_removed`` limited it.
        subpopulations: Label and standardized gap of every subpopulation that was found.
        all_to_all: Whether most labels share one subpopulation.
        correct: Samples that the model gives their label, bool ``(N,)``; ``None`` if that was not measured.
        units: What was measured of the units of the model; ``None`` if nothing was.
        kept_before: Samples that the verdict before kept, bool ``(N,)``; known once the verdict is in force.
        whole_classes: See :class:`~lightning_backdoor.events.Event`.
    """

    verdict: Verdict
    num_flagged_before_cap: int
    subpopulations: tuple[tuple[int, float], ...] = ()
    all_to_all: bool = False
    correct: Tensor | None = None
    units: Measured | None = None
    kept_before: Tensor | None = None
    whole_classes: tuple[Signaled, ...] = ()


class Case(Protocol):
    """What outlasts a fit: verdict and events of a defense.

    Attributes:
        verdict: The latest verdict, ``None`` before the first detection.
        history: What every detection found, what was done, and what came of it.
        approved: Samples that the user has declared to be fine, bool ``(N,)``; ``None`` if nothing was said.
    """

    verdict: Verdict | None
    history: list[Event]
    approved: Tensor | None

    @property
    def defense(self) -> Callback:
        """The callback."""

    @property
    def title(self) -> str:
        """Name of the defense for readers."""

    @property
    def detects_again(self) -> bool:
        """Whether another detection of the fit may follow."""

    def adopt(self, verdict: Verdict) -> int:
        """Put a verdict in force; returns how many samples it removes that the one before had kept."""

    def tell(self) -> None:
        """Log, print and report the events so far."""

    def detect(self) -> None:
        """Run the detector, and the response to what it finds."""

    def explain(self) -> None:
        """Say of the findings of the verdict in force what a model without them makes of them."""

    def explain_at_end(self) -> None:
        """Say it of those whose diagnosis was left to the end of training."""

    def count_from_zero(self) -> None:
        """Count the epochs before the next detection from the present one, since training has started anew."""


@dataclass(frozen=True)
class Session:
    """What is there during a fit alone, from ``on_train_start`` on.

    Attributes:
        trainer: The running Trainer.
        module: The LightningModule under training.
        scanner: Reads and measures the training set.
        loader_filter: Says which samples the training loader draws.
        case: Verdict and events so far.
        began: When the fit began, in seconds since the epoch.
    """

    trainer: Trainer
    module: LightningModule
    scanner: DatasetScanner
    loader_filter: LoaderFilter
    case: Case
    began: float

    @property
    def in_training(self) -> Tensor | None:
        """Samples that all defenses keep, bool ``(N,)``; ``None`` while nothing is removed."""
        return self.loader_filter.keep

    @property
    def epochs_done(self) -> int:
        """Epochs that the fit has had, with the one that ends; call in ``on_train_epoch_end``."""
        return int(self.trainer.current_epoch) + 1

    @property
    def verdict(self) -> Verdict:
        """The verdict in force."""
        if self.case.verdict is None:
            raise RuntimeError("a response is at work before there is a verdict")
        return self.case.verdict

    def takes(self, argument: str) -> bool:
        """Whether the constructor of the defense has an argument of this name, which a message may advise."""
        return argument in inspect.signature(type(self.case.defense)).parameters

    def require_same_data(self, verdict: Verdict) -> None:
        """Raise a DataError if a verdict is on other samples than those that are about to be trained on."""
        scanner, (positions, labels) = self.scanner, self.scanner.probe
        if len(verdict) == len(scanner):
            known = None if verdict.labels is None else verdict.labels[positions]
            if known is None or bool(((known == labels) | (known < 0)).all()):
                return
        other = "" if len(verdict) != len(scanner) else " with other labels"
        raise DataError(
            f"The verdict is on another dataset: it knows {len(verdict)} samples, the training dataset has "
            f"{len(scanner)} samples{other}. Resume with the dataset of the interrupted run, or use a new callback and "
            "no `ckpt_path`."
        )

    def label_rates(self, correct: Tensor) -> tuple[float, float | None]:
        """Share of the samples in training, and of the removed ones, that the model gives their label.

        Args:
            correct: Samples that get their label, bool ``(N,)``.

        Returns:
            Both in ``[0, 1]``; the second is ``None`` if nothing is removed.
        """
        verdict, training = self.verdict, self.in_training
        removed, known = ~verdict.keep, labels_of(verdict) >= 0
        kept = correct[(verdict.keep if training is None else training) & known].float().mean()
        return float(kept), float(correct[removed].float().mean()) if bool(removed.any()) else None

    def rates_of_labels(self, correct: Tensor) -> tuple[tuple[int, float, float], ...]:
        """The same of the labels that removed samples have: label, and both shares; five at most, most removed first.

        Labels without a sample in training are left out.
        """
        verdict, training = self.verdict, self.in_training
        labels, removed = labels_of(verdict), ~verdict.keep
        kept = (verdict.keep if training is None else training) & (labels >= 0)
        present, counts = torch.unique(labels[removed & (labels >= 0)], return_counts=True)
        found = []
        for label in present[counts.argsort(descending=True, stable=True)][:NAMED].tolist():
            own = labels == label
            if bool((own & kept).any()):
                shares = (float(correct[own & part].float().mean()) for part in (kept, removed))
                found.append((label, *shares))
        return tuple(found)


def labels_of(verdict: Verdict) -> Tensor:
    """The labels of a verdict, long ``(N,)``; a defense's own verdict has them."""
    if verdict.labels is None:
        raise ArgumentError("`verdict` must have labels, got none. Pass a `verdict` of a defense of this library.")
    return verdict.labels


def representation(made: object, values: Mapping[str, Any]) -> str:
    """The call that makes an equal object, with the arguments that are not at their defaults.

    Args:
        made: The object.
        values: What its arguments are, by name; those that are not known are left out.
    """
    given = [
        f"{name}={values[name]!r}"
        for name, parameter in inspect.signature(type(made)).parameters.items()
        if name in values and values[name] is not parameter.default and values[name] != parameter.default
    ]
    return f"{type(made).__name__}({', '.join(given)})"


class Response:
    """What is done about a verdict. It has Lightning's hooks, with the session in the place of Trainer and module.

    A response does nothing in all of them by default. :meth:`respond` is called in ``on_train_epoch_end`` (or
    ``on_train_start``), after a detection whose verdict is in force.

    Attributes:
        name: What users pass as ``response``.
        changed_at: When it last changed weights, in seconds since the epoch; 0 if it has not.
        drops: Whether flagged samples leave the training set.
        alone: Whether no other defense may be on the same Trainer.
        at_once: Whether the first detection comes before the first epoch.
        features: Whether the classifier head has to be found.
        starts_over: Whether another defense's restart makes everything begin anew, the first detection included.
        repeats: Whether it may be due again when training is about to end, after a detection that led to nothing.
        rereads: Whether :meth:`respond` reads the training images, which are kept in memory by then.
        replaceable: Whether training anew takes the place of a treatment that costs accuracy. Resets have a tighter
            bound then.
        busy: Whether a treatment is going on or about to begin.
        copies: Whether a copy of the model that is trained without what was found says whether its labels are right.
            Not where the model itself is trained without it, or such a copy is a part of the response.
        explains_at_end: Whether findings are diagnosed at the end of training instead of at the detection: by the
            model if it was trained anew without them, else by the repaired model where it can say, else by such a copy.
        keeps_start: Whether it keeps the weights at the start of the fit, for other ends.
    """

    name: str
    changed_at: float = 0.0
    drops: bool = True
    alone: bool = False
    at_once: bool = False
    features: bool = False
    starts_over: bool = False
    repeats: bool = False
    rereads: bool = False
    replaceable: bool = False
    busy: bool = False
    copies: bool = False
    explains_at_end: bool = False
    keeps_start: bool = False

    def __repr__(self) -> str:
        """Return a call that makes an equal response.

        An argument has to be kept as an attribute of its name, perhaps with an underscore before it.
        """
        return representation(self, {name.removeprefix("_"): value for name, value in vars(self).items()})

    @property
    def written_as(self) -> str:
        """By which a checkpoint says whose state it holds."""
        return self.name

    def setup(self, trainer: Trainer, pl_module: LightningModule, title: str) -> None:
        """Forget an earlier fit, and raise where a setting of the Trainer rules the response out."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue what was interrupted; the state of a checkpoint is loaded."""

    def on_other_restart(self, session: Session) -> None:
        """Forget what was done, since another defense went back to the start of the fit."""

    def on_train_start(self, session: Session) -> None:
        """Check what it needs of model and data."""

    def after_first_detection(self, session: Session) -> None:
        """Called last in ``on_train_start``, after a detection that comes before the first epoch."""

    def on_train_epoch_start(self, session: Session) -> None:
        """Change weights, counters or loaders for the epoch that begins."""

    def on_train_batch_start(self, session: Session, batch_idx: int) -> None:
        """Prepare a step."""

    def on_before_backward(self, session: Session, loss: Tensor) -> None:
        """Change the loss in place."""

    def on_after_backward(self, session: Session) -> None:
        """Change gradients."""

    def on_before_optimizer_step(self, session: Session, optimizer: torch.optim.Optimizer) -> None:
        """Change gradients before a step."""

    def on_train_batch_end(self, session: Session) -> None:
        """Measure what a treatment has led to with the last batch of an epoch, before validation."""

    def on_train_epoch_end(self, session: Session) -> bool:
        """Count and end epochs of a treatment; returns whether one was going on, so that no detection is due."""
        return False

    def on_train_end(self, session: Session) -> None:
        """Say what the fit ends with."""

    def why_not(self, session: Session) -> str:
        """Why a fit ended without a verdict, and what to do; empty if that is no fault."""
        smaller = f", or with a smaller `{WARMUP}`" if session.takes(WARMUP) else ""
        return f"training ended before the scan. Train longer{smaller}."

    def metrics(self, session: Session) -> dict[str, float]:
        """What is logged after every event."""
        return {"removed": float(len(session.verdict.removed))}

    def revise(self, session: Session, detection: Detection) -> Detection:
        """Change a detection by what earlier treatments have shown, before it is in force."""
        return detection

    def respond(self, session: Session, detection: Detection, event: Event) -> Event:
        """Act on a detection, and return its event with what was done."""
        return event

    def awaits_detection(self, session: Session) -> bool:
        """Whether a detection may come now: no treatment is going on or has been done."""
        return True

    def ready(self, session: Session) -> bool:
        """Whether a detection that is due can lead to anything; if not, it is due again after the next epoch."""
        return True

    def latest_detection(self, trainer: Trainer) -> int:
        """Epochs after which the first detection has to come, so that the treatment fits into the plan."""
        return sys.maxsize

    def is_over(self, session: Session) -> bool:
        """Whether training ends with the present weights: nothing is being treated, and no treatment follows."""
        return not self.busy and about_to_end(session.trainer)

    def release(self) -> None:
        """Give back what belongs to the user, at the end of a fit and after an error."""

    @property
    def weights_before(self) -> dict[str, Any] | None:
        """While a treatment lasts, the weights that it began with."""
        return None

    @property
    def unseen(self) -> Tensor | None:
        """Samples that the present weights were never trained on in this fit, bool ``(N,)``; ``None``: none is."""
        return None

    @property
    def repaired_without(self) -> Tensor | None:
        """Samples that a repair which is over and holds was fine-tuned without, bool ``(N,)``; ``None``: none is."""
        return None

    @property
    def start(self) -> dict[str, Any] | None:
        """The weights of the module at the start of the fit, if it keeps them still."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that load with ``weights_only=True``."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""


class Continue(Response):
    """Train on without the removed samples, from the weights as they are.

    Where something is found, a copy of the model is trained without it for 200 to 1,000 steps, for its diagnosis. The
    weights at the start of the fit, where it starts from, are kept on the CPU and in checkpoints until the last
    detection; with ``at_once`` they are drawn anew instead.

    Args:
        at_once: Detect before the first epoch.
        halfway: Detect after half of the plan, so that there are epochs to train on; otherwise when training is about
            to end, unless the defense has a warm-up.
    """

    name = "continue"
    copies = True

    def __init__(self, *, at_once: bool = False, halfway: bool = False) -> None:
        self.at_once, self._halfway, self._removed = at_once, halfway, False

    def latest_detection(self, trainer: Trainer) -> int:
        """Half of the planned epochs, if that is wanted and their number is known."""
        end = planned_end(trainer) if self._halfway else None
        return sys.maxsize if end is None else max(1, math.ceil(end / 2))

    def respond(self, session: Session, detection: Detection, event: Event) -> Event:
        """Note whether samples were removed."""
        self._removed = bool(event.removed)
        return event

    def after_first_detection(self, session: Session) -> None:
        """Draw the first epoch without the samples that a detection before it has removed."""
        if self.at_once and self._removed:
            session.loader_filter.restart_iterator()
        self._removed = False


class Report(Response):
    """Change nothing: the scan, the verdict and the report are all.

    Costs the same copy as :class:`Continue` where something is found, and the same weights in memory and checkpoints.

    Args:
        at_once: Detect before the first epoch.
    """

    name = "report"
    copies = True
    drops = False
    starts_over = True

    def __init__(self, *, at_once: bool = False) -> None:
        self.at_once = at_once
