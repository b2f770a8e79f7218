"""Batches of different sizes: a collate that pads to the largest image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from tests.callbacks.helpers import Pictures, loader_of, make_trainer
from tests.contract.problem import BATCH, EPOCHS, WARNS, assert_settled, net_of, planted
from tests.contract.registry import Entry, every_defence, of

pytestmark = WARNS


class Sizes(Pictures):
    """Planted images, of which every 16th is larger."""

    def __init__(self, n: int = 96) -> None:
        self.__dict__.update(vars(planted(n)))

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = super().__getitem__(i)
        return {**item, "image": F.pad(item["image"], (0, 4, 0, 2)) if i % 32 == 16 else item["image"]}


def padded(items: list[Any]) -> dict[str, Tensor]:
    """Black margins up to the largest image of the batch."""
    height, width = (max(item["image"].shape[side] for item in items) for side in (1, 2))
    return default_collate(
        [
            {
                **item,
                "image": F.pad(item["image"], (0, width - item["image"].shape[2], 0, height - item["image"].shape[1])),
            }
            for item in items
        ]
    )


@every_defence
def test_a_collate_that_pads_to_the_largest_image_of_a_batch(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Tensor] = []
    monkeypatch.setattr(
        "lightning_backdoor.callbacks.defense.write_report",
        lambda *args, evidence, **kwargs: shown.append(evidence.images([15, 16, 17])),
    )
    callback, module = entry.make(batch_size=12, report_dir=tmp_path), net_of()
    trainer = make_trainer([callback], EPOCHS)
    trainer.fit(module, loader_of(Sizes(), BATCH, collate_fn=padded))
    assert entry.acted(callback, trainer)
    assert_settled(trainer, module)
    assert shown[-1].shape == (3, 3, 10, 12)


def test_two_scans_of_padded_batches_are_one() -> None:
    """What does not fit into the memory of denoised images is denoised again."""
    callback = of("UltraCleanCallback").make(rescore_every=1, rewind=False, warmup_epochs=1, batch_size=12)
    make_trainer([callback], 3).fit(net_of(), loader_of(Sizes(), BATCH, collate_fn=padded))
    assert callback.verdict is not None
    assert bool(callback.verdict.scores.isfinite().all())
