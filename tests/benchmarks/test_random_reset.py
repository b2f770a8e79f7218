"""The baseline that resets units by chance."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from benchmarks.random_reset import RandomReset
from tests.callbacks.helpers import LIGHTNING_WARNS, digits
from tests.callbacks.test_none import train_digits

pytestmark = [*LIGHTNING_WARNS, pytest.mark.filterwarnings("ignore:NONE ends with a model")]  # labels are true here


def test_random_reset_treats_as_many_units_once() -> None:
    train, _ = digits()
    labels, keep = train.tensors[1], torch.arange(len(train)) >= 20
    callback = RandomReset({"body.0": 2, "body.4": 3}, labels, keep)
    train_digits(train, [callback])
    (only,) = callback.history
    assert Counter(layer for layer, *_ in only.units) == {"body.0": 2, "body.4": 3}
    assert only.removed == 20
    assert only.accuracy_after is not None
    assert torch.equal(callback.verdict.keep, keep)
