"""Every callback that curates, on datasets of every library, behind every kind of loader.

A case is a callback and a loader; the dataset behind it changes from case to case so that each is met.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_backdoor.callbacks.base import Defense
from tests.callbacks.helpers import Pictures, make_trainer
from tests.contract.problem import BATCH, EPOCHS, IMAGES, WARNS, Net, assert_settled
from tests.contract.registry import ENTRIES, Entry, name_of
from tests.contract.sources import DATASETS, LOADERS, NOT_EACH_ONCE, find_batch

# timm leaves closing its image files to the garbage collector
pytestmark = [
    *WARNS,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CURATING = [entry for entry in ENTRIES if entry.kind in ("filter", "repair")]
CASES = [(which, CURATING[(2 * i + j) % len(CURATING)]) for i, which in enumerate(LOADERS) for j in range(2)]
"""Two callbacks behind each loader; the loader does not know them."""


def dataset_of(entry: Entry, which: str) -> str:
    """The dataset of a case."""
    names = list(DATASETS)
    return names[(list(LOADERS).index(which) + CURATING.index(entry)) % len(names)]


class Reader(Net):
    """Knows an image again by its pixels, and what its defence allowed when it was drawn."""

    def __init__(self, data: Any) -> None:
        super().__init__()
        items = [data[i] for i in range(len(data))]
        self.places = {self.key(find_batch(item)[0]): i for i, item in enumerate(items)}
        assert len(self.places) == IMAGES, "no two images are the same"
        self.leaks: set[int] = set()

    @staticmethod
    def key(image: Tensor) -> bytes:
        return image.cpu().contiguous().numpy().tobytes()

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images if images.dtype == torch.uint8 else 255 * images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = find_batch(batch)
        positions = [self.places[self.key(image)] for image in images]
        self.drawn.append((self.current_epoch, batch_idx, positions))
        for callback in self.trainer.callbacks:
            if isinstance(callback, Defense) and callback.verdict is not None:
                allowed = callback.verdict.keep.clone()
                if callback.verdict.suspect is not None:
                    allowed |= callback.verdict.suspect  # a repair unlearns them
                self.leaks |= {i for i in positions if not allowed[i]}
        return torch.nn.functional.cross_entropy(self(images), labels)


def assert_curates(entry: Entry, callback: Any, module: Any, trainer: Any, *, each_once: bool) -> None:
    """It acted; nothing that it removed was drawn from then on; of what it kept, everything was."""
    assert entry.acted(callback, trainer)
    assert EPOCHS <= trainer.current_epoch <= entry.epochs, "a repair may be done early"
    assert not module.leaks, "drawn after they were removed"
    assert_settled(trainer, module)
    verdict, (_, last) = callback.verdict, module.epochs()[-1]
    known = [mask for mask in (verdict.trusted, verdict.suspect) if mask is not None]
    allowed = torch.stack(known).any(dim=0) if known else verdict.keep
    expected = allowed.nonzero().flatten().tolist()
    assert set(last) <= set(expected)
    if each_once or known:  # a repair has batches of its own
        lone = len(expected) % BATCH == 1  # batch norm cannot take it
        assert len(last) == len(set(last)) == len(expected) - lone


def train(callback: Any, module: Any, loader: Any, **settings: Any) -> Any:
    trainer = make_trainer([callback], EPOCHS, **settings)
    trainer.fit(module, loader, DataLoader(Pictures(32, seed=1), batch_size=16))
    return trainer


@pytest.fixture(autouse=True)
def _no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """FakeData seeds for each image, and torch notes a stack for each seed of a device that has not started."""
    monkeypatch.setattr("traceback.format_stack", lambda *args: [])


@pytest.mark.case("1", "2", "3", "4", "5", "7", "8", "9", "10", "16", "60")
@pytest.mark.parametrize(("which", "entry"), CASES, ids=name_of)
def test_removed_samples_are_never_drawn_again(entry: Entry, which: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = DATASETS[dataset_of(entry, which)](tmp_path)
    callback, module = entry.make(), Reader(data)
    trainer = train(callback, module, LOADERS[which](data))
    assert_curates(entry, callback, module, trainer, each_once=which not in NOT_EACH_ONCE)


def test_every_loader_every_dataset_and_every_callback_is_met() -> None:
    assert {which for which, _ in CASES} == LOADERS.keys()
    assert {dataset_of(entry, which) for which, entry in CASES} == DATASETS.keys()
    assert {entry.name for _, entry in CASES} == {entry.name for entry in CURATING}
