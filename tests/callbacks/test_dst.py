"""D-ST in a Trainer: planted truth and its clean twin, two stages, and what it gives back."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning_pytorch
import pytest
import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

from lightning_backdoor import DSTCallback, Verdict, attacks
from lightning_backdoor.errors import ArgumentError, DataError, ModelError, TrainerError
from lightning_backdoor.responses import Recipe, TwoStage
from tests.callbacks.helpers import (
    LIGHTNING_WARNS,
    Net,
    Pairs,
    Pictures,
    always,
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
from tests.callbacks.test_none import lightning_net
from tests.callbacks.test_ultraclean_resume import SaveAll
from tests.loading.recording import SAFE_LOADING
from tests.processes import processes

pytestmark = [
    *LIGHTNING_WARNS,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:D-ST. the model gives"),
]

SUSPECT = torch.arange(64) % 16 == 0  # four of 64, of label 0
GIVEN = Verdict(torch.arange(64).float(), ~SUSPECT, 0.0, "known")


def shifted(pixels: Tensor) -> Tensor:
    """A weak view that leaves digits what they are: a shift of up to two pixels, and other colours."""
    moved = torch.stack(
        [image.roll((int(a), int(b)), (1, 2)) for image, a, b in zip(pixels, *_offsets(len(pixels)), strict=True)]
    )
    brightness = 0.7 + 0.6 * torch.rand(len(pixels), 1, 1, 1)
    return moved.float().mul(brightness).clamp(0, 255).byte()


def _offsets(n: int) -> Tensor:
    return torch.randint(-2, 3, (2, n))


def acting(**kwargs: Any) -> DSTCallback:
    """D-ST that suspects four samples, whatever the data look like."""
    return DSTCallback(**{"verdict": GIVEN, "trusted": 0.4, "views": torch.Tensor.clone, **kwargs})


@pytest.fixture(scope="module")
def poisoned() -> Any:
    return poisoned_digits()


def test_finds_planted_poisons_and_never_learns_the_backdoor(poisoned: Any, tmp_path: Path) -> None:
    _, test = digits()
    attacked = attacks.triggered(test, attacks.BadNets(), target=0)
    plain = undefended(poisoned=True)
    assert share_right(plain, attacked) > 0.6, "the attack must work for the defence to have something to do"

    callback = DSTCallback(views=shifted, trusted=0.6, report_dir=tmp_path, detector_steps=60)
    trainer, module = train_digits(poisoned, [callback], epochs=12)

    truth, verdict = poisoned.poisoned, callback.verdict
    assert (verdict.suspect & truth).sum() >= 0.9 * truth.sum()
    assert (verdict.suspect & ~truth).sum() <= 0.05 * len(truth)
    assert torch.equal(verdict.suspect, ~verdict.keep)
    assert not (verdict.trusted & verdict.suspect).any()
    assert share_right(module, attacked) < 0.25
    assert share_right(module, test) > 0.6
    (history,) = callback.history
    assert trainer.current_epoch == len(history.losses) == 12
    assert history.feature_epochs == 11
    assert [epoch for epoch, _ in history.agreement] == [2, 4, 6, 8, 10, 11]
    assert history.agreement[-1][1] > history.agreement[0][1]
    assert trainer.callback_metrics["backdoor/dst/trusted_accuracy"] == pytest.approx(history.accuracies[-1])
    assert "trained in two stages" in (tmp_path / "report.html").read_text()


def test_does_nothing_on_clean_data_and_the_training_is_bit_identical(caplog: pytest.LogCaptureFixture) -> None:
    train, _ = digits()
    _, plain = train_digits(train, [], epochs=2)
    callback = DSTCallback(detector_steps=40)
    with caplog.at_level("INFO"):
        trainer, module = train_digits(train, [callback], epochs=2)
    assert same_state(plain.state_dict(), module)
    assert callback.verdict.keep.all()
    assert not callback.verdict.suspect.any()
    assert type(trainer.optimizers[0]) is torch.optim.Adam
    assert "nothing stands out, nothing to do" in caplog.text


def test_a_verdict_without_suspects_changes_nothing() -> None:
    _, plain = fit([])
    _, module = fit([acting(verdict=replace(GIVEN, keep=torch.ones(64, dtype=torch.bool)))])
    assert same_state(plain, module)


def test_a_fast_dev_run_is_ordinary_training_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        _, module = fit([acting()], fast_dev_run=1)
    assert module.drawn
    assert "D-ST: fast_dev_run trains too little for two stages; ordinary training." in caplog.text


class Watch(pl.Callback):
    """Weights, modes, optimizer and what the module holds, at the end of every epoch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.optimizers: list[Any] = []
        self.rates: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if not self.weights:
            self.weights.append(state_of(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        assert "training_step" not in vars(pl_module)
        self.rates.append(trainer.optimizers[0].param_groups[-1]["lr"])

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(state_of(pl_module))
        self.optimizers.append(trainer.optimizers[0])


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_first_the_features_and_then_the_classifier() -> None:
    watch, module = Watch(), Net()
    trainer = make_trainer([watch, acting(reassign_uncertain=False)], 4)
    loader = loader_of(Pictures())
    own = module.training_step
    trainer.fit(module, loader)
    first, *_, features, end = watch.weights
    assert changed(first, features) >= {"body.0.weight", "body.1.weight", "body.1.running_mean", "head.weight"}
    assert changed(features, end) == {"head.weight", "head.bias"}
    assert not module.drawn, "the user's training_step did not run"
    assert module.training_step == own
    assert set(dict(module.named_children())) == {"body", "head"}
    assert not {"training_step", "batch_to_device"} & set(vars(trainer.strategy))
    assert "convert_input" not in vars(trainer.precision_plugin)
    assert trainer.max_epochs == trainer.current_epoch == 4
    assert [len(batch["index"]) for batch in loader] == [16] * 4
    rates = watch.rates[:12]
    assert rates[0] < 1e-4, "warm-up"
    assert rates[0] < rates[-1] < max(rates) <= 2e-3


@pytest.mark.parametrize("supervised_features", [True, False])
def test_whether_the_classifier_guides_the_features(supervised_features: bool) -> None:
    results = []
    for bias in (0.0, 3.0):
        torch.manual_seed(0)
        module, watch = Net(), Watch()
        nn.init.constant_(module.head.bias[0], bias)
        make_trainer([watch, acting(reassign_uncertain=False, supervised_features=supervised_features)], 3).fit(
            module, loader_of(Pictures())
        )
        results.append(watch.weights[-1])
    assert ({name for name in changed(*results)} == {"head.weight", "head.bias"}) is not supervised_features


def test_only_trusted_labels_guide_the_features() -> None:
    trusted, weights = [], []
    suspect = torch.tensor([0, 1, 16, 17])  # of labels 0 and 1, in turns
    for labels in ([0, 1, 0, 1], [1, 0, 1, 0]):
        torch.manual_seed(0)
        data, watch = Pictures(), Watch()
        data.targets[suspect] = torch.tensor(labels)
        given = replace(GIVEN, keep=~torch.isin(torch.arange(64), suspect))
        callback = acting(verdict=given, reassign_uncertain=False)
        make_trainer([watch, callback], 3).fit(Net(), loader_of(data))
        trusted.append(callback.verdict.trusted)
        weights.append(watch.weights[-2])
    assert torch.equal(*trusted)
    assert not changed(*weights)


@pytest.mark.parametrize("detector", ["copy", Net()], ids=["copy", "own"])
def test_other_detectors(detector: Any) -> None:
    callback = DSTCallback(detector=detector, suspect=0.1, trusted=0.4, detector_steps=3)
    _, module = fit([callback], epochs=2)
    assert callback.verdict.suspect.sum() == 6
    assert callback.history[-1].losses
    assert set(dict(module.named_children())) == {"body", "head"}


class Seen(Net):
    """Notes the positions and the images of all forward passes while training."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, bool, Tensor]] = []

    def forward(self, images: Tensor) -> Tensor:
        if self._trainer is not None and torch.is_inference_mode_enabled() is False and self._armed():
            self.batches.append((self.trainer.current_epoch, self.training, images.clone()))
        return super().forward(images)

    def _armed(self) -> bool:
        return "training_step" in vars(self)


def test_stage_one_draws_everything_twice_and_stage_two_trusted_and_suspect() -> None:
    callback, module, data = acting(reassign_uncertain=False, classifier_epochs=1), Seen(), Pictures()
    make_trainer([callback], 3).fit(module, loader_of(data))
    place = {tuple(image.flatten().tolist()): i for i, image in enumerate(data.images)}
    drawn: dict[int, list[int]] = {}
    for epoch, _, images in module.batches:
        drawn.setdefault(epoch, []).extend(place[tuple(image.flatten().tolist())] for image in images)
    assert sorted(drawn[0]) == sorted(drawn[1]) == sorted([*range(64), *range(64)])
    assert drawn[0] != drawn[1]
    known = callback.verdict.trusted | callback.verdict.suspect
    assert sorted(drawn[2]) == known.nonzero().flatten().tolist()
    assert {(epoch, training) for epoch, training, _ in module.batches} == {(0, True), (1, True), (2, False)}


def run(callbacks: list[Any], ckpt: Path | None = None, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    module, trainer = Net(), make_trainer(callbacks, 4, **kwargs)
    extra = {} if ckpt is None else SAFE_LOADING
    trainer.fit(module, loader_of(Pictures()), loader_of(Pictures(seed=1)), ckpt_path=ckpt, **extra)
    return trainer, module


class EachStep(SaveAll):
    """Checkpoints within epochs, too."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step in (2, 14):
            self.save(trainer, f"step{trainer.global_step}")


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_an_interrupted_run_ends_like_one_that_was_not(
    first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, whole = SaveAll(tmp_path), DSTCallback(suspect=0.1, detector_steps=3, classifier_epochs=2)
    _, plain = run([whole, saver] if first else [saver, whole])
    assert len(saver.paths) == 8
    monkeypatch.setattr("lightning_backdoor.callbacks.consistency.distinguish", None)  # never repeated
    for path in saver.paths:
        callback = DSTCallback(suspect=0.1, detector_steps=3, classifier_epochs=2)
        again, module = run([callback], ckpt=path)
        assert same_state(plain, module), path.name
        assert torch.equal(callback.verdict.trusted, whole.verdict.trusted), path.name
        assert torch.equal(callback.verdict.suspect, whole.verdict.suspect), path.name
        assert again.current_epoch == 4
        if first or path != saver.paths[-1]:  # else there is nothing left in which to look at the end
            assert callback.history == whole.history, path.name


def test_a_checkpoint_of_any_stage_is_an_ordinary_one(tmp_path: Path) -> None:
    saver = SaveAll(tmp_path)
    run([acting(), saver])
    for path in saver.paths:
        checkpoint = torch.load(path, weights_only=True)
        bare = Net()
        bare.load_state_dict(checkpoint["state_dict"], strict=True)
        assert len(checkpoint["optimizer_states"]) == 1


def test_resumed_within_an_epoch_it_goes_on_with_what_it_had(tmp_path: Path) -> None:
    saver = EachStep(tmp_path)
    run([acting(classifier_epochs=2), saver])
    for path in [path for path in saver.paths if "step" in path.name]:
        trainer, module = run([acting(classifier_epochs=2)], ckpt=path)
        assert trainer.current_epoch == 4
        assert not module.drawn


def test_a_complete_training_is_not_continued(tmp_path: Path) -> None:
    saver = SaveAll(tmp_path)
    _, plain = run([acting(), saver])
    module, trainer = Net(), make_trainer([acting()], 9)
    with pytest.warns(UserWarning, match="the training of this checkpoint is complete"):
        trainer.fit(module, loader_of(Pictures()), ckpt_path=saver.paths[-1])
    assert same_state(plain, module)


def test_a_resumed_training_keeps_to_its_plan(tmp_path: Path) -> None:
    saver = SaveAll(tmp_path)
    run([acting(), saver])
    with pytest.raises(TrainerError, match="planned 4 epochs and cannot go on to `max_epochs=9`"):
        make_trainer([acting()], 9).fit(Net(), loader_of(Pictures()), ckpt_path=saver.paths[0])


def test_everything_comes_back_after_an_error() -> None:
    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("stop")

    module, callback = Net(), acting()
    trainer = make_trainer([callback, Fails()])
    with pytest.raises(RuntimeError, match="stop"):
        trainer.fit(module, loader_of(Pictures()))
    assert "training_step" not in vars(module)
    assert "training_step" not in vars(trainer.strategy)
    assert set(dict(module.named_children())) == {"body", "head"}
    fit([callback])
    assert callback.history[-1].accuracies


@pytest.mark.parametrize(
    "settings", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}], ids=str
)
def test_settings_of_the_trainer(settings: dict[str, Any]) -> None:
    trainer, module = fit([acting()], **settings)
    assert trainer.current_epoch == 4
    assert all(value.isfinite().all() for value in module.state_dict().values())
    if "accumulate_grad_batches" in settings:
        assert trainer.global_step == 3 * 2 + 1


def test_logs_rates_losses_and_agreement(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit([acting(), LearningRateMonitor()], logger=logger, log_every_n_steps=1)
    columns = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    for name in ("lr-", "dst/loss", "dst/neighbor_agreement", "dst/trusted_accuracy"):
        assert name in columns
    assert (Path(logger.log_dir) / "lightning_backdoor" / "DST" / "report.html").exists()


def test_a_training_that_stops_early_says_so(caplog: pytest.LogCaptureFixture) -> None:
    stop = EarlyStopping("val_loss", patience=1, min_delta=1e9)
    callback = acting()
    with caplog.at_level("INFO"):
        trainer, _ = fit([callback, stop], epochs=9, val=Pictures(seed=1))
    assert trainer.current_epoch < 8
    assert callback.history[-1].ended_early
    assert "ended before the second stage" in caplog.text


class StopAfter(pl.Callback):
    """Ends training after so many epochs."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def test_a_training_that_stops_between_the_stages_says_so_until_it_goes_on(tmp_path: Path) -> None:
    saver, callback = SaveAll(tmp_path), acting(classifier_epochs=2)
    run([StopAfter(2), callback, saver])
    assert callback.history[-1].feature_epochs == 2
    assert callback.history[-1].ended_early
    later = acting(classifier_epochs=2)
    run([later], ckpt=saver.paths[-1])
    assert not later.history[-1].ended_early
    assert later.history[-1].accuracies


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_transformers_and_convnext(name: str) -> None:
    recipe = Recipe(projection=8, reassign_uncertain=False)  # as wide as 64 images fill in two epochs

    class Timm(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = None, None
            self.network = timm.create_model(name, num_classes=4, **({"img_size": 32} if "vit" in name else {}))

        def forward(self, images: Tensor) -> Tensor:
            return self.network(images.float() / 255)

    torch.manual_seed(0)
    module, watch, callback = Timm(), Watch(), acting(response=TwoStage(recipe))
    make_trainer([watch, callback], 3).fit(module, loader_of(Pictures(size=32)))
    first, *_, features, end = watch.weights
    assert len(changed(first, features)) > 0.9 * len(first)
    assert all(".head" in key or "head." in key for key in changed(features, end))
    assert callback.history[-1].losses[1] < callback.history[-1].losses[0]


@pytest.mark.parametrize("package", [pl, lightning_pytorch])
def test_works_with_both_packages_and_workers(package: Any) -> None:
    torch.manual_seed(0)
    callback = acting()
    trainer = make_trainer([callback], 2, package=package)
    trainer.fit(Net() if package is pl else lightning_net(), loader_of(Pictures(), num_workers=1))
    assert len(callback.history[-1].losses) == 2


class Hooks(Net):
    """Normalises on the device, augments there while training, and changes the list of a batch in place."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        assert images.dtype == torch.uint8
        if self.trainer.training:
            images, labels = images.flip(0), nn.functional.one_hot(labels, 4).float()
        batch[0], batch[1] = images.float() / 255, labels
        return batch

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.float32
        return self.head(self.body(images).flatten(1))


def test_transfer_hooks_work_as_in_evaluation() -> None:
    module, callback = Hooks(), acting()
    make_trainer([callback], 2).fit(module, loader_of(Pairs()))
    assert callback.history[-1].accuracies


def test_what_cannot_work_is_said_at_the_start() -> None:
    with pytest.raises(DataError, match="another dataset"):
        fit([acting(verdict=replace(GIVEN, scores=torch.zeros(3), keep=torch.ones(3, dtype=torch.bool)))])
    with pytest.raises(TrainerError, match="cannot share a Trainer with UltraCleanCallback"):
        fit([acting(), always()])
    for settings in ({"epochs": -1}, {"epochs": None, "max_steps": 10}):
        with pytest.raises(TrainerError, match="plans its stages by epochs"):
            fit([acting()], **settings)
    with pytest.raises(TrainerError, match="an epoch for the features and 1 for the classifier, got 1"):
        fit([acting()], epochs=1)
    with pytest.raises(DataError, match="in_order=False"):
        make_trainer([acting()]).fit(Net(), loader_of(Pictures(), in_order=False, num_workers=1))

    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(TrainerError, match="automatic_optimization = False"):
        make_trainer([acting()]).fit(Manual(), loader_of(Pictures()))


@pytest.mark.case("60")
def test_labels_must_be_those_of_the_samples() -> None:
    class Fractions(Pairs):
        def __getitem__(self, i: int) -> Any:
            return self.images[i], self.targets[i] + 0.5

    def backwards(items: list[Any]) -> Any:
        images, labels = torch.utils.data.default_collate(items)
        return images, labels.flip(0)

    with pytest.raises((ArgumentError, DataError), match="labels"):
        fit([acting()], Fractions())
    with pytest.raises(DataError, match="not those of the samples that were drawn"):
        make_trainer([acting()]).fit(Net(), loader_of(Pairs(), collate_fn=backwards))


def test_a_model_whose_parts_cannot_be_told_apart_or_learn() -> None:
    class Around(Net):
        def forward(self, images: Tensor) -> Tensor:
            body = self.body(images.float() / 255).flatten(1)
            return self.head(body) + body[:, :4]

    class Frozen(Net):
        def __init__(self, part: str) -> None:
            super().__init__()
            getattr(self, part).requires_grad_(False)

    with pytest.warns(UserWarning, match="No layer's output"), pytest.raises(ModelError, match="another way to them"):
        make_trainer([acting()]).fit(Around(), loader_of(Pictures()))
    for part in ("body", "head"):
        with pytest.raises(ModelError, match="can learn"):
            make_trainer([acting()]).fit(Frozen(part), loader_of(Pictures()))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_the_first_process_measures_the_neighbors_for_all(tmp_path: Path) -> None:
    with processes(2, "tests.callbacks.ddp_neighbors", tmp_path):
        pass
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert len(first["history"]["agreement"]) == 2
    assert first["history"] == second["history"]
    error = "MemoryError: no room for an index"
    assert first["said"] == error
    assert second["said"] == f"BackdoorDefenseError: D-ST neighbors failed in the process of rank 0: {error}"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_class_without_trusted_images_is_left_to_ordinary_training(workers: int) -> None:
    trusted = torch.arange(64) % 16 == 5
    callback, module = acting(verdict=replace(GIVEN, trusted=trusted, suspect=SUSPECT)), Net()
    with pytest.warns(UserWarning, match=r"no image of the classes \[0, 2, 3\] can be trusted"):
        make_trainer([callback], 2).fit(module, loader_of(Pictures(), num_workers=workers))
    assert module.drawn
    assert not {i for _, _, batch in module.drawn for i in batch} & set(SUSPECT.nonzero().flatten().tolist())


@pytest.mark.parametrize(
    "wrong",
    [
        *({"lr": 0.0}, {"classifier_epochs": 0}, {"temperature": 0.0}, {"suspect_weight": -1.0}, {"suspect": 5}),
        *({"trusted": 20}, {"neighbors": 0}, {"num_transforms": 0}, {"detector_steps": 0}, {"response": "unlearn"}),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"`{next(iter(wrong))}` must be"):
        DSTCallback(**wrong)


def test_representation_and_pickling() -> None:
    assert repr(DSTCallback(suspect_weight=0.1, suspect=0.05)) == "DSTCallback(suspect_weight=0.1, suspect=0.05)"
    assert DSTCallback.from_paper().arguments["suspect"] == 0.05
    assert not DSTCallback.from_paper().reassign_uncertain
    callback = acting(views=None)
    fit([callback], epochs=2)
    again = pickle.loads(pickle.dumps(callback))
    assert torch.equal(again.verdict.keep, callback.verdict.keep)
    assert again.history == callback.history
