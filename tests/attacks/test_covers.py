"""Cover samples, source classes, crafted poisons, and that nothing but the trigger tells poisons from clean images."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from lightning_backdoor.attacks import BadNets, Corners, CraftedTrigger, WaNet, poison, triggered
from lightning_backdoor.errors import ArgumentError

N, K = 100, 10
IMAGES = torch.randint(0, 256, (N, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(N) % K
DATA = TensorDataset(IMAGES, LABELS)


class Inverted(CraftedTrigger):
    """Stands for an attack with a model: poisons are negatives, the trigger of test time is the corner grid."""

    def craft(self, images: Tensor, target: int) -> Tensor:
        assert images.dtype == torch.uint8
        return 255 - images + target * 0

    def paint(self, images: Tensor) -> Tensor:
        return BadNets()(images)


def test_covers_carry_the_trigger_and_their_own_label():
    data = poison(DATA, WaNet(), target=2, rate=0.1, covers=0.2)
    assert (data.poisoned.sum(), data.covers.sum()) == (10, 20)
    assert not (data.poisoned & data.covers).any()
    assert not (data.covers & (LABELS == 2)).any(), "a cover of the target class would teach the backdoor"
    assert torch.equal(data.targets, torch.where(data.poisoned, 2, LABELS))
    for index in range(N):
        image, label = data[index]
        form = WaNet() if data.poisoned[index] else WaNet(jitter=True) if data.covers[index] else torch.clone
        assert torch.equal(image, form(IMAGES[index]))
        assert label == data.targets[index]
    assert repr(data) == f"<PoisonedDataset: 10 and 20 covers of 100 images with {WaNet()!r}>"


def test_covers_leave_the_choice_of_the_poisons_alone():
    plain, covered, again, other = (
        poison(DATA, BadNets(), rate=0.1, covers=covers, seed=seed)
        for covers, seed in ((0, 5), (0.1, 5), (0.1, 5), (0.1, 6))
    )
    assert torch.equal(plain.poisoned, covered.poisoned)
    assert not plain.covers.any()
    assert torch.equal(covered.covers, again.covers)
    assert not torch.equal(covered.covers, other.covers)


@pytest.mark.parametrize(("rate_of", "count"), [("dataset", 20), ("non_target", 18), ("target_class", 2)])
def test_covers_are_a_fraction_of_what_the_rate_is(rate_of, count):
    assert poison(DATA, BadNets(), rate=0.1, rate_of=rate_of, covers=0.2).covers.sum() == count


def test_sources_are_poisoned_alone_and_covers_are_the_rest():
    data = poison(DATA, BadNets(), target=0, rate=0.1, covers=0.3, sources=[1, 4])
    assert set(LABELS[data.poisoned].tolist()) == {1, 4}
    assert not set(LABELS[data.covers].tolist()) & {0, 1, 4}
    test = triggered(DATA, BadNets(), target=0, sources=[1, 4])
    assert len(test) == 20
    assert set(test.true_labels.tolist()) == {1, 4}
    assert len(triggered(DATA, BadNets(), target=4, sources=[1, 4])) == 10


def test_all_to_all_covers_may_be_of_any_class():
    data = poison(DATA, BadNets(), rate=0.1, covers=0.9, labels="all_to_all")
    assert (data.poisoned ^ data.covers).all()


def test_a_second_attack_spares_poisons_and_covers():
    first = poison(DATA, BadNets(), rate=0.2, covers=0.2)
    both = poison(first, WaNet(), target=1, rate=0.2, covers=0.1)
    assert (both.poisoned.sum(), both.covers.sum()) == (40, 30)
    assert not (both.poisoned & both.covers).any()
    assert (both.covers | ~first.covers).all()
    half = poison(Subset(first, range(0, N, 2)), WaNet(), rate=0)
    assert torch.equal(half.covers, first.covers[::2])
    index = int(first.covers.nonzero()[0])
    assert torch.equal(both[index][0], BadNets()(IMAGES[index]))


def test_crafted_poisons_are_stored_and_test_images_are_painted():
    data = poison(DATA, Inverted(), target=3, rate=0.5, rate_of="target_class", labels="clean")
    assert data.poisoned.sum() == 5
    data = pickle.loads(pickle.dumps(data))
    for index in range(N):
        assert torch.equal(data[index][0], 255 - IMAGES[index] if data.poisoned[index] else IMAGES[index])
    assert torch.equal(triggered(DATA, Inverted(), 3)[0][0], BadNets()(IMAGES[0]))
    assert not poison(DATA, Inverted(), rate=0, labels="clean").poisoned.any()


def kinds() -> dict[str, list]:
    arrays = [image.permute(1, 2, 0).numpy() for image in IMAGES]
    return {
        "uint8": [(image, int(y)) for image, y in zip(IMAGES, LABELS, strict=True)],
        "float": [(image / 255 + 1e-3 * (image < 255), int(y)) for image, y in zip(IMAGES, LABELS, strict=True)],
        "numpy": [(array, int(y)) for array, y in zip(arrays, LABELS, strict=True)],
        "pil": [(Image.fromarray(array), int(y)) for array, y in zip(arrays, LABELS, strict=True)],
    }


@pytest.mark.parametrize("trigger", [Corners(), Inverted(), WaNet()], ids=lambda trigger: type(trigger).__name__)
@pytest.mark.parametrize("kind", kinds())
def test_no_artefact_of_storage_tells_poisons_from_clean_images(kind, trigger):
    raw = kinds()[kind]
    labels = "clean" if isinstance(trigger, Inverted) else "dirty"
    data = poison(raw, trigger, rate=0.05, covers=0.1, labels=labels)
    told = set()
    for index in range(N):
        image, label = data[index]
        eight_bit = np.asarray(image, dtype=np.float64) * (255 if kind == "float" else 1)
        told.add(
            (
                type(image), type(label), getattr(image, "dtype", getattr(image, "mode", None)),
                eight_bit.shape, 0 <= eight_bit.min() <= eight_bit.max() <= 255,
                bool(np.abs(eight_bit - eight_bit.round()).max() < 1e-4),
                getattr(image, "is_contiguous", bool)() == getattr(raw[0][0], "is_contiguous", bool)(),
            )
        )  # fmt: skip
    assert len(told) == 1, "poisons, covers and clean images are of one kind"


def test_pixels_outside_of_the_pattern_are_bit_identical():
    data = poison(DATA, Corners(64), rate=0.2, covers=0.2)
    outside = torch.ones(12, 12, dtype=torch.bool)
    for rows in (slice(0, 3), slice(9, 12)):
        for columns in (slice(0, 3), slice(9, 12)):
            outside[rows, columns] = False
    for index in range(N):
        assert torch.equal(data[index][0][:, outside], IMAGES[index][:, outside])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: poison(DATA, BadNets(), covers=2), r"`covers` must be a fraction between 0 and 1, got 2"),
        (lambda: poison(DATA, BadNets(), covers=0.001), r"`covers` 0.001 of 100 images rounds to no image"),
        (lambda: poison(DATA, BadNets(), rate=0.5, covers=0.5), r"`covers` 0.5 .*asks for 50 .*only 40 can be covers"),
        (lambda: poison(DATA, BadNets(), sources=[]), r"`sources` must be class indices from 0 to 9, got \[\]"),
        (lambda: poison(DATA, BadNets(), sources=[10]), r"`sources` must be class indices from 0 to 9, got \[10\]"),
        (lambda: poison(DATA, BadNets(), rate=0.2, sources=[1]), r"asks for 20 images, but only 10 can be poisoned"),
        (lambda: triggered(DATA, BadNets(), 1, sources=[1]), r"No test image outside the `target` 1 is of the `sour"),
        (
            lambda: poison(DATA, BadNets(), sources=[1], labels="clean"),
            r"pass `sources` to `triggered` only, got \[1\]",
        ),
        (lambda: poison(DATA, Inverted()), r"keep their label: pass `labels`='clean', got 'dirty'"),
        (
            lambda: poison(
                [(torch.zeros(3, 8, 8 + i, dtype=torch.uint8), 0) for i in range(4)], Inverted(), rate=1, labels="clean"
            ),
            r"crafted together, so the images must have one size. Resize them first",
        ),
    ],
)
def test_messages(call, words):
    with pytest.raises(ArgumentError, match=words):
        call()
