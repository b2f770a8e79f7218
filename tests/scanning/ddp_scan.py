"""What each of two processes does in the DDP test; run by ``torch.multiprocessing.spawn``."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_backdoor.data.views import scan_loader
from lightning_backdoor.errors import BackdoorDefenseError
from lightning_backdoor.scanning import scan as scan_module
from lightning_backdoor.scanning.isolation import isolated_eval
from lightning_backdoor.scanning.scan import scan, shard
from tests.scanning.helpers import NoisyData, Trap, make_trainer, scan_logits, train_loader


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Probe(pl.Callback):
    """Scans at the start and after each epoch, in several situations."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = NoisyData()
        self.seen["odd"] = scan_logits(trainer, pl_module, data)
        self.seen["one sample"] = scan_logits(trainer, pl_module, NoisyData(1))
        scan_module.GATHER_BYTES = 100  # several portions
        self.seen["portions"] = scan_logits(trainer, pl_module, data)
        self.seen["failure"] = self.failure(trainer, pl_module)

    def failure(self, trainer: Any, pl_module: Any) -> str:
        def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
            if trainer.global_rank == 1:
                raise KeyError("only here")
            return {"x": indices}

        loader = scan_loader(train_loader(NoisyData()), shard(63, trainer), seed=0)
        try:
            scan(trainer, pl_module, loader, step, description="fails on rank 1")
        except (BackdoorDefenseError, KeyError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen["own mean"] = pl_module.norm.running_mean.clone()
        with isolated_eval(trainer, pl_module):
            self.seen["lent mean"] = pl_module.norm.running_mean.clone()
        self.seen["after an epoch"] = scan_logits(trainer, pl_module, NoisyData())


def fit(callbacks: list[Any]) -> dict[str, Tensor]:
    pl.seed_everything(3)
    module = Trap()
    # A batch norm that no rank shares, and forward's buffers left alone as in a long epoch without validation.
    strategy = pl.strategies.DDPStrategy(process_group_backend="gloo", broadcast_buffers=False)
    trainer = make_trainer(callbacks, epochs=1, devices=2, strategy=strategy)
    trainer.fit(module, train_loader(NoisyData()))
    return {name: value.clone() for name, value in module.state_dict().items()}


def work(rank: int, port: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(
        LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2"
    )
    plain = fit([])
    probe = Probe()
    scanned = fit([probe])
    torch.save({**probe.seen, "plain": plain, "scanned": scanned}, Path(folder) / f"rank{rank}.pt")
