"""The batches on which the detector of D-BR and D-ST is trained."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_backdoor.scanning.measure_fct import order_of_steps

STEPS, REPULSION = 3, 40


def data_of(labels: Tensor, size: int, outputs: int) -> Any:
    """A training set in batches of ``size``, for a model with so many logits, that counts how often labels are read."""
    data = SimpleNamespace(num_classes=outputs, reads=0)

    def read_labels(*_: Any) -> Tensor:
        data.reads += 1
        return labels

    class Data(SimpleNamespace):
        def __len__(self) -> int:
            return len(labels)

    loader = nullcontext(SimpleNamespace(batch_size=size))
    unread = torch.arange(len(labels)) == 7
    return Data(num_classes=outputs, read=lambda _: loader, read_labels=read_labels, unread=unread, count=data)


def order_of(data: Any, seed: int = 0) -> Tensor:
    alone = SimpleNamespace(world_size=1)
    return order_of_steps(alone, None, data, steps=STEPS, all_steps=STEPS + REPULSION, seed=seed)


def shuffles(n: int, size: int) -> Tensor:
    """One shuffle after the other."""
    generator, needed = torch.Generator().manual_seed(0), (STEPS + REPULSION) * size
    return torch.cat([torch.randperm(n, generator=generator) for _ in range(-(-needed // n))])[:needed]


@pytest.mark.parametrize(("classes", "size"), [(100, 64), (33, 64), (100, 10), (12, 5)])
def test_centers_are_of_several_samples_where_a_batch_cannot_hold_two_of_every_class(classes: int, size: int) -> None:
    """Plain batches would hold single samples of most classes, which centre repulsion turns away from one another."""
    labels = torch.arange(1000) % classes
    data = data_of(labels, size, classes)
    order = order_of(data)
    assert torch.equal(order[: STEPS * size], shuffles(1000, size)[: STEPS * size]), "the first phase is as it was"
    batches = labels[order].view(-1, size)[STEPS:]
    assert len(batches) == REPULSION
    assert 7 not in order[STEPS * size :], "of what `collate_fn` drops a batch would hold fewer"
    counts = [torch.unique(batch, return_counts=True)[1] for batch in batches]
    assert all(len(count) >= 2 and int(count.min()) >= min(4, size // 2) for count in counts)
    if classes * 2 < REPULSION * len(counts[0]):
        assert len(torch.unique(batches)) == classes, "all classes have their turn"
    assert torch.equal(order, order_of(data))
    assert not torch.equal(order, order_of(data, seed=1))


@pytest.mark.parametrize(("classes", "outputs", "read"), [(10, 10, 0), (32, 32, 0), (10, 1000, 1)])
def test_few_classes_keep_one_shuffle_after_the_other(classes: int, outputs: int, read: int) -> None:
    data = data_of(torch.arange(1000) % classes, 64, outputs)
    assert torch.equal(order_of(data), shuffles(1000, 64))
    assert data.count.reads == read


def test_a_class_that_is_smaller_than_its_share_repeats_its_samples() -> None:
    labels = torch.cat([torch.arange(20), torch.arange(20)])  # two samples of each class
    batches = order_of(data_of(labels, 16, 20)).view(-1, 16)[STEPS:]
    for batch in batches[[7 not in labels[batch] for batch in batches]]:  # of class 7 a sample is unread
        present, counts = torch.unique(labels[batch], return_counts=True)
        assert counts.tolist() == [4] * 4
        assert len(torch.unique(batch)) == 2 * len(present), "each of the two, twice"
