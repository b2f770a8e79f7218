"""Files that cannot be read: `None` in the dataset, dropped by `collate_fn`; kept, counted and not judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import default_collate

from lightning_backdoor.errors import DataError
from lightning_backdoor.report.table import class_rows
from tests.callbacks.helpers import Pictures, loader_of, make_trainer, same_state
from tests.contract.problem import BATCH, EPOCHS, WARNS, assert_settled, net_of, planted
from tests.contract.registry import GIVEN, Entry, every_kind_of_defense, of

pytestmark = [*WARNS, pytest.mark.filterwarnings("ignore:.*`collate_fn` drops 5 of 96")]

HOLES = [0, 3, 40, 41, 95]  # the first image, a planted one, two in a row, the last


class Holes(Pictures):
    """Planted images, of which some cannot be read."""

    def __init__(self, holes: list[int] = HOLES) -> None:
        self.__dict__.update(vars(planted()))
        self.holes = holes

    def __getitem__(self, i: int) -> Any:
        return None if i in self.holes else super().__getitem__(i)


def drop_nothing(items: list[Any]) -> dict[str, Tensor]:
    """What everybody writes who has corrupt files."""
    return default_collate([item for item in items if item is not None])


def train(callback: Any, trainer: Any = None, data: Any = None, **settings: Any) -> tuple[Any, Any]:
    module, trainer = net_of(), make_trainer([callback], EPOCHS, **settings) if trainer is None else trainer
    trainer.fit(module, loader_of(Holes() if data is None else data, BATCH, collate_fn=drop_nothing))
    return module, trainer


@pytest.mark.case("52")
@every_kind_of_defense
def test_samples_that_the_collate_drops_are_kept_and_counted(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: dict[str, Any] = {}
    monkeypatch.setattr(
        "lightning_backdoor.callbacks.reporting.write_report",
        lambda *args, evidence, **kwargs: reported.update(evidence.facts),
    )
    size = 2 if entry.name in ("ActivationClustering", "RandomFilter") else None  # one batch of a scan holds nothing
    callback = entry.make(report_dir=tmp_path, batch_size=size)
    with pytest.warns(UserWarning, match="`collate_fn` drops 5 of 96 training samples.*kept.*lowest score") as told:
        module, trainer = train(callback)
    assert sum("drops 5 of 96" in str(warning.message) for warning in told) == 1
    assert entry.acted(callback, trainer)
    assert trainer.current_epoch == entry.epochs
    assert_settled(trainer, module)
    verdict, holes = callback.verdict, torch.zeros(96, dtype=torch.bool)
    holes[HOLES] = True
    assert bool(verdict.keep[holes].all())
    assert torch.equal(verdict.labels < 0, holes)
    assert torch.equal(verdict.labels[~holes], planted().targets[~holes])
    assert bool(verdict.scores.isfinite().all())
    assert bool((verdict.scores[holes] == verdict.scores.min()).all())
    for mask in (verdict.trusted, verdict.suspect):
        assert mask is None or not bool(mask[holes].any())
    assert reported["images that `collate_fn` drops (kept, not looked at)"] == 5
    assert all(row.label >= 0 for row in class_rows(verdict))


@pytest.mark.filterwarnings("ignore:.*`collate_fn` drops 2 of 96")
@pytest.mark.parametrize("name", ["DSTCallback", "DBRCallback"])
def test_the_first_two_samples_may_be_among_them(name: str) -> None:
    """The fit goes on to its end: what reads a few samples to look at gradients reads others."""
    entry = of(name)
    callback = entry.make()
    module, trainer = train(callback, data=Holes([0, 1]))
    assert entry.acted(callback, trainer)
    assert trainer.current_epoch == entry.epochs
    assert_settled(trainer, module)
    assert (callback.verdict.labels < 0).nonzero().flatten().tolist() == [0, 1]


@pytest.mark.parametrize("name", ["DSTCallback", "DBRCallback", "UltraCleanCallback"])
def test_a_resumed_run_knows_them(name: str, tmp_path: Path) -> None:
    entry = of(name)
    saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    callback = entry.make()
    whole, _ = train(callback, make_trainer([callback, saves], EPOCHS, enable_checkpointing=True))
    again, module = entry.make(), net_of()
    trainer = make_trainer([again], EPOCHS)
    trainer.fit(module, loader_of(Holes(), BATCH, collate_fn=drop_nothing), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert same_state(whole, module)
    assert torch.equal(callback.verdict.scores, again.verdict.scores)
    assert torch.equal(callback.verdict.keep, again.verdict.keep)


def test_a_dataset_that_cannot_be_read_at_all_is_told_before_anything_is_trained() -> None:
    class Nothing(Holes):
        def __getitem__(self, i: int) -> Any:
            return None

    trainer = make_trainer([of("UltraCleanCallback").make()], EPOCHS)
    with pytest.raises(DataError, match="`collate_fn` drops all of 64 training samples"):
        trainer.fit(net_of(), loader_of(Nothing(), BATCH, collate_fn=lambda items: None))
    assert trainer.global_step == 0


def test_a_verdict_of_before_fits_although_an_image_has_become_unreadable() -> None:
    """The labels of what is read are compared, and of nothing else."""
    callback = of("FineTuneTrusted").make(verdict=GIVEN)
    _, trainer = train(callback)
    assert of("FineTuneTrusted").acted(callback, trainer)
