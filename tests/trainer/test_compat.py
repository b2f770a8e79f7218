"""Both Lightning packages: callbacks of every base in Trainers of both, one package hidden, names that must not go."""

from __future__ import annotations

import importlib
import importlib.metadata
import operator
import subprocess
import sys
from typing import Any

import lightning.pytorch as unified
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.distributed import DistributedSamplerWrapper as FabricWrapper
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from lightning_backdoor.trainer import compat
from lightning_backdoor.trainer.compat import LEDGER, CallbackBase, limited, wrapped_sampler
from lightning_backdoor.trainer.loaders import clone
from lightning_backdoor.trainer.samplers import KeepState
from tests.trainer._recording import (
    KEEP,
    KEPT,
    LIGHTNING_WARNS,
    SAFE_LOADING,
    Points,
    Pruner,
    Recording,
    UnifiedRecording,
    expect_pruned,
    loader,
    make_trainer,
)

pytestmark = LIGHTNING_WARNS
PACKAGES = {"pytorch_lightning": (pl, Recording), "lightning.pytorch": (unified, UnifiedRecording)}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("single", [False, True])
def test_one_callback_class_serves_both_packages(package: str, single: bool, tmp_path: Any) -> None:
    trainers, module_class = PACKAGES[package]
    pruner = Pruner()
    assert isinstance(pruner, trainers.Callback)
    module = module_class()
    trainer = make_trainer(pruner if single else [pruner], package=trainers)
    trainer.fit(module, loader(shuffle=True))
    expect_pruned(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    again, resumed = Pruner(), module_class()
    trainer = make_trainer(again if single else [again], package=trainers, max_epochs=6)
    trainer.fit(resumed, loader(shuffle=True), ckpt_path=tmp_path / "last.ckpt", **SAFE_LOADING)
    assert torch.equal(again.mask, KEEP)
    assert [set(resumed.drawn(epoch)) for epoch in sorted(resumed.batches)] == [KEPT, KEPT]


HIDDEN = """
import sys
sys.modules[{hidden!r}] = None
import {other} as package
from lightning_backdoor.trainer.compat import CallbackBase
assert issubclass(CallbackBase, package.Callback)
assert CallbackBase.__bases__ == (package.Callback,), CallbackBase.__bases__
from lightning_backdoor.trainer.curation import curation_of
trainer = package.Trainer(accelerator="cpu", logger=False, callbacks=[CallbackBase()])
curation_of(trainer).join("a")
curation_of(trainer).leave("a")
print("served by", package.__name__)
"""


def test_one_package_is_enough() -> None:
    running = {}
    for hidden, other in (("pytorch_lightning", "lightning.pytorch"), ("lightning", "pytorch_lightning")):
        command = [sys.executable, "-c", HIDDEN.format(hidden=hidden, other=other)]
        running[other] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for other, process in running.items():
        output, errors = process.communicate(timeout=300)
        assert f"served by {other}" in output, errors


def test_without_lightning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytorch_lightning", "lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install pytorch-lightning"):
        compat._callback_classes()


def test_a_broken_package_is_named_and_the_other_one_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def broken(name: str) -> Any:
        if name == "lightning.pytorch":
            raise AttributeError("half an installation")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.warns(UserWarning, match=r"`import lightning.pytorch` failed \(half an installation\)"):
        assert compat._callback_classes() == (pl.Callback,)


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", LEDGER)
def test_private_names_exist(package: str, name: str) -> None:
    trainers, module_class = PACKAGES[package]
    version = importlib.metadata.version(package.partition(".")[0].replace("_", "-"))
    missing: list[str] = []

    class Looking(trainers.Callback):  # type: ignore[name-defined, misc]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            try:
                found = operator.attrgetter(name.removeprefix("trainer."))(trainer)
            except AttributeError as error:
                missing.append(str(error))
            else:
                if found is None:
                    missing.append(f"{name} is None")

    make_trainer([Looking()], package=trainers, max_epochs=1).fit(module_class(), loader())
    assert not missing, f"{package} {version} lost a name: {missing[0]}. Without it: {LEDGER[name]}"


def test_names_that_are_called_may_be_called() -> None:
    trainer = make_trainer([])
    assert callable(trainer.fit_loop.setup_data)
    assert callable(trainer.strategy.process_dataloader)


def test_a_loader_lives_in_its_dict_and_its_iterator_has_the_name_we_reset() -> None:
    train = DataLoader(Points(), batch_size=8, num_workers=1, persistent_workers=True)
    iter(train)
    assert vars(train)["_iterator"] is not None
    twin = clone(train, KeepState())
    assert twin._iterator is None
    assert vars(train)["_iterator"] is not None
    assert twin.dataset is train.dataset
    assert type(twin) is type(train)
    assert twin.sampler is twin.batch_sampler.sampler is not train.sampler


def test_the_sampler_inside_lightnings_wrapper_is_found() -> None:
    inner = SequentialSampler(Points())
    assert wrapped_sampler(FabricWrapper(inner, num_replicas=2, rank=0)) is inner
    assert wrapped_sampler(DistributedSampler(Points(), num_replicas=2, rank=0)) is None


@pytest.mark.parametrize(
    ("length", "limit", "batches"),
    [(6, 1.0, 6), (6, 0.5, 3), (7, 0.5, 3), (6, 4, 4), (6, 9, 6), (float("inf"), 1.0, float("inf"))],
)
def test_limits_follow_lightnings_rule(length: float, limit: float, batches: float) -> None:
    assert limited(length, limit) == batches


def test_the_base_has_no_surprises() -> None:
    assert CallbackBase.__mro__[1:3] == (pl.Callback, unified.Callback)
    assert CallbackBase().state_dict() == {}
