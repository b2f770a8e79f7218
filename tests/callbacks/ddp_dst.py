"""What each of a number of processes does: ``python -m tests.callbacks.ddp_dst PROCESSES FOLDER``.

Lightning finds its rank in the environment.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_backdoor import DSTCallback
from tests.callbacks.ddp_ultraclean import SAMPLES
from tests.callbacks.helpers import Net, Pictures, make_trainer


class Projections(pl.Callback):
    """The projection at the end of every epoch."""

    def __init__(self, callback: DSTCallback) -> None:
        self.callback = callback
        self.seen: list[dict[str, Tensor] | None] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(self.callback.state_dict()["run"]["projection"])


def main(processes: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    settings: dict[str, Any] = {} if processes == 1 else {"devices": processes, "strategy": "ddp"}
    torch.manual_seed(0)
    callback = DSTCallback(suspect=0.1, trusted=0.4, detector_steps=5, batch_size=8, projection=8, classifier_epochs=2)
    projections, module = Projections(callback), Net()
    trainer = make_trainer([callback, projections], 4, accumulate_grad_batches=2, **settings)
    trainer.fit(module, DataLoader(Pictures(SAMPLES), batch_size=8, shuffle=True))
    result = {
        "scores": callback.verdict.scores,
        "suspect": callback.verdict.suspect,
        "trusted": callback.verdict.trusted,
        "history": [past.state_dict() for past in callback.history],
        "steps": trainer.global_step,
        "projections": projections.seen,
        "weights": {key: value.clone() for key, value in module.state_dict().items()},
    }
    torch.save(result, folder / f"{processes}-{trainer.global_rank}.pt")
    if processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
