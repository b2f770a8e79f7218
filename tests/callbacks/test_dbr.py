"""D-BR in a Trainer: planted truth and its clean twin, order and sign of its steps, what it gives back."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_backdoor import DBRCallback, NONECallback, Verdict, attacks
from lightning_backdoor.callbacks.consistency import detection_of
from lightning_backdoor.callbacks.unit_decision import decide_by_units
from lightning_backdoor.errors import ArgumentError, DataError, ModelError, TrainerError
from lightning_backdoor.responses import Unlearn
from lightning_backdoor.responses.unlearn import split_of
from lightning_backdoor.scanning.measure_fct import Distinguished
from lightning_backdoor.scanning.measure_units import Measured, UnitScan
from tests.callbacks.helpers import (
    LIGHTNING_WARNS,
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
from tests.callbacks.test_ultraclean_resume import SaveAll, run

pytestmark = [
    pytest.mark.filterwarnings("ignore:D-BR ends with a model"),  # it unlearns images whose labels are true here
    *LIGHTNING_WARNS,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]


@pytest.fixture(scope="module")
def poisoned() -> Any:
    return poisoned_digits()


def test_finds_planted_poisons_and_removes_the_backdoor(poisoned: Any, tmp_path: Path) -> None:
    _, test = digits()
    attacked = attacks.triggered(test, attacks.BadNets(), target=0)
    plain = undefended(poisoned=True)
    assert share_right(plain, attacked) > 0.6, "the attack must work for the defence to have something to do"

    callback = DBRCallback(report_dir=tmp_path, extra_epochs=10)
    trainer, module = train_digits(poisoned, [callback])

    truth, verdict = poisoned.poisoned, callback.verdict
    assert (verdict.suspect & truth).sum() >= 0.9 * truth.sum()
    assert (verdict.suspect & ~truth).sum() <= 0.01 * len(truth)
    assert torch.equal(verdict.suspect, ~verdict.keep)
    assert not (verdict.trusted & truth).any()
    assert set(verdict.labels[verdict.trusted].tolist()) == set(range(10))
    assert share_right(module, attacked) < 0.15
    assert share_right(module, test) > share_right(plain, test) - 0.02
    assert trainer.current_epoch == 6 + len(callback.history[-1].undone_steps)
    assert trainer.max_epochs == 6, "the user's limit is back"
    assert trainer.callback_metrics["backdoor/dbr/removed"] == verdict.suspect.sum()
    page = (tmp_path / "report.html").read_text()
    assert "D-BR report" in page
    assert "The model was repaired" in page


def test_removes_nothing_from_clean_data_and_the_training_is_bit_identical() -> None:
    train, _ = digits()
    callback = DBRCallback(detector_steps=40)
    trainer, module = train_digits(train, [callback])
    assert same_state(undefended(poisoned=False), module)
    assert callback.verdict.keep.all()
    assert not callback.verdict.suspect.any()
    assert callback.verdict.trusted.any()
    assert trainer.current_epoch == 6


SUSPECT = torch.arange(64) % 16 == 0  # four of 64
GIVEN = Verdict(torch.arange(64).float(), ~SUSPECT, 0.0, "known")


def acting(**kwargs: Any) -> DBRCallback:
    """D-BR that unlearns four samples in three epochs, whatever the data look like."""
    return DBRCallback(
        **{
            "verdict": GIVEN,
            "epochs": 3,
            "extra_epochs": 3,
            "trusted": 0.2,
            "paper_loop": True,
            "fallback": None,
            **kwargs,
        }
    )


def kinds(module: Net, epoch: int) -> str:
    suspects = set(SUSPECT.nonzero().flatten().tolist())
    return "".join("s" if set(batch) <= suspects else "t" for at, _, batch in module.drawn if at == epoch)


class Signs(pl.Callback):
    """Positions and the loss that is differentiated, per batch; steps per epoch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []
        self.steps: dict[int, int] = {}

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self.seen.append((trainer.current_epoch, float(loss.detach())))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps[trainer.current_epoch] = self.steps.get(trainer.current_epoch, 0) + 1


@pytest.mark.case("57")
@pytest.mark.parametrize(("accumulate", "steps"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("workers", [0, 1])
def test_suspects_come_first_with_the_other_sign_and_the_logged_loss_stays(
    accumulate: int, steps: int, workers: int
) -> None:
    torch.manual_seed(0)
    callback, signs, module = acting(), Signs(), Net()
    trainer = make_trainer([callback, signs], 2, accumulate_grad_batches=accumulate)
    extra = {"persistent_workers": True} if workers else {}
    trainer.fit(module, loader_of(Pictures(), num_workers=workers, **extra))
    assert trainer.current_epoch == 5
    trusted = set(callback.verdict.trusted.nonzero().flatten().tolist())
    for epoch in (2, 3, 4):
        assert kinds(module, epoch) == "st"
        drawn = [batch for at, _, batch in module.drawn if at == epoch]
        assert sorted(drawn[0]) == SUSPECT.nonzero().flatten().tolist()
        assert set(drawn[1]) == trusted
        assert signs.steps[epoch] == steps
    losses = [value for _, value in signs.seen]
    assert all((value < 0) == (i >= 8 and i % 2 == 0) for i, value in enumerate(losses))
    assert [abs(value) for value in losses] == pytest.approx([value / accumulate for value in module.logged])


@pytest.mark.parametrize(("relearn", "drawn"), [(True, "st"), (False, "s")])
def test_suspects_are_unlearned_with_or_without_relearning(relearn: bool, drawn: str) -> None:
    response = Unlearn(epochs=2, extra_epochs=2, relearn=relearn, paper_loop=True)
    callback = acting(response=response)
    _, module = fit([callback], epochs=1)
    assert [kinds(module, epoch) for epoch in (1, 2)] == [drawn] * 2
    assert int(callback.verdict.trusted.sum()) > 0, "they are trusted in any case"
    assert callback.history[0].treated


@pytest.mark.case("57")
def test_the_steps_are_those_of_a_literal_loop() -> None:
    callback, seen = acting(lr=0.01), Moments()
    _, module = fit([callback, seen], epochs=1)
    twin, data = Net(), Pictures()
    twin.load_state_dict(seen.weights[1])
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9)
    optimizer.load_state_dict({**seen.optimizers[1], "param_groups": optimizer.state_dict()["param_groups"]})
    for _, _, positions in module.drawn[4:]:
        loss = nn.functional.cross_entropy(twin(data.images[positions]), data.targets[positions])
        optimizer.zero_grad()
        (-loss if SUSPECT[positions].all() else loss).backward()
        optimizer.step()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-4, atol=1e-6)


class Moments(pl.Callback):
    """Weights and momentum before every epoch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.optimizers: list[Any] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(state_of(pl_module))
        self.optimizers.append(pickle.loads(pickle.dumps(trainer.optimizers[0].state_dict())))


ORDER = "".join(["s", "ttt"] * 4)  # four suspects, twelve trusted samples, each a batch of its own


@pytest.mark.case("61")
def test_bounded_it_alternates_freezes_batch_norms_and_gives_everything_back() -> None:
    moments = Moments()
    trainer, module = fit([acting(paper_loop=False), moments], epochs=2)
    assert kinds(module, 2) == ORDER
    before, after = moments.weights[2], state_of(module)
    assert torch.equal(before["body.1.running_mean"], after["body.1.running_mean"])
    assert all(part.training for part in module.modules())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.7**2)
    assert trainer.max_epochs == 2


@pytest.mark.case("48")
def test_labels_mixed_on_the_device_do_not_matter() -> None:
    class Mixing(Net):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            if not self.trainer.training:
                return batch
            return {**batch, "label": nn.functional.one_hot(batch["label"], 4).float()}

    torch.manual_seed(0)
    module = Mixing()
    make_trainer([acting(paper_loop=False)], 2).fit(module, loader_of(Pictures()))
    assert kinds(module, 2) == ORDER
    _, usual = fit([acting(paper_loop=False)], epochs=2)
    for name, value in usual.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value)


def test_a_fresh_detector_can_be_resumed_until_something_was_found(tmp_path: Path) -> None:
    callback = DBRCallback(warmup_epochs=1, detector="fresh", detector_steps=2)
    saver = SaveAll(tmp_path)
    run([callback, saver])
    assert [event.epochs for event in callback.history] == [1, 3], "nothing found: it detects again at the end"
    states = [torch.load(path, weights_only=True)["callbacks"]["lightning_backdoor.DBR"] for path in saver.paths]
    between = [state["detector"]["initial"] for state in states if len(state["history"]) == 1]
    assert between
    assert all(same_state(callback._procedure.detector._initial, initial) for initial in between)


@pytest.mark.parametrize("detector", ["copy", "fresh"])
def test_the_detector_keeps_the_statistics_that_its_batch_norms_learned(
    detector: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(
        "lightning_backdoor.scanning.measure_fct._agree", lambda _, twin: seen.append(twin.body[1].num_batches_tracked)
    )
    _, undefended = fit([], epochs=1)
    fit([DBRCallback(suspect=0.1, detector=detector, detector_steps=3, epochs=1, extra_epochs=1)], epochs=1)
    started = int(undefended.body[1].num_batches_tracked) if detector == "copy" else 0
    assert [int(batches) for batches in seen] == [started + 6], "three steps of labels and three of centre repulsion"


class Probe(nn.Module):
    """A small network of the user's own, which sees pixels as the model does."""

    def __init__(self, classes: int = 4, side: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        )
        self.head = nn.Linear(2 * side**2, classes)
        self.batches = 0

    def forward(self, images: Tensor) -> Tensor:
        self.batches += self.training
        return self.head(self.body(images.float() / 255))


def test_a_detector_of_the_users_own_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    twins: list[Any] = []
    monkeypatch.setattr("lightning_backdoor.scanning.measure_fct._agree", lambda _, twin: twins.append(twin))
    own = Probe()
    before = state_of(own)
    fit([DBRCallback(suspect=0.1, detector=own, detector_steps=3, epochs=1, extra_epochs=1)], epochs=1)
    assert same_state(before, own)
    assert own.batches == 0
    (twin,) = twins
    assert twin.backdoor_detector.batches == 6, "three steps of labels and three of centre repulsion"
    assert not same_state(before, twin.backdoor_detector)


def test_a_detector_of_the_users_own_finds_planted_poisons(poisoned: Any) -> None:
    torch.manual_seed(0)
    callback = DBRCallback(detector=Probe(10, side=16), epochs=1)
    train_digits(poisoned, [callback])
    truth, suspect = poisoned.poisoned, callback.verdict.suspect
    assert (suspect & truth).sum() >= 0.9 * truth.sum()
    assert (suspect & ~truth).sum() <= 0.05 * len(truth)


@pytest.mark.parametrize("suspect", ["auto", 0.1])
def test_a_detector_that_cannot_work_is_refused_at_the_start(suspect: Any) -> None:
    refused = {
        "must return logits of the 4 classes of the model, got 5": Probe(5),
        "must have parameters that can learn": Probe().requires_grad_(False),
        r"must take the images of a batch .* mat1 and mat2 shapes cannot be multiplied": Probe(side=16),
    }
    for message, own in refused.items():
        module = Net()
        with pytest.raises(ArgumentError, match=f"`detector` {message}"):
            make_trainer([DBRCallback(detector=own, suspect=suspect)]).fit(module, loader_of(Pictures()))
        assert not module.drawn


class Typed(Net):
    """Works in any dtype, and asks its Trainer while it answers."""

    def forward(self, images: Tensor) -> Tensor:
        assert self.trainer.world_size == 1
        return self.head(self.body(images.to(self.head.weight.dtype) / 255).flatten(1))


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_a_detector_of_the_users_own_works_in_all_precisions(precision: Any) -> None:
    callback = DBRCallback(detector=Typed(), detector_steps=2, epochs=1)
    make_trainer([callback], 1, precision=precision).fit(Typed(), loader_of(Pictures()))
    assert callback.verdict is not None


def test_measuring_the_units_of_the_detector_moves_none_of_its_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    measure = UnitScan.measure

    def spied(self: Any, trainer: Any, twin: Any) -> Any:
        seen.append(int(twin.body[1].num_batches_tracked))
        return measure(self, trainer, twin)

    monkeypatch.setattr(UnitScan, "measure", spied)
    fit([DBRCallback(detector="fresh", detector_steps=3)], epochs=1)
    assert seen == [6], "three steps of labels and three of centre repulsion"


def test_an_epoch_that_does_harm_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    _, undefended = fit([])
    monkeypatch.setattr("lightning_backdoor.responses.unlearn.MAX_LOSS", -2.0)
    callback = acting(paper_loop=False)
    _, module = fit([callback])
    assert same_state(undefended, module)
    assert callback.history[0].undone_steps == (True, True, True)
    assert callback._procedure.response._rate == 0.125


def test_an_epoch_that_is_undone_has_forgotten_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_backdoor.responses.unlearn.TOLERANCE", 2.0)
    monkeypatch.setattr(Unlearn, "_by_mistake", lambda *_: 2.0)
    callback = acting(paper_loop=False)
    fit([callback])
    assert callback.history[0].undone_steps == (False,), "forgotten after an epoch, by this measure"
    monkeypatch.setattr("lightning_backdoor.responses.unlearn.MAX_LOSS", -2.0)
    callback = acting(paper_loop=False)
    fit([callback])
    assert callback.history[0].undone_steps == (True, True, True)


class Wide(Net):
    """With the thousand outputs of a pretrained head, for four labels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(self.head.in_features, 1000)


def test_outputs_without_a_label_are_no_reason_to_refuse_and_count_for_no_mistakes() -> None:
    callback = DBRCallback(detector_steps=1, epochs=1)
    make_trainer([callback], 1).fit(Wide(), loader_of(Pictures()))
    assert callback.verdict is not None
    response: Any = acting(paper_loop=False)._procedure.response
    response._accuracies, response._split = [0.91], split_of(replace(GIVEN, labels=torch.arange(64) % 4), 0)
    session: Any = SimpleNamespace(scanner=SimpleNamespace(num_classes=1000))
    assert response._by_mistake(session) == pytest.approx(2 * 0.09 / 3)


@pytest.mark.parametrize("extra_epochs", [0, 3])
def test_a_schedule_made_for_the_plan_takes_no_more_steps_than_it_has(extra_epochs: int) -> None:
    class OneCycle(Net):
        def configure_optimizers(self) -> Any:
            sgd = torch.optim.SGD(self.parameters(), lr=0.05)
            cycle = torch.optim.lr_scheduler.OneCycleLR(sgd, 0.05, total_steps=16)
            return {"optimizer": sgd, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    callback = acting(paper_loop=False, epochs=2, extra_epochs=extra_epochs, trusted=0.9)
    module = OneCycle()
    make_trainer([callback], 4).fit(module, loader_of(Pictures()))
    assert callback.history[0].treated
    assert (len(module.drawn) > 16) == (extra_epochs > 0)
    assert module.lr_schedulers().last_epoch == min(len(module.drawn), 16)


def test_a_second_population_of_all_labels_is_not_unlearned() -> None:
    units = torch.zeros(400, 3)
    labels = torch.arange(400) % 4
    units[torch.arange(400) // 4 % 5 == 0, 0] = 9.0  # a style: the same in every label
    units += 0.5 * torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    measured = Measured(labels, labels, units, units.norm(dim=1), units.norm(dim=1), torch.zeros(3, 4), ())
    found = Distinguished(labels, units.norm(dim=1), measured)
    assert decide_by_units(measured, None, rule="auto", max_removed=0.3).all_to_all
    assert not detection_of(found, None, suspect="auto", trusted=0.2, max_removed=0.3).verdict.suspect.any()


def test_suspects_are_what_the_early_neighbors_deny_too() -> None:
    """A second population that is too common in other labels for the other gates, and looked like these at first."""
    generator = torch.Generator().manual_seed(0)
    labels, marked = torch.arange(2000) % 4, torch.rand(2000, generator=generator) < 0.2
    units = torch.randn(2000, 6, generator=generator) + 3 * nn.functional.one_hot(labels, 6)
    units[:, 5] += 9 * (marked & ((labels == 0) | (torch.rand(2000, generator=generator) < 0.3)))
    size = units.norm(dim=1)
    found = Distinguished(labels, size, Measured(labels, labels, units, size, size, torch.zeros(6, 4), ()))
    settings: dict[str, Any] = {"suspect": "auto", "trusted": 0.2, "max_removed": 0.3}
    assert not detection_of(found, None, **settings).verdict.suspect.any()
    planted = marked & (labels == 0)
    agreement = torch.where(planted, 0.2, 0.7)
    first = detection_of(found, None, agreement=agreement, **settings).verdict
    assert torch.equal(first.suspect, planted)
    assert torch.equal(detection_of(found, first, agreement=agreement, **settings).verdict.suspect, planted)


@pytest.mark.parametrize(
    ("settings", "measured"), [({"warmup_epochs": 2}, True), ({"suspect": 0.05}, False), ({"warmup_epochs": 1}, False)]
)
def test_measures_the_neighbors_half_way_to_the_detection(settings: dict[str, Any], measured: bool) -> None:
    callback = DBRCallback(response="report", detector_steps=1, **settings)
    fit([callback])
    early = callback.state_dict()["detector"]["early"]
    assert (early is not None) == measured
    again = DBRCallback(response="report", detector_steps=1, **settings)
    again.load_state_dict(callback.state_dict())
    if measured:
        assert torch.equal(again.state_dict()["detector"]["early"]["agreement"], early["agreement"])


def test_a_verdict_with_masks_is_taken_as_it_is() -> None:
    trusted = torch.arange(64) % 16 == 5
    callback = acting(verdict=replace(GIVEN, trusted=trusted | SUSPECT, suspect=SUSPECT))
    with pytest.warns(UserWarning, match=r"no image of the classes \[0, 2, 3\] can be trusted"):
        trainer, _ = fit([callback])
    assert torch.equal(callback.verdict.trusted, trusted)
    assert trainer.current_epoch == 4, "nothing was repaired"


@pytest.mark.filterwarnings("ignore:NONE after fine-tuning")
def test_the_verdict_of_another_defense_is_repaired_from(poisoned: Any) -> None:
    first = NONECallback(finetune_epochs=1)
    _, module = train_digits(poisoned, [first])
    callback = DBRCallback(verdict=first.verdict, warmup_epochs=0, epochs=2)
    trainer = make_trainer([callback], epochs=50)
    trainer.fit(module, DataLoader(poisoned, batch_size=64, shuffle=True))
    assert torch.equal(callback.verdict.suspect, ~first.verdict.keep)
    assert trainer.current_epoch <= 2


def test_repairs_a_finished_checkpoint_and_ends(tmp_path: Path) -> None:
    saver = SaveAll(tmp_path)
    run([saver])
    callback = acting(warmup_epochs=0)
    trainer, module = run([callback], ckpt=saver.paths[-1])
    assert {epoch for epoch, *_ in module.drawn} == {3, 4, 5}
    assert kinds(module, 3) == "st"
    assert trainer.current_epoch == 6
    assert trainer.max_epochs == 3


def test_a_detection_on_a_finished_checkpoint_that_fails_leaves_a_file_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("disk full")

    saver = SaveAll(tmp_path)
    run([saver])
    monkeypatch.setattr("lightning_backdoor.scanning.scanner.DatasetScanner.read_labels", fails)
    with pytest.raises(RuntimeError, match="disk full"):
        run([acting(warmup_epochs=0, report_dir=tmp_path / "report")], ckpt=saver.paths[-1])
    (path,) = (tmp_path / "report").glob("*.ckpt")
    finished = torch.load(saver.paths[-1], weights_only=True)["state_dict"]
    assert same_state(finished, torch.load(path, weights_only=True)["state_dict"])


def test_nothing_to_repair_ends_the_fit_without_a_step() -> None:
    callback = DBRCallback(warmup_epochs=0, verdict=replace(GIVEN, keep=torch.ones(64, dtype=torch.bool)))
    trainer, module = fit([callback])
    assert trainer.global_step == 0
    assert not module.drawn
    assert callback.verdict.keep.all()


def test_a_resumed_run_never_repeats_the_detector(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"suspect": 0.1, "detector_steps": 3, "epochs": 1, "detector": "fresh"}
    saver, whole = SaveAll(tmp_path), DBRCallback(**settings)
    _, plain = run([whole, saver])
    for path in saver.paths[:4]:  # before the detection
        callback = DBRCallback(**settings)
        _, module = run([callback], ckpt=path)
        assert torch.equal(callback.verdict.scores, whole.verdict.scores), path.name
        assert same_state(plain, module), path.name
    monkeypatch.setattr("lightning_backdoor.callbacks.consistency.distinguish", None)
    for path in saver.paths[5:]:  # after it
        _, module = run([DBRCallback(**settings)], ckpt=path)
        assert same_state(plain, module), path.name


@pytest.mark.case("63")
@pytest.mark.parametrize("suspect", ["auto", 0.1])
@pytest.mark.parametrize("detector", ["copy", "fresh", "own"])
def test_the_detection_is_invisible_to_the_training(detector: Any, suspect: Any) -> None:
    detector = Probe() if detector == "own" else detector
    callback = DBRCallback(suspect=suspect, detector=detector, detector_steps=3, warmup_epochs=2, epochs=1, lr=1e-30)
    moments = Moments()
    fit([callback, moments], epochs=3)
    _, two = fit([], epochs=2)
    assert same_state(two, moments.weights[2])
    if suspect == 0.1:
        assert callback.verdict.suspect.sum() == 6
        scores = callback.verdict.scores
        assert scores[callback.verdict.suspect].min() >= scores[callback.verdict.keep].max()


def test_another_transformation_and_no_transformation() -> None:
    callback = DBRCallback(suspect=0.1, detector_steps=1, epochs=1, extra_epochs=1, transform=lambda pixels: pixels)
    fit([callback])
    assert float(callback.verdict.scores.abs().max()) == 0, "features that do not move"


@pytest.mark.parametrize(("signed", "automatic"), [(False, "mse"), (True, "cosine")])
def test_how_features_move_is_measured_as_they_are_or_as_chosen(signed: bool, automatic: str) -> None:
    scores = {}
    for metric in ("auto", "mse", "cosine"):
        torch.manual_seed(0)
        module = Net()
        module.body[2] = nn.Tanh() if signed else nn.ReLU()
        callback = DBRCallback(suspect=0.1, detector_steps=1, epochs=1, extra_epochs=1, fct_metric=metric)
        make_trainer([callback], 1).fit(module, loader_of(Pictures()))
        scores[metric] = callback.verdict.scores
    assert torch.equal(scores["auto"], scores[automatic])
    assert not torch.equal(scores["mse"], scores["cosine"])


def test_a_random_transformation_of_an_image_depends_on_no_batch() -> None:
    def noisy(pixels: Tensor) -> Tensor:
        return torch.randint(0, 256, pixels.shape, dtype=torch.uint8)

    scores = []
    for size in (16, 5):
        callback = DBRCallback(
            suspect=0.1, epochs=1, extra_epochs=1, transform=noisy, num_transforms=1, batch_size=size, detector_steps=1
        )
        with pytest.MonkeyPatch.context() as patch:  # weights as they are: their training depends on the batch size
            patch.setattr("lightning_backdoor.scanning.measure_fct._train", lambda *_: None)
            fit([callback], epochs=1)
        scores.append(callback.verdict.scores)
    torch.testing.assert_close(*scores)


@pytest.mark.case("58")
def test_manual_optimization_is_refused_before_anything_happens() -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(TrainerError, match="automatic_optimization = False"):
        make_trainer([acting()]).fit(Manual(), loader_of(Pictures()))


def test_what_cannot_work_is_said_at_the_start() -> None:
    with pytest.raises(DataError, match="another dataset"):
        fit([acting(verdict=replace(GIVEN, scores=torch.zeros(3), keep=torch.ones(3, dtype=torch.bool)))])

    class Uncopyable(Net):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("no")

    with pytest.raises(ModelError, match=r"must be copied.*`verdict`"):
        make_trainer([DBRCallback(suspect=0.1)], 1).fit(Uncopyable(), loader_of(Pictures()))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"lr": 0.0}, {"epochs": 0}, {"warmup_epochs": -1}, {"suspect": 5}, {"suspect": "top"}, {"trusted": 20}),
        *(
            {"detector": "new"},
            {"fct_metric": "l1"},
            {"num_transforms": 0},
            {"detector_steps": 0},
            {"response": "heal"},
        ),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"`{next(iter(wrong))}` must be"):
        DBRCallback(**wrong)


def test_representation_and_pickling() -> None:
    assert repr(DBRCallback(warmup_epochs=0, lr=0.1)) == "DBRCallback(warmup_epochs=0, lr=0.1)"
    assert "verdict=Verdict(" in repr(acting())
    assert DBRCallback.from_paper().paper_loop
    callback = acting()
    fit([callback])
    again = pickle.loads(pickle.dumps(callback))
    assert torch.equal(again.verdict.keep, callback.verdict.keep)
    assert again.history == callback.history
