"""The repairs from the literature in a Trainer: what is isolated, the order and sign of their steps, resuming."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_backdoor import Verdict, baselines
from lightning_backdoor.baselines import ABL, FineTuneTrusted, easiness_scores
from lightning_backdoor.errors import ArgumentError, DataError
from tests.baselines.helpers import POISONS, Rigged, red_corners
from tests.callbacks.helpers import LIGHTNING_WARNS, HeldOpen, Net, Pictures, fit, make_trainer, same_state, state_of
from tests.callbacks.test_ultraclean_resume import SaveAll, run

pytestmark = [
    *LIGHTNING_WARNS,
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]

TRUSTED = torch.arange(64) % 8 < 4  # half of them, all classes
GIVEN = Verdict(
    torch.arange(64).float(), torch.arange(64) < 60, 59.0, "known", trusted=TRUSTED & (torch.arange(64) < 60)
)


class Losses(pl.Callback):
    """Epoch and differentiated loss of every batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self.seen.append((trainer.current_epoch, float(loss.detach())))


def test_the_easiest_samples_have_the_smallest_loss() -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    for i in range(6):
        exponentials = logits[i].double().exp()
        expected = float((exponentials[labels[i]] / exponentials.sum()).log())
        assert float(easiness_scores(logits, labels)[i]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("settings", [{"batch_size": 24, "shuffle": True}, {"batch_size": 160}], ids=str)
def test_isolates_planted_poisons(settings: dict[str, Any]) -> None:
    data, truth = red_corners()
    callback = ABL(isolate=POISONS / 160, epochs=1, extra_epochs=3, warmup_epochs=1)
    make_trainer([callback], 2).fit(Rigged(), DataLoader(data, **settings))
    assert torch.equal(callback.verdict.suspect, truth)
    assert torch.equal(callback.verdict.keep, ~truth)
    assert torch.equal(callback.verdict.labels, data.targets)


@pytest.mark.parametrize("others", [[], [HeldOpen(3, shown=30)]], ids=["alone", "beside a defence that needs more"])
def test_isolates_after_a_fifth_of_the_planned_epochs(others: list[Any]) -> None:
    callback = ABL(isolate=0.1, epochs=1)
    fit([*others, callback], epochs=4)
    assert [event.epochs for event in callback.history] == [1]


def test_isolates_as_many_of_clean_data() -> None:
    callback = ABL(isolate=0.1, epochs=1, extra_epochs=3, warmup_epochs=1)
    make_trainer([callback], 1).fit(Rigged(), DataLoader(red_corners(poisoned=False)[0], batch_size=32))
    assert callback.verdict.suspect.sum() == 16


@pytest.mark.parametrize(("accumulate", "gamma"), [(1, 1.3), (2, 1.38)])
def test_climbs_on_low_losses_until_it_isolates_and_on_isolated_samples_at_the_end(
    accumulate: int, gamma: float
) -> None:
    callback, losses = ABL(isolate=0.0625, gamma=gamma, epochs=2, extra_epochs=3, warmup_epochs=1, lr=1e-3), Losses()
    trainer, module = fit([callback, losses], epochs=3, accumulate_grad_batches=accumulate)
    logged, isolated = module.logged, set(callback.verdict.suspect.nonzero().squeeze(1).tolist())
    assert len(isolated) == 4
    assert trainer.current_epoch == 5
    assert trainer.max_epochs == 3
    for (epoch, loss), value, (_, _, batch) in zip(losses.seen, logged, module.drawn, strict=True):
        climbs = value < gamma if epoch == 0 else epoch >= 3 and set(batch) <= isolated
        assert loss == pytest.approx((-1 if climbs else 1) * value / accumulate)
    flooded = [value < gamma for (epoch, _), value in zip(losses.seen, logged, strict=True) if epoch == 0]
    assert len(set(flooded)) == 2, "both signs must have been seen"
    for epoch in (1, 2):
        assert isolated.isdisjoint(i for at, _, batch in module.drawn if at == epoch for i in batch)
    for epoch in (3, 4):
        drawn = [batch for at, _, batch in module.drawn if at == epoch]
        assert set(drawn[0]) == isolated
        assert sorted(i for batch in drawn[1:] for i in batch) == sorted(set(range(64)) - isolated)


def test_flooding_is_that_of_a_literal_loop() -> None:
    before = Before(1)
    _, module = fit([ABL(gamma=1.3, warmup_epochs=2, isolate=0.0625, epochs=1, extra_epochs=1), before], epochs=2)
    torch.manual_seed(0)
    twin, data = Net(), Pictures()
    optimizer = torch.optim.SGD(twin.parameters(), lr=twin.lr, momentum=0.9)
    signs = set()
    for _, _, positions in module.drawn[:4]:
        loss = F.cross_entropy(twin(data.images[positions]), data.targets[positions])
        signs.add(float(loss.detach()) < 1.3)
        optimizer.zero_grad()
        (torch.sign(loss.detach() - 1.3) * loss).backward()
        optimizer.step()
    assert len(signs) == 2
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(before.state[name], value, rtol=1e-4, atol=1e-6)


def test_without_flooding_the_training_is_untouched_until_it_isolates() -> None:
    before = Before(2)
    fit([ABL(gamma=0.0, warmup_epochs=2, isolate=0.1, epochs=1, extra_epochs=1), before], epochs=3)
    _, plain = fit([], epochs=2)
    assert same_state(before.state, plain)


class Before(pl.Callback):
    """Weights before an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            self.state = state_of(pl_module)


def test_fine_tunes_on_trusted_samples_alone(tmp_path: Path) -> None:
    callback = FineTuneTrusted(verdict=GIVEN, epochs=3, extra_epochs=3, lr=0.01, report_dir=tmp_path)
    losses, before = Losses(), Before(2)
    trainer, module = fit([callback, losses, before], epochs=2)
    _, plain = fit([], epochs=2)
    assert same_state(before.state, plain), "ordinary training until then"
    expected = GIVEN.trusted.nonzero().squeeze(1).tolist()
    assert module.epochs()[2:] == [(epoch, expected) for epoch in (2, 3, 4)]
    assert all(loss > 0 for _, loss in losses.seen)
    assert (trainer.current_epoch, trainer.max_epochs) == (5, 2)
    assert not same_state(plain, module)
    assert callback.history[0].undone_steps == (False,) * 3
    assert trainer.callback_metrics["backdoor/finetunetrusted/epochs"] == 3
    assert "The model was repaired: after 3 epochs" in (tmp_path / "report.html").read_text()


def test_least_suspicious_samples_are_trusted_where_a_verdict_names_none() -> None:
    given = Verdict(GIVEN.scores, GIVEN.keep, 59.0, "known")
    _, module = fit([FineTuneTrusted(verdict=given, trusted=0.25, epochs=1, extra_epochs=1)], epochs=1)
    assert module.epochs()[1:] == [(1, list(range(16)))]


def test_says_which_classes_no_trusted_sample_has() -> None:
    given = replace(GIVEN, trusted=TRUSTED & (torch.arange(64) % 8 == 1))
    with pytest.warns(UserWarning, match=r"no image of the classes \[.+\] is trusted; the model may forget them"):
        fit([FineTuneTrusted(verdict=given, epochs=1, extra_epochs=1)], epochs=1)


def test_fine_tunes_a_finished_checkpoint_and_ends(tmp_path: Path) -> None:
    saver = SaveAll(tmp_path)
    run([saver], val=False, epochs=2)
    callback = FineTuneTrusted(verdict=GIVEN, epochs=1, warmup_epochs=0)
    trainer, module = run([callback], saver.paths[-1], val=False, epochs=2)
    assert [epoch for epoch, _ in module.epochs()] == [2]
    assert trainer.current_epoch == 3


def test_representation() -> None:
    callback = ABL(isolate=0.05, lr=None, seed=3, batch_size=2)
    assert repr(callback) == "ABL(isolate=0.05, lr=None, batch_size=2, seed=3)"
    assert repr(eval(repr(callback), vars(baselines))) == repr(callback)
    assert "epochs=7" in repr(FineTuneTrusted(verdict=GIVEN, epochs=7))


@pytest.mark.parametrize(
    ("cls", "wrong", "message"),
    [
        (ABL, {"isolate": 1}, "`isolate` must be a fraction"),
        (ABL, {"gamma": -1.0}, "`gamma` must be a loss of at least 0"),
        (ABL, {"warmup_epochs": 0}, "`warmup_epochs` must be"),
        (ABL, {"epochs": 0}, "`epochs` must be"),
        (ABL, {"lr": 0.0}, "`lr` must be"),
        (FineTuneTrusted, {"trusted": 2}, "`trusted` must be a fraction"),
        (FineTuneTrusted, {"warmup_epochs": 3}, r"`warmup_epochs` must be 0 \(now\) or None"),
        (FineTuneTrusted, {"verdict": replace(GIVEN, trusted=~GIVEN.keep & GIVEN.keep)}, "`verdict` must trust one"),
    ],
)
def test_wrong_arguments(cls: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        cls(**{**({} if cls is ABL else {"verdict": GIVEN}), **wrong})


def test_what_cannot_work_is_said_at_the_start() -> None:
    with pytest.raises(ArgumentError, match=r"`isolate` must be one image at least, got 0\.01 of 64"):
        fit([ABL()])
    with pytest.raises(DataError, match="another dataset"):
        fit([FineTuneTrusted(verdict=Verdict(torch.ones(2), torch.ones(2) > 0, 1.0, "x"))])
