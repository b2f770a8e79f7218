"""The kept samples of a dataset, and the removed ones with the labels that the findings suggest."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_backdoor import Verdict
from lightning_backdoor.errors import ArgumentError, DataError
from lightning_backdoor.verdict import Diagnosis, Finding

LABELS = [0, 1, 0, 0, 2, 0]


def found(diagnosis: Diagnosis = "wrong labels", suggested: list[int] | None = None) -> Verdict:
    """Six samples: the positions 2, 3 and 5, of label 0, stand out; 1, 3 and 5 are removed."""
    finding = Finding(
        label=0,
        positions=torch.tensor([5, 3, 2]),
        gate="strict",
        figures=(),
        units=torch.tensor([0]),
        weights=torch.ones(1),
        threshold=0.5,
        diagnosis=diagnosis,
        suggested_labels=None if suggested is None else torch.tensor(suggested),
    )
    keep = torch.tensor([True, False, True, False, True, False])
    return Verdict(torch.arange(6.0), keep, 0.5, "known", labels=torch.tensor(LABELS), findings=(finding,))


def pairs() -> list[tuple[str, int]]:
    return [(f"image {position}", label) for position, label in enumerate(LABELS)]


def test_the_subset_has_the_kept_samples() -> None:
    kept = found().subset(pairs())
    assert isinstance(kept, torch.utils.data.Subset)
    assert list(kept) == [("image 0", 0), ("image 2", 0), ("image 4", 2)]


def test_removed_samples_come_back_with_another_label_alone() -> None:
    """2 is kept whatever is suggested, 1 has no suggestion, 3 is suggested its own label."""
    relabeled = found(suggested=[2, 0, 1]).relabeled(pairs())
    assert list(relabeled) == [("image 0", 0), ("image 2", 0), ("image 4", 2), ("image 5", 2)]
    assert relabeled.__getitems__([3, 0]) == [("image 5", 2), ("image 0", 0)]
    assert len(found(suggested=[-1, 1, -1]).relabeled(pairs())) == 4


@pytest.mark.parametrize(("diagnosis", "count"), [("wrong labels", 5), ("unclear", 5), ("right labels", 3)])
def test_a_finding_with_right_labels_stays_out(diagnosis: Diagnosis, count: int) -> None:
    assert len(found(diagnosis, [2, 1, 1]).relabeled(pairs())) == count


def test_without_findings_it_is_the_subset() -> None:
    verdict = found()
    assert list(verdict.relabeled(pairs())) == list(verdict.subset(pairs()))


Item = namedtuple("Item", ["image", "label", "name"])


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (("i", 0, "extra"), ("i", 2, "extra")),
        (["i", 0], ["i", 2]),
        (Item("i", 0, "n"), Item("i", 2, "n")),
        ({"image": "i", "label": 0}, {"image": "i", "label": 2}),
        ({"pixel_values": "i", "labels": 0}, {"pixel_values": "i", "labels": 2}),
        (("i", np.int64(0)), ("i", np.int64(2))),
        (("i", torch.tensor(0)), ("i", torch.tensor(2))),
        (("i", torch.tensor([0], dtype=torch.int32)), ("i", torch.tensor([2], dtype=torch.int32))),
    ],
    ids=str,
)
def test_a_new_label_is_of_the_type_of_the_old_one(item: Any, expected: Any) -> None:
    data = [item] * 6
    verdict = found(suggested=[2, 1, 1])
    new = verdict.relabeled(data)[4]
    assert new == expected
    assert type(new) is type(expected)
    old, label = (
        part["label" if "label" in part else "labels"] if isinstance(part, dict) else part[1] for part in (item, new)
    )
    assert type(label) is type(old)
    assert not isinstance(old, torch.Tensor) or (label.dtype, label.shape) == (old.dtype, old.shape)


def test_a_loader_reads_it_and_the_dataset_is_as_before() -> None:
    data = TensorDataset(torch.arange(6.0), torch.tensor(LABELS))
    loader = DataLoader(found(suggested=[2, 1, 1]).relabeled(data), batch_size=5)
    images, labels = next(iter(loader))
    assert images.tolist() == [0, 2, 3, 4, 5]
    assert labels.tolist() == [0, 0, 1, 2, 2]
    assert data.tensors[1].tolist() == LABELS


def test_other_datasets_are_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(pairs())

    for call in (found().subset, found().relabeled):
        with pytest.raises(ArgumentError, match=r"`dataset` must be a map-style dataset .* got Stream"):
            call(Stream())
        with pytest.raises(ArgumentError, match="which has 6 samples, got one of 5"):
            call(pairs()[:5])


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("image", r"must give \(image, label\) or a dict .* got a str at position 5"),
        ({"image": 1, "class": 2}, "got a dict with image, class at position 5"),
        ({"label": 0, "target": 0}, "got a dict with label, target at position 5"),
        (("i", "cat"), "must give whole numbers as labels, got a str at position 5"),
        (("i", torch.tensor([1.0, 0.0])), r"got a tensor torch.float32 \(2,\) at position 5"),
        (("i", 1), "the label at position 5 was 0, got 1"),
    ],
    ids=str,
)
def test_items_without_a_clear_label_are_named(item: Any, message: str) -> None:
    relabeled = found(suggested=[2, 1, 1]).relabeled([item] * 6)
    assert relabeled[0] == item
    with pytest.raises(DataError, match=message):
        relabeled[4]
