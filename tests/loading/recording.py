"""A toy model and data that remember which samples were trained on, and a callback that only prunes."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning.pytorch as unified
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_backdoor._lightning import CallbackBase
from lightning_backdoor.loading.loader_filter import LoaderFilter, loader_filter_of
from tests.accelerators import trainer_settings

N, BATCH, EPOCHS = 64, 8, 4
REMOVED = torch.arange(N) % 4 == 1
KEEP = ~REMOVED
KEPT = set(KEEP.nonzero().squeeze(1).tolist())

SAFE_LOADING: dict[str, Any] = (
    {"weights_only": True} if "weights_only" in inspect.signature(pl.Trainer.fit).parameters else {}
)
"""Further arguments of ``fit``, where Lightning knows them: callback states must load without unpickling code."""

LIGHTNING_WARNS = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


class Points(Dataset[tuple[Tensor, Tensor, int]]):
    """Vectors with two classes; the third part of an item is its position."""

    def __init__(self, n: int = N) -> None:
        self.x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
        self.y = (self.x.sum(dim=1) > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.x[index], self.y[index], index


class RecordingMixin:
    """Trains a small classifier and writes down positions, validations and batch counts by epoch."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        layers = [nn.Linear(4, 6), nn.BatchNorm1d(6)] if norm else [nn.Linear(4, 6)]
        self.net = nn.Sequential(*layers, nn.ReLU(), nn.Linear(6, 2))
        self.batches: dict[int, list[list[int]]] = {}
        self.validated: list[int] = []
        self.planned: list[float] = []
        self.learning_rate = 0.1
        self.batch_size = BATCH

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, positions = find_batch(batch)
        self.batches.setdefault(self.trainer.current_epoch, []).append(torch.as_tensor(positions).reshape(-1).tolist())
        loss = nn.functional.cross_entropy(self.net(x.reshape(-1, 4)), y.reshape(-1))
        self.log("loss", loss)
        return loss

    def on_train_epoch_start(self) -> None:
        self.planned.append(self.trainer.num_training_batches)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking and batch_idx == 0:
            self.validated.append(self.trainer.current_epoch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    def drawn(self, epoch: int) -> Counter[int]:
        return Counter(index for batch in self.batches[epoch] for index in batch)

    def sizes(self, epoch: int) -> list[int]:
        return [len(batch) for batch in self.batches[epoch]]


class Recording(RecordingMixin, pl.LightningModule):
    pass


class UnifiedRecording(RecordingMixin, unified.LightningModule):
    pass


def find_batch(batch: Any) -> Any:
    """The tuple of a batch that may sit in the dict or list of a CombinedLoader."""
    if isinstance(batch, dict):
        return find_batch(next(value for value in batch.values() if value is not None))
    return find_batch(batch[0]) if isinstance(batch[0], (tuple, list)) else batch


class Pruner(CallbackBase):
    """Prunes by given masks at given epoch ends; the mask travels in the checkpoint."""

    def __init__(self, plan: dict[int, Tensor | None] | None = None, name: str = "pruner") -> None:
        super().__init__()
        self.plan = {1: KEEP} if plan is None else plan
        self.name = name
        self.mask: Tensor | None = None
        self.done = -1
        self.loader_filter: LoaderFilter | None = None
        self.lengths: list[float] = []

    @property
    def state_key(self) -> str:
        return self.name

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.loader_filter = loader_filter_of(trainer)
        self.loader_filter.join(self.name)
        if self.mask is not None:
            self.loader_filter.set_keep(self.name, self.mask)

    def prune(self, trainer: Any, epochs: list[int]) -> None:
        for epoch in epochs:
            self.loader_filter.set_keep(self.name, self.plan[epoch])
            self.mask, self.done = self.plan[epoch], epoch
            self.loader_filter.refresh()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.prune(trainer, [epoch for epoch in sorted(self.plan) if self.done < epoch <= trainer.current_epoch])

    def state_dict(self) -> dict[str, Any]:
        return {"mask": self.mask, "done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.mask, self.done = state_dict["mask"], state_dict["done"]
        if self.loader_filter is not None:
            self.loader_filter.set_keep(self.name, self.mask)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.loader_filter.leave(self.name)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if self.loader_filter is not None:
            self.loader_filter.leave(self.name)


def make_trainer(callbacks: Any, *, package: Any = pl, **settings: Any) -> Any:
    options = {
        **trainer_settings(package),
        "max_epochs": EPOCHS,
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        **settings,
    }
    return package.Trainer(callbacks=callbacks, **options)


def loader(data: Any = None, **settings: Any) -> DataLoader[Any]:
    options = {} if {"batch_size", "batch_sampler"} & set(settings) else {"batch_size": BATCH}
    return DataLoader(Points() if data is None else data, **options, **settings)


def fit(
    train: Any = None, pruner: Any = None, *, validate: bool = True, module: Any = None, seed: int = 3, **settings: Any
) -> Any:
    """Train on a loader (or whatever a Trainer takes) with a pruner; return the module that remembers."""
    torch.manual_seed(seed)
    module = module or Recording()
    callbacks = [Pruner() if pruner is None else pruner] if not isinstance(pruner, list) else pruner
    trainer = make_trainer(callbacks, **settings)
    val = DataLoader(Points(16), batch_size=16) if validate else None
    trainer.fit(module, loader(shuffle=True) if train is None else train, val)
    return module


def expect_pruned(module: Any, *, after: int = 1, last: int = EPOCHS - 1, once: bool = True) -> None:
    """All samples are drawn until the mask is set, the kept ones afterwards."""
    for epoch in range(last + 1):
        drawn = module.drawn(epoch)
        expected = KEPT if epoch > after else set(range(N))
        assert set(drawn) <= expected, f"epoch {epoch} drew removed samples: {sorted(set(drawn) - expected)}"
        if once:
            assert drawn == Counter(expected), f"epoch {epoch}"


def weights_of(module: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


Factory = Callable[[], Any]
