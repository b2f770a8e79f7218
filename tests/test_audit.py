"""An audit finds what the detectors of the defenses find in a training, and leaves model and data as they were."""

from __future__ import annotations

import copy
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as unified
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_backdoor import NONECallback, UltraCleanCallback, Verdict, audit
from lightning_backdoor.audit import DETECTORS, _warn_of_kept, _warn_of_removed
from lightning_backdoor.detection.majorities import MOST_OF_LABEL
from lightning_backdoor.errors import ArgumentError, DataError, ModelError
from lightning_backdoor.verdict import Finding
from tests.accelerators import trainer_settings
from tests.callbacks.helpers import (
    LIGHTNING_WARNS,
    DigitNet,
    Net,
    Pairs,
    digits,
    make_trainer,
    poisoned_digits,
    same_state,
    state_of,
    undefended,
)
from tests.contract.problem import seed_everything, streams
from tests.scanning.helpers import NoisyData, Trap

pytestmark = [
    *LIGHTNING_WARNS,
    pytest.mark.filterwarnings("ignore:The model gives only"),
    pytest.mark.filterwarnings("ignore:NoisyData augments its images at random"),
]


def settings(**others: Any) -> dict[str, Any]:
    """Arguments of an audit where the tests run."""
    return {"accelerator": trainer_settings(pl)["accelerator"], "progress": False, **others}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Verdict, Path]:
    """What an audit of a poisoned model finds, and where it has written it."""
    folder = tmp_path_factory.mktemp("audit") / "new"
    return audit(undefended(poisoned=True), poisoned_digits(), report_dir=folder, **settings()), folder


def test_planted_poisons_are_found_by_both_detectors(found: tuple[Verdict, Path]) -> None:
    verdict, truth = found[0], poisoned_digits().poisoned
    removed = ~verdict.keep
    assert (removed & truth).sum() >= 0.95 * truth.sum()
    assert (removed & ~truth).sum() <= 0.01 * len(truth)
    assert verdict.findings[0].detectors == ("features", "units")
    assert verdict.findings[0].label == 0
    assert len(torch.cat([finding.positions for finding in verdict.findings]).unique()) == sum(
        map(len, verdict.findings)
    )


def test_the_labels_of_planted_poisons_are_called_wrong_and_the_true_ones_suggested(
    found: tuple[Verdict, Path],
) -> None:
    data, finding = poisoned_digits(), found[0].findings[0]
    assert finding.diagnosis == "wrong labels"
    true = digits()[0].tensors[1][finding.positions]
    poisoned = data.poisoned[finding.positions]
    assert float((finding.suggested_labels == true)[poisoned].float().mean()) > 0.8


def test_the_labels_of_a_clean_kind_are_not_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever found it: a third of one class with a bar at one side."""
    images, labels = (tensor.clone() for tensor in digits()[0].tensors)
    members = (labels == 3).nonzero().squeeze(1)[::3]
    images[members, :, :, :2] = 255
    keep = torch.ones(len(labels), dtype=torch.bool).index_fill(0, members, False)
    kind = Finding(3, members, "strict", (), torch.zeros(1).long(), torch.ones(1), 0.5)
    verdict = Verdict((~keep).float(), keep, 0.5, "given", labels, findings=(kind,))
    monkeypatch.setattr(sys.modules["lightning_backdoor.audit"], "join_verdicts", lambda *_, **__: verdict)
    data = TensorDataset(images, labels)
    (finding,) = audit(undefended(poisoned=False), data, detectors=("units",), **settings()).findings
    assert finding.diagnosis != "wrong labels"
    assert finding.suggested_labels is not None
    (finding,) = audit(undefended(poisoned=False), data, detectors=("units",), diagnose=False, **settings()).findings
    assert finding.diagnosis == "unclear"
    assert finding.suggested_labels is None


def test_nothing_is_found_in_clean_data() -> None:
    verdict = audit(undefended(poisoned=False), digits()[0], **settings())
    assert not verdict.findings
    assert bool(verdict.keep.all())
    assert verdict.threshold == float("inf")


def test_the_findings_are_those_of_the_callbacks() -> None:
    """After a training so short that no early neighbors are measured."""
    module, data = copy.deepcopy(undefended(poisoned=True)).train(), poisoned_digits()
    looking = [UltraCleanCallback(warmup_epochs=1, response="report"), NONECallback(response="report")]
    loader = DataLoader(data, batch_size=64, shuffle=True)
    make_trainer(looking, epochs=1).fit(module, loader)
    verdict, (features, units) = audit(module, loader, **settings()), (callback.verdict for callback in looking)
    assert torch.equal(verdict.keep, features.keep & units.keep)
    assert torch.equal(verdict.scores, torch.maximum(features.scores, units.scores))
    assert torch.equal(verdict.findings[0].positions, features.findings[0].positions)
    assert verdict.findings[0].figures == features.findings[0].figures
    found = torch.cat([finding.positions for finding in verdict.findings])
    assert set(found.tolist()) == {i for one in (features, units) for f in one.findings for i in f.positions.tolist()}


class Images(pl.LightningDataModule):
    """Has data after its setup alone, whose training transform is random; a hook of its own scales the images."""

    def __init__(self) -> None:
        super().__init__()
        self.set_up = 0

    def setup(self, stage: str) -> None:
        self.set_up += 1
        self.data = Pairs(40)

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, batch_size=16, shuffle=True)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0].float() / 255, batch[1]


class Scaled(nn.Module):
    """Takes images in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.head = nn.Linear(32, 4)

    def forward(self, images: Tensor) -> Tensor:
        assert images.is_floating_point()
        assert float(images.max()) <= 1
        return self.head(self.body(images).flatten(1))


def test_a_dataset_a_loader_and_a_datamodule_give_the_same_verdict() -> None:
    model, module = Scaled(), Images()
    data = Pairs(40)
    scaled = TensorDataset(data.images.float() / 255, data.targets)
    first = audit(model, module, **settings())
    assert module.set_up == 1
    assert module.trainer is None
    again = audit(model, module, **settings())
    assert module.set_up == 1, "it has data already"
    for other in (again, audit(model, scaled, **settings(batch_size=16))):
        assert torch.allclose(other.scores, first.scores, atol=1e-4)
    loader = DataLoader(scaled, batch_size=16, shuffle=True, drop_last=True)
    assert torch.equal(
        audit(model, loader, **settings()).scores, audit(model, scaled, **settings(batch_size=16)).scores
    )


def test_any_module_and_a_lightning_module_give_the_same_verdict() -> None:
    module, data = Net(), Pairs(40)
    wrapped = nn.Sequential(module)
    named = audit(wrapped, data, **settings(feature_layer="0.body.3"))
    assert torch.equal(named.scores, audit(module, data, **settings(feature_layer="body.3")).scores)

    def first(model: nn.Module, batch: Any) -> Tensor:
        return model[0](batch[0])

    assert torch.equal(
        audit(wrapped, data, **settings(forward_fn=first)).scores, audit(module, data, **settings()).scores
    )


@pytest.mark.parametrize("package", [pl, unified], ids=lambda package: package.__name__)
def test_modules_of_both_packages(package: Any) -> None:
    class Module(package.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Scaled()
            self.stages: set[str] = set()

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.stages.add(str(self.trainer.state.stage))
            assert not self.trainer.training
            return batch[0].float() / 255, batch[1]

    module = Module()
    assert len(audit(module, Pairs(40), **settings())) == 40
    assert module.stages == {"RunningStage.VALIDATING"} or len(module.stages) == 1
    with pytest.raises(RuntimeError, match="not attached"):
        _ = module.trainer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_precision_get_images_of_it(dtype: torch.dtype) -> None:
    model, data = Scaled().to(dtype), Pairs(40)
    verdict = audit(model, TensorDataset(data.images.float() / 255, data.targets), **settings())
    assert verdict.scores.dtype == torch.float32
    assert {weight.dtype for weight in model.parameters()} == {dtype}


@pytest.mark.slow
def test_three_detectors_agree_on_planted_poisons() -> None:
    detectors = ("features", "units", "consistency")
    verdict = audit(undefended(poisoned=True), poisoned_digits(), detectors=detectors, **settings())
    assert verdict.findings[0].detectors == detectors
    assert not audit(undefended(poisoned=False), digits()[0], detectors=detectors, **settings()).findings


def traces(model: nn.Module) -> list[Any]:
    """The objects that a model is made of, its modes, its hooks, and what its instances hold."""
    parts = list(model.modules())
    tensors = [*model.parameters(), *model.buffers()]
    return [
        [id(tensor) for tensor in tensors],
        [tensor.data_ptr() for tensor in tensors],
        [None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist()) for tensor in tensors],
        [tensor.requires_grad for tensor in tensors],
        [part.training for part in parts],
        [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in parts],
        [sorted(vars(part)) for part in parts],
    ]


@pytest.mark.parametrize("detectors", [("features", "units"), ("consistency",)], ids=lambda names: names[0])
def test_model_data_and_random_streams_stay_as_they_are(detectors: Any) -> None:
    module, data = Trap(), NoisyData(48)
    loader = DataLoader(data, batch_size=16, shuffle=True)
    trainer = make_trainer([], epochs=1)
    trainer.fit(module, loader)
    module.conv.weight.requires_grad_(False)
    module.frozen.eval()
    before, state, of_loader, of_data = traces(module), state_of(module), dict(vars(loader)), dict(vars(data))
    losses = list(module.losses)
    seed_everything()
    expected = streams()
    seed_everything()
    audit(module, loader, detectors=detectors, **settings(mean=(0.5,), std=(0.1,)))
    assert streams() == expected
    assert traces(module) == before
    assert same_state(state, module)
    assert module.trainer is trainer
    assert vars(loader) == of_loader
    assert vars(data) == of_data
    assert module.losses == losses
    assert module.augmented == 3, "in the training alone"


def test_an_error_leaves_the_model_to_its_trainer() -> None:
    module = Net()
    trainer = make_trainer([], epochs=1)
    trainer.fit(module, DataLoader(Pairs(32), batch_size=16))
    with pytest.raises(DataError):
        audit(module, TensorDataset(torch.full((40, 3, 8, 8), float("nan")), torch.arange(40) % 4), **settings())
    assert module.trainer is trainer


def test_a_report_and_the_verdict_are_written(found: tuple[Verdict, Path]) -> None:
    verdict, folder = found
    assert {"report.html", "verdict.csv", "verdict.pt"} <= {path.name for path in folder.iterdir()}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "training images stand out" in page
    assert "Nothing was changed" in page
    assert "It was found by features and units." in page
    read = Verdict.load(folder / "verdict.pt")
    assert torch.equal(read.keep, verdict.keep)
    assert [finding.detectors for finding in read.findings] == [finding.detectors for finding in verdict.findings]


def test_approved_images_are_in_no_finding(found: tuple[Verdict, Path]) -> None:
    verdict, folder = found
    again = audit(
        undefended(poisoned=True), poisoned_digits(), detectors=("units",), approved=folder / "verdict.pt", **settings()
    )
    assert not again.findings
    assert torch.equal(again.approved, ~verdict.keep)


def test_a_model_that_has_not_learned_these_images_is_a_warning() -> None:
    data = poisoned_digits()
    shuffled = TensorDataset(torch.stack([data[i][0] for i in range(200)]), torch.arange(200) % 10)
    with pytest.warns(UserWarning, match=r"gives only \d+% of the images their label"):
        audit(undefended(poisoned=True), shuffled, detectors=("units",), **settings())


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from ()


def test_what_cannot_work_is_one_error() -> None:
    model, data = Scaled(), Pairs(40)
    with pytest.raises(ArgumentError, match=r"`detectors` must name some of 'features', 'units', 'consistency', got"):
        audit(model, data, detectors=("unit",), **settings())  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="`detectors` must name some of"):
        audit(model, data, detectors=(), **settings())
    with pytest.raises(ArgumentError, match="`max_removed` must be a fraction"):
        audit(model, data, max_removed=5, **settings())
    with pytest.raises(ArgumentError, match=r"`dataset` must be a map-style dataset.*got int"):
        audit(model, 3, **settings())
    with pytest.raises(DataError, match="must be map-style"):
        audit(model, DataLoader(Stream()), **settings())
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    scaled = TensorDataset(data.images.float() / 255, data.targets)
    with pytest.raises(ModelError, match=r"No unit of .* Or leave 'units' out of `detectors`\."):
        audit(linear, scaled, **settings())
    assert len(audit(linear, scaled, detectors=("features",), **settings())) == 40
    with pytest.raises(ArgumentError, match=r"`train_dataloader` of the datamodule must return one DataLoader"):
        audit(DigitNet(), Two(), **settings())


class Two(Images):
    def train_dataloader(self) -> Any:
        return [super().train_dataloader(), super().train_dataloader()]


def test_findings_that_stay_are_told_by_their_index_in_the_joined_verdict() -> None:
    labels, few = torch.arange(60) % 2, torch.zeros(1)
    findings = tuple(Finding(label, places, "strict", (), few.long(), few, 0.5) for label, places in (
        (1, torch.arange(1, 20, 2)), (0, torch.arange(0, 40, 2)),
    ))  # fmt: skip
    keep = torch.ones(60, dtype=torch.bool)
    verdict = Verdict(torch.zeros(60), keep, float("inf"), f"features: {MOST_OF_LABEL}0.5)", labels, findings=findings)
    with pytest.warns(UserWarning, match=r"The audit keeps 20 of the 30 .*`verdict.findings\[1\].positions`") as told:
        _warn_of_kept(verdict, 0.5)
    assert len(told) == 1
    assert "callback" not in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn_of_kept(verdict, 0.7)
        _warn_of_kept(replace(verdict, rule="features: strict"), 0.5)


def test_labels_that_are_mostly_flagged_are_told_of_the_joined_verdict() -> None:
    labels = torch.arange(60) % 2
    verdict = Verdict(torch.zeros(60), (labels == 0) | (torch.arange(60) < 20), 0.5, "features: strict", labels)
    with pytest.warns(UserWarning, match=r"The audit takes most images .* 20 of the 30 with label 1") as told:
        _warn_of_removed(verdict)
    assert "(verdict.keep | (verdict.labels == k))" in str(told[0].message)
    assert "callback" not in str(told[0].message)


def test_an_examination_leaves_it_to_its_caller_to_say_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    unit = DETECTORS["features"](response="report")
    monkeypatch.setitem(DETECTORS, "features", lambda **arguments: unit)
    detect = unit._procedure._detect
    monkeypatch.setattr(unit._procedure, "_detect", lambda *a: (told.append(unit._procedure._without_fit), detect(*a)))
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    audit(model, TensorDataset(images, torch.arange(40) % 2), detectors=("features",), **settings())
    assert told == [True]
    assert not unit._procedure._without_fit
