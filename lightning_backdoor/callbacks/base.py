"""One base for all defenses: when a detection is due, which detector, which response."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_backdoor._lightning import (
    CallbackBase,
    callbacks_of,
    is_fast_dev_run,
    rank_zero_info,
    rank_zero_warn,
    validation_loaders,
)
from lightning_backdoor.callbacks.approved import approved_samples, detection_without, warn_of_other, with_approved
from lightning_backdoor.callbacks.arguments import flat_signature, require_fraction, require_positive, require_share
from lightning_backdoor.callbacks.detector import Detector
from lightning_backdoor.callbacks.fabric import guard_hooks, guard_inherited_hooks
from lightning_backdoor.callbacks.options import DEFAULTS, ScanArguments, ScanOptions
from lightning_backdoor.callbacks.reporting import report_folder, report_verdict
from lightning_backdoor.callbacks.unread import spared, warn_of_unread
from lightning_backdoor.data.nesting import class_names, paths_of
from lightning_backdoor.data.random_state import isolated_rng
from lightning_backdoor.data.views import unwrapped
from lightning_backdoor.detection.diagnosis import MIN_SAMPLES, undiagnosed
from lightning_backdoor.detection.majorities import without_majorities
from lightning_backdoor.errors import ArgumentError, TrainerError
from lightning_backdoor.events import Event, repaired
from lightning_backdoor.loading.loader_filter import LoaderFilter, loader_filter_of
from lightning_backdoor.report.of_events import (
    findings_told,
    kept_majority,
    majorities,
    nothing_learned,
    sentence,
    unsolved,
)
from lightning_backdoor.report.of_whole_classes import whole_classes_told
from lightning_backdoor.responses.base import Detection, Report, Response, Session, representation
from lightning_backdoor.responses.checkpointing import save_training
from lightning_backdoor.responses.explaining import (
    diagnosed,
    diagnosed_by_copy,
    diagnosed_by_repaired,
    with_estimated_asr,
)
from lightning_backdoor.responses.limits import about_to_end
from lightning_backdoor.responses.weight_copies import on_cpu, start_of_fit, unwatch_averages, watch_averages
from lightning_backdoor.scanning.isolation import require_unsharded, warn_of_evaluation_mode
from lightning_backdoor.scanning.scan import raise_on_all_ranks
from lightning_backdoor.scanning.scanner import DatasetScanner, open_scanner
from lightning_backdoor.verdict import Finding, Verdict

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from typing_extensions import Unpack

    from lightning_backdoor.responses.mirrors import Watch

__all__ = ["Defense", "Procedure", "diagnosed_by_copy", "examine", "is_due", "require_examinable", "validation_dataset"]

SCHEMA = 6  # of what checkpoints hold of any defense: a release that changes it counts up


@guard_inherited_hooks
class Defense(CallbackBase):
    """A detector, a response, and when the first is due. Lightning's hooks are forwarded to the response.

    Args:
        detector: Measures all samples and decides.
        response: What is done about the verdict, see :func:`~lightning_backdoor.callbacks.chosen_response`.
        warmup_epochs: Epochs before the first detection; ``None``: as the response needs it.
        every: Epochs between later detections; ``None``: none.
        max_removed: Largest share of the training set that may be flagged, in ``(0, 1)``.
        max_removed_of_class: Share of a label that findings may take without further evidence, in ``(0, 1]``.
        **scan: See :class:`~lightning_backdoor.callbacks.options.ScanArguments`.

    Attributes:
        method: Name of the defense in logs and checkpoints.
        title: Name of the defense for readers.
    """

    method: ClassVar[str]
    title: ClassVar[str]
    shared: ClassVar[type] = ScanArguments
    shared_defaults: ClassVar[dict[str, Any]] = DEFAULTS

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the arguments that are taken as ``**`` in signature, help and representation."""
        super().__init_subclass__(**kwargs)
        guard_hooks(cls)
        cls.__signature__ = flat_signature(cls, cls.shared, cls.shared_defaults)  # type: ignore[attr-defined]

    def __init__(
        self,
        *,
        detector: Detector,
        response: Response,
        warmup_epochs: int | None,
        max_removed: float,
        max_removed_of_class: float = 1.0,
        every: int | None = None,
        **scan: Unpack[ScanArguments],
    ) -> None:
        super().__init__()
        self._procedure = Procedure(self, detector, response, every, max_removed_of_class)
        self.warmup_epochs, self.max_removed = warmup_epochs, require_fraction("max_removed", max_removed)
        given: dict[str, Any] = {**DEFAULTS, **scan}
        report_dir, self.name, self.approved = given.pop("report_dir"), given.pop("name"), given.pop("approved")
        self.report_dir = None if report_dir is None else str(report_dir)
        self.options = ScanOptions(**given, features=detector.features or response.features)

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints, from the defense and the user's ``name``."""
        return ".".join(filter(None, ("lightning_backdoor", self.method, self.name)))

    @property
    def verdict(self) -> Verdict | None:
        """The latest verdict, ``None`` before the first detection."""
        return self._procedure.verdict

    @property
    def history(self) -> list[Event]:
        """What every detection found, what was done, and what came of it."""
        return self._procedure.history

    @property
    def repaired(self) -> bool | None:
        """Whether the model gives at most a tenth of the flagged samples their label; ``None`` if not measured."""
        return repaired(self.history)

    def __repr__(self) -> str:
        """Return a call that makes an equal callback."""
        given = {**vars(self.options), **vars(self), **getattr(self, "arguments", {}), "report_dir": self.report_dir}
        return representation(self, given)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the filter of the training loader."""
        if stage == "fit":
            require_unsharded(trainer)
            defenses = [callback for callback in callbacks_of(trainer) if isinstance(callback, Defense)]
            self._procedure.join(trainer, pl_module, [defense._procedure for defense in defenses])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue what was interrupted."""
        self._procedure.response.on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read a few training images, so that whatever cannot work is said before anything is trained."""
        procedure, response = self._procedure, self._procedure.response
        session = procedure.open(trainer, pl_module, self.options)
        response.on_train_start(session)
        if response.at_once and not self.history and not is_fast_dev_run(trainer):
            with procedure.acting():
                procedure.detect(trainer.current_epoch)
        response.after_first_detection(session)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the response act on the epoch that begins."""
        self._procedure.notice_other_restart()
        with self._procedure.acting() as session:
            self._procedure.response.on_train_epoch_start(session)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let the response prepare a step."""
        self._procedure.response.on_train_batch_start(self._procedure.session, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Let the response change the loss."""
        self._procedure.response.on_before_backward(self._procedure.session, loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the response change gradients."""
        self._procedure.response.on_after_backward(self._procedure.session)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let the response change gradients before a step."""
        self._procedure.response.on_before_optimizer_step(self._procedure.session, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the response measure a treatment with the last batch, before validation."""
        with self._procedure.acting() as session:
            self._procedure.response.on_train_batch_end(session)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End epochs of a treatment; detect when it is time."""
        procedure, response = self._procedure, self._procedure.response
        with procedure.acting() as session:
            if response.on_train_epoch_end(session):
                return
            due = response.awaits_detection(session) and procedure.is_due(self._first_detection(trainer))
            if is_fast_dev_run(trainer):
                if due:
                    rank_zero_info(f"{self.title}: fast_dev_run trains too little for a verdict; no scan.")
            elif not due and self.verdict is None:
                procedure.detector.observe(session, self._first_detection(trainer))
            elif due and response.ready(session):
                procedure.detect()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the fit ends with, or that it ended before a detection."""
        if not is_fast_dev_run(trainer):
            self._procedure.end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the training loader back."""
        self._procedure.leave(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what was trained if it is the defense that fails; give the loader back, since no teardown follows."""
        try:
            self._procedure.save_training(trainer, pl_module, exception)
        finally:
            self._procedure.leave(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only; while a treatment or a restart may come, with the weights for it."""
        return self._procedure.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take everything from a checkpoint; the verdict is in force before the first batch is drawn."""
        if state_dict:
            self._procedure.load_state_dict(state_dict)

    def _first_detection(self, trainer: Trainer) -> int:
        """Epochs of ordinary training before the first detection, unless training ends before."""
        return self.warmup_epochs or self._procedure.response.latest_detection(trainer)


class Procedure:
    """A detector, a response, and between them the verdict in force and the events so far.

    Responses see it as their :class:`~lightning_backdoor.responses.base.Case`.

    Args:
        defense: The callback that they belong to.
        detector: Measures all samples and decides.
        response: What is done about the verdict.
        every: Epochs between later detections; ``None``: none.
        most_of_label: See ``max_removed_of_class`` of the defense.

    Attributes:
        verdict: The latest verdict, ``None`` before the first detection.
        history: What every detection found, what was done, and what came of it.
        approved: Samples that the user has declared to be fine, bool ``(N,)``; ``None`` if nothing was said.
    """

    def __init__(
        self,
        defense: Defense,
        detector: Detector,
        response: Response,
        every: int | None,
        most_of_label: float,
    ) -> None:
        self.defense, self.detector, self.response = defense, detector, response
        self._every = require_positive("rescore_every", every)
        self.most_of_label = require_share("max_removed_of_class", most_of_label)
        self.verdict: Verdict | None = None
        self.history: list[Event] = []
        self.approved: Tensor | None = None
        self._resumed = False
        self._last_detection: int | None = None  # epochs before it, counted from the last restart
        self._filter: LoaderFilter | None = None
        self._session: Session | None = None
        self._without_fit = False  # whether a model is examined as it is; the caller then says what is kept
        self._acts = False
        self._began = 0.0  # of the fit, in seconds since the epoch
        self._seconds = 0.0  # of the last detection
        self._told = ""  # of the findings
        self._explains_later = False  # whether findings without a diagnosis have one at the end of training
        self._anew_without: Tensor | None = None  # out of training when another defense began it anew, bool ``(N,)``
        self._watch: Watch | None = None
        # Weights at the start of the fit, for a copy that is trained from there.
        self._start: dict[str, Any] | None = None
        self._watched: dict[str, Any] = {}  # its state in the checkpoint that training goes on from

    @property
    def title(self) -> str:
        """Name of the defense for readers."""
        return self.defense.title

    @property
    def own_name(self) -> str:
        """Name of the defense in file names."""
        return self.defense.state_key.removeprefix("lightning_backdoor.")

    @property
    def session(self) -> Session:
        """What is there during a fit.

        Raises:
            TrainerError: No fit is running.
        """
        if self._session is None:
            raise TrainerError(
                f"{type(self.defense).__name__} is at work in `Trainer.fit` alone, and no fit is running."
            )
        return self._session

    def join(self, trainer: Trainer, pl_module: LightningModule, procedures: Sequence[Procedure]) -> None:
        """Join the filter of the training loader at the setup of a fit; an earlier verdict is in force again.

        Args:
            trainer: The Trainer.
            pl_module: The LightningModule to train.
            procedures: Of all defenses on the Trainer.
        """
        self.response.setup(trainer, pl_module, self.title)
        for other in procedures:
            if other is not self:
                require_compatible(self, other)
        self.detector.setup(trainer, pl_module)
        self._acts, self._began, self._watched, self._resumed = False, time.time(), {}, False
        self._explains_later, self._anew_without = False, None
        self._start = on_cpu(pl_module.state_dict()) if self._needs_start else None
        if self.response.starts_over:
            self.history = []
        if isinstance(self.response, Report):
            self.verdict = None  # it changes nothing, so nothing of an earlier model is left to be in force
        if self.verdict is None or not self.history:
            self._told = ""  # of another model
        again = self.verdict is not None and not self.response.starts_over
        self._last_detection = trainer.current_epoch if again else None
        self._filter = loader_filter_of(trainer)
        self._filter.join(self.defense.state_key)
        if self.verdict is not None:
            self._put_in_force(self.verdict)

    def open(self, trainer: Trainer, pl_module: LightningModule, options: ScanOptions) -> Session:
        """Begin a session at the start of training; raise where data or model rule the detector out."""
        loader = None if self._filter is None else self._filter.loader
        if self._filter is None or loader is None:
            raise TrainerError(
                f"{type(self.defense).__name__} found no training loader. Pass one map-style loader to `fit`."
            )
        warn_of_evaluation_mode(pl_module, self.title)
        self._watch = watch_averages(trainer, pl_module, self, self._watched)
        scanner = open_scanner(trainer, pl_module, loader, options, validation_dataset(trainer))
        session = Session(trainer, pl_module, scanner, self._filter, self, self._began)
        if self._start is not None:
            self._start = start_of_fit(trainer, pl_module, self._start)
        if self.verdict is not None:
            session.require_same_data(self.verdict)
            if self.verdict.labels is not None:
                scanner.unread[self.verdict.labels < 0] = True
        self._session = session
        self._approve(session)
        self.detector.require(session)
        return session

    def _approve(self, session: Session) -> None:
        """Find out which samples are approved; those of an interrupted run stay the same."""
        given, approved = self.defense.approved, None
        if given is not None:
            with raise_on_all_ranks(session.trainer, "reading of `approved`"):
                approved = approved_samples(given, session.scanner)
        if self._resumed:
            warn_of_other(approved, self.approved, self.title)
            return
        self.approved = approved
        if approved is not None and self.verdict is not None:
            self.adopt(self.verdict)

    def notice_other_restart(self) -> None:
        """Begin anew, or count from zero, where another defense went back to the start of the fit."""
        session = self.session
        if self._last_detection is not None and session.trainer.current_epoch < self._last_detection:
            self.response.on_other_restart(session)
            self._anew_without = None if session.in_training is None else ~session.in_training
            self._last_detection = None if self.response.starts_over else 0
            if self._needs_start:
                self._start = on_cpu(session.module.state_dict())  # the module is at the start of the fit again

    @contextmanager
    def acting(self) -> Iterator[Session]:
        """While the defense measures or decides: an exception in here was raised by the defense."""
        self._acts = True
        yield self.session
        self._acts = False

    def is_due(self, first: int) -> bool:
        """Whether a detection is due at the end of an epoch.

        Args:
            first: Epochs of ordinary training before the first one.
        """
        wanted = self._last_detection is None or self.response.repeats
        return is_due(
            self.session.epochs_done,
            last_scan=self._last_detection,
            warmup=first,
            every=self._every,
            ends=wanted and about_to_end(self.session.trainer),
        )

    def detect(self, epochs: int | None = None) -> None:
        """Run the detector, put its verdict in force, and let the response act on it.

        Args:
            epochs: Epochs of the fit so far; ``None``: with the one that ends.
        """
        session = self.session
        with ExitStack() as stack:
            if self.detector.rereads or self.response.rereads:
                stack.enter_context(session.scanner.loaded(session.trainer, session.module))
            self._detect_and_respond(session.epochs_done if epochs is None else epochs)

    def examine(
        self, trainer: Trainer, pl_module: LightningModule, scanner: DatasetScanner, *, detect: bool = True
    ) -> None:
        """Run the detector on a model as it is, without a fit: nothing is done about the verdict, nor is it logged.

        Args:
            trainer: A Trainer that is attached to the module.
            pl_module: The LightningModule; nothing of it is changed.
            scanner: Reads and measures the dataset.
            detect: ``False``: only raise where data or model rule the detector out.
        """
        self._session = Session(trainer, pl_module, scanner, loader_filter_of(trainer), self, time.time())
        self._without_fit = True
        try:
            self._approve(self._session)
            self.detector.setup(trainer, pl_module)
            self.detector.require(self._session)
            if detect:
                self._detect(0)
        finally:
            self.detector.close()
            self._session, self._without_fit = None, False

    def _detect_and_respond(self, epochs: int) -> None:
        began = time.monotonic()
        detection = self._detect(epochs)
        self.history[-1] = self.response.respond(self.session, detection, self.history[-1])
        if self._explains_later and self.response.is_over(self.session):
            self.explain_at_end()
        self._seconds = time.monotonic() - began
        self.tell()
        if not self.detects_again:
            self.detector.close()
            self._start = self._start if self._explains_later else None

    def _detect(self, epochs: int) -> Detection:
        """Detect, put the verdict in force, and add an event."""
        session, before = self.session, self.verdict
        detection = self.detector.detect(session)
        if self.approved is not None:
            detection = detection_without(detection, self.approved)
        detection = self.response.revise(session, detection)
        detection = replace(detection, verdict=self._explained(detection.verdict))
        detection = self._without_majorities(detection)
        removed = self.adopt(detection.verdict)
        kept = torch.ones_like(detection.verdict.keep) if before is None else before.keep
        detection = replace(detection, kept_before=kept)
        self._last_detection = epochs
        event = Event(
            epochs,
            removed,
            detection.num_flagged_before_cap,
            detection.subpopulations,
            response=self.response.name,
            all_to_all=detection.all_to_all,
            accuracies=() if detection.correct is None else (float(detection.correct.float().mean()),),
            whole_classes=detection.whole_classes,
        )
        if detection.correct is not None and self.response.unseen is not None and not removed:
            event = replace(event, of_labels=session.rates_of_labels(detection.correct.cpu()))
        self.history.append(event)
        if event.whole_classes and not self._without_fit:
            self._warn_of_whole_classes()
        return detection

    def _warn_of_whole_classes(self) -> None:
        """Warn of labels that the latest event is the first to name; once, whatever is done about the verdict."""
        if signals := whole_classes_told(self.history, self._classes):
            rank_zero_warn(f"{self.title} warns: {signals}")

    @property
    def _classes(self) -> Sequence[str] | None:
        """Names of the classes, where the training dataset has them."""
        return class_names(self.session.scanner.loader.dataset)

    @property
    def _needs_start(self) -> bool:
        """Whether a copy may be trained from the weights at the start of the fit, and nothing else keeps them.

        Before the first epoch, these are what is looked at.
        """
        response = self.response
        return response.copies and self.detector.explains and not (response.keeps_start or response.at_once)

    @property
    def detects_again(self) -> bool:
        """Whether another detection of the fit may follow the next or the last one."""
        return self.response.repeats or self._every is not None

    def _without_majorities(self, detection: Detection) -> Detection:
        """The detection without findings that may be a class itself; these are told once."""
        if self.most_of_label == 1:
            return detection
        verdict, before = detection.verdict, self.verdict
        kept = torch.ones_like(verdict.keep) if before is None else before.keep
        whole, (verdict, spared) = verdict, without_majorities(verdict, kept, self.most_of_label)
        if spared and self._explains_later:  # whether they are removed depends on their labels
            verdict, spared = without_majorities(self._by_copy(whole), kept, self.most_of_label)
            self._explains_later = False
        told = 0 if before is None else len(before.findings)
        for place, finding in enumerate(() if self._without_fit else verdict.findings):
            if place >= told and any(finding is one for one in spared):
                rank_zero_warn(f"{self.title} {kept_majority(finding, place, verdict)}")
        return replace(detection, verdict=verdict)

    def adopt(self, verdict: Verdict) -> int:
        """Put a verdict in force and return how many samples it removes that the one before had kept.

        A verdict that cannot be carried out is an error and leaves the one before in place.
        """
        before, verdict = self.verdict, self._with_paths(verdict)
        if self._session is not None and bool(self._session.scanner.unread.any()):
            warn_of_unread(self._session.scanner.unread, before, self.title)
            verdict = spared(verdict, self._session.scanner.unread, before)
        if self.approved is not None:
            verdict = with_approved(verdict, self.approved)
        removed = int((~verdict.keep if before is None else before.keep & ~verdict.keep).sum())
        returned = before is not None and bool((~before.keep & verdict.keep).any())
        if removed or returned:
            self._put_in_force(verdict)
        self.verdict = verdict
        if removed and not self._without_fit and (told := majorities(verdict, before)):
            rank_zero_warn(f"{self.title} {told}")
        return removed

    def explain(self) -> None:
        """Say of the findings of the verdict in force what a model without them makes of them."""
        later, verdict = self._explains_later, self._explained(self.session.verdict)
        # A finding that stayed in training is left to a copy.
        self.verdict, self._explains_later = self._by_copy(verdict) if later else verdict, False

    def explain_at_end(self) -> None:
        """The same of findings whose diagnosis was left to the end of training: by the model itself, else a copy.

        The model can say it if another defense had it trained anew without them, or if it was repaired without them.
        """
        session = self.session
        if not self._explains_later:
            return
        verdict, training, where = session.verdict, session.in_training, (session.trainer, session.module)
        if training is not None and self._anew_without is not None:
            unseen = self._anew_without & ~training
            verdict = diagnosed(*where, session.scanner, verdict, unseen=unseen, again=False)
        if training is not None and (without := self.response.repaired_without) is not None:
            verdict = diagnosed_by_repaired(*where, session.scanner, verdict, left_out=without & ~training)
        self.verdict, self._explains_later = self._by_copy(verdict), False

    def end(self) -> None:
        """Say what the fit ends with, or that it ended before a detection."""
        session, response = self.session, self.response
        if self.verdict is None and (why := response.why_not(session)):
            rank_zero_warn(f"{self.title}: {why}")
        # Somebody has stopped the fit after its last epoch had ended for this defense.
        if self._explains_later and self.history and undiagnosed(session.verdict.findings):
            if response.unseen is None:
                self.explain_at_end()
            else:
                self.explain()
            if told := self._news_of_findings():
                rank_zero_info(f"{self.title}:{told}")
            self._report()
        response.on_train_end(session)

    def _explained(self, verdict: Verdict) -> Verdict:
        """The verdict with the estimated attack success rate of its findings, and their diagnosis if it is known."""
        session, unseen = self.session, self.response.unseen
        if not self.detector.explains or all(len(finding) < MIN_SAMPLES for finding in verdict.findings):
            return verdict
        verdict = with_estimated_asr(session.trainer, session.module, session.scanner, verdict)
        if unseen is not None:
            return diagnosed(session.trainer, session.module, session.scanner, verdict, unseen=unseen)
        if self._without_fit or not self.response.copies:
            return verdict
        self._explains_later = self.response.explains_at_end and bool(undiagnosed(verdict.findings))
        return verdict if self.response.explains_at_end else self._by_copy(verdict)

    def _by_copy(self, verdict: Verdict) -> Verdict:
        """The verdict with the diagnosis of its findings by a copy of the model that is trained without them."""
        session, response = self.session, self.response
        return diagnosed_by_copy(
            session.trainer,
            session.module,
            session.scanner,
            verdict,
            title=self.title,
            initial=response.start if response.keeps_start else self._start,
            seed=self.defense.options.seed,
            left_out=None if session.in_training is None else ~session.in_training,
        )

    def count_from_zero(self) -> None:
        """Count the epochs before the next detection from the present one, at the start of the fit."""
        self._last_detection = 0
        if self._explains_later and self._needs_start and self._in_training(undiagnosed(self.session.verdict.findings)):
            self._start = on_cpu(self.session.module.state_dict())

    def _in_training(self, findings: Sequence[Finding]) -> bool:
        """Whether one of them is in training as a whole, so that no model is without it."""
        training = self.session.in_training
        return any(training is None or bool(training[one.positions].all()) for one in findings)

    def tell(self) -> None:
        """Log, print one sentence, and write the report of all events so far."""
        session, defense = self.session, self.defense
        metrics = {**self.response.metrics(session), **self.detector.metrics(self.history)}
        if metrics:
            session.module.log_dict({f"backdoor/{defense.method.lower()}/{name}": n for name, n in metrics.items()})
        told = f"{self.title} {sentence(self.history, len(session.verdict), verdict=session.verdict)}"
        told += self._news_of_findings()
        if useless := nothing_learned(self.history[-1], session.verdict):
            rank_zero_warn(f"{self.title} {useless}")
        (rank_zero_warn if unsolved(self.history[-1]) else rank_zero_info)(told)
        self._report()

    def _news_of_findings(self) -> str:
        """What is known of the labels of the findings, after a space; empty if that has been said."""
        before, session = self._told, self.session
        self._told = findings_told(
            session.verdict,
            self._classes,
            approved=session.takes("approved"),
            diagnosis_follows=self._explains_later,
        )
        return self._told if self._told != before else ""

    def _report(self) -> None:
        """Write the report of all events so far, if one is wanted."""
        session, trainer, defense = self.session, self.session.trainer, self.defense
        log_dir = trainer.log_dir  # a broadcast
        wanted = defense.report_dir is not None or (log_dir is not None and trainer.loggers)
        if wanted and trainer.is_global_zero:
            folder = report_folder(defense.report_dir, defense.name, self.own_name, log_dir)
            rate = getattr(defense, "false_alarm_rate", getattr(self.detector, "false_alarm_rate", None))
            report_verdict(
                session,
                self.detector,
                folder,
                seconds=self._seconds,
                max_removed=defense.max_removed,
                callback=type(defense).__name__,
                false_alarm_rate=rate,
                diagnosis_follows=self._explains_later,
            )

    def save_training(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what was trained if an exception is this defense's: it acts at the moment, or a treatment lasts."""
        if self._filter is None or not isinstance(exception, Exception):
            return
        before = self.response.weights_before
        if trainer.global_step and (self._acts or before is not None):
            save_training(
                trainer,
                pl_module,
                exception,
                title=self.title,
                name=self.own_name,
                before=before,
                report_dir=self.defense.report_dir,
            )

    def leave(self, trainer: Trainer) -> None:
        """Give back what belongs to the user, at the end of a fit and after an error."""
        unwatch_averages(trainer, self)
        self.response.release()
        self.detector.close()
        if self._filter is not None:
            self._filter.leave(self.defense.state_key)
        self._filter = self._session = self._watch = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that load with ``weights_only=True``."""
        return {
            "schema": SCHEMA,
            "verdict": None if self.verdict is None else self.verdict.state_dict(),
            "approved": self.approved,
            "copies": self._watch.state_dict() if self._watch else {},
            "told": self._told,
            "explains_later": self._explains_later,
            "anew_without": self._anew_without,
            "start": self._start if self.verdict is None or self.detects_again or self._explains_later else None,
            "last_detection": self._last_detection,
            "history": [event.state_dict() for event in self.history],
            "detector": self.detector.state_dict(),
            "response_name": self.response.written_as,
            "response": self.response.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written.

        Raises:
            ArgumentError: Another release, or a defense with another response, wrote the checkpoint.
        """
        require_own_state(state_dict, self.response.written_as)
        verdict = None if state_dict["verdict"] is None else Verdict.from_state_dict(state_dict["verdict"])
        if self._filter is not None and self.response.drops:
            self._filter.set_keep(self.defense.state_key, None if verdict is None else verdict.keep)
        self.verdict = verdict
        self.approved, self._resumed = state_dict["approved"], True
        self._watched, self._told, self._start = state_dict["copies"], state_dict["told"], state_dict["start"]
        self._explains_later, self._anew_without = state_dict["explains_later"], state_dict["anew_without"]
        self._last_detection = state_dict["last_detection"]
        self.history = [Event(**event) for event in state_dict["history"]]
        self.detector.load_state_dict(state_dict["detector"])
        self.response.load_state_dict(state_dict["response"])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running Trainer."""
        return {**self.__dict__, "_filter": None, "_session": None, "_watch": None, "_acts": False}

    def _with_paths(self, verdict: Verdict) -> Verdict:
        """The verdict with the file of every sample, where the training dataset names files."""
        if self._session is None or verdict.paths is not None:
            return verdict
        paths = paths_of(self._session.scanner.loader.dataset)
        return verdict if paths is None or len(paths) != len(verdict) else replace(verdict, paths=paths)

    def _put_in_force(self, verdict: Verdict) -> None:
        if self._filter is not None and self.response.drops:
            self._filter.set_keep(self.defense.state_key, verdict.keep)
            self._filter.refresh()


def examine(
    defense: Defense, trainer: Trainer, pl_module: LightningModule, scanner: DatasetScanner
) -> tuple[Verdict, Event]:
    """The verdict of a defense on a model as it is, without a fit, and its event; see :meth:`Procedure.examine`."""
    procedure = defense._procedure
    procedure.examine(trainer, pl_module, scanner)
    if procedure.verdict is None:
        raise RuntimeError("a detector came to no verdict")
    return procedure.verdict, procedure.history[-1]


def require_examinable(defense: Defense, trainer: Trainer, pl_module: LightningModule, scanner: DatasetScanner) -> None:
    """Raise where data or model rule out that :func:`examine` comes to a verdict."""
    defense._procedure.examine(trainer, pl_module, scanner, detect=False)


def require_compatible(procedure: Procedure, other: Procedure) -> None:
    """Check that two defenses can share a Trainer.

    Args:
        procedure: Of the defense that is set up.
        other: Of another one on the same Trainer.

    Raises:
        ArgumentError: They have one response or one detector.
        TrainerError: The response of the first trains all epochs.
    """
    if other.response is procedure.response or other.detector is procedure.detector:
        raise ArgumentError("`response` must be one object for each defense, got one that another defense has, too.")
    if procedure.response.alone:
        remedy = "train on what it keeps: `callback.verdict.subset(dataset)`"
        if "verdict" in inspect.signature(type(procedure.defense)).parameters:
            remedy = f"pass its verdict: {type(procedure.defense).__name__}(verdict=...)"
        raise TrainerError(
            f"{procedure.title} trains all epochs and cannot share a Trainer with {type(other.defense).__name__}. Fit "
            f"with that one first, and {remedy}."
        )


def require_own_state(state_dict: dict[str, Any], response: str) -> None:
    """Check that a checkpoint was written by a defense like this one.

    Args:
        state_dict: Its state in the checkpoint.
        response: Name of the present response.

    Raises:
        ArgumentError: Another release wrote the checkpoint and kept other things, or the response was another one.
    """
    if state_dict["schema"] != SCHEMA:
        raise ArgumentError(
            f"The checkpoint was written by another release of lightning_backdoor (state {state_dict['schema']}, "
            f"this one writes {SCHEMA}). Resume with that release, or start anew without `ckpt_path`."
        )
    if state_dict["response_name"] != response:
        raise ArgumentError(
            f"The checkpoint was written with `response={state_dict['response_name']!r}`, got "
            f"{response!r}. Resume with the response of the interrupted run, or start anew without "
            "`ckpt_path`."
        )


def validation_dataset(trainer: Trainer) -> Any:
    """Dataset of the first validation loader, if there is one."""
    with isolated_rng():
        loaders = validation_loaders(trainer)
    while isinstance(loaders, (list, tuple, dict)) and loaders:
        loaders = next(iter(loaders.values())) if isinstance(loaders, dict) else loaders[0]
    loader = unwrapped(loaders)
    return loader.dataset if isinstance(loader, torch.utils.data.DataLoader) else None


def is_due(epochs: int, *, last_scan: int | None, warmup: int, every: int | None, ends: bool) -> bool:
    """Whether to scan now.

    Args:
        epochs: Epochs trained so far, counted from the last restart.
        last_scan: The same count at the latest scan, 0 after a restart; ``None`` before the first scan.
        warmup: Epochs before the first scan.
        every: Epochs between later scans, ``None`` for no periodic scans.
        ends: Whether training is about to end and a last scan is wanted.
    """
    if last_scan is None:
        return ends or epochs >= warmup
    return (ends and epochs > last_scan) or (every is not None and epochs - last_scan >= every)
