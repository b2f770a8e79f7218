"""Whether the labels of a finding are right is told by a copy that is trained without it, where no other model is."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_backdoor import Finding, Verdict, audit
from lightning_backdoor._lightning import reset_of
from lightning_backdoor.responses import Continue, Report, ResetUnits, Response, Unlearn
from tests.callbacks.helpers import LIGHTNING_WARNS, Net, Pictures, fit, loader_of, make_trainer, same_state
from tests.responses.helpers import Scripts, Torn, Uncopied, pictures

pytestmark = [*LIGHTNING_WARNS, pytest.mark.filterwarnings("ignore:.* ends with a model")]
RESPONSES: dict[str, Callable[[], Response]] = {"report": Report, "continue": Continue}


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_backdoor.responses.explaining.PROBE_STEPS", 120)


def true_labels(members: Tensor) -> Tensor:
    return members % 4


@pytest.mark.parametrize("response", RESPONSES)
@pytest.mark.parametrize("wrong", [True, False])
def test_a_copy_tells_wrong_labels_from_right_ones(wrong: bool, response: str) -> None:
    data, members = pictures(wrong=wrong)
    callback = Scripts(members, RESPONSES[response]())
    fit([callback], epochs=4, dataset=data)
    (finding,) = callback.verdict.findings
    assert finding.diagnosis == ("wrong labels" if wrong else "right labels")
    suggested = finding.suggested_labels
    assert suggested is not None
    assert float((suggested == true_labels(finding.positions)).float().mean()) > 0.8


class Streams(pl.Callback):
    """The state of the random stream after every epoch."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.rand(1)
        self.seen.append(torch.get_rng_state())


def test_a_report_leaves_the_training_bit_identical() -> None:
    data, members = pictures(wrong=True)
    alone, beside = Streams(), Streams()
    _, plain = fit([alone], epochs=5, dataset=data)
    callback = Scripts(members, Report())
    _, module = fit([callback, beside], epochs=5, dataset=data)
    assert callback.verdict.findings[0].diagnosis == "wrong labels"
    assert same_state(plain, module)
    assert module.drawn == plain.drawn
    assert module.logged == plain.logged
    assert all(map(torch.equal, alone.seen, beside.seen))
    assert len(alone.seen) == len(beside.seen) == 5


def test_a_resumed_run_comes_to_the_same_diagnosis(tmp_path: Path) -> None:
    """The copy starts from the weights at the start of the fit, which the checkpoint has."""
    data, members = pictures(wrong=True)
    path = tmp_path / "two.ckpt"

    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(path)

    whole = Scripts(members, Report())
    fit([whole, Save()], epochs=4, dataset=data)
    resumed = Scripts(members, Report())
    torch.manual_seed(9)  # other weights, which are not the start
    make_trainer([resumed], 4).fit(Net(), loader_of(data), ckpt_path=path)
    (one,), (other,) = whole.verdict.findings, resumed.verdict.findings
    assert one.diagnosis == other.diagnosis == "wrong labels"
    assert torch.equal(one.suggested_labels, other.suggested_labels)
    assert torch.equal(one.suggested_confidences, other.suggested_confidences)


def test_the_weights_at_the_start_are_given_up_after_the_detection() -> None:
    data, members = pictures(wrong=True)
    sizes: list[bool] = []

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            sizes.append(callback.state_dict()["start"] is None)

    callback = Scripts(members, Report())
    fit([callback, Watch()], epochs=5, dataset=data)
    assert sizes == [False, False, False, True, True]


def test_a_module_that_cannot_be_copied_is_a_warning() -> None:
    data, members = pictures(wrong=True)
    callback = Scripts(members, Report())
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="Scripts cannot find out whether the labels of 20 .*no copies"):
        make_trainer([callback], 4).fit(Uncopied(), loader_of(data))
    assert callback.verdict.findings[0].diagnosis == "unclear"


@pytest.mark.parametrize(
    "response", [Report, ResetUnits, lambda: Unlearn(epochs=1)], ids=["report", "reset", "unlearn"]
)
def test_whatever_the_training_of_a_copy_raises_is_a_warning(response: Callable[[], Response]) -> None:
    data, members = pictures(wrong=response is not ResetUnits)  # wrong ones are told by the repaired model
    callback = Scripts(members, response())
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="whether the labels of 20 .*: OSError: a file is cut off$"):
        make_trainer([callback], 5).fit(Torn(), loader_of(data))
    assert callback.verdict.findings[0].diagnosis == "unclear"


def audited(model: pl.LightningModule, monkeypatch: pytest.MonkeyPatch) -> Finding:
    """What an audit makes of a group that it finds in any case."""
    data, members = pictures(wrong=True)
    keep = torch.ones(len(data), dtype=torch.bool).index_fill(0, members, False)
    found = Finding(0, members, "scripted", (), torch.tensor([0]), torch.tensor([1.0]), 0.0)
    verdict = Verdict((~keep).float(), keep, 0.5, "scripted", data.targets, findings=(found,))
    monkeypatch.setattr(sys.modules["lightning_backdoor.audit"], "join_verdicts", lambda *_, **__: verdict)
    (finding,) = audit(model, data, detectors=("units",), accelerator="cpu", progress=False).findings
    return finding


@pytest.mark.filterwarnings("ignore:The model gives only")
def test_whatever_the_copy_of_an_audit_raises_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="The audit cannot find out .*: OSError: a file is cut off$"):
        assert audited(Torn(), monkeypatch).diagnosis == "unclear"


class Scale(nn.Module):
    """Draws its weights by an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.factor, std=std)

    def forward(self, images: Tensor) -> Tensor:
        return self.factor * images


@pytest.mark.filterwarnings("ignore:The model gives only")
def test_a_layer_that_cannot_draw_its_weights_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    model.body.append(Scale())
    said = r"No copy of .*: `Scale.reset_parameters\(\)` must draw the weights of the layer anew, but failed: .*'std'"
    with pytest.warns(UserWarning, match=said):
        assert audited(model, monkeypatch).diagnosis == "unclear"


def test_attention_draws_its_weights() -> None:
    layer = nn.MultiheadAttention(4, 2)
    before, reset = copy.deepcopy(layer.state_dict()), reset_of(layer)
    assert reset is not None
    reset()
    assert not torch.equal(before["in_proj_weight"], layer.in_proj_weight)
    assert reset_of(nn.ReLU()) is None


@pytest.mark.filterwarnings("ignore:The model gives only")
def test_batches_of_a_batch_sampler_are_counted_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    data, steps = Pictures(40), []
    loader = DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 8, drop_last=False))

    def note(trainer: Any, module: Any, scanner: Any, verdict: Verdict, **options: Any) -> Verdict:
        steps.append(options["steps"])
        return verdict

    monkeypatch.setattr(sys.modules["lightning_backdoor.audit"], "diagnosed_by_copy", note)
    for one in (loader, DataLoader(data, batch_size=8)):
        audit(Net(), one, detectors=("units",), accelerator="cpu", progress=False)
    assert steps == [100, 100]
