"""What an estimate of the attack success rate does when a process of several fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_backdoor.scanning import estimate_asr as room


class NoRoom(Tensor):
    """Images for which a device has no room."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(args[0], torch.device):
            raise MemoryError("no room on the device")
        return super().to(*args, **kwargs)


def test_images_that_find_no_room_on_the_device_are_an_error_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    @contextmanager
    def on_all_ranks(trainer: Any, what: str) -> Iterator[None]:
        try:
            yield
        except MemoryError as error:
            told.append(f"{what}: {error}")
            raise

    monkeypatch.setattr(room, "raise_on_all_ranks", on_all_ranks)
    monkeypatch.setattr(room, "isolated_eval", lambda *args: nullcontext())
    labels = torch.arange(40) % 2
    data = SimpleNamespace(
        require_replaceable=lambda *args: None,
        unread=torch.zeros(40, dtype=torch.bool),
        predict=lambda *args, positions, **kwargs: labels[positions],
        images=lambda places: torch.zeros(len(places), 3, 8, 8, dtype=torch.uint8).as_subclass(NoRoom),
        scan=lambda *args, **kwargs: pytest.fail("a scan began in this process alone"),
    )
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    ordinary = torch.arange(40) >= 8
    group = (labels == 0).nonzero().squeeze(1)[:4]
    with pytest.raises(MemoryError):
        room.estimate_asr(SimpleNamespace(), module, data, [(0, group)], labels=labels, ordinary=ordinary)  # type: ignore[arg-type]
    assert told == [f"{room.DESCRIPTION}: no room on the device"]
