"""Every defence says it where its verdict takes most of a label away."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from lightning_backdoor import UltraCleanCallback, Verdict
from tests.contract.registry import Entry, every_kind_of_defense

SIZE = 20  # samples of each of ten labels


def verdict(**removed: int) -> Verdict:
    """Of label ``k3`` so many are removed."""
    labels = torch.arange(10).repeat_interleave(SIZE)
    keep = torch.ones(len(labels), dtype=torch.bool)
    for name, count in removed.items():
        label = int(name.removeprefix("k"))
        keep[SIZE * label : SIZE * label + count] = False
    return Verdict((~keep).float(), keep, 0.5, "known", labels, trusted=keep, suspect=~keep)


@every_kind_of_defense
def test_a_majority_of_a_label_is_told_with_a_remedy_that_works(entry: Entry) -> None:
    callback = entry.make()
    with pytest.warns(UserWarning, match=r"most images of a label .* 16 of the 20 with label 3\. Either") as told:
        callback._procedure.adopt(verdict(k3=16, k4=10))
    assert "k)).nonzero().flatten().tolist()`" in str(told[0].message)
    k, dataset = 3, TensorDataset(torch.arange(10 * SIZE))
    positions = (callback.verdict.keep | (callback.verdict.labels == k)).nonzero().flatten().tolist()
    assert len(Subset(dataset, positions)) == 10 * SIZE - 10
    with pytest.warns(UserWarning, match="18 of the 20 with label 3"):
        callback._procedure.adopt(verdict(k3=18, k4=10))


@every_kind_of_defense
def test_half_of_a_label_or_what_was_told_before_is_not(entry: Entry) -> None:
    callback = entry.make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback._procedure.adopt(verdict())
        callback._procedure.adopt(verdict(k3=10, k4=10))
        callback._procedure.adopt(replace(verdict(k5=20), labels=None))
    with pytest.warns(UserWarning, match="label 3"):
        callback._procedure.adopt(verdict(k3=16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback._procedure.adopt(verdict(k3=16, k4=2))
        callback._procedure.adopt(verdict(k3=15))


def test_of_many_labels_five_are_named() -> None:
    with pytest.warns(UserWarning, match=r"with label 4, and most of those with 3 more labels\. Either"):
        UltraCleanCallback()._procedure.adopt(verdict(**{f"k{label}": 11 for label in range(8)}))
