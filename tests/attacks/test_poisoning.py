"""Which images are poisoned, with which label, and how many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, Subset, TensorDataset

from lightning_backdoor.attacks import SIG, BadNets, poison, poisoned_mask, triggered
from lightning_backdoor.errors import ArgumentError, DataError

N, K = 100, 10
IMAGES = torch.randint(0, 256, (N, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(N) % K  # ten images per class
LABELS[90:] = 0  # and a few more of class 0: 19 of them
DATA = TensorDataset(IMAGES, LABELS)
IN_TARGET = LABELS == 0


def test_the_data_has_19_target_images():
    assert IN_TARGET.sum() == 19


@pytest.mark.parametrize(
    ("rate", "rate_of", "labels", "count"),
    [
        (0.05, "dataset", "dirty", 5),
        (0.10, "non_target", "dirty", 8),  # 8.1
        (0.50, "target_class", "dirty", 10),  # 9.5, halves up
        (0.10, "dataset", "clean", 10),
        (0.80, "target_class", "clean", 15),  # 15.2
        (0.10, "non_target", "clean", 8),
        (0.29, "dataset", "all_to_all", 29),  # 28.999999999999996 in floating point
        (0.005, "dataset", "dirty", 1),  # 0.5, halves up
        (1.0, "non_target", "dirty", 81),
        (0.0, "dataset", "dirty", 0),
    ],
)
def test_counts_follow_the_rate_convention(rate, rate_of, labels, count):
    assert poison(DATA, BadNets(), rate=rate, rate_of=rate_of, labels=labels).poisoned.sum() == count


def test_dirty_labels():
    data = poison(DATA, BadNets(), target=0, rate=0.2)
    assert not (data.poisoned & IN_TARGET).any()
    assert torch.equal(data.targets, torch.where(data.poisoned, 0, LABELS))
    assert torch.equal(data.true_labels, LABELS)


def test_clean_labels():
    data = poison(DATA, BadNets(), target=0, rate=0.5, rate_of="target_class", labels="clean")
    assert (IN_TARGET | ~data.poisoned).all()
    assert torch.equal(data.targets, LABELS)


def test_all_to_all_labels():
    data = poison(DATA, BadNets(), rate=0.6, labels="all_to_all")
    assert (data.poisoned & IN_TARGET).any()
    assert (data.poisoned & ~IN_TARGET).any()
    assert torch.equal(data.targets, torch.where(data.poisoned, (LABELS + 1) % K, LABELS))


@pytest.mark.parametrize("labels", ["dirty", "clean", "all_to_all"])
def test_items_agree_with_the_record(labels):
    data = poison(DATA, BadNets(), target=0, rate=0.1, labels=labels)
    for index in range(len(data)):
        image, label = data[index]
        assert label == data.targets[index]
        assert label.dtype == LABELS.dtype
        assert torch.equal(image, BadNets()(IMAGES[index]) if data.poisoned[index] else IMAGES[index])


def test_the_seed_decides_and_a_higher_rate_adds():
    few, same, other = (poison(DATA, BadNets(), rate=0.1, seed=seed).poisoned for seed in (3, 3, 4))
    many = poison(DATA, BadNets(), rate=0.3, seed=3).poisoned
    assert torch.equal(few, same)
    assert not torch.equal(few, other)
    assert (many | ~few).all()


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    poison(DATA, BadNets())[0]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("classes", [10, np.array(["cat", "dog"]), {"cat": 0}, lambda: ["cat"]], ids=range(4))
def test_a_dataset_may_use_the_attribute_classes_for_anything(classes):
    data = TensorDataset(IMAGES, LABELS)
    data.classes = classes
    assert poison(data, BadNets(), rate=0.05).poisoned.equal(poison(DATA, BadNets(), rate=0.05).poisoned)


def test_clean_twin():
    twin = poison(DATA, BadNets(), rate=0)
    assert not twin.poisoned.any()
    assert torch.equal(twin.targets, LABELS)
    assert all(torch.equal(twin[index][0], IMAGES[index]) for index in range(N))


def test_a_second_attack_joins_the_first():
    first = poison(DATA, BadNets(), target=0, rate=0.1)
    both = poison(first, SIG(), target=1, rate=0.1)
    added = both.poisoned & ~first.poisoned
    assert (both.poisoned.sum(), added.sum()) == (20, 10)
    assert torch.equal(both.true_labels, LABELS)
    old, new = int(first.poisoned.nonzero()[0]), int(added.nonzero()[0])
    assert torch.equal(both[old][0], BadNets()(IMAGES[old]))
    assert torch.equal(both[new][0], SIG()(IMAGES[new]))
    assert both[new][1] == both.targets[new] == 1


def test_subset_before_and_after():
    positions = [7, 3, 50, 51, 52, 99]
    inner = poison(
        Subset(Subset(DATA, range(99, -1, -1)), [99 - position for position in positions]), BadNets(), rate=0.5
    )
    assert torch.equal(inner.true_labels, LABELS[positions])
    assert all(
        torch.equal(inner[i][0], BadNets()(IMAGES[p]) if inner.poisoned[i] else IMAGES[p])
        for i, p in enumerate(positions)
    )
    whole = poison(DATA, BadNets(), rate=0.5)
    assert torch.equal(poisoned_mask(Subset(whole, positions)), whole.poisoned[positions])
    assert poisoned_mask(DATA) is None
    again = poison(Subset(whole, positions), SIG(), rate=0)
    assert torch.equal(again.true_labels, LABELS[positions])
    assert torch.equal(again.poisoned, whole.poisoned[positions])


def test_triggered_leaves_the_target_class_out():
    test = triggered(DATA, BadNets(), target=0)
    expected = (~IN_TARGET).nonzero().squeeze(1)
    assert len(test) == 81
    assert torch.equal(test.true_labels, LABELS[expected])
    for index, position in enumerate(expected.tolist()):
        image, label = test[index]
        assert label == 0
        assert torch.equal(image, BadNets()(IMAGES[position]))


def test_triggered_all_to_all_uses_every_image():
    test = triggered(DATA, BadNets(), labels="all_to_all")
    assert len(test) == N
    assert torch.equal(test.targets, (LABELS + 1) % K)
    assert torch.equal(test.true_labels, LABELS)


def test_triggered_uses_the_trigger_of_test_time():
    test = triggered(DATA, SIG(20, test_delta=60))
    assert torch.equal(test[0][0], SIG(60)(IMAGES[1]))
    assert torch.equal(poison(DATA, SIG(20, test_delta=60), rate=1, rate_of="non_target")[1][0], SIG(20)(IMAGES[1]))


def test_any_function_is_a_trigger():
    test = triggered(DATA, torch.bitwise_not)
    assert torch.equal(test[0][0], 255 - IMAGES[1])


class Stream(IterableDataset):
    def __iter__(self):
        yield from DATA


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"rate": 5}, r"`rate` must be a fraction between 0 and 1, got 5. For five per cent, pass 0.05"),
        ({"rate": float("nan")}, r"`rate` must be a fraction"),
        ({"target": 10}, r"`target` must be a class index from 0 to 9, got 10"),
        ({"labels": "flipped"}, r"`labels` must be 'dirty' or 'clean' or 'all_to_all', got 'flipped'"),
        ({"rate_of": "everything"}, r"`rate_of` must be 'dataset' or 'non_target' or 'target_class'"),
        ({"rate_of": "non_target", "labels": "all_to_all"}, r"`rate_of` must be 'dataset'"),
        ({"rate": 0.2, "labels": "clean"}, r"0.2 of 100 images .*asks for 20 .*only 19 .*lower `rate`"),
        ({"rate": 0.9}, r"asks for 90 .*only 81 can be poisoned"),
        ({"rate": 0.004}, r"rounds to no image. Pass a higher `rate`, or 0"),
    ],
)
def test_argument_messages(kwargs, words):
    with pytest.raises(ArgumentError, match=words):
        poison(DATA, BadNets(), **kwargs)


def test_triggered_needs_other_classes():
    with pytest.raises(ArgumentError, match=r"All 5 test images belong to the `target` 0"):
        triggered(Subset(DATA, [0, 10, 20, 30, 40]), BadNets(), target=0)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Stream(), r"`dataset` must be map-style.*got Stream"),
        (Subset(DATA, []), r"`dataset` is empty"),
        (TensorDataset(torch.randn(4, 3, 8, 8), LABELS[:4]), r"floats in \[0, 1\].*before it is normalised"),
        (TensorDataset(torch.full((4, 3, 8, 8), torch.nan), LABELS[:4]), r"floats in \[0, 1\].*between nan and nan"),
        (TensorDataset(torch.ones(4, 3, 8, 8).long(), LABELS[:4]), r"uint8 or floats.*int64"),
        (TensorDataset(torch.zeros(4, 8, 8, 3), LABELS[:4]), r"must be \(C, H, W\), got \(8, 8, 3\).*`.permute`"),
        (TensorDataset(IMAGES[:4], torch.rand(4)), r"one image and one label, a whole number"),
        (TensorDataset(IMAGES[:4]), r"one image and one label, a whole number"),
        ([torch.zeros(3, 8, 8)], r"must be a tuple, list or dict"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_data_messages(data, words):
    with pytest.raises(DataError, match=words):
        poison(data, BadNets())
