from __future__ import annotations

import copy
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_backdoor.data.views import scan_loader
from lightning_backdoor.errors import DataError, ModelError
from lightning_backdoor.scanning import scan as scan_module
from lightning_backdoor.scanning.scan import progress, raise_on_all_ranks, scan, shard
from tests.scanning.ddp_scan import free_port, work
from tests.scanning.helpers import (
    LIGHTNING_WARNS,
    NoisyData,
    Scanner,
    Trap,
    make_trainer,
    scan_logits,
    train_loader,
)

pytestmark = LIGHTNING_WARNS


@pytest.fixture
def running() -> tuple[Any, Trap]:
    """A trainer and a module as they stand in the middle of a fit."""
    module, trainer = Trap(), make_trainer([])
    trainer.strategy.connect(module)
    trainer.strategy.model_to_device()
    trainer._data_connector.attach_datamodule(module)
    module.trainer = trainer
    trainer.training = True
    return trainer, module


def loader_of(n: int = 10, indices: Any = None, batch_size: int = 4) -> Any:
    data = NoisyData(n)
    return scan_loader(
        train_loader(data), range(n) if indices is None else indices, seed=0, batch_size=batch_size, num_workers=0
    )


def test_result_is_the_plain_loop(running: Any) -> None:
    trainer, module = running
    data = NoisyData()
    result = scan_logits(trainer, module, data)
    oracle = copy.deepcopy(module).eval()
    oracle.log = oracle.log_dict = lambda *args, **kwargs: None
    logits = []
    for _, (images, _) in scan_loader(train_loader(data), range(63), seed=5, batch_size=1):
        with torch.no_grad():
            logits.append(oracle(images.to(oracle.device)).cpu())
    torch.testing.assert_close(result["logits"], torch.cat(logits))
    assert torch.equal(result["label"], data.labels)
    assert torch.equal(result["right"], result["logits"].argmax(1) == data.labels)
    assert result["right"].dtype == torch.bool


@pytest.mark.case("45")
@pytest.mark.parametrize(("batch_size", "workers"), [(5, 0), (64, 0), (8, 1), (8, 2)])
def test_workers_and_batch_size_do_not_matter(running: Any, batch_size: int, workers: int) -> None:
    trainer, module = running
    first = scan_logits(trainer, module, NoisyData())
    second = scan_logits(trainer, module, NoisyData(), batch_size, workers)
    torch.testing.assert_close(first["logits"], second["logits"], rtol=0, atol=1e-6)


def test_rows_follow_the_dataset_position(running: Any) -> None:
    shuffled = [7, 2, 9, 4]
    result = scan(
        *running,
        loader_of(indices=shuffled, batch_size=3),
        lambda indices, batch: {"at": indices, "twice": 2.0 * indices},
        description="",
    )
    assert result["at"].tolist() == [2, 4, 7, 9]
    assert result["twice"].tolist() == [4.0, 8.0, 14.0, 18.0]


def test_shards_are_a_partition() -> None:
    shards = [shard(63, SimpleNamespace(global_rank=rank, world_size=4)) for rank in range(4)]  # type: ignore[arg-type]
    assert shards[1][:3] == [1, 5, 9]
    assert sorted(index for own in shards for index in own) == list(range(63))


def test_batches_are_not_kept(running: Any) -> None:
    """Memory does not grow with the number of samples: hardly any earlier result is alive when the next one is made."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        value = torch.zeros(len(indices), 100)
        alive.append(weakref.ref(value))
        return {"x": value}

    scan(*running, loader_of(63, batch_size=2), step, description="")
    assert len(alive) == 32
    assert most <= 1


def test_collate_that_merges_samples_is_named(running: Any) -> None:
    with pytest.raises(DataError, match=r"4 samples and 'x' of shape \(3,\).*collate_fn"):
        scan(*running, loader_of(), lambda i, batch: {"x": torch.zeros(len(i) - 1)}, description="")
    with pytest.raises(DataError, match=r"4 samples and 'x' of shape \(\)"):
        scan(*running, loader_of(), lambda i, batch: {"x": torch.tensor(0.0)}, description="")


def test_missing_repeated_and_no_samples_are_errors(running: Any) -> None:
    def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
        return {"x": indices}

    class Yields(list[Any]):
        dataset = range(4)

    with pytest.raises(DataError, match="got 2 of 4"):
        scan(*running, Yields([(torch.tensor([0, 1]), None)]), step, description="")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="4 samples, the length of its dataset, got more"):
        scan(*running, Yields([(torch.arange(5), None)]), step, description="")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"every dataset position once.*shard"):
        scan(*running, loader_of(indices=[1, 2, 1]), step, description="")
    with pytest.raises(DataError, match="at least one sample"):
        scan(*running, loader_of(indices=[]), step, description="")


def test_nan_is_reported_with_its_positions(running: Any) -> None:
    def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
        logits = torch.zeros(len(indices), 3)
        logits[(indices == 5) | (indices == 8), 1] = torch.nan
        return {"logits": logits, "index": indices}

    with pytest.raises(ModelError, match=r"NaN in 'logits' for 2 of 10 \(first positions: \[5, 8\]\).*diverged"):
        scan(*running, loader_of(), step, description="")


def test_error_in_step_leaves_everything_as_it_was(running: Any) -> None:
    trainer, module = running
    before = torch.get_rng_state()

    def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
        torch.rand(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        scan(trainer, module, loader_of(), step, description="")
    assert trainer.training
    assert all(child.training for child in module.modules())
    assert torch.equal(torch.get_rng_state(), before)


class Quiet(Trap):
    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.fc(self.drop(self.norm(self.conv(images)).relu().mean((2, 3))))
        return out


@pytest.mark.case("55")
@pytest.mark.skipif(pl.__version__ < "2.4", reason="torch cannot compile what Lightning 2.2 logs with")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch, while compiling
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
def test_compiled_module_gives_the_scores_of_the_eager_one() -> None:
    data, results = NoisyData(), []
    for wrap in (lambda module: module, lambda module: torch.compile(module, backend="eager")):
        torch.manual_seed(0)
        module = Quiet()
        scanner = Scanner(data, ("on_train_start",))
        make_trainer([scanner], max_steps=1).fit(wrap(module), train_loader(data))
        results.append(scanner.results[0]["logits"])
        assert module.conv.weight.requires_grad
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


class Told(list[Any]):
    """Records in the shape of a rich display."""

    def add_task(self, description: str, total: int) -> int:
        self.append(("add", description, total))
        return 3

    def update(self, task: int, **change: Any) -> None:
        self.append((task, change))


def display(bar: Any, rank_zero: bool = True, total: int = 40, step: int = 4) -> None:
    trainer: Any = SimpleNamespace(progress_bar_callback=bar, is_global_zero=rank_zero)
    with progress(trainer, "Looking", total) as advance:
        for _ in range(total // step):
            advance(step)


def test_tqdm_gets_a_second_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(scan_module, "PATIENCE_S", 0.0)
    display(pl.callbacks.TQDMProgressBar())
    err = capsys.readouterr().err
    assert "Looking" in err
    assert "/40" in err


def test_rich_display_gets_a_task_that_is_hidden_and_never_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "PATIENCE_S", 0.0)
    told = Told()
    display(SimpleNamespace(progress=told, is_disabled=False), total=8)
    assert told[0] == ("add", "Looking", 8)
    assert [change["advance"] for _, change in told[1:-1]] == [4, 4]
    assert told[-1] == (3, {"visible": False, "refresh": True})


@pytest.mark.case("71")
def test_real_rich_display(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(scan_module, "PATIENCE_S", 0.0)

    class Scan(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            scan_logits(trainer, pl_module, NoisyData())
            tasks = trainer.progress_bar_callback.progress.tasks
            self.tasks = [(task.description, task.completed, task.visible) for task in tasks]

    class Validated(Trap):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    seen = Scan()
    trainer = make_trainer([pl.callbacks.RichProgressBar(), seen], enable_progress_bar=True)
    data = NoisyData()
    trainer.fit(
        Validated(), train_loader(data), DataLoader(data, batch_size=16)
    )  # the validation task is made after ours: positions must hold
    assert ("scanning", 63, False) in seen.tasks


def test_other_bars_get_a_message_every_tenth(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scan_module, "PATIENCE_S", 0.0)
    messages: list[str] = []
    monkeypatch.setattr(scan_module, "rank_zero_info", messages.append)
    display(SimpleNamespace(is_disabled=False), total=40, step=1)
    assert len(messages) == 10
    assert messages[0] == "Looking: 10 % (4 of 40)"


@pytest.mark.parametrize(
    ("bar", "rank_zero", "patience"),
    [
        (None, True, 0.0),
        (SimpleNamespace(is_disabled=True), True, 0.0),
        (SimpleNamespace(), False, 0.0),
        (SimpleNamespace(), True, 9.0),
    ],
    ids=["no bar", "disabled", "other rank", "short pass"],
)
def test_silence(monkeypatch: pytest.MonkeyPatch, bar: Any, rank_zero: bool, patience: float) -> None:
    monkeypatch.setattr(scan_module, "PATIENCE_S", patience)
    monkeypatch.setattr(scan_module, "rank_zero_info", pytest.fail)
    display(bar, rank_zero)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    torch.multiprocessing.spawn(work, args=(free_port(), str(folder)), nprocs=2)
    return [torch.load(Path(folder) / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.cpu
@pytest.mark.parametrize("situation", ["odd", "one sample", "portions", "after an epoch"])
def test_ranks_agree(two_ranks: list[dict[str, Any]], situation: str) -> None:
    first, second = (rank[situation] for rank in two_ranks)
    assert first.keys() == second.keys() == {"logits", "label", "right"}
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert len(first["logits"]) == (1 if situation == "one sample" else 63)


@pytest.mark.cpu
@pytest.mark.case("45")
def test_two_ranks_see_what_one_process_sees(running: Any, two_ranks: list[dict[str, Any]]) -> None:
    pl.seed_everything(3)
    module = Trap()
    running[1].load_state_dict(module.state_dict())
    alone = scan_logits(*running, NoisyData())
    for key, value in two_ranks[0]["odd"].items():
        torch.testing.assert_close(value, alone[key], rtol=0, atol=1e-6)
    assert all(torch.equal(two_ranks[0]["odd"][key], two_ranks[0]["portions"][key]) for key in alone)


@pytest.mark.cpu
@pytest.mark.case("50")
def test_ranks_borrow_the_buffers_of_rank_zero(two_ranks: list[dict[str, Any]]) -> None:
    first, second = two_ranks
    assert not torch.equal(first["own mean"], second["own mean"]), "the test must start from ranks that differ"
    assert torch.equal(second["lent mean"], first["own mean"])
    assert torch.equal(second["scanned"]["norm.running_mean"], second["own mean"])


@pytest.mark.cpu
def test_training_on_two_ranks_is_bit_identical(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        assert [k for k, v in rank["plain"].items() if not torch.equal(v, rank["scanned"][k])] == []


@pytest.mark.cpu
def test_failure_on_one_rank_ends_both(two_ranks: list[dict[str, Any]]) -> None:
    said = "BackdoorDefenseError: fails on rank 1 failed in the process of rank 1: KeyError: 'only here'"
    assert two_ranks[0]["failure"] == said
    assert two_ranks[1]["failure"] == "KeyError: 'only here'"


def test_stop_iteration_of_a_defense_does_not_end_a_fit_silently() -> None:
    """Lightning takes it for the end of the training data."""

    class Stopping(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            with raise_on_all_ranks(trainer, "look at the images"):
                next(iter(()))

    with pytest.raises(RuntimeError, match=r"look at the images.*StopIteration.*`next\(iterator, None\)`") as told:
        make_trainer([Stopping()]).fit(Trap(), train_loader(NoisyData()))
    assert told.traceback[-1].name == "on_train_epoch_start"
