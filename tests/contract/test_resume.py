"""Law 5 for every public callback: a run that was interrupted anywhere ends like one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_backdoor import DBRCallback, NONECallback
from lightning_backdoor.errors import DataError
from tests.callbacks.helpers import same_state
from tests.callbacks.test_ultraclean_resume import SaveAll
from tests.contract.problem import EPOCHS, WARNS, Run, assert_settled, clean, fit, planted
from tests.contract.registry import GIVEN, Entry, every, every_defense

pytestmark = [*WARNS, pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)` before")]


class SaveEverywhere(SaveAll):
    """A checkpoint in the middle of every epoch, at its end, and at the end of its validation."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.save(trainer, "middle")


def assert_same_end(whole: Any, expected: Run, callback: Any, run: Run, where: str) -> None:
    assert same_state(expected.module, run.module), where
    assert run.trainer.current_epoch == expected.trainer.current_epoch, where
    assert run.trainer.global_step == expected.trainer.global_step, where
    for part in ("history",):
        assert getattr(callback, part, None) == getattr(whole, part, None), where
    if getattr(whole, "verdict", None) is None:
        return
    for name in ("scores", "keep", "labels", "trusted", "suspect"):
        one, other = getattr(whole.verdict, name), getattr(callback.verdict, name)
        assert (one is None) == (other is None), where
        assert one is None or torch.equal(one, other), where
    assert callback.verdict.rule == whole.verdict.rule, where
    assert callback.verdict.threshold == whole.verdict.threshold, where


@pytest.fixture(scope="module")
def plain_resumes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    """Of which checkpoints Lightning by itself ends the same: before 2.6, schedules step twice after a validation."""
    saver = SaveAll(tmp_path_factory.mktemp("plain"))
    whole = fit([saver])
    return {path.name: same_state(whole.module, fit([], ckpt=path).module) for path in saver.paths}


@pytest.mark.case("36", "43")
@every
def test_resumed_between_epochs_and_after_validation_it_ends_the_same(
    entry: Entry, plain_resumes: dict[str, bool], tmp_path: Path
) -> None:
    assert sum(plain_resumes.values()) >= EPOCHS
    whole, saver = entry.make(), SaveAll(tmp_path)
    expected = fit([whole, saver])
    assert {path.name.split("-")[1] for path in saver.paths} == {"epoch_end", "validation_end"}
    for path in saver.paths:
        callback = entry.make()
        run = fit([callback], ckpt=path)
        if all(plain_resumes.values()) or "validation" not in path.name:
            assert_same_end(whole, expected, callback, run, path.name)
        if entry.kind != "watch":  # after the last validation there is nothing left to watch
            assert entry.acted(callback, run.trainer), path.name
        assert_settled(run.trainer, run.module, run.loader, run.before)


@pytest.mark.case("37", "61")
@every
def test_resumed_in_the_middle_of_an_epoch_it_goes_on_with_what_it_knew(entry: Entry, tmp_path: Path) -> None:
    """Lightning begins the loader of the epoch anew: batches differ, so weights do."""
    saver = SaveEverywhere(tmp_path)
    expected = fit([entry.make(), saver])
    paths = [path for path in saver.paths if "middle" in path.name]
    assert len(paths) >= 3
    for path in paths:
        callback = entry.make()
        known = torch.load(path, weights_only=True)["callbacks"].get(callback.state_key, {}).get("verdict")
        run = fit([callback], ckpt=path)
        assert run.trainer.current_epoch == expected.trainer.current_epoch, path.name
        assert entry.acted(callback, run.trainer), path.name
        assert_settled(run.trainer, run.module, run.loader, run.before)
        if known is not None:
            assert torch.equal(callback.verdict.scores, known["scores"]), path.name
            drawn = {i for _, positions in run.module.epochs() for i in positions}
            assert bool(drawn) == (entry.kind != "own"), "the steps of D-ST are its own"
            suspect = known.get("suspect", torch.zeros(len(known["keep"]), dtype=torch.bool))
            allowed = known["keep"] | (suspect & (entry.kind == "repair"))
            assert drawn <= set(allowed.nonzero().flatten().tolist()), path.name


@pytest.mark.case("39")
@every
def test_the_checkpoints_of_lightning_resume_and_load_safely(entry: Entry, tmp_path: Path) -> None:
    keeper, callback = ModelCheckpoint(tmp_path, save_last=True, save_top_k=-1), entry.make(name="mine")
    expected = fit([callback, keeper], enable_checkpointing=True)
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert same_state(last["state_dict"], expected.module)
    assert len(last["optimizer_states"]) == 1
    again = entry.make(name="mine")
    run = fit([again], ckpt=tmp_path / "last.ckpt")
    assert_same_end(callback, expected, again, run, "last.ckpt")
    if entry.kind != "watch":
        assert f"lightning_backdoor.{entry.cls.method}.mine" in last["callbacks"]


@pytest.mark.case("42")
@every_defense
def test_resumed_on_other_data_it_is_refused(entry: Entry, tmp_path: Path) -> None:
    saver = SaveAll(tmp_path)
    fit([entry.make(), saver])
    with pytest.raises(DataError, match=r"another dataset: it knows 96|dataset of 96 samples, but this one has 80"):
        fit([entry.make()], planted(80), ckpt=saver.paths[-1])
    other = planted()
    other.targets = other.targets.flip(0)
    with pytest.raises(DataError, match="other labels"):
        fit([entry.make()], other, ckpt=saver.paths[-2])


@pytest.mark.parametrize(
    "make",
    [
        lambda: NONECallback(rule="paper", warmup_epochs=1, finetune_epochs=1),
        lambda: NONECallback(rule="paper", rounds=3, finetune_epochs=1),
        lambda: DBRCallback(verdict=GIVEN, paper_loop=True, epochs=2),
        lambda: DBRCallback(verdict=GIVEN, warmup_epochs=1, epochs=2),
        lambda: DBRCallback(verdict=GIVEN, warmup_epochs=0, epochs=2),
    ],
    ids=[
        "NONE inside the plan",
        "three rounds",
        "reference",
        "inside the plan",
        "at once",
    ],
)
def test_other_settings_resume_as_well(make: Any, plain_resumes: dict[str, bool], tmp_path: Path) -> None:
    whole, saver = make(), SaveAll(tmp_path)
    expected = fit([whole, saver])
    for path in saver.paths:
        callback = make()
        run = fit([callback], ckpt=path)
        if all(plain_resumes.values()) or "validation" not in path.name:
            assert_same_end(whole, expected, callback, run, path.name)


@pytest.mark.case("38")
@every
def test_added_on_resume_it_acts_on_what_is_left(entry: Entry, tmp_path: Path) -> None:
    saver = SaveAll(tmp_path)
    fit([saver])
    callback = entry.make()
    if entry.kind == "own":
        with pytest.raises(Exception, match=r"trains from the start, but the checkpoint was written without it"):
            fit([callback], ckpt=saver.paths[0])
        return
    run = fit([callback], ckpt=saver.paths[0])
    assert entry.acted(callback, run.trainer)
    assert_settled(run.trainer, run.module, run.loader, run.before)


@every
def test_a_checkpoint_of_it_is_an_ordinary_one(entry: Entry, tmp_path: Path) -> None:
    """A user may drop the callback and train on."""
    saver = SaveAll(tmp_path)
    fit([entry.make(), saver])
    if entry.kind == "own":  # its own optimizer is in it until it is done; torch says so
        with pytest.raises(ValueError, match="different number of parameter groups"):
            fit([], clean(), ckpt=saver.paths[0])
        return
    ends = torch.load(saver.paths[0], weights_only=True)["epoch"]
    run = fit([], clean(), ckpt=saver.paths[0], epochs=ends + 3)
    assert run.trainer.current_epoch == ends + 3
