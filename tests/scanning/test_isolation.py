from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_backdoor.errors import TrainerError
from lightning_backdoor.scanning.isolation import isolated_eval, prepare_batch, require_unsharded
from tests.accelerators import trainer_settings
from tests.scanning.helpers import LIGHTNING_WARNS, NoisyData, Scanner, Trap, make_trainer, train_loader

pytestmark = LIGHTNING_WARNS

EPOCH_HOOKS = ("on_train_start", "on_train_epoch_start", "on_train_epoch_end")
BATCH_HOOKS = ("on_train_batch_start", "on_train_batch_end")


def train(callbacks: list[Any], workers: int = 0, precision: Any = "32-true") -> dict[str, Any]:
    pl.seed_everything(3)
    data, module = NoisyData(), Trap()
    trainer = make_trainer(callbacks, precision=precision)
    trainer.fit(module, train_loader(data, workers))
    return {
        **module.state_dict(),
        "losses": module.losses,
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "frozen": module.frozen.training,
        "norm": module.norm.training,
        "streams": (torch.rand(2).tolist(), np.random.rand(), random.random()),
        "augmented": module.augmented,
    }


def same(first: Any, second: Any) -> bool:
    return torch.equal(first, second) if isinstance(first, Tensor) else bool(first == second)


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    return [name for name in first if not same(first[name], second[name])]


@pytest.fixture(scope="module")
def undisturbed() -> dict[Any, dict[str, Any]]:
    return {}


@pytest.mark.case("44", "47", "49")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("workers", "hooks"),
    [(workers, (hook,)) for workers in (0, 1) for hook in EPOCH_HOOKS] + [(0, (hook,)) for hook in BATCH_HOOKS],
)
def test_training_is_bit_identical_with_scans(
    undisturbed: dict[Any, dict[str, Any]], hooks: tuple[str, ...], workers: int, precision: Any
) -> None:
    if (workers, precision) not in undisturbed:
        undisturbed[workers, precision] = train([], workers, precision)
    scanner = Scanner(NoisyData(), hooks)
    assert differences(undisturbed[workers, precision], train([scanner], workers, precision)) == []
    assert scanner.results, "the scan never ran"


def test_a_naive_pass_would_be_noticed() -> None:
    """The clean twin of the matrix above: the same forward passes without good manners leave traces everywhere."""

    class Naive(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            for batch in train_loader(NoisyData()):
                pl_module(batch[0].to(pl_module.device))
            pl_module.train()

    traces = differences(train([]), train([Naive()]))
    assert {"norm.running_mean", "conv.weight", "frozen", "calls", "metrics", "streams"} <= set(traces)


@pytest.mark.case("48")
def test_scan_sees_the_validation_stage_and_no_augmentation() -> None:
    module = Trap()
    scanner = Scanner(NoisyData(), ("on_train_epoch_end",))
    make_trainer([scanner], epochs=1).fit(module, train_loader(NoisyData()))
    assert module.augmented == 4  # the training batches, none of the scan's
    assert any("validat" in stage.lower() for stage in module.seen_stage)


def attached(module: Any) -> Any:
    """A trainer as it stands in the middle of a fit, without the fit."""
    trainer = make_trainer([])
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.training = True
    return trainer


@pytest.mark.case("46")
def test_modes_stage_grad_and_log_come_back_after_an_error() -> None:
    class Stubborn(nn.Dropout):
        def train(self, mode: bool = True) -> Stubborn:
            raise AssertionError("train() and eval() belong to the user")

    class Child(pl.LightningModule):
        def forward(self, images: Tensor) -> Tensor:
            self.log("inside a child", 1.0)
            return images

    module = Trap()
    module.extra, module.child = Stubborn(), Child()
    module.frozen.eval()
    own_log = module.child.log = lambda *args, **kwargs: None
    trainer = attached(module)
    flags = {name: child.training for name, child in module.named_modules()}
    with pytest.raises(KeyError), isolated_eval(trainer, module):  # noqa: PT012
        assert not any(child.training for child in module.modules())
        assert trainer.validating
        assert not trainer.training
        assert not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        module.child(torch.zeros(1))
        module(torch.zeros(2, 3, 8, 8))
        raise KeyError
    assert {name: child.training for name, child in module.named_modules()} == flags
    assert trainer.training
    assert torch.is_grad_enabled()
    assert "log" not in vars(module)
    assert module.child.log is own_log


def test_buffers_keep_object_and_value() -> None:
    class Restless(Trap):
        def forward(self, images: Tensor) -> Tensor:
            self.calls = self.calls + 1
            self.norm.running_mean.add_(1)
            return super().forward(images)

    module = Restless()
    calls, mean = module.calls, module.norm.running_mean
    with isolated_eval(attached(module), module):
        module(torch.zeros(2, 3, 8, 8))
        assert module.calls == 2
    assert module.calls is calls
    assert module.calls == 0
    assert module.norm.running_mean is mean
    assert torch.equal(mean, torch.zeros(6))


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer`")
@pytest.mark.parametrize("package", [pl, lightning.pytorch], ids=["pytorch_lightning", "lightning.pytorch"])
def test_prepare_batch_takes_the_hooks_of_module_and_datamodule(package: Any) -> None:
    trail: list[str] = []

    class Module(package.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            trail.append("module after")
            return batch

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.fc(batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Data(package.LightningDataModule):  # type: ignore[misc, name-defined]
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            trail.append("datamodule before")
            return batch

        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            trail.append("datamodule transfer")
            return batch.to(device)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.ones(2, 4), batch_size=2)

    class Probe(package.Callback):  # type: ignore[misc, name-defined]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            with isolated_eval(trainer, pl_module):
                self.batch = prepare_batch(trainer, pl_module, torch.zeros(2, 4))
            self.trail = list(trail)

    probe = Probe()
    trainer = package.Trainer(
        max_epochs=1, **trainer_settings(package), logger=False, enable_checkpointing=False, callbacks=[probe],
        enable_progress_bar=False, enable_model_summary=False, precision="64-true",
    )  # fmt: skip
    trainer.fit(Module(), datamodule=Data())
    assert probe.trail == ["datamodule before", "datamodule transfer", "module after"]
    assert probe.batch.dtype == torch.float64  # the precision plugin's convert_input


@pytest.mark.case("56")
@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_sharded_strategies_are_refused(name: str) -> None:
    strategy = type("Mine", (type(name, (), {}),), {})()
    with pytest.raises(TrainerError, match=r"strategy=.*Mine.*shards.*strategy='ddp'"):
        require_unsharded(SimpleNamespace(strategy=strategy))  # type: ignore[arg-type]


def test_plain_strategies_pass() -> None:
    require_unsharded(make_trainer([]))
