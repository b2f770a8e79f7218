"""What each of two processes does in the test of D-ST's neighbors: ``python -m ... 2 FOLDER``."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor import DSTCallback, Verdict
from lightning_backdoor.errors import BackdoorDefenseError
from lightning_backdoor.responses import two_stage
from tests.callbacks.helpers import Net, Pictures, loader_of, make_trainer

ASK = two_stage.neighbor_agreement


def train(rank: int, *, fails: bool) -> DSTCallback:
    """One fit in which neighbours tell other processes than the first something else, and it nothing if it fails."""

    def measure(*args: Any, **kwargs: Any) -> Tensor:
        if fails and rank == 0:
            raise MemoryError("no room for an index")
        return ASK(*args, **kwargs) / (1 + rank)

    two_stage.neighbor_agreement = measure
    torch.manual_seed(0)
    given = Verdict(torch.arange(64).float(), torch.arange(64) % 16 > 0, 0.0, "known")
    callback = DSTCallback(verdict=given, trusted=0.4, views=torch.Tensor.clone)
    make_trainer([callback], 3, devices=2, strategy="ddp").fit(Net(), loader_of(Pictures()))
    return callback


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    callback, said = train(rank, fails=False), "nothing"
    try:
        train(rank, fails=True)
    except (BackdoorDefenseError, MemoryError) as error:
        said = f"{type(error).__name__}: {error}"
    history = callback.history[-1].state_dict()
    (folder / f"{rank}.json").write_text(json.dumps({"history": history, "said": said}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[2]))
