"""Law 5: a run that was interrupted and resumed ends like one that was not."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from lightning_backdoor import UltraCleanCallback
from lightning_backdoor.errors import DataError
from tests.callbacks.helpers import (
    LIGHTNING_WARNS,
    FirstBatches,
    Net,
    Pairs,
    Pictures,
    always,
    loader_of,
    make_trainer,
    same_state,
    state_of,
)
from tests.loading.recording import SAFE_LOADING

pytestmark = [
    *LIGHTNING_WARNS,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]


class SaveAll(pl.Callback):
    """A checkpoint from every hook in which Lightning's own callbacks save, numbered in the order of training."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, itertools.count()
        self.paths: list[Path] = []

    def save(self, trainer: Any, where: str) -> None:
        path = self.folder / f"{next(self.number):02d}-{where}-{trainer.current_epoch}.ckpt"
        trainer.save_checkpoint(path)
        self.paths.append(path)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.save(trainer, "epoch_end")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.save(trainer, "validation_end")


def run(callbacks: list[Any], ckpt: Path | None = None, val: bool = True, epochs: int = 3, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    module, trainer = Net(), make_trainer(callbacks, epochs)
    extra = {} if ckpt is None else SAFE_LOADING
    trainer.fit(
        module,
        loader_of(kwargs.pop("dataset", None) or Pictures(), **kwargs),
        loader_of(Pictures(seed=1)) if val else None,
        ckpt_path=ckpt,
        **extra,
    )
    return trainer, module


@pytest.mark.parametrize("val", [True, False], ids=["validation", "no validation"])
@pytest.mark.parametrize(
    "settings", [{}, {"warmup_epochs": 3}, {"response": "continue"}, {"rescore_every": 1}], ids=str
)
def test_resumed_anywhere_it_ends_the_same(tmp_path: Path, settings: dict[str, Any], val: bool) -> None:
    whole, saver = always(**settings), SaveAll(tmp_path)
    trainer, expected = run([whole, saver], val=val)
    assert saver.paths
    for path in saver.paths:
        resumed = always(**settings)
        again, module = run([resumed], path, val=val)
        assert torch.equal(resumed.verdict.keep, whole.verdict.keep), path.name
        assert torch.equal(resumed.verdict.scores, whole.verdict.scores), path.name
        assert resumed.history == whole.history, path.name
        assert same_state(module, expected), path.name
        assert again.current_epoch == trainer.current_epoch, path.name
        assert again.global_step == trainer.global_step, path.name
        assert again.max_epochs == 3


def test_what_was_told_of_the_findings_is_in_the_checkpoint(tmp_path: Path) -> None:
    """Else a resumed fit says it again; a fit of another model says it again in any case."""
    before, after, others = always(), always(), always(response="report")
    before._procedure._told = " 4 images"
    torch.save(before.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    for callback in (after, others):
        callback.load_state_dict({**state, "response_name": callback.state_dict()["response_name"]})
        assert callback._procedure._told == " 4 images"
    run([others], epochs=1)
    assert others._procedure._told == ""


class Turned(Pairs):
    """Images behind a transform, as torchvision's datasets hold it."""

    def __init__(self, transform: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.transform = transform

    def __getitem__(self, i: int) -> Any:
        image, label = super().__getitem__(i)
        return self.transform(image), label


def mirrored(image: Tensor) -> Tensor:
    return image.flip(-1)


def upright(image: Tensor) -> Tensor:
    return image


class OwnLoaders(Net):
    """Makes its own loaders, and draws a number for the validation set."""

    def train_dataloader(self) -> Any:
        return loader_of(Turned(mirrored))

    def val_dataloader(self) -> Any:
        return loader_of(Turned(upright, seed=int(torch.randint(1, 9, ()))))


@pytest.mark.parametrize("settings", [{}, {"limit_val_batches": 0}], ids=["validation", "no validation"])
def test_a_resumed_run_reads_the_images_through_the_same_transform(tmp_path: Path, settings: dict[str, Any]) -> None:
    """A new run has seen its validation set in the sanity check; a resumed one meets it at the first validation."""

    class Telling(UltraCleanCallback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            self.source = self._procedure.session.scanner.transform.source

    def train(callbacks: list[Any], ckpt: Path | None = None, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        module, trainer = OwnLoaders(), make_trainer(callbacks, 3, check_val_every_n_epoch=3, **kwargs)
        trainer.fit(module, ckpt_path=ckpt)
        return module

    whole, saver = Telling(warmup_epochs=2, rule="fraction", fraction=0.25), SaveAll(tmp_path)
    train([whole, saver], num_sanity_val_steps=1, **settings)
    resumed = Telling(warmup_epochs=2, rule="fraction", fraction=0.25)
    train([resumed], saver.paths[0], **settings)
    assert whole.source == resumed.source == ("training" if settings else "validation")
    assert torch.equal(whole.verdict.scores, resumed.verdict.scores)
    assert torch.equal(whole.verdict.keep, resumed.verdict.keep)


def test_reading_the_validation_set_draws_no_random_numbers() -> None:
    def train(callbacks: list[Any]) -> Any:
        torch.manual_seed(0)
        module = OwnLoaders()
        make_trainer(callbacks, 3, check_val_every_n_epoch=3).fit(module)
        return module

    assert same_state(train([]), train([always(fraction=1e-3)]))


def test_resumed_with_workers(tmp_path: Path) -> None:
    whole, saver = always(), SaveAll(tmp_path)
    _, expected = run([whole, saver])
    after_decision = next(path for path in saver.paths if path.name.endswith("epoch_end-1.ckpt"))
    _, module = run([always()], after_decision, num_workers=1, persistent_workers=True)
    assert same_state(module, expected)
    kept = set(whole.verdict.keep.nonzero().flatten().tolist())
    assert all(set(positions) == kept for _, positions in module.epochs())


def test_lightnings_checkpoints_resume_too(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}-{step}")
    torch.manual_seed(0)
    whole, expected = always(), Net()
    trainer = make_trainer([whole, keeper], 3, enable_checkpointing=True)
    trainer.fit(expected, loader_of(Pictures()))
    paths = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert len(paths) == 5
    for number, path in enumerate(paths):
        resumed, module = always(), Net()
        folder = tmp_path / str(number)
        torch.manual_seed(0)
        trainer = make_trainer([resumed, ModelCheckpoint(folder)], 3, enable_checkpointing=True)
        with pytest.warns(UserWarning, match="dirpath has changed"):
            trainer.fit(module, loader_of(Pictures()), ckpt_path=path)
        assert same_state(module, expected), path.name


def test_interrupted_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    class Cut(pl.Callback):
        def __init__(self, at: int) -> None:
            self.at, self.seen = at, list[int]()  # a restart gives numbers back

        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            self.seen.append(trainer.global_step)
            if len(self.seen) == self.at:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")
                raise ValueError("the cable")

    for at in (2, 6, 10):
        with pytest.raises(ValueError, match="the cable"):
            run([always(), Cut(at)])
        callback = always()
        trainer, module = run([callback], tmp_path / "cut.ckpt")
        kept = callback.verdict.keep.nonzero().flatten().tolist()
        assert len(kept) == 48
        assert module.epochs()[-2:] == [(1, kept), (2, kept)]
        assert trainer.current_epoch == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_callback_that_is_added_on_resume_goes_back_to_a_new_optimizer(tmp_path: Path, workers: int) -> None:
    run([SaveAll(tmp_path)], val=False)
    (path,) = tmp_path.glob("*epoch_end-1.ckpt")
    added, digest = always(), FirstBatches()
    torch.manual_seed(0)
    start = state_of(Net())
    trainer, module = run([added, digest], path, val=False, num_workers=workers)
    (first,) = digest.seen
    assert first["momentum"] == first["step"] == 0
    assert first["lr"] == 0.05
    assert same_state(first["weights"], start)
    kept = added.verdict.keep.nonzero().flatten().tolist()
    assert module.epochs()[1:] == [(epoch, kept) for epoch in range(3)]
    assert trainer.current_epoch == 3


def test_averages_go_back_after_a_resume(tmp_path: Path) -> None:
    class Average(pl.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            self.average = AveragedModel(pl_module)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            self.average.update_parameters(pl_module)

    whole, saver = Average(), SaveAll(tmp_path)
    run([whole, always(), saver])
    path = next(path for path in saver.paths if path.name.endswith("epoch_end-1.ckpt"))
    resumed = Average()
    run([resumed, always()], path)
    assert same_state(resumed.average, whole.average)


def test_another_dataset_is_refused_by_its_size(tmp_path: Path) -> None:
    saver = SaveAll(tmp_path)
    run([always(), saver])
    with pytest.raises(DataError, match=r"64.*48|48.*64"):
        run([always()], saver.paths[-1], dataset=Pictures(48))
    other = Pictures()
    other.targets = other.targets.flip(0)
    with pytest.raises(DataError, match="other labels"):
        run([always()], saver.paths[-2], dataset=other)


def test_state_is_tensors_and_plain_values(tmp_path: Path) -> None:
    saver = SaveAll(tmp_path)
    callback = always(name="mine")
    run([callback, saver])
    for path in saver.paths:
        state = torch.load(path, weights_only=True)["callbacks"]
        assert "lightning_backdoor.UltraClean.mine" in state
    last = state["lightning_backdoor.UltraClean.mine"]
    assert torch.equal(last["verdict"]["keep"], callback.verdict.keep)
    assert last["response"]["start"] is None, "nothing to go back to: the checkpoint is small again"


def early_of(callback: UltraCleanCallback) -> Any:
    return callback.state_dict()["detector"]["early"]


def test_early_neighbors_survive_an_interruption_and_not_a_second_fit(tmp_path: Path) -> None:
    whole, saver = UltraCleanCallback(warmup_epochs=3), SaveAll(tmp_path)
    run([whole, saver], epochs=4)
    expected = early_of(whole)
    states = [torch.load(path, weights_only=True)["callbacks"][whole.state_key] for path in saver.paths]
    known = [state["detector"]["early"] is not None for state in states]
    assert known == sorted(known), "before they are measured, after it"
    assert not known[0]
    for path in saver.paths:
        resumed = UltraCleanCallback(warmup_epochs=3)
        run([resumed], path, epochs=4)
        again = early_of(resumed)
        assert all(torch.equal(again[name], expected[name]) for name in expected), path.name
    cut = UltraCleanCallback(warmup_epochs=3)
    cut.load_state_dict(states[known.index(True)])
    assert cut.verdict is None
    trainer, module = make_trainer([]), Net()
    trainer.strategy.connect(module)
    for callback in (cut, resumed):
        assert early_of(callback) is not None
        callback.setup(trainer, module, "fit")
    assert early_of(cut) is None, "of a fit that ended before its scan"
    assert early_of(resumed) is not None, "the verdict of the earlier fit stays, and so does what led to it"


@pytest.mark.parametrize(("after", "measures"), [(1, True), (2, False)], ids=["before the scan", "at the scan"])
def test_a_callback_that_is_added_on_resume_measures_neighbors_before_the_scan_alone(
    tmp_path: Path, after: int, measures: bool
) -> None:
    saver = SaveAll(tmp_path)
    run([saver], val=False, epochs=3)
    added = UltraCleanCallback(warmup_epochs=3, response="continue")
    run([added], saver.paths[after - 1], val=False, epochs=3)
    assert added.verdict is not None
    assert (early_of(added) is not None) == measures


def test_early_neighbors_of_another_dataset_are_refused(tmp_path: Path) -> None:
    saver = SaveAll(tmp_path)
    run([UltraCleanCallback(warmup_epochs=4), saver], epochs=3)
    other = Pictures()
    other.targets = other.targets.flip(0)
    for dataset in (Pictures(60), other):
        with pytest.raises(DataError, match=r"early neighbors are of 64 samples of another dataset"):
            run([UltraCleanCallback(warmup_epochs=4)], saver.paths[-2], epochs=5, dataset=dataset)


def test_the_verdict_survives_a_second_fit() -> None:
    callback = always()
    run([callback])
    verdict = callback.verdict
    _, second = run([callback])
    kept = verdict.keep.nonzero().flatten().tolist()
    assert callback.verdict is verdict
    assert second.epochs() == [(epoch, kept) for epoch in range(3)]
