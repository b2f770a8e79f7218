"""One base for all defenses: when a detection is due, which detector, which response."""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from lightning_backdoor._lightning import (
    CallbackBase,
    callbacks_of,
    is_fast_dev_run,
    rank_zero_info,
    rank_zero_warn,
    validation_loaders,
)
from lightning_backdoor.callbacks.arguments import flat_signature, require_fraction, require_positive
from lightning_backdoor.callbacks.options import DEFAULTS, ScanArguments, ScanOptions
from lightning_backdoor.data.random_state import isolated_rng
from lightning_backdoor.data.views import unwrapped
from lightning_backdoor.errors import ArgumentError, DataError, TrainerError
from lightning_backdoor.events import Event
from lightning_backdoor.loading.loader_filter import LoaderFilter, loader_filter_of
from lightning_backdoor.report.of_events import evidence, sentence, unsolved
from lightning_backdoor.report.writer import write_report
from lightning_backdoor.responses.base import Continue, Detection, Report, Response, Session
from lightning_backdoor.responses.checkpointing import save_weights
from lightning_backdoor.responses.fallback import WithFallback
from lightning_backdoor.responses.limits import about_to_end
from lightning_backdoor.responses.reset_units import ResetUnits
from lightning_backdoor.responses.restart import Restart
from lightning_backdoor.responses.unlearn import Unlearn
from lightning_backdoor.responses.weight_copies import put_weights, unwatch_averages, watch_averages
from lightning_backdoor.scanning.isolation import require_unsharded
from lightning_backdoor.scanning.scanner import DatasetScanner, open_scanner
from lightning_backdoor.verdict import Verdict

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer
    from typing_extensions import Unpack

    from lightning_backdoor.responses.mirrors import Watch

__all__ = [
    "Defense",
    "Detector",
    "ResponseName",
    "chosen_response",
    "guard_hooks",
    "guard_inherited_hooks",
    "is_due",
    "require_same_data",
    "spared",
    "warmup_or_half",
    "warn_of_majorities",
]

Class = TypeVar("Class", bound=type)

HOOKS = {name for name in dir(CallbackBase) if name.startswith("on_") or name in ("setup", "teardown")}
HOOKS -= {"on_after_setup"}

SCHEMA = 3  # of what checkpoints hold of any defense: a release that changes it counts up

ResponseName = Literal["restart", "continue", "reset", "unlearn", "report"]

DEFAULT_WARMUP = 10

NAMED = 5  # labels in a warning, at most


def guard_hooks(cls: Class) -> Class:
    """Let every hook that a class defines raise unless its first argument is a Trainer.

    Fabric takes any object as a callback and calls any method of it, with any arguments. It has no fit loop, in which
    samples could be left out or epochs repeated.
    """
    for name in HOOKS & vars(cls).keys():
        setattr(cls, name, _guarded(vars(cls)[name]))
    return cls


def guard_inherited_hooks(cls: Class) -> Class:
    """The same for a class that derives from Lightning's callbacks, with the hooks that it inherits.

    Fabric calls ``on_after_setup``, a hook of its own, in ``Fabric.setup``; it raises, too.
    """
    guard_hooks(cls)
    for name in HOOKS - vars(cls).keys():
        setattr(cls, name, _guarded(getattr(cls, name)))
    cls.on_after_setup = lambda self, **_: _refuse(self, "on_after_setup", "Fabric")  # type: ignore[attr-defined]
    return cls


def _guarded(hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(hook)  # Fabric and Lightning look at the signature and the code of what is inside
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        trainer = args[0] if args else kwargs.get("trainer")
        if not hasattr(trainer, "fit_loop"):
            _refuse(self, hook.__name__, type(trainer).__name__ if args or "trainer" in kwargs else "no argument")
        return hook(self, *args, **kwargs)

    return guarded


def _refuse(callback: Any, hook: str, got: str) -> NoReturn:
    name = type(callback).__name__
    raise TrainerError(
        f"{name} needs Lightning's Trainer, but `{hook}` was called with {got} in its place. Train by "
        f"Trainer(callbacks=[{name}(...)]).fit(...), or leave it out of Fabric(callbacks=...) and use the functions of "
        "`lightning_backdoor.functional` in a loop of your own."
    )


class Detector:
    """What measures every training sample, and decides.

    Attributes:
        meaning: What the score measures, in one sentence for the report.
        by_subpopulations: Whether subpopulations are looked for.
        features: Whether penultimate features are needed; where not, no classifier head is searched.
        rereads: Whether it reads the training images several times, so that they are kept in memory meanwhile.
    """

    meaning: str = ""
    by_subpopulations: bool = False
    features: bool = True
    rereads: ClassVar[bool] = False

    def setup(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what a checkpoint may replace next; forget an earlier fit."""

    def require(self, session: Session) -> None:
        """Raise at the start of a fit where model or data rule the detector out."""

    def observe(self, session: Session, first: int) -> None:
        """Measure something before the first detection, which comes after ``first`` epochs."""

    def detect(self, session: Session) -> Detection:
        """Measure all samples and decide; every process calls it and gets the same result."""
        raise NotImplementedError(f"{type(self).__name__} must define `detect`.")

    def metrics(self, history: list[Event]) -> dict[str, float]:
        """What is logged beside the counts."""
        return {}

    def denoised_for(self, session: Session) -> Callable[[Sequence[int]], Sequence[Tensor]] | None:
        """A function from dataset positions to denoised versions of these images, for the report; ``None``: none."""
        return None

    def close(self) -> None:
        """Forget what is kept between detections."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that load with ``weights_only=True``."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the checkpoint was written."""


@guard_inherited_hooks
class Defense(CallbackBase):
    """A detector, a response, and when the first is due. Lightning's hooks are forwarded to the response.

    Args:
        detector: Measures all samples and decides.
        response: What is done about the verdict; also what :func:`chosen_response` made of the user's ``response``.
        warmup_epochs: Epochs before the first detection; ``None``: as the response needs it.
        every: Epochs between later detections; ``None``: none.
        max_removed: Largest share of the training set that may be flagged, in ``(0, 1)``.
        **scan: See :class:`~lightning_backdoor.callbacks.options.ScanArguments`.

    Attributes:
        method: Name of the defense in logs and checkpoints.
        title: Name of the defense for readers.
        verdict: The latest verdict, ``None`` before the first detection.
        history: What every detection found, what was done, and what came of it.
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
        every: int | None = None,
        **scan: Unpack[ScanArguments],
    ) -> None:
        super().__init__()
        self._detector, self._response = detector, response
        self.warmup_epochs, self._every = warmup_epochs, require_positive("rescore_every", every)
        self.max_removed = require_fraction("max_removed", max_removed)
        given: dict[str, Any] = {**DEFAULTS, **scan}
        report_dir, self.name = given.pop("report_dir"), given.pop("name")
        self.report_dir = None if report_dir is None else str(report_dir)
        self.options = ScanOptions(**given, features=detector.features or response.features)
        self.verdict: Verdict | None = None
        self.history: list[Event] = []
        self._last_detection: int | None = None  # epochs before it, counted from the last restart
        self._filter: LoaderFilter | None = None
        self._session: Session | None = None
        self._acts = False
        self._began = 0.0  # of the fit, in seconds since the epoch
        self._seconds = 0.0  # of the last detection
        self._watch: Watch | None = None
        self._watched: dict[str, Any] = {}  # its state in the checkpoint that training goes on from

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints: the defense and the user's ``name``."""
        return ".".join(filter(None, ("lightning_backdoor", self.method, self.name)))

    def __repr__(self) -> str:
        """Return a call that makes an equal callback."""
        values = {}
        given = {**vars(self.options), **vars(self), **getattr(self, "arguments", {}), "report_dir": self.report_dir}
        for argument, parameter in inspect.signature(type(self)).parameters.items():
            value = given[argument]
            if value is not parameter.default and value != parameter.default:
                values[argument] = value
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in values.items())})"

    @property
    def session(self) -> Session:
        """What is there during a fit.

        Raises:
            TrainerError: No fit is running.
        """
        if self._session is None:
            raise TrainerError(f"{type(self).__name__} is at work in `Trainer.fit` alone, and no fit is running.")
        return self._session

    @property
    def repaired(self) -> bool | None:
        """Whether the model gives at most a tenth of the flagged samples their label, as measured last.

        ``None`` if nothing was flagged, or it was not measured. Flagged samples whose labels are right get them from a
        good model, too.
        """
        known = [event for event in self.history if event.remaining is not None]
        return None if not known else not known[-1].remains

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the filter of the training loader."""
        if stage != "fit":
            return
        require_unsharded(trainer)
        self._response.setup(trainer, pl_module, self.title)
        others = [other for other in callbacks_of(trainer) if isinstance(other, Defense) and other is not self]
        if any(other._response is self._response or other._detector is self._detector for other in others):
            raise ArgumentError(
                "`response` must be one object for each defense, got one that another defense has, too."
            )
        if self._response.alone:
            require_alone(trainer, self)
        self._detector.setup(trainer, pl_module)
        self._acts, self._began, self._watched = False, time.time(), {}
        if self._response.starts_over:
            self.history = []
        if isinstance(self._response, Report):
            self.verdict = None  # it changes nothing, so nothing of an earlier model is left to be in force
        again = self.verdict is not None and not self._response.starts_over
        self._last_detection = trainer.current_epoch if again else None
        self._filter = loader_filter_of(trainer)
        self._filter.join(self.state_key)
        if self.verdict is not None:
            self._put_in_force(self.verdict)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue what was interrupted."""
        self._response.on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read a few training images, so that whatever cannot work is said before anything is trained."""
        loader = None if self._filter is None else self._filter.loader
        if self._filter is None or loader is None:
            raise TrainerError(f"{type(self).__name__} found no training loader. Pass one map-style loader to `fit`.")
        warn_of_evaluation_mode(pl_module, self.title)
        self._watch = watch_averages(trainer, pl_module, self, self._watched)
        scanner = open_scanner(trainer, pl_module, loader, self.options, _validation_dataset(trainer))
        if self.verdict is not None:
            require_same_data(self.verdict, scanner)
            if self.verdict.labels is not None:
                scanner.unread[self.verdict.labels < 0] = True
        session = self._session = Session(trainer, pl_module, scanner, self._filter, self, self._began)
        self._detector.require(session)
        self._response.on_train_start(session)
        if self._response.at_once and not self.history and not is_fast_dev_run(trainer):
            with self._acting():
                self._detect(trainer.current_epoch)
        self._response.after_first_detection(session)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the response act on the epoch that begins."""
        session = self.session
        if self._last_detection is not None and trainer.current_epoch < self._last_detection:
            self._response.on_other_restart(session)
            self._last_detection = None if self._response.starts_over else 0
        with self._acting():
            self._response.on_train_epoch_start(session)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let the response prepare a step."""
        self._response.on_train_batch_start(self.session, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Let the response change the loss."""
        self._response.on_before_backward(self.session, loss)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the response change gradients."""
        self._response.on_after_backward(self.session)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Let the response change gradients before a step."""
        self._response.on_before_optimizer_step(self.session, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the response judge a treatment with the last batch, before validation."""
        with self._acting():
            self._response.on_train_batch_end(self.session)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End epochs of a treatment; detect when it is time."""
        session = self.session
        with self._acting():
            if self._response.on_train_epoch_end(session):
                return
            due = self._response.awaits_detection(session) and self._is_due(trainer)
            if is_fast_dev_run(trainer):
                if due:
                    rank_zero_info(f"{self.title}: fast_dev_run trains too little for a verdict; no scan.")
                return
            if not due and self.verdict is None:
                self._detector.observe(session, self._first_detection(trainer))
            elif due and self._response.ready(session):
                self.detect()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the fit ends with, or that it ended before a detection."""
        if is_fast_dev_run(trainer):
            return
        if self.verdict is None and (why := self._response.why_not(self.session)):
            rank_zero_warn(f"{self.title}: {why}")
        self._response.on_train_end(self.session)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the training loader back."""
        unwatch_averages(trainer, self)
        self._leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what was trained if it is the defense that fails; give the training loader back.

        Lightning does not tear down after an error.
        """
        try:
            fails = self._filter is not None and (self._acts or self._response.weights_before is not None)  # in a fit
            if isinstance(exception, Exception) and trainer.global_step and fails:
                self._save_training(trainer, pl_module, exception)
        finally:
            unwatch_averages(trainer, self)
            self._leave()

    def detect(self) -> None:
        """Run the detector, put its verdict in force, and let the response act on it."""
        self._detect(self.session.epochs_done)

    def _detect(self, epochs: int) -> None:
        with ExitStack() as stack:
            if self._detector.rereads or self._response.rereads:
                stack.enter_context(self.session.scanner.loaded(self.session.trainer, self.session.module))
            self._detect_and_respond(epochs)

    def _detect_and_respond(self, epochs: int) -> None:
        session, began = self.session, time.monotonic()
        detection = self._response.revise(session, self._detector.detect(session))
        before = self.verdict
        kept = torch.ones_like(detection.verdict.keep) if before is None else before.keep
        removed = self.adopt(detection.verdict)
        detection = replace(detection, kept_before=kept)
        self._last_detection = epochs
        accuracies = () if detection.correct is None else (float(detection.correct.float().mean()),)
        event = Event(
            epochs,
            removed,
            detection.num_flagged_before_cap,
            detection.subpopulations,
            response=self._response.name,
            all_to_all=detection.all_to_all,
            accuracies=accuracies,
        )
        self.history.append(event)
        self.history[-1] = self._response.respond(session, detection, event)
        self._seconds = time.monotonic() - began
        self.tell()
        if not self._response.repeats and self._every is None:
            self._detector.close()

    def adopt(self, verdict: Verdict) -> int:
        """Put a verdict in force and return how many samples it removes that the one before had kept.

        A verdict that cannot be carried out is an error and leaves the one before in place.
        """
        before = self.verdict
        if self._session is not None:
            self._tell_unread(self._session.scanner)
            verdict = spared(verdict, self._session.scanner.unread, before)
        removed = int((~verdict.keep if before is None else before.keep & ~verdict.keep).sum())
        returned = before is not None and bool((~before.keep & verdict.keep).any())
        if removed or returned:
            self._put_in_force(verdict)
        self.verdict = verdict
        if removed:
            warn_of_majorities(verdict, None if before is None else before.keep, self.title)
        return removed

    def count_from_zero(self) -> None:
        """Count the epochs before the next detection from the present one."""
        self._last_detection = 0

    def tell(self) -> None:
        """Log, print one sentence, and write the report of all events so far."""
        session, verdict = self.session, self.session.verdict
        metrics = {**self._response.metrics(session), **self._detector.metrics(self.history)}
        if metrics:
            session.module.log_dict({f"backdoor/{self.method.lower()}/{name}": n for name, n in metrics.items()})
        told = f"{self.title} {sentence(self.history, len(verdict))}"
        (rank_zero_warn if unsolved(self.history[-1]) else rank_zero_info)(told)
        self._write_report(session, verdict)

    def _first_detection(self, trainer: Trainer) -> int:
        """Epochs of ordinary training before the first detection, unless training ends before."""
        return self.warmup_epochs if self.warmup_epochs else self._response.latest_detection(trainer)

    def _is_due(self, trainer: Trainer) -> bool:
        wanted = self._last_detection is None or self._response.repeats
        return is_due(
            trainer.current_epoch + 1,
            last_scan=self._last_detection,
            warmup=self._first_detection(trainer),
            every=self._every,
            ends=wanted and about_to_end(trainer),
        )

    def _put_in_force(self, verdict: Verdict) -> None:
        if self._filter is not None and self._response.drops:
            self._filter.set_keep(self.state_key, verdict.keep)
            self._filter.refresh()

    @contextmanager
    def _acting(self) -> Iterator[None]:
        """While the defense measures or decides: an exception is none of the training's."""
        self._acts = True
        yield
        self._acts = False

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only; while a treatment or a restart may come, with the weights for it."""
        return {
            "schema": SCHEMA,
            "verdict": None if self.verdict is None else self.verdict.state_dict(),
            "copies": self._watch.state_dict() if self._watch else {},
            "last_detection": self._last_detection,
            "history": [event.state_dict() for event in self.history],
            "detector": self._detector.state_dict(),
            "response_name": self._response.name,
            "response": self._response.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take everything from a checkpoint; the verdict is in force before the first batch is drawn.

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
        if state_dict["response_name"] != self._response.name:
            raise ArgumentError(
                f"The checkpoint was written with `response={state_dict['response_name']!r}`, got "
                f"{self._response.name!r}. Resume with the response of the interrupted run, or start anew without "
                "`ckpt_path`."
            )
        verdict = None if state_dict["verdict"] is None else Verdict.from_state_dict(state_dict["verdict"])
        if self._filter is not None and self._response.drops:
            self._filter.set_keep(self.state_key, None if verdict is None else verdict.keep)
        self.verdict = verdict
        self._watched = state_dict["copies"]
        self._last_detection = state_dict["last_detection"]
        self.history = [Event(**event) for event in state_dict["history"]]
        self._detector.load_state_dict(state_dict["detector"])
        self._response.load_state_dict(state_dict["response"])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running Trainer."""
        return {**self.__dict__, "_filter": None, "_session": None, "_watch": None, "_acts": False}

    def _leave(self) -> None:
        self._response.release()
        self._detector.close()
        if self._filter is not None:
            self._filter.leave(self.state_key)
        self._filter = self._session = self._watch = None

    def _save_training(self, trainer: Trainer, pl_module: LightningModule, exception: Exception) -> None:
        """Let the module have its weights from before the treatment, save them, and say so in the exception."""
        before = self._response.weights_before
        if before is not None:
            put_weights(trainer, pl_module, before)
        when = "from before the repair" if before is not None else "as they were trained"
        told = f"{self.title} failed after epoch {trainer.current_epoch}. The module has its weights {when}"
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

    def _tell_unread(self, scanner: DatasetScanner) -> None:
        """Say once how many samples nothing is known of."""
        count = int(scanner.unread.sum())
        if count and (self.verdict is None or self.verdict.labels is None or not bool((self.verdict.labels < 0).any())):
            rank_zero_warn(
                f"{self.title}: `collate_fn` drops {count:,} of {len(scanner):,} training samples, which could not be "
                "looked at. They are kept; in the verdict they have the lowest score and the label -1."
            )

    def _write_report(self, session: Session, verdict: Verdict) -> None:
        """Write the report of the verdict: into the user's folder, else beside the logs. Every rank must call it."""
        trainer, scanner = session.trainer, session.scanner
        logs = trainer.log_dir  # a broadcast
        if self.report_dir is None and (logs is None or not trainer.loggers):
            return
        if not trainer.is_global_zero:
            return
        own = self.state_key.removeprefix("lightning_backdoor.")
        if self.report_dir is None:
            folder = Path(logs or ".") / "lightning_backdoor" / own
        else:
            folder = Path(self.report_dir) if self.name is None else Path(self.report_dir) / own
        shown = evidence(
            self.history,
            len(verdict),
            images=scanner.images,
            denoised=self._detector.denoised_for(session),
            read_with=scanner.transform.description,
            classes=getattr(scanner.loader.dataset, "classes", None),
            meaning=self._detector.meaning,
            by_subpopulations=self._detector.by_subpopulations,
            seconds=self._seconds,
            max_removed=self.max_removed,
        )
        if unread := int(scanner.unread.sum()):
            facts = {**shown.facts, "images that `collate_fn` drops (kept, not looked at)": unread}
            shown = replace(shown, facts=facts)
        with isolated_rng():
            try:
                write_report(folder, verdict, method=self.title, evidence=shown)
            except Exception as error:  # a picture must never end somebody's training
                rank_zero_warn(f"The report in {folder} is incomplete: {type(error).__name__}: {error}")


def chosen_response(
    response: str | Response,
    own: Mapping[str, Response],
    *,
    others: bool = True,
    fallback: Literal["restart"] | None = "restart",
) -> Response:
    """The response that a user's argument names.

    Args:
        response: A name, or a response with settings of its own, which is taken as it is.
        own: By name, those that the defense makes itself.
        others: Whether the ones with default settings are possible, too.
        fallback: What follows a repair (``"reset"``, ``"unlearn"``) that leaves the backdoor in the model.

    Raises:
        ArgumentError: There is none of this name.
    """
    if isinstance(response, Response):
        return response
    usual: dict[str, Response] = {
        "restart": Restart(last_detection=True),
        "continue": Continue(),
        "reset": ResetUnits(),
        "unlearn": Unlearn(),
        "report": Report(),
    }
    known = {**(usual if others else {}), **own}
    if response not in known:
        raise ArgumentError(f"`response` must be one of {', '.join(map(repr, known))}, got {response!r}.")
    repairs = isinstance(known[response], ResetUnits | Unlearn)
    return WithFallback(known[response]) if repairs and fallback else known[response]


def require_alone(trainer: Trainer, defense: Defense) -> None:
    """Check that no other defence is on the Trainer.

    Raises:
        TrainerError: There is one.
    """
    other = next((c for c in callbacks_of(trainer) if isinstance(c, Defense) and c is not defense), None)
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


def require_same_data(verdict: Verdict, scanner: DatasetScanner) -> None:
    """Raise if a verdict was passed on other samples than those that are about to be trained on."""
    positions, labels = scanner.probe
    if len(verdict) == len(scanner):
        known = None if verdict.labels is None else verdict.labels[positions]
        if known is None or bool(((known == labels) | (known < 0)).all()):
            return
    differs = f"{len(scanner)} samples" if len(verdict) != len(scanner) else f"{len(scanner)} samples with other labels"
    raise DataError(
        f"The verdict is on another dataset: it knows {len(verdict)} samples, the training dataset has {differs}. "
        "Resume with the dataset of the interrupted run, or use a new callback and no `ckpt_path`."
    )


def _validation_dataset(trainer: Trainer) -> Any:
    """Dataset of the first validation loader, if there is one."""
    with isolated_rng():
        loaders = validation_loaders(trainer)
    while isinstance(loaders, (list, tuple, dict)) and loaders:
        loaders = next(iter(loaders.values())) if isinstance(loaders, dict) else loaders[0]
    loader = unwrapped(loaders)
    return loader.dataset if isinstance(loader, torch.utils.data.DataLoader) else None


def warmup_or_half(warmup_epochs: int | None, max_epochs: int | None) -> int:
    """The user's warm-up, else half of the planned epochs, else 10 where their number is not known."""
    if warmup_epochs is not None:
        return warmup_epochs
    return max(1, math.ceil(max_epochs / 2)) if max_epochs is not None and max_epochs > 0 else DEFAULT_WARMUP


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


def warn_of_majorities(verdict: Verdict, before: Tensor | None, title: str) -> None:
    """Warn if a verdict removes most samples of a label, and more of them than the one before.

    Args:
        verdict: The verdict.
        before: Samples that the verdict before kept, bool ``(N,)``; ``None`` if there was none.
        title: Name of the defence for readers.
    """
    if verdict.labels is None:
        return
    present, places, counts = torch.unique(verdict.labels, return_inverse=True, return_counts=True)
    removed = torch.bincount(places[~verdict.keep], minlength=len(present))
    earlier = removed.new_zeros(len(present))
    if before is not None:
        earlier = torch.bincount(places[~before], minlength=len(present))
    most = ((2 * removed > counts) & (removed > earlier)).nonzero().squeeze(1).tolist()
    if not most:
        return
    told = [f"{int(removed[i])} of the {int(counts[i])} with label {int(present[i])}" for i in most[:NAMED]]
    further = f", and most of those with {len(most) - NAMED} more labels" if len(most) > NAMED else ""
    rank_zero_warn(
        f"{title} takes most images of a label for poisoned: {', '.join(told)}{further}. Either they carry a trigger, "
        "or they are a kind of image that no other label has (of another camera, with a border), which the model will "
        "then not know. Look at them in the report. To keep those of label k and leave out the others, train without "
        "this callback on `torch.utils.data.Subset(dataset, positions)`, where `positions` are "
        "`(callback.verdict.keep | (callback.verdict.labels == k)).nonzero().flatten().tolist()`."
    )
