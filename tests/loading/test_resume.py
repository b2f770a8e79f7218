"""Interrupted runs: the mask is in force before the first batch, from every kind of checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_backdoor.errors import DataError
from tests.loading.recording import (
    EPOCHS,
    KEEP,
    KEPT,
    LIGHTNING_WARNS,
    SAFE_LOADING,
    N,
    Points,
    Pruner,
    Recording,
    fit,
    loader,
    make_trainer,
    same_weights,
    weights_of,
)

pytestmark = [
    *LIGHTNING_WARNS,
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def saver(folder: Path, **settings: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename="{epoch}-{step}", save_top_k=-1, **settings)


def interrupted(folder: Path, pruner: Any = None, *, train: Any = None, epochs: int = 3, **settings: Any) -> list[Path]:
    """Train for fewer epochs with a checkpoint callback; its files in the order of their steps."""
    callbacks = [pruner or Pruner(), saver(folder, **settings)]
    fit(train, callbacks, enable_checkpointing=True, max_epochs=epochs)
    return sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.split("step=")[1]))


def resume(path: Path, pruner: Any = None, train: Any = None, **settings: Any) -> tuple[Recording, Pruner]:
    torch.manual_seed(11)
    module, pruner = Recording(), pruner or Pruner()
    trainer = make_trainer([pruner], **settings)
    trainer.fit(module, train or loader(shuffle=True), loader(Points(16)), ckpt_path=path, **SAFE_LOADING)
    return module, pruner


@pytest.mark.case("35")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_resumed_after_pruning_stays_pruned(workers: int, tmp_path: Path) -> None:
    path = interrupted(tmp_path, save_on_train_epoch_end=True)[-1]
    module, pruner = resume(path, train=loader(shuffle=True, num_workers=workers))
    assert sorted(module.batches) == [3]
    assert module.drawn(3).keys() == KEPT
    assert module.planned[-1] == len(module.batches[3]) == 6
    assert module.validated == [3]
    assert torch.equal(pruner.mask, KEEP)


@pytest.mark.parametrize("crash", range(EPOCHS - 1))
@pytest.mark.parametrize("at_validation", [False, True])
def test_every_epoch_is_a_place_to_resume_with_the_same_weights(
    crash: int, at_validation: bool, tmp_path: Path
) -> None:
    whole = fit(loader())  # in order: Lightning does not restore random streams
    path = interrupted(tmp_path, train=loader(), epochs=crash + 1, save_on_train_epoch_end=not at_validation)[-1]
    module, pruner = resume(path, train=loader())
    assert torch.equal(pruner.mask, KEEP)
    for epoch in range(crash + 1, EPOCHS):
        assert module.batches[epoch] == whole.batches[epoch]
    assert same_weights(weights_of(module), weights_of(whole))


@pytest.mark.case("36")
def test_the_checkpoint_written_before_pruning_is_healed(tmp_path: Path) -> None:
    """By default ModelCheckpoint saves at the end of validation, which comes before the end of the training epoch."""
    path = interrupted(tmp_path, epochs=2, save_on_train_epoch_end=False)[-1]
    stored = torch.load(path, weights_only=True)["callbacks"]["pruner"]
    assert stored == {"mask": None, "done": -1}
    module, pruner = resume(path)
    assert pruner.done == 1
    assert [set(module.drawn(epoch)) for epoch in (2, 3)] == [KEPT, KEPT]
    assert module.planned[-1] == 6


@pytest.mark.case("37")
@pytest.mark.parametrize("step", [12, 19])
def test_in_the_middle_of_an_epoch(step: int, tmp_path: Path) -> None:
    paths = interrupted(tmp_path, every_n_train_steps=1)
    path = next(path for path in paths if f"step={step}" in path.stem)
    module, _ = resume(path)
    for epoch, batches in module.batches.items():
        allowed = KEPT if epoch > 1 else set(range(N))
        assert {index for batch in batches for index in batch} <= allowed
    assert set(module.drawn(3)) == KEPT
    assert module.validated[-1] == 3


class Late(Pruner):
    """Joins a run that began without it and prunes before the first batch."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch > 1 and self.mask is None:
            self.prune(trainer, [1])
            self.loader_filter.restart_iterator()


@pytest.mark.case("38")
@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, False), (1, True)])
def test_a_callback_that_is_added_on_resume_leaks_nothing(workers: int, persistent: bool, tmp_path: Path) -> None:
    path = interrupted(tmp_path, Pruner({}, name="other"), save_on_train_epoch_end=True)[-1]
    train = loader(shuffle=True, num_workers=workers, persistent_workers=persistent)
    module, _ = resume(path, Late(), train=train)
    assert set(module.drawn(3)) == KEPT
    assert len(module.batches[3]) == 6
    assert module.validated == [3]


def test_a_long_validation_interval_does_not_stop_the_resumed_run(tmp_path: Path) -> None:
    path = interrupted(tmp_path, save_on_train_epoch_end=True)[-1]
    with pytest.warns(UserWarning, match="`val_check_interval=8` is more than the 6 batches"):
        module, _ = resume(path, val_check_interval=8)
    assert module.validated == [3]
    assert module.trainer.val_check_interval == 8


def test_a_run_resumed_on_other_data_is_refused(tmp_path: Path) -> None:
    path = interrupted(tmp_path, save_on_train_epoch_end=True)[-1]
    with pytest.raises(
        DataError, match=r"64 samples, but this one has 63\. Resume with the dataset of the interrupted"
    ):
        resume(path, train=loader(Points(63)))


def test_a_batch_size_that_leaves_no_batch_is_refused_on_resume(tmp_path: Path) -> None:
    path = interrupted(tmp_path, save_on_train_epoch_end=True)[-1]
    with pytest.raises(DataError, match=r"48 of 64 training samples would be kept, less than one batch"):
        resume(path, train=loader(batch_size=50, drop_last=True))
