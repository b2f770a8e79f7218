"""Inside the library tensors are plain; what goes back into a batch is of the class that was there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_backdoor._lightning import plain
from lightning_backdoor.data import find_layout
from lightning_backdoor.data.nesting import copied
from tests.data.tensor_kinds import CLASSES, KINDS, Meta

X = torch.rand(4, 3, 8, 8)
Y = torch.tensor([0, 2, 1, 2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("through", ["found", "batch_fn", "permuted"])
def test_images_are_read_plain_and_put_back_as_they_were(kind: str, through: str) -> None:
    images, cls = KINDS[kind](X.clone()), CLASSES[kind]
    if through == "permuted":
        images = KINDS[kind](X.permute(0, 2, 3, 1).contiguous())
    functions: dict[str, Any] = {
        "found": None,
        "batch_fn": lambda batch: (batch[0], batch[1]),
        "permuted": lambda batch: (batch[0].permute(0, 3, 1, 2), batch[1]),
    }
    labels = Meta.of(Y)
    layout = find_layout((images, labels), functions[through])
    read = layout.images((images, labels))
    assert type(read) is Tensor
    assert type(layout.labels((images, labels))) is Tensor
    assert torch.equal(read, X)
    kept = through != "permuted" or kind == "MetaTensor"  # torchvision's operations give plain tensors
    assert type(layout.given_images((images, labels))) is (cls if kept else Tensor)
    changed = layout.with_images((images, labels), torch.zeros_like(X))
    assert type(changed[0]) is cls
    assert not bool(layout.images(changed).any())
    assert torch.equal(layout.images((images, labels)), X), "the batch given is not changed"
    if kind == "MetaTensor":
        assert changed[0].meta == images.meta


def test_other_numbers_of_samples_and_parameters_stay_plain() -> None:
    layout = find_layout((Meta.of(X), Y))
    assert type(layout.with_images((Meta.of(X), Y), torch.zeros(2, 3, 8, 8))[0]) is Tensor
    held = torch.nn.Parameter(X)
    assert type(find_layout((held, Y)).images((held, Y))) is Tensor
    assert type(find_layout((held, Y)).with_images((held, Y), X)[0]) is Tensor


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_copied(kind: str) -> None:
    batch = {"image": KINDS[kind](X.clone()), "label": [Y]}
    other = copied(batch)
    other["image"].zero_()
    other["label"][0].zero_()
    assert type(other["image"]) is CLASSES[kind]
    assert torch.equal(plain(batch["image"]), X)
    assert bool(batch["label"][0].any())
