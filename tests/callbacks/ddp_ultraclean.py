"""What each of a number of processes does: ``python -m tests.callbacks.ddp_ultraclean PROCESSES FOLDER``.

Lightning finds its rank in the environment.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from tests.callbacks.helpers import Net, Pictures, always, make_trainer

SAMPLES = 63


class Fixed(Net):
    """No learning rate: with any number of processes, the weights at the scan are the same."""

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.body[1].momentum = 0.0  # nor do its running statistics depend on the batch size


def main(processes: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    settings: dict[str, Any] = {} if processes == 1 else {"devices": processes, "strategy": "ddp"}
    for name, module_class in {"fixed": Fixed, "learning": Net}.items():
        torch.manual_seed(0)
        callback, module = always(fraction=0.2), module_class()
        trainer = make_trainer([callback], 2, **settings)
        trainer.fit(module, DataLoader(Pictures(SAMPLES), batch_size=8, shuffle=True))
        result = {
            "scores": callback.verdict.scores,
            "keep": callback.verdict.keep,
            "epochs": [(epoch, positions) for epoch, positions in module.epochs()],
            "weights": {key: value.clone() for key, value in module.state_dict().items()},
            "counts": (trainer.current_epoch, trainer.global_step, trainer.max_epochs),
        }
        torch.save(result, folder / f"{name}-{processes}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
