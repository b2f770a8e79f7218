"""timm's loaders: one that normalises on the device, and one that never ends its epoch."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from timm.data import create_dataset, create_loader
from timm.data.loader import MultiEpochsDataLoader, PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_backdoor.data.views import finish_of, scan_loader, unwrapped
from lightning_backdoor.scanning.scanner import ScanOptions, open_scanner
from tests.callbacks.helpers import Net, Pictures, always, make_trainer, same_state
from tests.contract.sources import write_folder
from tests.loading.recording import (
    BATCH,
    KEEP,
    LIGHTNING_WARNS,
    N,
    Points,
    Pruner,
    expect_pruned,
    fit,
    same_weights,
    weights_of,
)
from tests.loading.test_loader_filter_guards import Unchanged

OLD = tuple(map(int, version("timm").split(".")[:3])) < (1, 0, 31)
# timm leaves closing its image files to the garbage collector
pytestmark = [
    *LIGHTNING_WARNS,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Arrays(Dataset[tuple[Any, int]]):
    """What timm's transforms for its prefetcher make of images: uint8 arrays ``(C, H, W)``."""

    def __init__(self, n: int = 48) -> None:
        data = Pictures(n)
        self.images, self.targets = data.images.numpy(), data.targets.tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.images[i], self.targets[i]


def prefetching(inner: Any = None, **settings: Any) -> PrefetchLoader:
    inner = DataLoader(Arrays(), batch_size=8, collate_fn=fast_collate) if inner is None else inner
    return PrefetchLoader(inner, **{"mean": MEAN, "std": STD, "device": CPU, **settings})


@pytest.mark.parametrize("settings", [{}, {"fp16": True}, {"img_dtype": torch.bfloat16}, {"re_prob": 1.0}], ids=str)
def test_a_scan_shows_what_the_training_shows_without_random_erasing(settings: dict[str, Any]) -> None:
    loader = prefetching(**settings)
    before = dict(vars(loader))
    state = torch.get_rng_state()
    view = scan_loader(unwrapped(loader), range(48), seed=0, finish=finish_of(loader))
    scanned = [batch for _, batch in view]
    assert torch.equal(state, torch.get_rng_state())
    trained = list(prefetching(**{**settings, "re_prob": 0.0}))
    assert len(scanned) == len(trained)
    for (images, labels), (expected, targets) in zip(scanned, trained, strict=True):
        assert images.dtype == expected.dtype
        assert torch.equal(images, expected)
        assert torch.equal(labels, targets)
    assert vars(loader) == before
    assert finish_of(loader).mean == pytest.approx(MEAN, abs=1e-2)


def test_the_pixel_space_is_the_one_of_the_prefetcher() -> None:
    class Opening(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.data = open_scanner(trainer, pl_module, trainer.train_dataloader, ScanOptions())

    opening = Opening()
    make_trainer([opening], 1).fit(Net(), prefetching())
    data = opening.data
    assert data.pixels.mean == pytest.approx(MEAN)
    assert data.pixels.std == pytest.approx(STD)
    assert torch.equal(data.images([3, 5]), torch.from_numpy(Arrays().images[[3, 5]]))


class Reader(Net):
    """Gets normalised floats, counts what it is shown."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.is_floating_point()
        return super().forward((images * torch.tensor(STD).view(-1, 1, 1) + torch.tensor(MEAN).view(-1, 1, 1)) * 255)


class Normalized(Arrays):
    """The same images as floats, for torch's own loader."""

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(i)
        mean, std = (torch.tensor([255 * x for x in part]).view(-1, 1, 1) for part in (MEAN, STD))
        return torch.from_numpy(image).float().sub(mean).div(std), label


def trained(train: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    callback, module = always(mean=MEAN, std=STD), Reader()
    make_trainer([callback]).fit(module, train)
    return callback.verdict, module


def test_a_defense_behind_the_prefetcher_does_what_it_does_behind_torchs_loader() -> None:
    inner = DataLoader(Arrays(), batch_size=8, shuffle=True, collate_fn=fast_collate)
    outer = prefetching(inner)
    before = dict(vars(outer)), dict(vars(inner))
    verdict, module = trained(outer)
    expected, like = trained(DataLoader(Normalized(), batch_size=8, shuffle=True))
    assert torch.equal(verdict.keep, expected.keep)
    assert not bool(verdict.keep.all())
    assert torch.equal(verdict.scores, expected.scores)
    assert same_state(module, like)
    assert (dict(vars(outer)), dict(vars(inner))) == before, "the user's loaders are as they were"


@pytest.mark.skipif(OLD, reason="Lightning cannot validate on its PrefetchLoader")
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_create_loader_makes(workers: int, tmp_path: Path) -> None:
    """timm's own function, with its defaults but for the device, for training and validation."""
    root = write_folder(tmp_path)
    train, val = (create_dataset("", root=str(root)) for _ in range(2))
    settings: dict[str, Any] = {
        "batch_size": 24,
        "num_workers": workers,
        "device": CPU,
        "use_multi_epochs_loader": True,
    }
    loader = create_loader(train, 8, is_training=True, re_prob=0.5, **settings)
    callback, module = always(warmup_epochs=1, response="continue"), Net()
    trainer = make_trainer([callback], 2)
    trainer.fit(module, loader, create_loader(val, 8, **settings))
    assert callback.verdict is not None
    assert len(callback.verdict) == 96
    assert callback.verdict.labels.tolist() == [label for _, label in train.reader.samples]
    assert trainer.num_training_batches == 3


MULTI = {
    "no worker": {},
    "worker": {"num_workers": 1},
    "persistent worker": {"num_workers": 1, "persistent_workers": True},
    "no worker, at once": {"at_once": True},
    "worker, at once": {"num_workers": 1, "at_once": True},
}


def multi(*, at_once: bool = False, **settings: Any) -> MultiEpochsDataLoader:
    """A loader; with ``at_once`` it has started in its constructor, as before timm 1.0.31."""
    torch.manual_seed(1)
    loader = MultiEpochsDataLoader(Points(), **{"batch_size": BATCH, "shuffle": True, **settings})
    if at_once:
        loader.iterator = DataLoader.__iter__(loader)
    return loader


@pytest.mark.parametrize("kind", ["no worker", "persistent worker", "no worker, at once", "worker, at once"])
def test_a_loader_that_never_ends_its_epoch_draws_what_is_kept(kind: str) -> None:
    module = fit(multi(**MULTI[kind]))
    expect_pruned(module)
    assert module.planned == [8, 8, 6, 6]
    assert module.validated == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["no worker", "worker", "no worker, at once", "worker, at once"])
def test_it_trains_bit_by_bit_as_without_a_callback_until_samples_are_removed(kind: str) -> None:
    alone, beside = (fit(multi(**MULTI[kind]), pruner=pruners) for pruners in ([], [Pruner({})]))
    assert alone.batches == beside.batches
    assert same_weights(weights_of(alone), weights_of(beside))


@pytest.mark.skipif(OLD, reason="its sampler begins a shuffle before the epoch has its number")
def test_it_begins_anew_when_told_to() -> None:
    """After a restart the epoch number is another one, and so is the shuffle."""

    class Rewinding(Pruner):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                trainer.fit_loop.epoch_progress.current.processed = 0
                self.loader_filter.restart_iterator()
                trainer.fit_loop.epoch_progress.current.processed = 2

    sharded = DistributedSampler(Points(), num_replicas=1, rank=0)
    module = fit(multi(shuffle=False, sampler=sharded, num_workers=1), pruner=Rewinding({}))
    assert module.batches[2] == module.batches[0] != module.batches[1]


@pytest.mark.parametrize("at_once", [False, True])
def test_the_users_loader_stays_as_it_was_and_serves_a_second_fit(*, at_once: bool) -> None:
    train = multi(at_once=at_once)
    before = dict(vars(train))
    expect_pruned(fit(train))
    assert vars(train) == before
    expect_pruned(fit(train))


def test_masks_growing_and_shrinking_inside_a_prefetcher() -> None:
    other = ~KEEP
    pruner = Pruner({0: KEEP, 1: None, 2: other})
    module = fit(Unchanged(multi(), device=CPU), pruner)
    assert [sorted(module.drawn(epoch)) for epoch in range(4)] == [
        list(range(N)),
        KEEP.nonzero().flatten().tolist(),
        list(range(N)),
        other.nonzero().flatten().tolist(),
    ]
    assert module.planned == [8, 6, 8, 2]
