"""NONE: find the units that a backdoor works through, reset them, and train on without the images that drive them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_backdoor._lightning import rank_zero_info, rank_zero_warn
from lightning_backdoor.callbacks.base import (
    Defense,
    require_count,
    require_fraction,
    require_one_of,
    require_positive,
    require_rate,
)
from lightning_backdoor.callbacks.compromised import (
    Chosen,
    check_resettable,
    choose_units,
    find_layers,
    frozen_layers,
    judge_samples,
    reset_chosen,
)
from lightning_backdoor.callbacks.round_report import evidence, last_word, sentence
from lightning_backdoor.callbacks.rounds import (
    STILL_OBEYED,
    Round,
    Series,
    judgement,
    readmission,
    reset_units,
    shares,
    unfinished,
)
from lightning_backdoor.callbacks.schedule import is_due, never_looked, repair_begins
from lightning_backdoor.responses.checkpointing import warn_of_treated_files
from lightning_backdoor.responses.extra_epochs import FineTuning, conclude, enough_epochs, is_finite
from lightning_backdoor.responses.limits import (
    about_to_end,
    epochs_left,
    planned_end,
    require_extendable,
)
from lightning_backdoor.responses.weight_copies import restart_averages, weights
from lightning_backdoor.scanning.isolation import require_automatic
from lightning_backdoor.scanning.measure_units import UnitScan
from lightning_backdoor.scanning.scanner import ScanOptions
from lightning_backdoor.surgery.units import UnitLayer

__all__ = ["NONECallback"]

PAPER_EPOCHS = 20  # of the authors' fine-tuning
NO_LIMIT = 0.999999  # of removed images: the natural break leaves one at least


class NONECallback(Defense):
    """Reset the units that a backdoor works through, drop the images that drive them, and fine-tune.

    Implements NONE (*Training with More Confidence*, `Wang et al., 2022 <https://arxiv.org/abs/2202.06382>`_) inside a
    Trainer. When as many epochs are left as its rounds need (or after ``warmup_epochs``), the largest response of every
    unit to every training image is looked at. A direction over units that splits one label into two populations and no
    other label, or all labels into two, is what a backdoor looks like. If there is one, its samples leave the training
    set, the units that they drive are drawn anew, and fine-tuning follows. Otherwise nothing changes.

    Assumes nothing: no clean data, no poison rate, no target class. Costs two forward passes a look, three
    if a class has no confident sample; for each round two more; two bytes per image for each of up to 512 units; a copy
    of weights and optimizer, to which training returns if a round brings what all have cost to over 5 points of
    accuracy. Fine-tuning takes epochs of the plan (``max_epochs``, ``max_steps``, ``max_time``), unless
    ``extra_epochs`` are allowed.

    Units are reset at the start of an epoch, and rounds are judged and undone with the last batch of one, before
    validation: what monitors a score, saves a checkpoint or averages weights sees both of one state.

    Differs from the paper: units and samples are chosen by evidence instead of by quota and a natural break, which
    fires on clean data, too (``rule="paper"`` keeps both); reset units may learn again (``reset="prune"``: never).

    Args:
        warmup_epochs: Epochs of ordinary training before the first look. ``None``: as late as the plan leaves time for
            all rounds, which take half of it at most. There is a second look at the end if the first one found nothing
            or was undone; what is found then is removed and reported, and reset if ``extra_epochs`` are left.
        extra_epochs: Epochs that fine-tuning may have beyond the plan. If they are as many as all rounds need, the
            first look comes when training is about to end.
        rounds: Most looks in a row, each followed by its fine-tuning, as long as they find something, or the model
            still gives over 10 % of the removed samples their label (after the second one: and it made them a quarter
            fewer). ``None``: 3; 1 where units are reset by quota.
        finetune_epochs: Epochs of fine-tuning after a reset. ``None``: a tenth of
            ``max_epochs``; more, up to ``max_epochs``, where this is less than 100 steps. At most what is left.
        lr: Learning rate at the start of fine-tuning, from where it falls to zero, with frozen batch-norm statistics.
            ``None``: within the plan that of the user's schedule, and ordinary training; beyond it 5 % of the largest
            so far.
        reset_fraction: Largest share of the units of a layer that one round resets, in ``(0, 1)``.
        reset: ``"reinit"`` draws units anew and lets them learn; ``"prune"`` zeroes them.
        strong: Probability above which a sample is confidently of a class.
        weak: Probability below which it is confidently not of a class.
        rule: ``"auto"`` acts on second populations that pass the no-poison gate; ``"paper"`` always resets
            ``reset_fraction`` of the units of each layer, and drops the samples above the natural break.
        samples: ``"drop"`` takes the samples out, ``"keep"`` leaves the data as they are and always resets the most
            compromised units, against backdoors that nobody planted (natural backdoors). ``"auto"`` is ``"drop"``.
        residual_mode: What belongs to a unit that enters a sum; see :func:`~lightning_backdoor.surgery.find_units`.
        paper_loop: Fine-tune as the authors: at a constant rate, with what the optimizer remembers of the reset weights,
            and without going back where it costs accuracy.
        max_removed: Largest share of the training set that may be removed, in ``(0, 1)``.
        report_dir: Folder for the report (with ``name``, a sub-folder of it). ``None``: beside the logger's files;
            without a logger there is no report.
        forward_fn: ``forward_fn(pl_module, batch)`` returns logits ``(B, K)``, where images alone are not enough.
        batch_fn: ``batch_fn(batch)`` returns images and labels, where they cannot be found.
        eval_transform: Transform without augmentation. ``None``: that of the validation set, else the training
            transform without its random steps.
        eval_dataset: In place of ``eval_transform``, for augmentation inside the dataset: the same samples without it,
            as a dataset, or as a function from the training dataset to one.
        mean: Mean of the pixel normalisation, one number per channel in ``[0, 1]`` units; ``None`` finds it out.
            ``"per_image"``: every image was standardised by itself; its pixels span its smallest to largest value.
        std: Its standard deviation.
        batch_size: Images per forward pass of the scan; ``None`` takes the loader's.
        num_workers: Worker processes of the scan; ``None`` takes the loader's.
        seed: Seed of the redrawn units, and of what is random in the training transform.
        name: Tells two instances apart in checkpoints and report folders.

    Attributes:
        history: What each round found and did.

    Raises:
        ArgumentError: If an argument is out of range.
        DataError: At the start of fit, if the training data cannot be scanned.
        ModelError: At the start of fit, if no unit of the model can be reset.
        TrainerError: At the start of fit, if the module optimizes by hand, or the strategy shards the model.

    Example:
        >>> NONECallback(rounds=4, reset="prune")
        NONECallback(rounds=4, reset='prune')
    """

    method: ClassVar[str] = "NONE"

    def __init__(
        self,
        *,
        warmup_epochs: int | None = None,
        extra_epochs: int = 0,
        rounds: int | None = None,
        finetune_epochs: int | None = None,
        lr: float | None = None,
        reset_fraction: float = 0.05,
        reset: Literal["reinit", "prune"] = "reinit",
        strong: float = 0.9,
        weak: float = 0.1,
        rule: Literal["auto", "paper"] = "auto",
        samples: Literal["auto", "drop", "keep"] = "auto",
        residual_mode: Literal["branch_only", "reference", "full_group"] = "branch_only",
        paper_loop: bool = False,
        max_removed: float = 0.3,
        report_dir: str | Path | None = None,
        forward_fn: Callable[[Any, Any], Any] | None = None,
        batch_fn: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
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
            forward_fn, batch_fn, None, eval_transform, mean, std, batch_size, num_workers, seed,
            features=False, eval_dataset=eval_dataset,
        )  # fmt: skip
        super().__init__(max_removed=max_removed, options=options, report_dir=report_dir, name=name)
        self.warmup_epochs = require_positive("warmup_epochs", warmup_epochs)
        self.extra_epochs = require_count("extra_epochs", extra_epochs)
        self.rounds = require_positive("rounds", rounds)
        self.finetune_epochs = require_positive("finetune_epochs", finetune_epochs)
        self.lr = require_rate("lr", lr)
        self.reset_fraction = require_fraction("reset_fraction", reset_fraction)
        self.reset = require_one_of("reset", reset, ("reinit", "prune"))
        self.strong = require_fraction("strong", strong)
        self.weak = require_fraction("weak", weak)
        self.rule = require_one_of("rule", rule, ("auto", "paper"))
        self.samples = require_one_of("samples", samples, ("auto", "drop", "keep"))
        self.residual_mode = require_one_of("residual_mode", residual_mode, ("branch_only", "reference", "full_group"))
        self.paper_loop = paper_loop
        self._by_quota = rule == "paper" or samples == "keep"
        self.history: list[Round] = []
        self._series, self._tuning = Series(), FineTuning()
        self._layers: list[UnitLayer] = []

    @classmethod
    def from_paper(cls, **overrides: Any) -> NONECallback:
        """Use the authors' quotas, natural break, zeroing and fine-tuning, without bounds; this always removes images.

        The model is fine-tuned for 20 epochs beyond the plan at a constant rate of 1e-4 (meant for SGD with momentum),
        and keeps what has come of it. Nothing limits how many images are removed.

        What is left of the differences: all units that can be reset are looked at, those of a ResNet's stem and first
        stage, too, and those of a projection shortcut before its batch norm (the authors: after it), and the weights
        that read a sum through a projection are reset with the others; images at the natural break stay, only those
        above it leave; a class that the model is never sure of gets a threshold of its own
        (:func:`~lightning_backdoor.functional.strong_thresholds`) instead of no units; when the network is trained, and
        how, is up to the Trainer.
        """
        paper: dict[str, Any] = {
            "rule": "paper", "reset": "prune", "residual_mode": "reference", "paper_loop": True, "lr": 1e-4,
            "finetune_epochs": PAPER_EPOCHS, "extra_epochs": PAPER_EPOCHS, "max_removed": NO_LIMIT,
        }  # fmt: skip
        return cls(**{**paper, **overrides})

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the curation of the training loader."""
        if stage == "fit":
            require_automatic(pl_module, "NONE fine-tunes")
            require_extendable(trainer, "NONE")
            self._series, self._tuning, self.history = Series(), FineTuning(), []
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Continue a fine-tuning that was interrupted."""
        self._tuning.at_fit_start(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the training set can be read, and find the units that can be reset."""
        super().on_train_start(trainer, pl_module)
        assert self._training_set is not None
        self._layers = find_layers(trainer, pl_module, self._training_set, self.residual_mode)
        check_resettable(trainer, self._layers, needed=self._by_quota)
        self._tuning.at_train_start()

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Look again later if another defence went back to the start; else reset what the last look chose."""
        if self._series.last_look is not None and trainer.current_epoch < self._series.last_look:
            self._tuning.leave()
            self._series, self._tuning = Series(), FineTuning()
        elif self._series.due:
            self._reset(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Prepare a step of fine-tuning."""
        self._tuning.at_batch_start(trainer, pl_module, batch_idx)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Judge a round with the last batch of its fine-tuning, before validation."""
        if self._series.before is not None and self._tuning.ends_now(trainer):
            self._judge(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Look and drop when it is time; say what came of a round when its fine-tuning is over."""
        series, began = self._series, time.monotonic()
        if self._tuning.left:
            if self._tuning.at_epoch_end():
                if series.before is not None:  # a callback that came later has ended the epoch
                    self._judge(trainer, pl_module)
                self._readmit()
                self._tell(trainer, pl_module, time.monotonic() - began)
                left = epochs_left(trainer, planned_end(trainer), self.extra_epochs)
                if 0 < series.treated < self._most_rounds and left != 0:
                    self._look(trainer, pl_module)
            return
        done, ends = trainer.current_epoch + 1, about_to_end(trainer)
        if trainer.fast_dev_run:
            rank_zero_info("NONE: fast_dev_run trains too little for a verdict; no look.")
        elif series.treated:
            if ends and done > (series.judged or 0) and not self._by_quota:
                self._look_at_removed(trainer, pl_module)
        elif is_due(done, last_scan=series.last_look, warmup=self._first_look(trainer), every=None, ends=ends):
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if training ended before the first look, or with a model that is not repaired."""
        if trainer.fast_dev_run:
            return
        if self.verdict is None:
            rank_zero_warn(f"NONE: {never_looked(frozen=self._waits)}")
        elif self.history and not self._by_quota and (warning := last_word(self.history[-1], self.verdict)):
            rank_zero_warn(f"NONE {warning}")
        warn_of_treated_files(trainer, "NONE", self._began, self._treated_until)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only; while a round lasts, with the weights to go back to."""
        return {
            **super().state_dict(),
            "history": [past.state_dict() for past in self.history],
            "series": dict(vars(self._series)),
            "tuning": self._tuning.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue an interrupted run."""
        super().load_state_dict(state_dict)
        if state_dict:
            self.history = [Round(**past) for past in state_dict["history"]]
            self._series = Series(**state_dict["series"])
            self._tuning.load_state_dict(state_dict["tuning"])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running Trainer."""
        return {**super().__getstate__(), "_layers": []}

    def _leave(self) -> None:
        self._tuning.leave()
        super()._leave()

    @property
    def _waits(self) -> bool:
        """Whether it has nothing to do but to reset units, and a callback has yet to thaw them."""
        return self._by_quota and not any(layer.trainable for layer in self._layers)

    @property
    def _before_repair(self) -> dict[str, Any] | None:
        return self._series.before

    @property
    def _most_rounds(self) -> int:
        return self.rounds or (1 if self._by_quota else 3)

    def _first_look(self, trainer: Any) -> int:
        """Epochs before it, as the plan is now."""
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        needed = self._most_rounds * (self.finetune_epochs or enough_epochs(trainer))
        return repair_begins(planned_end(trainer), needed, self.extra_epochs)

    def _look(self, trainer: Any, pl_module: Any) -> None:
        """Measure, decide, drop, and choose the units that are reset when the next epoch begins."""
        with self._acting():
            self._look_at_all(trainer, pl_module)

    def _look_at_all(self, trainer: Any, pl_module: Any) -> None:
        began = time.monotonic()
        assert self._training_set is not None
        self._layers = find_layers(trainer, pl_module, self._training_set, self.residual_mode)
        if self._waits:  # it is due again after the next epoch
            return
        scan = UnitScan(self._training_set, self._layers, strong=self.strong, weak=self.weak)
        measured = scan.measure(trainer, pl_module)
        earlier = None if (keeps := self.samples == "keep") else self.verdict
        decision = judge_samples(measured, earlier, rule=self.rule, max_removed=self.max_removed)
        decision = trainer.strategy.broadcast(decision, src=0)  # float ties must not tell ranks apart
        series, training, right = self._series, self._in_training, measured.predicted == measured.labels
        treated = [past for past in self.history if past.units][-series.treated :] if series.treated else []
        where: dict[str, Any] = {"training": training, "drops": not keeps, "by_quota": self._by_quota}
        verdict, num_flagged_before_cap = judgement(
            decision, self.verdict, measured.labels, right, treated=treated, **where
        )
        before = torch.ones_like(verdict.keep) if self.verdict is None else self.verdict.keep
        removed = self._adopt(verdict)
        accuracy, flagged_label_rate = shares(measured.predicted, verdict, self._in_training)
        chosen: list[Chosen] = []
        anew = not treated and not keeps and (flagged_label_rate or 0.0) > STILL_OBEYED  # after a round that was undone
        if self._by_quota or removed or unfinished(treated) or anew:
            unit_shift = None if self._by_quota else scan.unit_shift(trainer, pl_module, ~verdict.keep)
            if unit_shift is not None and (frozen := frozen_layers(self._layers, unit_shift)):
                rank_zero_warn(
                    f"NONE: the removed images drive units of {', '.join(frozen)}, which do not learn (frozen, or in "
                    "no optimizer) and are not reset. The backdoor may stay: unfreeze them, or train anew without "
                    "`verdict.removed`."
                )
            found = choose_units(
                self._layers, measured.activation_excess, unit_shift, reset_fraction=self.reset_fraction
            )
            chosen = trainer.strategy.broadcast(found, src=0)
        series.last_look = trainer.current_epoch + 1
        end = planned_end(trainer)
        left = epochs_left(trainer, end, self.extra_epochs)
        units = tuple((self._layers[i].name, unit, label, score) for i, unit, label, score in chosen if left != 0)
        modes = tuple((mode.label, mode.standardized_gap) for mode in decision.subpopulations)
        told = Round(
            series.last_look,
            removed,
            num_flagged_before_cap,
            modes,
            units,
            measured.unconfident,
            accuracy,
            flagged_label_rate,
        )
        self.history.append(replace(told, shared=decision.all_to_all, no_room=bool(chosen) and left == 0))
        if units:
            series.begin(weights(trainer, pl_module), before, right)
            wanted_epochs = self.finetune_epochs or enough_epochs(trainer)
            epochs = wanted_epochs if left is None else min(wanted_epochs, left)
            beyond = end is not None and series.last_look + epochs > end
            ordinary = self.lr is None and end is not None and not beyond
            self._tuning.begin(trainer, epochs, self.lr, ordinary=ordinary, constant=self.paper_loop, beyond=beyond)
        self._tell(trainer, pl_module, time.monotonic() - began)

    def _reset(self, trainer: Any, pl_module: Any) -> None:
        """Reset the units that the last look chose; all that monitors or saves has seen the epoch before."""
        with self._acting():
            self._series.due = False
            places = {layer.name: place for place, layer in enumerate(self._layers)}
            chosen = [(places[name], unit, label, score) for name, unit, label, score in self.history[-1].units]
            seed = self.options.seed + len(self.history) * len(self._layers)
            optimizers = () if self.paper_loop else trainer.optimizers
            reset_chosen(self._layers, chosen, mode=self.reset, optimizers=optimizers, seed=seed)
            restart_averages(trainer, pl_module)

    def _judge(self, trainer: Any, pl_module: Any) -> None:
        """Compare with the model before the reset, and go back to it if this one is much worse."""
        series = self._series
        assert self._training_set is not None
        assert self.verdict is not None
        assert series.keep is not None
        with self._acting():
            predicted = self._training_set.predict(trainer, pl_module, description="NONE check")
            judged = self.history[-1].judged(predicted, self.verdict, series, self._in_training)
            if self.paper_loop:
                judged = replace(judged, undone=not is_finite(pl_module), readmitted=False)
            self.history[-1] = judged
            conclude(trainer, pl_module, series.before if judged.undone else None)
            series.end(trainer.current_epoch + 1, undone=judged.undone)
        self._treated_until = time.time()

    def _readmit(self) -> None:
        """Take samples of the last round back if it says so; not before the epoch ends, which has its validation yet.

        The number of batches of an epoch decides when Lightning validates.
        """
        if self.history[-1].readmitted:
            assert self.verdict is not None
            assert self._series.keep is not None
            with self._acting():
                self._adopt(readmission(self.verdict, self._series.keep))

    def _look_at_removed(self, trainer: Any, pl_module: Any) -> None:
        """At the end of training, see what the model makes of the samples that earlier rounds removed."""
        began, last = time.monotonic(), self.history[-1]
        assert self._training_set is not None
        assert self.verdict is not None
        with self._acting():
            predicted = self._training_set.predict(trainer, pl_module, description="NONE check")
            accuracy, flagged_label_rate = shares(predicted, self.verdict, self._in_training)
            done, gone = trainer.current_epoch + 1, int((~self.verdict.keep).sum())
            self._series.judged = done
            self.history.append(
                Round(done, 0, last.num_flagged_before_cap, (), (), (), accuracy, flagged_label_rate, again=gone)
            )
            self._tell(trainer, pl_module, time.monotonic() - began)

    def _tell(self, trainer: Any, pl_module: Any, seconds: float) -> None:
        """Log, print one sentence, and write the report of all rounds so far."""
        data, rounds = self._training_set, self.history
        assert data is not None
        assert self.verdict is not None
        removed, units = float(len(self.verdict.removed)), float(len(reset_units(rounds)))
        pl_module.log_dict({"backdoor/none/removed": removed, "backdoor/none/units_reset": units})
        last = rounds[-1]
        unsolved = (last.undone and not last.readmitted) or (last.removed and not last.units) or last.no_room
        (rank_zero_warn if unsolved else rank_zero_info)(f"NONE {sentence(rounds, len(data))}")
        shown = evidence(rounds, data, rule=self.rule, seconds=seconds, max_removed=self.max_removed)
        self._write_report(trainer, shown)
