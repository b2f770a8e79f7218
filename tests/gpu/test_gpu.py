"""What only a GPU shows: mixed precision, compiled parts, memory formats, memory, waiting, deterministic kernels.

Every test also runs on the CPU (``pytest -m slow tests/gpu``), where it says little about the library and much about
itself.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import lightning_backdoor
from lightning_backdoor import measure
from tests.callbacks.helpers import Pairs, make_trainer, same_state
from tests.callbacks.test_ultraclean_resume import SaveAll
from tests.contract.problem import BATCH, WARNS, Run, assert_settled, clean, fit, net_of, seed_everything
from tests.contract.registry import Entry, every_kind_of_defense, of
from tests.contract.test_composition import kept
from tests.contract.test_resume import assert_same_end

pytestmark = [
    *WARNS,
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),  # where fp16 leaves the first steps out
]
PACKAGE = Path(lightning_backdoor.__file__).parent
WAITS_ALLOWED = {"scanning/scan.py": "the results of a batch are copied to their rows in the CPU's memory"}
"""Where a scan may wait for the GPU once for each batch, and for what."""


@pytest.fixture(params=[pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the Trainers of a test run; Lightning leaves its choice of kernels behind."""
    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield request.param
    torch.use_deterministic_algorithms(before, warn_only=warn)
    torch.backends.cudnn.deterministic = False


def net(**settings: Any) -> Any:
    """The network of the contract with a pooling whose gradients have one order on a GPU, too."""
    module = net_of(**settings)
    module.body[3] = nn.AvgPool2d(4)
    return module


def trained(place: str, callbacks: list[Any], *args: Any, module: Any = None, **settings: Any) -> Run:
    module = net() if module is None else module
    return fit(callbacks, *args, module=module, **{"accelerator": place, "deterministic": True, **settings})


@pytest.mark.case("62")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@every_kind_of_defense
def test_in_mixed_precision_it_acts(entry: Entry, precision: str, place: str) -> None:
    if place == "cpu" and precision == "16-mixed":
        pytest.skip("Lightning has no fp16 on a CPU")
    callback = entry.make()
    run = trained(place, [callback], precision=precision)
    assert entry.acted(callback, run.trainer)
    assert_settled(run.trainer, run.module, run.loader, run.before)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("name", "backend"), [("UltraCleanCallback", "inductor"), ("NONECallback", "aot_eager")])
def test_with_a_compiled_part_it_acts(name: str, backend: str, place: str) -> None:
    entry, module = of(name), net()
    module.body = torch.compile(module.body, backend=backend if place == "gpu" else "aot_eager")
    callback = entry.make()
    run = trained(place, [callback], module=module)
    assert entry.acted(callback, run.trainer)
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


@every_kind_of_defense
def test_with_channels_last_it_acts_and_weights_stay_so(entry: Entry, place: str) -> None:
    callback, module = entry.make(), net().to(memory_format=torch.channels_last)
    run = trained(place, [callback], module=module)
    assert entry.acted(callback, run.trainer)
    assert module.body[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_settled(run.trainer, run.module, run.loader, run.before)


@every_kind_of_defense
def test_resumed_it_ends_the_same(entry: Entry, place: str, tmp_path: Path) -> None:
    whole, saver = entry.make(), SaveAll(tmp_path)
    expected = trained(place, [whole, saver])
    paths = [path for path in saver.paths if "epoch_end" in path.name]
    for path in (paths[0], paths[-1]):
        callback = entry.make()
        run = trained(place, [callback], ckpt=path)
        assert_same_end(whole, expected, callback, run, path.name)


def test_two_defenses_at_once(place: str) -> None:
    one, two = of("UltraCleanCallback").make(), of("NONECallback").make()
    run = trained(place, [one, two])
    assert run.module.epochs()[-1][1] == kept(one, two)
    assert_settled(run.trainer, run.module, run.loader, run.before)


@every_kind_of_defense
def test_until_it_acts_no_bit_of_the_training_changes(entry: Entry, place: str) -> None:
    ends = []
    for callbacks in ([], [entry.make_silent()]):
        seed_everything()
        ends.append(trained(place, callbacks, clean(), module=net(noisy=True), shuffle=True).module)
    assert same_state(*ends)
    assert ends[0].drawn == ends[1].drawn


class Wide(pl.LightningModule):
    """Large enough that a training step takes more memory than its weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.AvgPool2d(8), nn.Flatten()),
        )
        self.head = nn.Linear(1024, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images.float() / 255))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit_wide(place: str, callbacks: list[Any], images: int) -> None:
    size = images if place == "gpu" else min(images, 96)
    trainer = make_trainer(callbacks, 2, accelerator=place, devices=1)
    trainer.fit(Wide(), DataLoader(Pairs(size, size=32), batch_size=min(128, size // 4)))


def allocated(place: str) -> int:
    return torch.cuda.memory_allocated() if place == "gpu" else 0


class Measuring(pl.Callback):
    """Scans several times before the first step; notes the memory in use after each."""

    def __init__(self, place: str, what: tuple[str, ...], times: int = 4) -> None:
        self.place, self.what, self.times = place, what, times
        self.memory: list[int] = []
        self.warned: list[warnings.WarningMessage] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for _ in range(self.times):
            with warnings.catch_warnings(record=True) as self.warned:
                warnings.simplefilter("always")
                if self.place == "gpu":
                    torch.cuda.set_sync_debug_mode("warn")
                try:
                    measure(trainer, pl_module, trainer.train_dataloader, what=self.what, detector_steps=2)
                finally:
                    if self.place == "gpu":
                        torch.cuda.set_sync_debug_mode("default")
            self.memory.append(allocated(self.place))


@pytest.mark.parametrize("what", ["units", "denoised", "fct"])
def test_scan_after_scan_takes_no_further_memory(what: str, place: str) -> None:
    measuring = Measuring(place, (what,))
    fit_wide(place, [measuring], 256)
    assert len(measuring.memory) == 4
    assert measuring.memory[-1] <= measuring.memory[1], measuring.memory


def waits(warned: list[Any], batches: int) -> dict[str, int]:
    """Files in which the GPU was waited for at least once for each batch, and how often."""
    told = [warning for warning in warned if "synchronizing" in str(warning.message)]
    paths = [Path(warning.filename) for warning in told]
    names = [str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else str(path) for path in paths]
    return {name: count for name, count in Counter(names).items() if count >= batches}


@pytest.mark.parametrize("what", ["units", "denoised"])
def test_a_scan_waits_for_the_gpu_only_where_it_may(what: str, place: str) -> None:
    """Sixteen batches, so that what is done once does not count."""
    measuring = Measuring(place, (what,), times=2)
    size = 16 * BATCH
    trainer = make_trainer([measuring], 1, accelerator=place, devices=1)
    trainer.fit(Wide(), DataLoader(Pairs(size, size=32), batch_size=BATCH))
    assert waits(measuring.warned, 15).keys() <= WAITS_ALLOWED.keys(), waits(measuring.warned, 15)


def test_waiting_is_counted() -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(5):
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("anything else", UserWarning, stacklevel=1)
    assert waits(warned, 5) == {__file__: 5}
    assert waits(warned, 6) == {}


@pytest.mark.parametrize("name", ["UltraCleanCallback", "NONECallback", "DBRCallback"])
def test_a_training_with_a_defense_takes_little_more_memory(name: str, place: str) -> None:
    def peak(*callbacks: Any) -> int:
        if place == "cpu":
            fit_wide(place, list(callbacks), 512)
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fit_wide(place, list(callbacks), 512)
        return torch.cuda.max_memory_allocated() - before

    peak()  # libraries take their working memory
    plain = peak()
    defended = peak(of(name).make(**({"warmup_epochs": 1} if name == "UltraCleanCallback" else {})))
    print(f"{name}: {plain / 2**20:.0f} MiB, with it {defended / 2**20:.0f} MiB")
    assert defended <= 1.3 * plain
