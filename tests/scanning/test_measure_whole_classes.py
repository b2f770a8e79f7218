"""Patterns of whole classes: what is read, what goes through the network, and on how many images a rate rests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_backdoor.scanning import measure_whole_classes as room

LABELS, EACH, SIGNALED, ALWAYS = 40, 25, 5, 7
COUNT = LABELS * EACH


class Data:
    """Plain images, whose brightness is their label; those of one label have a bright pixel. Counts what is used."""

    def __init__(self, given: Callable[[Tensor], Tensor]) -> None:
        self.labels = torch.arange(COUNT) % LABELS
        self.pictures = (20 + 2 * self.labels).to(torch.uint8)[:, None, None, None].repeat(1, 1, 8, 8)
        self.pictures[self.labels == SIGNALED, :, 2, 2] += 60
        self.unread = torch.zeros(COUNT, dtype=torch.bool)
        self.layout = SimpleNamespace(images=lambda batch: batch, with_images=lambda batch, images: images)
        self.pixels = SimpleNamespace(to_pixels=lambda images: images, to_model=lambda pixels, like: pixels)
        self.read, self.forward, self._given = 0, 0, given

    def images(self, places: list[int]) -> Tensor:
        self.read += len(places)
        return self.pictures[places]

    def logits(self, trainer: Any, module: Any, batch: Tensor) -> Tensor:
        self.forward += len(batch)
        return F.one_hot(self._given(batch), LABELS).float()

    def scan(self, trainer: Any, module: Any, step: Any, *, description: str, positions: Tensor) -> dict[str, Tensor]:
        return step(positions, self.pictures[positions])


def by_brightness(images: Tensor) -> Tensor:
    """The label, or that of the signal where the pixel is bright."""
    usual, pixel = images[:, 0, 6, 6].long(), images[:, 0, 2, 2].long()
    return torch.where(pixel - usual > 100, SIGNALED, (usual - 20) // 2)


def one_for_all(images: Tensor) -> Tensor:
    return torch.full((len(images),), ALWAYS)


def turned(data: Any, monkeypatch: pytest.MonkeyPatch) -> room.Turned:
    for name in ("isolated_eval", "raise_on_all_ranks"):
        monkeypatch.setattr(room, name, lambda *args: nullcontext())
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    trainer: Any = SimpleNamespace()
    return room.turned_by_patterns(trainer, module, data, labels=data.labels, ordinary=torch.ones(COUNT).bool())


def test_a_signal_is_measured_and_unchanged_images_are_read_and_answered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Data(by_brightness)
    rates, labels, images = turned(data, monkeypatch)
    assert labels == list(range(LABELS))
    planted = torch.zeros(LABELS, LABELS)
    planted[SIGNALED, SIGNALED] = 1
    assert torch.equal(rates, planted)
    assert data.read == room.IMAGES[0] + COUNT, "of each label there are fewer than 64"
    assert data.forward == room.IMAGES[0] * (1 + LABELS)
    shown = data.labels[room.drawn(torch.ones(COUNT).bool(), room.IMAGES[0])]
    assert images == room.IMAGES[0] - int(torch.bincount(shown).max()), "without those of the label itself"


def test_a_label_that_all_images_get_as_they_are_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, labels, images = turned(Data(one_for_all), monkeypatch)
    assert labels == [label for label in range(LABELS) if label != ALWAYS]
    assert torch.equal(rates, torch.zeros(LABELS - 1, LABELS - 1))
    assert images >= room.FEWEST
