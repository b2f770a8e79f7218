"""A restart of the fit: counters, optimizer, schedule, other callbacks; on the kept images alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_backdoor import UltraCleanCallback
from lightning_backdoor.callbacks.ultraclean import DenoisedFeatures
from lightning_backdoor.errors import TrainerError
from tests.callbacks.helpers import (
    LIGHTNING_WARNS,
    FirstBatches,
    Net,
    Pictures,
    always,
    fit,
    loader_of,
    make_trainer,
    same_state,
)

pytestmark = LIGHTNING_WARNS


def epochs_before_and_after(module: Net, warmup: int) -> tuple[list[Any], list[Any]]:
    epochs = module.epochs()
    return epochs[:warmup], epochs[warmup:]


def assert_trained_anew(callback: UltraCleanCallback, module: Net, warmup: int, epochs: int) -> None:
    """Every image in the warm-up; then each kept one exactly once in each of ``epochs`` epochs counted from 0."""
    before, after = epochs_before_and_after(module, warmup)
    kept = callback.verdict.keep.nonzero().flatten().tolist()
    assert before == [(epoch, list(range(64))) for epoch in range(warmup)]
    assert after == [(epoch, kept) for epoch in range(epochs)]


def test_counts_epochs_and_steps_from_zero_and_trains_all_of_them_on_the_kept_images() -> None:
    digest, callback = FirstBatches(), always()
    trainer, module = fit([callback, digest], epochs=3, val=Pictures(seed=1))
    assert_trained_anew(callback, module, warmup=2, epochs=3)
    fresh, again = digest.seen
    assert again["step"] == fresh["step"] == 0
    assert again["momentum"] == fresh["momentum"] == 0
    assert again["schedule"] == fresh["schedule"]
    assert same_state(fresh["weights"], again["weights"])
    assert trainer.current_epoch == 3
    assert trainer.global_step == 3 * 3, "48 images in batches of 16"
    assert trainer.max_epochs == 3
    assert module.rates[-9:] == pytest.approx([0.05 * 0.7**epoch for epoch in range(3) for _ in range(3)])


@pytest.mark.parametrize("warmup", [None, 2, 3, 99])
def test_a_warmup_up_to_the_end_still_scans_and_starts_again(warmup: int | None) -> None:
    callback = always(warmup_epochs=warmup)
    _, module = fit([callback], epochs=3)
    assert_trained_anew(callback, module, warmup=min(warmup or 2, 3), epochs=3)


def test_a_single_epoch() -> None:
    callback = always(warmup_epochs=None)
    trainer, module = fit([callback], epochs=1)
    assert_trained_anew(callback, module, warmup=1, epochs=1)
    assert trainer.current_epoch == 1


def test_max_steps_bound_the_second_run_too() -> None:
    callback = always(warmup_epochs=None)
    trainer, module = fit([callback], epochs=-1, max_steps=12)
    assert trainer.global_step == trainer.max_steps == 12
    assert_trained_anew(callback, module, warmup=3, epochs=4)


def test_unbounded_training_is_bounded_by_the_user_again() -> None:
    callback = always(warmup_epochs=1)
    trainer, module = fit([callback], epochs=2, min_epochs=1, max_steps=100)
    assert (trainer.min_epochs, trainer.max_epochs, trainer.max_steps) == (1, 2, 100)
    assert_trained_anew(callback, module, warmup=1, epochs=2)


class StopAt(pl.Callback):
    """Asks the Trainer to stop in the given epoch of the first run."""

    def __init__(self, epoch: int) -> None:
        self.epoch, self.done = epoch, list[bool]()  # a restart gives numbers back

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, i: int) -> None:
        if trainer.current_epoch == self.epoch and not self.done:
            trainer.should_stop = True
            self.done.append(True)


def test_a_stop_during_the_warmup_brings_the_scan_forward() -> None:
    callback = always(warmup_epochs=5)
    trainer, module = fit([callback, StopAt(1)], epochs=6)
    after = module.epochs()[2:]
    assert callback.verdict is not None
    assert [epoch for epoch, _ in after] == list(range(6))
    assert trainer.current_epoch == 6


@pytest.mark.parametrize("on_train_epoch_end", [True, False])
def test_early_stopping_in_the_warmup_brings_the_scan_forward_and_is_forgotten(on_train_epoch_end: bool) -> None:
    class Stuck(Net):
        """A monitored value that never improves."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("stuck", 1.0, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("stuck_val", 1.0)

    monitor = "stuck" if on_train_epoch_end else "stuck_val"
    stopping = EarlyStopping(monitor, patience=2, check_on_train_epoch_end=on_train_epoch_end)
    callback = always(warmup_epochs=8)
    module, trainer = Stuck(), make_trainer([callback, stopping], 9)
    trainer.fit(module, loader_of(Pictures()), loader_of(Pictures(seed=1)))
    assert_trained_anew(callback, module, warmup=3, epochs=3)
    assert stopping.stopped_epoch == 2
    assert trainer.current_epoch == 3


def test_checkpoints_of_the_warmup_are_forgotten(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, monitor="loss", save_top_k=1, save_last=True, filename="{epoch}")
    callback = always()
    _, module = fit([callback, keeper], epochs=3, enable_checkpointing=True)
    best = torch.load(keeper.best_model_path, weights_only=True)
    assert not bool(best["callbacks"][callback.state_key]["verdict"]["keep"].all())
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert same_state(last["state_dict"], module), "last.ckpt must be the model of the second run"
    assert [path.name for path in tmp_path.glob("last*")] == ["last.ckpt"]


class Average(pl.Callback):
    """Exponential moving average as users write it: no state of its own in checkpoints."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.average = AveragedModel(pl_module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.average.update_parameters(pl_module)
        self.counts.append(int(self.average.n_averaged))


def test_averaged_weights_start_again() -> None:
    callback, average = always(), Average()
    fit([average, callback], epochs=2)
    assert average.counts == [*range(1, 9), *range(1, 7)]


def test_lightnings_own_average_starts_again() -> None:
    averaging = pytest.importorskip("pytorch_lightning.callbacks.weight_averaging")
    average, callback = averaging.EMAWeightAveraging(decay=0.5), always(fraction=0.25)
    fit([average, callback], epochs=2)
    assert int(average._average_model.n_averaged) == 6


def test_other_callbacks_see_the_new_epoch_numbers() -> None:
    accumulation = GradientAccumulationScheduler({0: 1, 1: 2})
    callback = always()
    trainer, _ = fit([accumulation, callback], epochs=3)
    assert trainer.global_step == 3 + 2 + 2, "epoch 0 steps on each of 3 batches, later ones on every second and last"


def test_a_schedule_that_reads_the_epoch_number() -> None:
    class Timm(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = CosineLRScheduler(optimizer, t_initial=4, warmup_t=1, warmup_lr_init=0.01)
            return [optimizer], [{"scheduler": schedule, "interval": "epoch"}]

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step(epoch=self.current_epoch + 1)

    plain, cleansed = Timm(), Timm()
    make_trainer([], 4).fit(plain, loader_of(Pictures()))
    make_trainer([always()], 4).fit(cleansed, loader_of(Pictures()))
    assert cleansed.rates[8::3] == pytest.approx(plain.rates[::4])


def test_one_cycle_does_not_run_over() -> None:
    class Cycle(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            steps = int(self.trainer.estimated_stepping_batches)
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
            return [optimizer], [{"scheduler": cycle, "interval": "step"}]

    module = Cycle()
    make_trainer([always(warmup_epochs=4)], 4).fit(module, loader_of(Pictures()))
    assert module.rates[16:] == pytest.approx(module.rates[:12])


def test_without_restart_training_goes_on() -> None:
    digest, callback = FirstBatches(), always(response="continue")
    trainer, module = fit([callback, digest], epochs=4)
    kept = callback.verdict.keep.nonzero().flatten().tolist()
    assert len(digest.seen) == 1
    assert [epoch for epoch, _ in module.epochs()] == [0, 1, 2, 3]
    assert [positions for _, positions in module.epochs()][2:] == [kept, kept]
    assert trainer.global_step == 2 * 4 + 2 * 3


def test_validation_goes_on_after_a_restart() -> None:
    class Counts(Net):
        validated: list[int]

        def on_validation_epoch_end(self) -> None:
            self.validated.append(self.current_epoch)

    module = Counts()
    module.validated = []
    make_trainer([always()], 3).fit(module, loader_of(Pictures()), loader_of(Pictures(seed=1)))
    assert module.validated == [0, 1, 0, 1, 2]


@pytest.mark.case("15")
@pytest.mark.parametrize("warmup", [3, 4])
def test_data_are_reloaded_in_the_epochs_in_which_a_new_run_does(warmup: int) -> None:
    class Reloads(Net):
        def __init__(self) -> None:
            super().__init__()
            self.train_loads: list[int] = []
            self.val_loads: list[int] = []

        def train_dataloader(self) -> Any:
            self.train_loads.append(self.current_epoch)
            return loader_of(Pictures())

        def val_dataloader(self) -> Any:
            self.val_loads.append(self.current_epoch)
            return loader_of(Pictures(seed=1))

    alone, module, callback = Reloads(), Reloads(), always(warmup_epochs=warmup)
    make_trainer([], 5, reload_dataloaders_every_n_epochs=2).fit(alone)
    trainer = make_trainer([callback], 5, reload_dataloaders_every_n_epochs=2)
    trainer.fit(module)
    assert alone.train_loads == alone.val_loads == [0, 2, 4]
    assert module.train_loads == [epoch for epoch in alone.train_loads if epoch <= warmup] + alone.train_loads
    assert module.val_loads == [epoch for epoch in alone.val_loads if epoch < warmup] + alone.val_loads
    assert_trained_anew(callback, module, warmup=warmup, epochs=5)


@pytest.mark.parametrize("workers", [1])
def test_workers_that_fetched_ahead_draw_no_removed_image(workers: int) -> None:
    callback, module = always(), Net()
    loader = loader_of(Pictures(), num_workers=workers, persistent_workers=True, prefetch_factor=4)
    make_trainer([callback], 2).fit(module, loader)
    assert_trained_anew(callback, module, warmup=2, epochs=2)


def test_a_time_limit_is_refused() -> None:
    with pytest.raises(TrainerError, match=r'max_time.*must be left out.*response="continue"'):
        fit([always()], max_time="00:01:00:00")
    callback = always(response="continue")
    fit([callback], max_time="00:01:00:00")
    assert callback.verdict is not None


def test_an_interrupted_fit_leaves_the_limits_and_a_second_fit_starts_fresh() -> None:
    class Fails(pl.Callback):
        armed = True

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1 and self.armed:
                self.armed = False
                raise ValueError("the cable")

    callback, fails = always(), Fails()
    trainer, module = make_trainer([callback, fails], 3), Net()
    with pytest.raises(ValueError, match="the cable"):
        trainer.fit(module, loader_of(Pictures()))
    assert trainer.max_epochs == 3
    torch.manual_seed(7)
    other, digest = Net(), FirstBatches()
    trainer = make_trainer([callback, digest], 3)
    trainer.fit(other, loader_of(Pictures()))
    assert same_state(digest.seen[0]["weights"], digest.seen[1]["weights"]), "of the second model, not the first"
    assert_trained_anew(callback, other, warmup=2, epochs=3)


def test_a_step_number_that_was_saved_in_the_warmup_is_saved_again(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, every_n_train_steps=12, save_top_k=-1)
    _, module = fit([always(warmup_epochs=3), keeper], epochs=4, enable_checkpointing=True)
    assert {path.name for path in tmp_path.glob("*")} == {"epoch=2-step=12.ckpt", "epoch=3-step=12.ckpt"}
    assert same_state(torch.load(tmp_path / "epoch=3-step=12.ckpt", weights_only=True)["state_dict"], module)


def test_a_second_restart_goes_back_to_the_same_start(tmp_path: Path) -> None:
    keeper, digest = ModelCheckpoint(tmp_path, monitor="loss", save_top_k=-1), FirstBatches()

    class Growing(DenoisedFeatures):
        """Flags a little more at the second scan."""

        def decide(self, found: Any, old: Any) -> Any:
            self._fraction = 0.125 if old is None else 0.25
            return super().decide(found, old)

    callback = always(rescore_every=1)
    callback._procedure.detector = Growing()
    fit([callback, keeper, digest], epochs=3, enable_checkpointing=True)
    assert len(callback.verdict.removed) == 16
    assert len(digest.seen) == 3
    assert all(same_state(digest.seen[0]["weights"], again["weights"]) for again in digest.seen)
    assert all(again["momentum"] == 0 for again in digest.seen)
    assert len(keeper.best_k_models) == 3, "of the last three epochs alone"


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start", "on_train_batch_start"])
@pytest.mark.parametrize("saves", [False, True], ids=["in no checkpoint", "in checkpoints"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_an_average_by_hand_goes_back_to_the_start(hook: str, saves: bool, first: bool) -> None:
    trail: list[dict[str, Tensor]] = []  # out of the callback's sight: weights of the run, from its start on

    class HandMade(pl.Callback):
        def __init__(self) -> None:
            self.shadow: dict[str, Tensor] = {}

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            trail.append(weights_of(pl_module))
            for name, value in pl_module.named_parameters():
                self.shadow[name] = self.shadow[name].lerp(value.detach(), 0.1)

    class Trail(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == batch_idx == 0:
                trail[:] = [weights_of(pl_module)]

    def begin(self: Any, trainer: Any, pl_module: Any, *rest: Any, **named: Any) -> None:
        if not self.shadow:
            self.shadow = weights_of(pl_module)

    setattr(HandMade, hook, begin)
    if saves:
        HandMade.state_dict = lambda self: {"shadow": dict(self.shadow)}
        HandMade.load_state_dict = lambda self, state: setattr(self, "shadow", state["shadow"])
    average, callback = HandMade(), always()
    fit([Trail(), average, callback] if first else [Trail(), callback, average], epochs=3)
    assert len(trail) == 1 + 3 * 3
    expected, *then = trail
    for weights in then:
        expected = {name: value.lerp(weights[name], 0.1) for name, value in expected.items()}
    assert all(torch.equal(value, expected[name]) for name, value in average.shadow.items())


def weights_of(module: Net) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@pytest.mark.parametrize("keeps", [True, False])
def test_the_best_weights_of_a_callback_keep_their_score_and_are_named(keeps: bool, recwarn: Any) -> None:
    class Best(pl.Callback):
        score, weights = float("inf"), None

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if keeps and trainer.callback_metrics["val_loss"] < self.score:
                self.score, self.weights = float(trainer.callback_metrics["val_loss"]), weights_of(pl_module)
                seen.append((self.score, weights_of(pl_module)))

    seen: list[tuple[float, dict[str, Tensor]]] = []
    best = Best()
    fit([best, always()], epochs=3, val=Pictures(seed=1))
    told = [str(w.message) for w in recwarn if "copies of the model's weights" in str(w.message)]
    assert len(told) == keeps
    if keeps:
        assert told[0].startswith("`Best.weights`: ")
        assert best.score == seen[-1][0]
        assert all(torch.equal(value, seen[-1][1][name]) for name, value in best.weights.items())
