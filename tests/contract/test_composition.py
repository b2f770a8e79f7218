"""Two defences on one Trainer, in both orders: masks are joined, and a restart does not silently undo surgery."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_backdoor import BackdoorMonitor, attacks
from lightning_backdoor.callbacks.base import Defense
from lightning_backdoor.errors import TrainerError
from lightning_backdoor.responses import Session
from tests.callbacks.helpers import same_state, state_of
from tests.contract.problem import EPOCHS, WARNS, assert_settled, clean, fit
from tests.contract.registry import ENTRIES, of

pytestmark = WARNS
both_orders = pytest.mark.parametrize("filter_first", [True, False], ids=["filter first", "filter last"])


def kept(*callbacks: Any) -> list[int]:
    return torch.stack([each.verdict.keep for each in callbacks]).all(dim=0).nonzero().flatten().tolist()


@both_orders
@pytest.mark.parametrize("warmup", [1, EPOCHS], ids=["early", "at the end"])
def test_ultraclean_and_none(filter_first: bool, warmup: int) -> None:
    one, two = of("UltraCleanCallback").make(warmup_epochs=warmup), of("NONECallback").make()
    run = fit([one, two] if filter_first else [two, one])
    assert not one.verdict.keep.all()
    assert not two.verdict.keep.all()
    assert run.module.epochs()[-1][1] == kept(one, two)
    assert [epoch for epoch, _ in run.module.epochs()] == [*range(warmup), *range(EPOCHS + 1)]
    assert two.history[-1].units, "the surgery is that of the run that counts"
    assert two.history[-1].epochs == EPOCHS
    assert_settled(run.trainer, run.module, run.loader, run.before)


@both_orders
def test_none_measures_itself_on_what_both_keep(filter_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    measured = Session.label_rates

    def spied(session: Session, correct: torch.Tensor) -> tuple[float, float | None]:
        seen.append(session.in_training)
        return measured(session, correct)

    monkeypatch.setattr(Session, "label_rates", spied)
    one, two = of("UltraCleanCallback").make(response="continue", warmup_epochs=1), of("NONECallback").make()
    fit([one, two] if filter_first else [two, one])
    assert (one.verdict.keep & two.verdict.keep).sum() < two.verdict.keep.sum()
    assert seen[-1].nonzero().flatten().tolist() == kept(one, two)


@both_orders
def test_a_restart_after_a_reset_is_followed_by_another_reset(filter_first: bool) -> None:
    one, two = of("UltraCleanCallback").make(), of("NONECallback").make(warmup_epochs=1)
    run = fit([one, two] if filter_first else [two, one])
    assert [past.epochs for past in two.history] == [1, 1], "before and after the restart"
    assert all(past.units for past in two.history)
    assert run.module.epochs()[-1][1] == kept(one, two)
    assert_settled(run.trainer, run.module, run.loader, run.before)


@both_orders
@pytest.mark.parametrize("warmup", [2, EPOCHS], ids=["early", "at the end"])
def test_ultraclean_and_dbr(filter_first: bool, warmup: int) -> None:
    one, two = of("UltraCleanCallback").make(warmup_epochs=warmup), of("DBRCallback").make()
    run = fit([one, two] if filter_first else [two, one])
    assert [epoch for epoch, _ in run.module.epochs()] == [*range(warmup), *range(EPOCHS + 2)]
    drawn = set(run.module.epochs()[-1][1])
    allowed = (two.verdict.trusted & one.verdict.keep) | two.verdict.suspect  # unlearned, whoever else dropped them
    assert drawn == set(allowed.nonzero().flatten().tolist())
    assert len(two.history[-1].undone_steps) == 2, "the repair is that of the run that counts"
    assert_settled(run.trainer, run.module, run.loader, run.before)


@both_orders
def test_a_restart_after_a_repair_is_followed_by_another_repair(filter_first: bool) -> None:
    one, two = of("UltraCleanCallback").make(warmup_epochs=3), of("DBRCallback").make(warmup_epochs=1)
    run = fit([one, two] if filter_first else [two, one])
    assert [past.epochs for past in two.history] == [1, 1]
    again = two.history[-1]
    assert 1 <= len(again.undone_steps) == len(again.accuracies) - 1, "measured from the start of this repair"
    assert_settled(run.trainer, run.module, run.loader, run.before)


@both_orders
@pytest.mark.parametrize("name", ["ABL", "FineTuneTrusted"])
def test_other_repairs_come_again_after_a_restart_too(name: str, filter_first: bool) -> None:
    one, two = of("UltraCleanCallback").make(warmup_epochs=EPOCHS), of(name).make()
    run = fit([one, two] if filter_first else [two, one])
    assert [epoch for epoch, _ in run.module.epochs()] == [*range(EPOCHS), *range(EPOCHS + 2)]
    assert len(two.history[-1].accuracies) == 3, "before, and after each epoch of the repair that counts"
    assert_settled(run.trainer, run.module, run.loader, run.before)


@both_orders
def test_none_and_dbr(filter_first: bool) -> None:
    one, two = of("NONECallback").make(), of("DBRCallback").make()
    run = fit([one, two] if filter_first else [two, one])
    assert one.history[-1].units
    assert two.history[-1].treated
    drawn = set(run.module.epochs()[-1][1])
    allowed = one.verdict.keep | two.verdict.suspect
    assert drawn <= set(allowed.nonzero().flatten().tolist())
    assert_settled(run.trainer, run.module, run.loader, run.before)


@pytest.mark.parametrize(
    "other", [entry for entry in ENTRIES if entry.kind in ("filter", "repair")], ids=lambda e: e.name
)
@pytest.mark.parametrize("own_first", [True, False], ids=["DST first", "DST last"])
def test_dst_refuses_to_share_and_says_what_to_do(other: Any, own_first: bool) -> None:
    own = of("DSTCallback").make()
    assert isinstance(other.make(), Defense)
    callbacks = [own, other.make()] if own_first else [other.make(), own]
    with pytest.raises(TrainerError, match=rf"cannot share a Trainer with {other.name}.*DSTCallback\(verdict="):
        fit(callbacks)


@pytest.mark.case("24b")
def test_three_filters_cut_all() -> None:
    filters = [of(name).make() for name in ("UltraCleanCallback", "RandomFilter", "SpectralSignatures")]
    run = fit(filters)
    assert run.module.epochs()[-1][1] == kept(*filters)
    assert_settled(run.trainer, run.module, run.loader, run.before)


def test_a_monitor_watches_two_defenses() -> None:
    one, two = of("UltraCleanCallback").make(), of("NONECallback").make()
    run = fit([one, two, BackdoorMonitor(trigger=attacks.BadNets())])
    assert {"backdoor/UltraClean/tpr", "backdoor/NONE/tpr"} <= run.trainer.callback_metrics.keys()


def test_two_that_find_nothing_change_nothing() -> None:
    plain = fit([], clean())
    callbacks = [of(name).make_silent() for name in ("UltraCleanCallback", "NONECallback", "DBRCallback")]
    run = fit(callbacks, clean())
    assert all(callback.verdict.keep.all() for callback in callbacks)
    assert same_state(state_of(plain.module), run.module)
