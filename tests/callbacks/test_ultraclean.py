"""UltraClean in a Trainer: planted truth and its clean twin, silence until it acts, what it tells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.digits import Classifier
from benchmarks.samples import digits as samples_of_digits
from benchmarks.samples import tinted
from lightning_backdoor import UltraCleanCallback, Verdict, attacks
from lightning_backdoor.scanning.early_neighbors import EarlyNeighbors
from tests.callbacks.helpers import (
    LIGHTNING_WARNS,
    HeldOpen,
    Net,
    Pictures,
    always,
    digits,
    fit,
    make_trainer,
    poisoned_digits,
    same_state,
    share_right,
    train_digits,
    undefended,
)

pytestmark = LIGHTNING_WARNS


def test_finds_planted_poisons_and_trains_a_model_without_the_backdoor() -> None:
    poisoned, (_, test) = poisoned_digits(), digits()
    attacked = attacks.triggered(test, attacks.BadNets(), target=0)
    plain = undefended(poisoned=True)
    assert share_right(plain, attacked) > 0.6, "the attack must work for the defence to have something to do"

    callback = UltraCleanCallback(warmup_epochs=6)  # half way the trigger has no effect yet that could be estimated
    trainer, module = train_digits(poisoned, [callback])

    truth, removed = poisoned.poisoned, ~callback.verdict.keep
    assert (removed & truth).sum() >= 0.9 * truth.sum()
    assert (removed & ~truth).sum() <= 0.01 * len(truth)
    assert share_right(module, attacked) < 0.05
    assert share_right(module, test) > share_right(plain, test) - 0.05
    assert trainer.current_epoch == 6
    assert trainer.callback_metrics["backdoor/ultraclean/removed"] == removed.sum()

    (finding,) = callback.verdict.findings
    assert finding.diagnosis == "wrong labels"
    own = truth[finding.positions]
    shown = poisoned.true_labels[finding.positions]
    assert float((finding.suggested_labels == shown)[own].float().mean()) > 0.8
    assert finding.reference_accuracy > 0.9
    assert finding.estimated_asr > 0.6
    assert finding.control_asr < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("relabeled", [75, 0])
def test_an_attack_by_labels_alone_is_found_and_its_clean_twin_is_quiet(relabeled: int) -> None:
    """The reddest digits have the label 0: no single unit shows them, and all other labels lie beside them."""
    samples = tinted(relabeled)(samples_of_digits(Path(), 1400, 1), 1)
    loader = DataLoader(TensorDataset(samples.images, samples.labels), 64, shuffle=True, drop_last=True)
    callback = UltraCleanCallback()
    pl.seed_everything(1, verbose=False)
    pl.Trainer(max_epochs=10, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False).fit(
        Classifier(), loader
    )
    removed = ~callback.verdict.keep
    assert int((removed & samples.poisoned).sum()) >= 0.95 * relabeled
    assert int((removed & ~samples.poisoned).sum()) <= 0.05 * relabeled
    assert [finding.gate for finding in callback.verdict.findings] == ["look_alikes"] * bool(relabeled)


def test_labels_of_a_clean_label_attack_are_not_called_wrong() -> None:
    options: dict[str, Any] = {"rate": 0.8, "rate_of": "target_class", "labels": "clean"}
    callback = UltraCleanCallback()
    train_digits(attacks.poison(digits()[0], attacks.SIG(), target=0, **options), [callback])
    (finding,) = callback.verdict.findings
    assert finding.diagnosis != "wrong labels"
    assert finding.own_label_rate > 0.5
    assert finding.estimated_asr > finding.control_asr + 0.3


def test_removes_nothing_from_clean_data_and_the_training_is_bit_identical() -> None:
    train, _ = digits()
    _, alone = train_digits(train, [])
    callback = UltraCleanCallback()
    trainer, module = train_digits(train, [callback])
    assert bool(callback.verdict.keep.all())
    assert callback.verdict.threshold == float("inf")
    assert callback.history
    assert not any(event.whole_classes for event in callback.history)
    assert same_state(alone, module)
    assert alone.logged == module.logged
    assert trainer.callback_metrics["backdoor/ultraclean/removed"] == 0


def test_a_second_scan_does_not_take_the_clean_rest_of_a_class_for_poisons() -> None:
    poisoned = poisoned_digits(1400)
    callback = UltraCleanCallback(warmup_epochs=3, rescore_every=2)
    train_digits(poisoned, [callback])
    truth, removed = poisoned.poisoned, ~callback.verdict.keep
    assert (removed & truth).sum() >= 0.9 * truth.sum()
    assert (removed & ~truth).sum() <= 0.01 * len(truth)


class Noisy(Net):
    """Dropout, a batch norm that was frozen by hand, and noise from the global stream in training."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm1d(32)
        self.drop = nn.Dropout(0.3)

    def forward(self, images: Any) -> Any:
        hidden = self.body(images.float() / 255).flatten(1)
        return self.head(self.drop(self.frozen(hidden)))

    def on_train_epoch_start(self) -> None:
        self.frozen.eval()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_scan_that_removes_nothing_leaves_no_trace(workers: int, precision: str) -> None:
    def run(callbacks: list[Any]) -> tuple[Any, Noisy]:
        torch.manual_seed(0)
        module = Noisy()
        trainer = make_trainer(callbacks, epochs=4, precision=precision)
        loader = DataLoader(
            Pictures(), batch_size=16, shuffle=True, num_workers=workers, persistent_workers=bool(workers)
        )
        trainer.fit(module, loader, DataLoader(Pictures(seed=1), batch_size=16))
        return trainer, module

    before, alone = run([])
    quiet = UltraCleanCallback(rule="fraction", fraction=1e-3, rescore_every=1, warmup_epochs=1)
    after, module = run([quiet])
    assert quiet.verdict is not None
    assert len(quiet.verdict.removed) == 0
    assert same_state(alone, module)
    assert alone.logged == module.logged
    assert alone.drawn == module.drawn
    for name, value in before.callback_metrics.items():
        assert torch.equal(value, after.callback_metrics[name]), name
    assert [m.training for m in alone.modules()] == [m.training for m in module.modules()]


def test_the_paper_removes_its_fraction() -> None:
    callback = UltraCleanCallback.from_paper(warmup_epochs=1)
    fit([callback], epochs=2)
    verdict = callback.verdict
    assert len(verdict.removed) == int(0.2 * 64)
    assert bool((verdict.scores[~verdict.keep] >= verdict.scores[verdict.keep].max()).all())
    assert bool(((verdict.scores >= 0) & (verdict.scores <= 4)).all()), "L1 between probability vectors, twice"


def test_the_paper_scans_the_trained_network_and_trains_as_long_again() -> None:
    callback = UltraCleanCallback.from_paper()
    _, module = fit([callback], epochs=3)
    (event,) = callback.history
    assert (event.epochs, event.restarts) == (3, True)
    assert [len(positions) for _, positions in module.epochs()] == [64] * 3 + [64 - int(0.2 * 64)] * 3


@pytest.mark.parametrize(
    ("callback", "first"),
    [
        (UltraCleanCallback.from_paper(response="continue"), 2),  # nothing would be trained after the end
        (UltraCleanCallback.from_paper(warmup_epochs=1), 1),
        (UltraCleanCallback(rule="fraction"), 2),
        (UltraCleanCallback(score="paper"), 2),
        (UltraCleanCallback(), 2),
    ],
    ids=str,
)
def test_others_scan_half_way_or_when_they_are_told(callback: UltraCleanCallback, first: int) -> None:
    trainer = make_trainer([callback], epochs=4)
    assert callback._first_detection(trainer) == first


def test_target_class_scans_one_label_only() -> None:
    callback = always(target_class=2, fraction=0.5, warmup_epochs=1)
    fit([callback], epochs=2)
    labels = Pictures().targets
    assert set(labels[~callback.verdict.keep].tolist()) == {2}
    assert len(callback.verdict.removed) == 8


def test_max_removed_is_a_cap_on_all_scans_together() -> None:
    callback = always(warmup_epochs=1, fraction=0.5, max_removed=0.25, response="continue", rescore_every=1)
    _, module = fit([callback], epochs=6)
    assert len(callback.verdict.removed) == 16
    sizes = [len(positions) for _, positions in module.epochs()]
    assert sizes == sorted(sizes, reverse=True), "removed samples stay removed"


@pytest.mark.parametrize(("settings", "removed"), [({}, 8), ({"target_class": 2}, 2)], ids=["all", "one class"])
def test_a_fraction_is_removed_once_however_often_it_scans(settings: dict[str, Any], removed: int) -> None:
    callback = always(
        warmup_epochs=1, fraction=0.125, max_removed=0.9, response="continue", rescore_every=1, **settings
    )
    _, module = fit([callback], epochs=5)
    assert len(callback.verdict.removed) == removed
    assert [len(positions) for _, positions in module.epochs()] == [64, *[64 - removed] * 4]


def test_rescores_every_so_many_epochs() -> None:
    callback = UltraCleanCallback(warmup_epochs=2, rule="fraction", fraction=1e-3, rescore_every=2)
    fit([callback], epochs=7)
    assert [event.epochs for event in callback.history][:3] == [2, 4, 6]


def test_logs_where_early_stopping_and_loggers_see_it_and_writes_the_report_beside_the_logs(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit([always(name="first")], logger=logger)
    metrics = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "backdoor/ultraclean/removed" in metrics
    assert "16.0" in metrics
    folder = Path(logger.log_dir) / "lightning_backdoor" / "UltraClean.first"
    page = (folder / "report.html").read_text()
    assert "16" in page
    assert (folder / "verdict.csv").exists() or list(folder.glob("*.csv"))


def test_report_beside_tensorboard(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit([always()], logger=logger)
    assert (Path(logger.log_dir) / "lightning_backdoor" / "UltraClean" / "report.html").exists()


def test_no_logger_no_files_unless_a_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit([always()])
    assert list(tmp_path.iterdir()) == []
    fit([always(report_dir="mine")])
    assert (tmp_path / "mine" / "report.html").exists()


def test_two_instances_share_a_folder_by_their_names(tmp_path: Path) -> None:
    fit([always(name="a", report_dir=tmp_path, target_class=0), always(name="b", report_dir=tmp_path, target_class=1)])
    assert {path.name for path in tmp_path.iterdir()} == {"UltraClean.a", "UltraClean.b"}
    tables = {path: (path / "verdict.csv").read_text() for path in tmp_path.iterdir()}
    assert len(set(tables.values())) == 2


@pytest.mark.parametrize("others", [[], [HeldOpen(8, shown=20)], [HeldOpen(8)]], ids=["alone", "longer", "no end"])
def test_half_of_the_planned_epochs_whoever_needs_more(others: list[Any]) -> None:
    callback = Measuring(response="continue")
    callback.measured = []
    fit([*others, callback], epochs=6)
    assert callback.measured == [2]
    assert [event.epochs for event in callback.history] == [3]


class Measuring(UltraCleanCallback):
    """Notes after which epochs early neighbors are measured."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        before = self._procedure.detector._early
        super().on_train_epoch_end(trainer, pl_module)
        if self._procedure.detector._early is not before:
            self.measured.append(trainer.current_epoch + 1)


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        ({}, [2]),
        ({"warmup_epochs": 1}, []),
        ({"warmup_epochs": 2}, [1]),
        ({"warmup_epochs": 5}, [3]),
        ({"rescore_every": 1}, [2]),
        ({"rule": "fraction"}, []),
        ({"score": "paper"}, []),
    ],
    ids=str,
)
def test_measures_the_neighbors_once_half_way_to_the_first_scan(settings: dict[str, Any], measured: list[int]) -> None:
    callback = Measuring(**settings)
    callback.measured = []
    fit([callback], epochs=8)
    assert callback.measured == measured
    assert (callback.state_dict()["detector"]["early"] is not None) == bool(measured)
    if measured:
        shares = callback.state_dict()["detector"]["early"]["agreement"]
        assert shares.shape == (64,)
        assert shares.dtype == torch.half
        assert bool(((shares >= 0) & (shares <= 1)).all())


class StopAfterOne(pl.Callback):
    """Ends training, as EarlyStopping would, before its time."""

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        trainer.should_stop = True


@pytest.mark.parametrize(
    ("epochs", "others", "measured"), [(1, [], []), (2, [], []), (3, [], [1]), (4, [StopAfterOne()], [])]
)
def test_neighbors_are_not_measured_in_the_model_that_is_scanned(
    epochs: int, others: list[Any], measured: list[int]
) -> None:
    """They would deny labels by what the model has learned, not by what it had not learned yet."""
    callback = Measuring()
    callback.measured = []
    fit([*others, callback], epochs=epochs)
    assert callback.verdict is not None
    assert callback.measured == measured


def test_removes_what_the_early_neighbors_deny() -> None:
    """A second population that is too common for the gate, and looked like other classes at first."""
    generator = torch.Generator().manual_seed(0)
    labels, marked = torch.arange(2000) % 4, torch.rand(2000, generator=generator) < 0.2
    values = torch.randn(2000, 6, generator=generator) + 3 * nn.functional.one_hot(labels, 6)
    values[:, 5] += 9 * (marked & ((labels == 0) | (torch.rand(2000, generator=generator) < 0.3)))
    callback = UltraCleanCallback()
    found = {"labels": labels, "responses": values, "movement": values[:, 5], "susceptibility": values[:, 5]}
    assert bool(callback._procedure.detector.decide(found, callback.verdict).keep.all())
    callback._procedure.detector._early = EarlyNeighbors(
        torch.where(marked & (labels == 0), 0.2, 0.7).half(), labels[:4]
    )
    decision = callback._procedure.detector.decide(found, callback.verdict)
    assert torch.equal(~decision.keep, marked & (labels == 0))
    callback._procedure.verdict = Verdict(decision.scores, decision.keep, decision.threshold, decision.rule, labels)
    again = callback._procedure.detector.decide(found, callback.verdict)
    assert (again.rule, again.num_flagged_before_cap) == (decision.rule, decision.num_flagged_before_cap), (
        "a scan that finds nothing says nothing new"
    )
    assert torch.equal(again.keep, decision.keep)


def test_fast_dev_run_does_not_scan() -> None:
    callback = UltraCleanCallback()
    fit([callback], fast_dev_run=2)
    assert callback.verdict is None


def test_says_so_when_training_ends_before_the_scan() -> None:
    class Late(Net):
        def on_train_epoch_end(self) -> None:
            self.log("late", 1.0)

    callback, module = UltraCleanCallback(warmup_epochs=5), Late()
    stopping = EarlyStopping("late", stopping_threshold=2.0, check_on_train_epoch_end=True)
    with pytest.warns(UserWarning, match=r"before the scan.*smaller `warmup_epochs`"):
        make_trainer([callback, stopping], 9).fit(module, DataLoader(Pictures(), batch_size=16))
    assert callback.verdict is None


def test_two_instances_by_name_cut_both() -> None:
    first, second = always(name="a", target_class=0), always(name="b", target_class=1)
    _, module = fit([first, second])
    removed = set(first.verdict.removed.tolist()) | set(second.verdict.removed.tolist())
    assert len(removed) == 8
    assert removed.isdisjoint(module.epochs()[-1][1])
    assert len(module.epochs()[-1][1]) == 56
    with pytest.raises(RuntimeError, match=r"`callback.state_key` must be unique"):
        make_trainer([always(), always()])
