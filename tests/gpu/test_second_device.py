"""Whole trainings with defences on the second device: no scan, detector or response mixes devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_backdoor import audit
from lightning_backdoor.detection.subpopulations import search_labels
from lightning_backdoor.scanning import idle, scan
from tests.callbacks.helpers import make_trainer
from tests.contract.problem import EPOCHS, WARNS, assert_settled, fit, net_of, planted
from tests.contract.registry import of
from tests.gpu.strict import DEVICE, StrictTensor, accelerator_of, second_device

pytestmark = WARNS


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With room for what scans measure."""
    monkeypatch.setattr(scan, "_free_memory", lambda device: 2**40)
    with second_device():
        yield


class Where(pl.Callback):
    """Notes of which class the weights are while they are trained."""

    def __init__(self) -> None:
        self.kinds: set[type] = set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.kinds |= {type(weight) for weight in pl_module.parameters()} | {type(batch["image"])}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("UltraCleanCallback", {"response": "continue"}),
        ("NONECallback", {}),
        ("DBRCallback", {}),
        ("ABL", {}),
        pytest.param("DSTCallback", {}, marks=pytest.mark.slow),
        pytest.param("UltraCleanCallback", {"response": "restart"}, marks=pytest.mark.slow),
    ],
)
def test_a_defense_gives_there_the_verdict_of_the_cpu(name: str, settings: dict[str, Any]) -> None:
    entry, verdicts = of(name), []
    for trainer in ({"accelerator": "cpu"}, accelerator_of(pl)):
        callback, where = entry.make(**settings), Where()
        run = fit([callback, where], **trainer)
        assert entry.acted(callback, run.trainer)
        assert where.kinds == {StrictTensor} if "strategy" in trainer else StrictTensor not in where.kinds
        assert run.trainer.strategy.root_device == (DEVICE if "strategy" in trainer else torch.device("cpu"))
        assert_settled(run.trainer, run.module, run.loader, run.before, EPOCHS)
        verdicts.append(callback.verdict)
    here, there = verdicts
    assert torch.equal(there.keep, here.keep)
    torch.testing.assert_close(there.scores, here.scores, rtol=1e-2, atol=1e-2)
    for mask in ("trusted", "suspect"):
        assert getattr(there, mask) is None or torch.equal(getattr(there, mask), getattr(here, mask))


@pytest.mark.parametrize(("free", "alone", "stays"), [(2**20, True, True), (100, True, False), (2**20, False, False)])
def test_results_stay_where_the_step_made_them_if_they_fit(
    monkeypatch: pytest.MonkeyPatch, free: int, alone: bool, stays: bool
) -> None:
    """Ten rows of 16 bytes are more than a tenth of 100; several processes gather on the CPU."""
    monkeypatch.setattr(scan, "_free_memory", lambda device: free)
    table, rows = scan._Table(10, alone=alone), torch.arange(40.0).reshape(10, 4)
    for part in torch.arange(10).split(3):
        table.append(part, {"responses": rows[part].to(DEVICE), "labels": part})
    assert table.columns["responses"].device.type == (DEVICE.type if stays else "cpu")
    assert table.columns["labels"].device.type == "cpu"
    assert torch.equal(table.columns["responses"].cpu(), rows)


def test_a_decision_is_made_where_the_responses_are(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    def search(values: torch.Tensor, labels: torch.Tensor, **settings: Any) -> Any:
        devices.append((values.device.type, labels.device.type))
        return search_labels(values, labels, **settings)

    monkeypatch.setattr("lightning_backdoor.detection.decision.search_labels", search)
    run = fit([of("UltraCleanCallback").make(response="continue")], **accelerator_of(pl))
    assert run.trainer.strategy.root_device == DEVICE
    assert set(devices) == {(DEVICE.type, "cpu")}


@pytest.mark.filterwarnings("ignore:The model gives only")
def test_an_audit_leaves_the_model_on_the_cpu_with_its_own_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    module, places = net_of(), []
    module.register_forward_hook(lambda part, images, logits: places.append(type(images[0])))
    module(planted().images).sum().backward()
    tensors = [*module.parameters(), *module.buffers(), *(weight.grad for weight in module.parameters())]
    before = [(id(tensor), tensor.data_ptr(), tensor.clone()) for tensor in tensors]
    here = audit(module, planted(), accelerator="cpu", progress=False)
    places.clear()
    monkeypatch.setattr(
        idle, "idle_trainer", lambda package, **_: make_trainer([], package=package, **accelerator_of(package))
    )
    there = audit(module, planted(), progress=False)
    assert {*places} == {StrictTensor}
    assert torch.allclose(there.scores, here.scores, atol=1e-4)
    after = [*module.parameters(), *module.buffers(), *(weight.grad for weight in module.parameters())]
    assert all((id(tensor), tensor.data_ptr()) == known[:2] for tensor, known in zip(after, before, strict=True))
    assert all(torch.equal(tensor, known[2]) for tensor, known in zip(after, before, strict=True))
    assert module.device == torch.device("cpu")
