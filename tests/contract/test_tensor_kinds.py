"""Batches of derived tensor classes: every defence works on plain tensors, the user's code meets its own class."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_backdoor import BackdoorMonitor, NONECallback, UltraCleanCallback, attacks
from tests.callbacks.helpers import loader_of, make_trainer, same_state
from tests.contract.problem import BATCH, EPOCHS, WARNS, Learner, planted
from tests.contract.registry import Entry, every_kind_of_defense
from tests.data.tensor_kinds import CLASSES, KINDS, Wrapped

pytestmark = WARNS


class Net(Learner, pl.LightningModule):
    """Notes of which classes the images are that it is called with and that its transfer hooks see."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[type]] = {"forward": set(), "hook": set(), "step": set()}

    def forward(self, images: Tensor) -> Tensor:
        self.seen["forward"].add(type(images))
        return super().forward(255 * images)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen["hook"].add(type(batch["image"]))
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen["step"].add(type(batch["image"]))
        return super().training_step(batch, batch_idx)


def fitted(callback: Any, kind: str | None, **kwargs: Any) -> Net:
    torch.manual_seed(0)
    net, settings = Net(), {"epochs": EPOCHS, **kwargs}
    collate = Wrapped(kind)
    val = loader_of(planted(32), 16, collate_fn=collate)
    make_trainer([callback], **settings).fit(net, loader_of(planted(), BATCH, collate_fn=collate), val)
    return net


def assert_own(net: Net, kind: str) -> None:
    assert net.seen["hook"] == {CLASSES[kind]}
    assert net.seen["step"] <= {CLASSES[kind]}
    assert net.seen["forward"] == {CLASSES[kind]}


@every_kind_of_defense
def test_batches_of_monai(entry: Entry) -> None:
    callback = entry.make()
    net = fitted(callback, "MetaTensor")
    assert callback.verdict is not None
    assert type(callback.verdict.scores) is Tensor
    assert_own(net, "MetaTensor")


@pytest.mark.parametrize("cls", [UltraCleanCallback, NONECallback])
def test_the_class_changes_nothing(cls: Any) -> None:
    plain = cls()
    expected = fitted(plain, None, epochs=1)
    for kind in KINDS:
        callback = cls()
        net = fitted(callback, kind, epochs=1)
        assert torch.equal(callback.verdict.scores, plain.verdict.scores)
        assert same_state(net, expected)
        assert_own(net, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_monitor(kind: str) -> None:
    monitor = BackdoorMonitor(trigger=attacks.BadNets(), mean=(0.0,), std=(1.0,))
    assert_own(fitted(monitor, kind, epochs=1), kind)
