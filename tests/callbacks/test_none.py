"""NONE in a Trainer: planted truth and its clean twin, silence until it acts, what it gives back."""

from __future__ import annotations

import math
import pickle
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as lightning_pytorch
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import TensorDataset

from lightning_backdoor import NONECallback, UltraCleanCallback, attacks
from lightning_backdoor.callbacks.unit_decision import decide_by_units
from lightning_backdoor.errors import ArgumentError, ModelError, TrainerError
from lightning_backdoor.events import Event
from lightning_backdoor.report.of_events import sentence
from lightning_backdoor.responses.reset_units import unfinished
from tests.callbacks.helpers import (
    LIGHTNING_WARNS,
    DigitNet,
    Net,
    Pictures,
    digits,
    fit,
    loader_of,
    make_trainer,
    poisoned_digits,
    same_state,
    share_right,
    state_of,
    train_digits,
    undefended,
)
from tests.callbacks.test_ultraclean_resume import SaveAll

pytestmark = [
    *LIGHTNING_WARNS,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:NONE after fine-tuning.* cost too much accuracy"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]


@pytest.fixture(scope="module")
def poisoned() -> Any:
    return poisoned_digits()


def test_finds_planted_poisons_resets_units_and_removes_the_backdoor(poisoned: Any) -> None:
    _, test = digits()
    attacked = attacks.triggered(test, attacks.BadNets(), target=0)
    plain = undefended(poisoned=True)
    assert share_right(plain, attacked) > 0.6, "the attack must work for the defence to have something to do"

    for extra_epochs, epochs, detected in ((6, 12, [6]), (0, 6, [3])):
        callback = NONECallback(extra_epochs=extra_epochs, rounds=1)
        trainer, module = train_digits(poisoned, [callback])
        truth, removed = poisoned.poisoned, ~callback.verdict.keep
        assert (removed & truth).sum() >= 0.9 * truth.sum()
        assert (removed & ~truth).sum() <= 0.01 * len(truth)
        assert share_right(module, attacked) < 0.1
        assert share_right(module, test) > share_right(plain, test) - 0.05
        assert [past.epochs for past in callback.history] == detected
        assert trainer.current_epoch == epochs, "six are planned"
        assert trainer.max_epochs == 6, "the user's limit is back"
    assert trainer.callback_metrics["backdoor/none/units_reset"] > 0


def test_removes_nothing_from_clean_data_and_the_training_is_bit_identical() -> None:
    train, _ = digits()
    callback = NONECallback()
    trainer, module = train_digits(train, [callback])
    assert same_state(undefended(poisoned=False), module)
    assert callback.verdict.keep.all()
    assert trainer.current_epoch == 6


def acting(**kwargs: Any) -> NONECallback:
    """NONE that drops samples and resets units, whatever the data look like."""
    return NONECallback(**{"rule": "paper", "finetune_epochs": 2, "extra_epochs": 20, **kwargs})


class Moments(pl.Callback):
    """Weights before every epoch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(state_of(pl_module))


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    return max(float((after[name] - value).abs().max()) for name, value in before.items() if value.is_floating_point())


def test_fine_tunes_beyond_the_plan_on_what_is_kept_and_gives_everything_back() -> None:
    callback = acting(lr=1e-30)
    moments = Moments()
    trainer, module = fit([callback, moments])
    kept = callback.verdict.keep.nonzero().flatten().tolist()
    assert 0 < 64 - len(kept) <= 0.3 * 64
    assert [(epoch, positions == kept) for epoch, positions in module.epochs()][4:] == [(4, True), (5, True)]
    assert module.epochs()[3][1] == list(range(64))
    before = {name: moments.weights[4][name] for name, _ in module.named_parameters()}
    assert moved(before, state_of(module)) < 1e-20, "a rate of 1e-30"
    assert moved(moments.weights[3], moments.weights[4]) > 0
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.7**4)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4, "the schedule waited at its end"
    assert trainer.lr_scheduler_configs[0].frequency == 1
    assert all(part.training for part in module.modules())
    assert trainer.max_epochs == 4


@pytest.mark.case("64")
def test_the_rate_of_the_phase_is_in_the_optimizer_during_steps_alone() -> None:
    seen: list[float] = []
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # from now on hooks run within the base's step as well

    class Rates(torch.optim.SGD):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(self.param_groups[0]["lr"])
            return super().step(*args, **kwargs)

    class WithRates(Net):
        def configure_optimizers(self) -> Any:
            return Rates(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    between: list[float] = []

    class Between(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            between.append(trainer.optimizers[0].param_groups[0]["lr"])

    make_trainer([acting(lr=0.08), Between()], 2).fit(WithRates(), loader_of(Pictures()))
    steps = [rate for rate in seen if rate != 0.1]
    assert seen[: len(seen) - len(steps)] == [0.1] * 8
    assert steps == pytest.approx([0.08 * (1 - i / len(steps)) for i in range(len(steps))])
    assert set(between) == {0.1}, "as schedulers and monitors see it"


def test_inside_the_plan_schedules_go_on_and_training_does_not_get_longer() -> None:
    callback = acting(warmup_epochs=1, finetune_epochs=1)
    trainer, module = fit([callback])
    assert trainer.current_epoch == 4
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4
    assert [len(positions) for _, positions in module.epochs()] == [64] + 3 * [int(callback.verdict.keep.sum())]


@pytest.mark.parametrize("paper_loop", [False, True])
def test_batch_norms_learn_and_their_statistics_go_on_but_in_the_authors_loop(paper_loop: bool) -> None:
    moments = Moments()
    _, module = fit([acting(paper_loop=paper_loop), moments])
    before, after = moments.weights[4], state_of(module)
    assert torch.equal(before["body.1.running_mean"], after["body.1.running_mean"]) is paper_loop
    assert torch.equal(before["body.1.num_batches_tracked"], after["body.1.num_batches_tracked"]) is paper_loop
    assert not torch.equal(before["body.1.weight"], after["body.1.weight"])


def test_a_round_that_does_harm_is_undone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, undefended = fit([])
    monkeypatch.setattr("lightning_backdoor.responses.reset_units.MAX_LOSS", -2.0)
    callback = acting(rounds=3, report_dir=tmp_path)
    with pytest.warns(UserWarning, match="the backdoor may still be there"):
        _, module = fit([callback])
    assert same_state(undefended, module)
    assert [past.undone for past in callback.history] == [True]
    assert "cost too much accuracy" in (tmp_path / "report.html").read_text()


def test_a_round_that_costs_accuracy_goes_on_in_the_place_of_those_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _, undefended = fit([], epochs=1)
    monkeypatch.setattr("lightning_backdoor.responses.reset_units.MAX_LOSS", -2.0)
    callback = acting(rounds=3, finetune_epochs=1, extra_epochs=2)
    with pytest.warns(UserWarning, match="the backdoor may still be there"):
        _, module = fit([callback], epochs=2)
    assert [epoch for epoch, _ in module.epochs()] == [0, 1, 2, 3], "two epochs beyond the plan"
    assert [(past.epochs, past.undone) for past in callback.history] == [(1, True)]
    assert same_state(undefended, module)


def test_rounds_follow_each_other() -> None:
    callback = acting(rounds=2, finetune_epochs=1)
    trainer, _ = fit([callback], epochs=2)
    assert [past.epochs for past in callback.history] == [2, 3]
    assert all(len(past.accuracies) == 2 for past in callback.history)
    assert trainer.current_epoch == 4


def test_natural_mode_keeps_the_data_and_resets_units() -> None:
    callback = NONECallback(samples="keep", finetune_epochs=1)
    _, module = fit([callback])
    assert callback.verdict.keep.all()
    assert callback.verdict.threshold == math.inf
    assert [len(past.units) for past in callback.history] == [1]
    assert module.epochs()[-1][1] == list(range(64))


def lightning_net() -> Any:
    plain = Net()

    class Twin(lightning_pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = plain.body, plain.head

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(images.float() / 255).flatten(1))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch["image"]), batch["label"])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Twin()


def test_averaged_weights_start_again_from_the_treated_model() -> None:
    class Average(pl.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.average = AveragedModel(pl_module)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.average.update_parameters(pl_module)

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.counts.append(int(self.average.n_averaged))

    average = Average()
    average.counts = []
    _, module = fit([average, acting(finetune_epochs=2)])
    assert average.counts == [0, 4, 8, 12, 16, 3], "again after the reset, which the fifth epoch begins with"
    assert same_state(average.average.module, module), "and again from the model that was judged"


def test_the_report_lists_the_units(tmp_path: Path) -> None:
    callback = acting(report_dir=tmp_path)
    fit([callback])
    page = (tmp_path / "report.html").read_text()
    layer, unit, *_ = callback.history[0].units[0]
    assert "Units that were reset" in page
    assert "units of 1 layers were reset, and the model was fine-tuned" in page
    assert f"<td>{layer}</td>" in page
    assert re.search(rf"<td[^>]*>{unit}</td>", page)


def test_manual_optimization_is_refused_before_anything_happens() -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(TrainerError, match="automatic_optimization = False"):
        make_trainer([acting()]).fit(Manual(), loader_of(Pictures()))


def test_a_frozen_backbone_has_nothing_to_reset() -> None:
    module = Net()
    module.body.requires_grad_(False)
    with pytest.raises(ModelError, match="Unfreeze some layers"):
        make_trainer([acting()]).fit(module, loader_of(Pictures()))


def test_a_model_without_units_is_refused() -> None:
    class Linear(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Flatten(), nn.Linear(192, 4)

    with pytest.raises(ModelError, match="can be reset"):
        make_trainer([acting()]).fit(Linear(), loader_of(Pictures()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0.0},
        {"rounds": 0},
        {"reset_fraction": 5},
        {"finetune_epochs": 0},
        {"samples": "remove"},
        {"rule": "jenks"},
        {"response": "heal"},
    ],
)
def test_wrong_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"`{next(iter(wrong))}` must be"):
        NONECallback(**wrong)


def test_representation_and_pickling() -> None:
    assert repr(NONECallback(rounds=2, lr=0.1)) == "NONECallback(rounds=2, lr=0.1)"
    assert NONECallback.from_paper().rule == "paper"
    callback = acting()
    fit([callback])
    again = pickle.loads(pickle.dumps(callback))
    assert torch.equal(again.verdict.keep, callback.verdict.keep)
    assert again.history == callback.history


class SaveInEpoch(SaveAll):
    """A checkpoint after the second batch of every epoch."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.save(trainer, "batch")


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended")
def test_a_run_that_is_resumed_within_an_epoch_of_fine_tuning_keeps_its_rate(tmp_path: Path) -> None:
    class Rates(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int, float]] = []

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            where = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx
            self.seen.append((*where, optimizer.param_groups[0]["lr"]))

    saver, plain = SaveInEpoch(tmp_path), Rates()
    fit([acting(), saver, plain])
    path = next(path for path in saver.paths if path.name.endswith("batch-4.ckpt"))
    again = Rates()
    trainer, _ = fit([acting(), again], ckpt=path)
    rates = {(epoch, batch): rate for epoch, batch, rate in plain.seen}
    assert again.seen[0][:2] == (4, 2)
    assert all(rate == rates[epoch, batch] for epoch, batch, rate in again.seen)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 4


@pytest.mark.parametrize("warmup_epochs", [None, 1, 3])
def test_a_one_cycle_schedule_is_not_asked_to_go_beyond_its_end(warmup_epochs: int | None) -> None:
    class Cycle(Net):
        def configure_optimizers(self) -> Any:
            sgd = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
            cycle = torch.optim.lr_scheduler.OneCycleLR(sgd, 0.05, total_steps=16)
            return {"optimizer": sgd, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    torch.manual_seed(0)
    trainer = make_trainer([acting(warmup_epochs=warmup_epochs, finetune_epochs=3)], 4)
    trainer.fit(Cycle(), loader_of(Pictures()))
    assert trainer.current_epoch == {None: 7, 1: 4, 3: 6}[warmup_epochs]


def test_limits_by_steps_early_stopping_and_accumulation() -> None:
    trainer, _ = fit([acting(finetune_epochs=1)], epochs=None, max_steps=6)
    assert trainer.global_step > 6
    assert trainer.max_steps == 6
    stopping = pl.callbacks.EarlyStopping("loss", patience=1, min_delta=100.0, check_on_train_epoch_end=True)
    callback = acting(finetune_epochs=1)
    trainer, _ = fit([callback, stopping], epochs=20, accumulate_grad_batches=2, gradient_clip_val=1.0)
    assert [past.epochs for past in callback.history] == [2]
    assert trainer.current_epoch == 3


def test_more_rounds_without_a_finding_do_nothing(poisoned: Any) -> None:
    callback = NONECallback(rounds=3, extra_epochs=20)
    trainer, _ = train_digits(poisoned, [callback])
    assert [bool(past.units) for past in callback.history] == [True, False]
    epochs = trainer.current_epoch
    trainer, _ = train_digits(poisoned, [callback])
    assert [past.units for past in callback.history] == [()], "a second fit trains on what is kept"
    assert trainer.current_epoch == 6 < epochs


class Steps(pl.Callback):
    """Learning rate and size of the momentum of every step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []
        self.momentum: list[list[torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append((trainer.current_epoch, optimizer.param_groups[0]["lr"]))
        self.momentum.append([state["momentum_buffer"].clone() for state in optimizer.state.values()])


@pytest.mark.parametrize("paper_loop", [True, False])
def test_the_authors_fine_tuning_is_not_bounded(paper_loop: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_backdoor.responses.reset_units.MAX_LOSS", -1.0)  # every round costs too much
    callback, steps = NONECallback.from_paper(finetune_epochs=2, paper_loop=paper_loop), Steps()
    trainer, _ = fit([callback, steps], epochs=2)
    (told,) = callback.history
    assert (told.undone, trainer.current_epoch) == (not paper_loop, 4)
    assert told.units
    first = next(i for i, (epoch, _) in enumerate(steps.seen) if epoch == 2)
    before, after = steps.momentum[first - 1 : first + 1]
    cleared = any(bool(((old != 0) & (new == 0)).any()) for old, new in zip(before, after, strict=True))
    assert cleared == (not paper_loop), "what the optimizer remembers of the reset weights"


def test_the_papers_cut_is_the_natural_break_alone() -> None:
    paper = NONECallback.from_paper()
    scores = torch.cat([torch.randn(10), 100 + torch.randn(90)])
    measured = SimpleNamespace(raw_bias=scores, labels=torch.zeros(100, dtype=torch.long))
    decision = decide_by_units(measured, None, rule="paper", max_removed=paper.max_removed)
    assert torch.equal(decision.keep, scores < 50)
    assert decision.rule == "natural_break"
    assert repr(eval(repr(paper))) == repr(paper)  # our own text


@pytest.mark.parametrize("first_of_two", [UltraCleanCallback, NONECallback])
def test_none_leaves_a_model_alone_that_ultraclean_has_trained_anew(first_of_two: type) -> None:
    both = UltraCleanCallback(), NONECallback(extra_epochs=20)
    ordered = sorted(both, key=lambda callback: not isinstance(callback, first_of_two))
    trainer, _ = train_digits(poisoned_digits(1400), ordered, epochs=8)
    assert len(both[0].verdict.removed) == 70
    assert [len(past.units) for past in both[1].history] == [0]
    assert trainer.current_epoch == 8


def test_classes_of_two_kinds_lose_no_more_in_later_rounds() -> None:
    train, _ = digits()
    images, labels = train.tensors
    callback = NONECallback(extra_epochs=20)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "NONE ends with a model")
        train_digits(TensorDataset(images, labels % 5), [callback])
    removed = [past.removed for past in callback.history]
    assert sum(removed[1:]) == 0
    if removed[0]:  # with so few images a kind may be taken for a backdoor, which its labels contradict
        assert "may be clean images of one kind" in sentence(callback.history[:1], 700)


def test_a_round_of_the_warm_up_that_was_undone_is_not_the_last_detection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_backdoor.responses.reset_units.MAX_LOSS", -2.0)
    callback = acting(warmup_epochs=1, finetune_epochs=1)
    fit([callback])
    assert [(past.epochs, past.undone) for past in callback.history] == [(1, True), (4, True)]


def test_what_is_left_from_before_a_rewind_resets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class AfterRewind(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                round_ = {"units": (("body.0", 0, 0, 1.0),), "accuracies": (0.9, 0.9), "undone_steps": (False,)}
                callback._procedure.history = [
                    Event(6, 0, 0, response="reset", flagged_label_rates=(1.0, 0.3), **round_)
                ]
                callback._procedure._last_detection, callback._procedure.response._rounds_done = 9, 1

    train, _ = digits()
    callback = NONECallback()
    _, module = train_digits(train, [AfterRewind(), callback])
    assert callback.history[-1].units == ()
    assert same_state(undefended(poisoned=False), module)


def test_goes_on_for_three_rounds_by_itself_unless_it_resets_by_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_backdoor.responses.reset_units.unfinished", bool)
    monkeypatch.setattr("lightning_backdoor.responses.reset_units.MAX_LOSS", 2.0)
    for settings, rounds in (({}, 3), ({"rounds": 1}, 1), ({"rule": "paper"}, 1), ({"samples": "keep"}, 1)):
        callback = NONECallback(finetune_epochs=1, extra_epochs=20, **settings)
        if callback.rule == "auto" and callback.samples == "auto":
            train_digits(poisoned_digits(), [callback])
        else:  # acts whatever the data look like
            fit([callback], epochs=1)
        assert [bool(past.units) for past in callback.history] == [True] * rounds, settings


def test_an_average_of_a_part_of_the_model_starts_again_too() -> None:
    class WithAverage(Net):
        def __init__(self) -> None:
            super().__init__()
            self.average = AveragedModel(self.body)

        def on_train_batch_end(self, *args: Any) -> None:
            self.average.update_parameters(self.body)

    module = WithAverage()
    make_trainer([acting(finetune_epochs=1)], 2).fit(module, loader_of(Pictures()))
    assert int(module.average.n_averaged) == 1, "the first update after the round was judged"
    assert same_state(module.average.module, module.body)


def test_undoing_inside_the_plan_leaves_the_schedule_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_backdoor.responses.reset_units.MAX_LOSS", -2.0)
    trainer, _ = fit([acting(warmup_epochs=1, finetune_epochs=1)])
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.7**4)


def test_units_that_no_optimizer_trains_are_left_alone() -> None:
    class HeadOnly(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.head.parameters(), lr=0.05)

    with pytest.raises(ModelError, match="in no optimizer"):
        make_trainer([acting()]).fit(HeadOnly(), loader_of(Pictures()))


def test_what_cannot_be_extended_is_refused() -> None:
    with pytest.raises(TrainerError, match="StochasticWeightAveraging"):
        fit([acting(), pl.callbacks.StochasticWeightAveraging(0.1)])


@pytest.mark.case("64")
def test_a_step_that_fails_leaves_the_users_rate() -> None:
    class Failing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.current_epoch == 4:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    trainer = make_trainer([acting()])
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(Failing(), loader_of(Pictures()))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.7**4)
    assert trainer.max_epochs == 4


def test_training_that_ends_without_a_detection_says_so() -> None:
    class Stops(Net):
        def on_train_epoch_end(self) -> None:
            self.trainer.should_stop = True

    with pytest.warns(UserWarning, match="Pass `warmup_epochs`"):
        make_trainer([acting()]).fit(Stops(), loader_of(Pictures()))


def test_a_best_checkpoint_from_before_the_reset_is_warned_of(tmp_path: Path) -> None:
    best, callback = (
        pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1),
        acting(rounds=3, finetune_epochs=1),
    )
    for _ in range(2):
        with pytest.warns(
            UserWarning, match="may hold the backdoor, whatever their score: .*ckpt. Use the last one"
        ) as told:
            fit([best, callback], val=Pictures(seed=1), enable_checkpointing=True)
        assert len(callback.history) == 3
        assert len([warning for warning in told if "may hold the backdoor" in str(warning.message)]) == 1, "in a fit"
    fit([pl.callbacks.ModelCheckpoint(tmp_path / "last"), acting(finetune_epochs=1)], enable_checkpointing=True)


class Trained(pl.Callback):
    """A copy of the model after some epochs, before NONE acts on it: training is the user's own until then."""

    def __init__(self, epochs: int) -> None:
        self.epochs, self.model = epochs, DigitNet()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch + 1 == self.epochs:
            self.model.load_state_dict(pl_module.state_dict())


def test_an_all_to_all_backdoor_is_found_and_weakened() -> None:
    train, test = digits(1400)
    poisoned = attacks.poison(train, attacks.BadNets(), rate=0.1, labels="all_to_all")
    attacked = attacks.triggered(test, attacks.BadNets(), labels="all_to_all")
    callback, before = NONECallback(extra_epochs=20), Trained(epochs=12)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "NONE ends with a model")  # a tenth of the images, give or take a few
        _, module = train_digits(poisoned, [before, callback], epochs=12)
    assert share_right(before.model, attacked) > 0.6
    truth, removed = poisoned.poisoned, ~callback.verdict.keep
    assert callback.verdict.rule.startswith("subpopulation(all_to_all: ")
    assert (removed & truth).sum() >= 0.9 * truth.sum()
    assert (removed & ~truth).sum() <= 0.01 * len(truth)
    first, second, *_ = callback.history
    assert unfinished([first]), "one round is not enough"
    assert second.units
    assert second.removed == 0
    flagged_label_rate = [past.flagged_label_rates[-1] for past in callback.history if past.units]
    assert flagged_label_rate[-1] < flagged_label_rate[0]
    assert share_right(module, attacked) < 0.2
    assert share_right(module, test) > share_right(before.model, test) - 0.05


def test_an_innocent_mark_in_every_label_costs_no_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found where the images are not tested for what they look like, and withdrawn after a round."""
    monkeypatch.setattr("lightning_backdoor.detection.subpopulations.wrong_labels_p_value", lambda *_: 0.0)
    train, _ = digits(1400)
    marked = attacks.poison(train, attacks.BadNets(), rate=0.1, labels="all_to_all")
    images = torch.stack([marked[i][0] for i in range(len(marked))])
    innocent = TensorDataset(images, train.tensors[1])  # the marks of the attack beside the true labels
    _, plain = train_digits(innocent, [], epochs=8)
    callback = NONECallback(report_dir=tmp_path, extra_epochs=20)
    trainer, module = train_digits(innocent, [callback], epochs=8)
    assert callback.verdict.keep.all()
    assert callback.verdict.rule.endswith("reassigned")
    assert same_state(plain, module)
    assert trainer.callback_metrics["backdoor/none/removed"] == 0
    page = (tmp_path / "report.html").read_text()
    assert "had seen" in page or "having seen" in page
    assert "the limit was reached" not in page
    assert "cost too much" not in page
