"""What each of two processes does in the DDP tests of the loader filter; run by ``torch.multiprocessing.spawn``."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import DistributedSampler, Sampler, WeightedRandomSampler

from tests.loading.recording import (
    BATCH,
    KEEP,
    N,
    Points,
    Pruner,
    Recording,
    loader,
    make_trainer,
    weights_of,
)

ODD = torch.arange(N) < 37


class OwnSharding(DistributedSampler[int]):
    """A user's way of sharding that only the user knows: blocks of neighbours."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank * N // 2, (self.rank + 1) * N // 2))


class OwnBatches(Sampler[list[int]]):
    """A user's batches, already shared out; every eighth batch may become empty."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __len__(self) -> int:
        return N // BATCH // 2

    def __iter__(self) -> Iterator[list[int]]:
        return iter(np.arange(N).reshape(-1, BATCH)[self.rank :: 2].tolist())


class Private(Sampler[int]):
    """A user's random sampler with replacement, different in each process."""

    def __len__(self) -> int:
        return N

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.randint(0, N, N).tolist())


def cases(rank: int) -> dict[str, tuple[Any, dict[str, Any], Any]]:
    """Loader, Trainer settings and mask by name."""
    uneven = torch.ones(N, dtype=torch.bool)
    uneven[:BATCH] = False  # all of rank 0's first batch
    blocks = torch.ones(N, dtype=torch.bool)
    blocks[:20] = False  # more than half of rank 0's block
    return {
        "shuffle": (loader(shuffle=True), {}, KEEP),
        "reload": (CombinedLoader({"a": loader(shuffle=True)}), {"reload_dataloaders_every_n_epochs": 1}, KEEP),
        "weighted": (loader(sampler=WeightedRandomSampler(torch.ones(N), N)), {}, KEEP),
        "own sampler": (loader(sampler=Private()), {}, KEEP),
        "odd": (loader(shuffle=True), {}, ODD),
        "odd drop last": (loader(shuffle=True, drop_last=True), {}, ODD),
        "lone": (loader(shuffle=True), {}, torch.arange(N) < 34),
        "own distributed": (loader(sampler=DistributedSampler(Points(), seed=5, drop_last=True)), {}, ODD),
        "own sharding": (loader(sampler=OwnSharding(Points())), {}, blocks),
        "own batches": (loader(batch_sampler=OwnBatches(rank)), {"use_distributed_sampler": False}, uneven),
    }


def fit(train: Any, settings: dict[str, Any], pruner: Any, ckpt_path: Any = None, norm: bool = False) -> dict[str, Any]:
    torch.manual_seed(3)
    np.random.seed(int(os.environ["LOCAL_RANK"]))
    strategy = pl.strategies.DDPStrategy(process_group_backend="gloo")
    module = Recording(norm)
    trainer = make_trainer([pruner], devices=2, strategy=strategy, **settings)
    trainer.fit(module, train, loader(Points(16)), ckpt_path=ckpt_path)
    return {
        "batches": module.batches,
        "planned": [float(count) for count in module.planned],
        "validated": module.validated,
        "weights": weights_of(module),
        "trainer": trainer,
    }


def work(rank: int, port: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(
        LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2"
    )
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    results = {}
    for name, (train, settings, mask) in cases(rank).items():
        results[name] = fit(train, settings, Pruner({0: mask}), norm=name in ("odd", "lone"))
        trainer = results[name].pop("trainer")
        if name == "shuffle":
            trainer.save_checkpoint(Path(folder) / "shuffle.ckpt")
    resumed = Pruner({0: KEEP})
    settings = {"max_epochs": 6}
    results["resumed"] = fit(loader(shuffle=True), settings, resumed, Path(folder) / "shuffle.ckpt")
    results["resumed"].pop("trainer")
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def launched(folder: str) -> None:
    """One fit in processes that Lightning starts by itself."""
    module = Recording()
    trainer = make_trainer([Pruner({0: KEEP})], devices=2, strategy="ddp")
    trainer.fit(module, loader(shuffle=True), loader(Points(16)))
    result = {"batches": module.batches, "weights": weights_of(module)}
    torch.save(result, Path(folder) / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    launched(sys.argv[1])
