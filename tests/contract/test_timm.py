"""Every defence behind what timm's `create_loader` makes: a prefetcher around a loader that never ends its epoch."""

from __future__ import annotations

from typing import Any

import torch
from timm.data.loader import MultiEpochsDataLoader, PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import TensorDataset

from tests.callbacks.helpers import make_trainer
from tests.contract.problem import BATCH, EPOCHS, WARNS, assert_settled, planted
from tests.contract.registry import Entry, every_kind_of_defense
from tests.contract.test_loaders import Reader, assert_curates

pytestmark = WARNS


class Normalized(Reader):
    """Gets floats, and knows an image by its pixels all the same."""

    @staticmethod
    def key(image: Tensor) -> bytes:
        return Reader.key(image if image.dtype == torch.uint8 else (255 * image).round().byte())


@every_kind_of_defense
def test_removed_samples_are_never_drawn_again(entry: Entry) -> None:
    torch.manual_seed(0)
    data: Any = TensorDataset(planted().images, planted().targets)
    inner = MultiEpochsDataLoader(data, batch_size=BATCH, shuffle=True, collate_fn=fast_collate)
    loader = PrefetchLoader(inner, mean=(0.0,) * 3, std=(1.0,) * 3, device=torch.device("cpu"))
    before = dict(vars(loader)), dict(vars(inner))
    callback, module = entry.make(), Normalized(data)
    trainer = make_trainer([callback], EPOCHS)
    trainer.fit(module, loader)
    assert (vars(loader), vars(inner)) == before
    if entry.kind == "own":  # it makes the training steps itself
        assert entry.acted(callback, trainer)
        assert_settled(trainer, module)
    else:
        assert_curates(entry, callback, module, trainer, each_once=True)
