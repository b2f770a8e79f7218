"""The learning rate of a fine-tuning, and what batch norms do in it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from lightning_backdoor.responses.extra_epochs import FineTuning


def test_the_default_rate_is_a_share_of_the_largest_that_the_schedule_had() -> None:
    group = {"lr": 1e-7, "initial_lr": 0.004, "max_lr": 0.1}
    assert FineTuning().rate(group) == pytest.approx(0.005)
    assert FineTuning().rate({"lr": 0.2}) == pytest.approx(0.01)


@pytest.mark.parametrize(("constant", "rate"), [(True, 1e-4), (False, 0.5e-4)])
@pytest.mark.parametrize("frozen", [True, False])
def test_rates_fall_or_are_constant_and_batch_norms_keep_their_statistics_or_go_on(
    constant: bool, rate: float, frozen: bool
) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    running: Any = SimpleNamespace(current_epoch=3, num_training_batches=10, optimizers=[], lr_scheduler_configs=[])
    tuning = FineTuning()
    tuning._hold = lambda _: None
    tuning.begin(running, 20, 1e-4, constant=constant, frozen_norms=frozen)
    again = FineTuning()
    again.load_state_dict(tuning.state_dict())
    again.left = 10  # half of it is over
    again._take_over = again._let_schedulers_wait = lambda *_: None
    again.prepare_step(running, net.train(), 0)
    assert again.rate({}) == pytest.approx(rate)
    assert net[1].training is not frozen
    again.release()
    assert net[1].training


def test_a_phase_that_is_prolonged_goes_on_at_the_rate_of_its_new_length() -> None:
    running: Any = SimpleNamespace(current_epoch=3, num_training_batches=10, optimizers=[], lr_scheduler_configs=[])
    tuning = FineTuning()
    held: list[int] = []
    tuning._hold = lambda _: held.append(tuning._until)
    tuning._take_over = tuning._let_schedulers_wait = lambda *_: None
    tuning.begin(running, 2, 1e-4)
    tuning.left = 1
    tuning.prolong(running, 2)
    assert (tuning.left, held) == (3, [6, 8])
    assert not tuning.count_epoch()
    tuning.prepare_step(running, nn.Linear(1, 1), 0)
    assert tuning.rate({}) == pytest.approx(0.5e-4), "two of four epochs are over"
