"""What each of a number of processes does: ``python -m tests.callbacks.ddp_dbr PROCESSES FOLDER``.

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

from lightning_backdoor import DBRCallback
from tests.callbacks.ddp_ultraclean import SAMPLES, Fixed
from tests.callbacks.helpers import Net, Pictures, make_trainer


def main(processes: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    settings: dict[str, Any] = {} if processes == 1 else {"devices": processes, "strategy": "ddp"}
    for name, module_class in {"fixed": Fixed, "learning": Net}.items():
        torch.manual_seed(0)
        callback, module = DBRCallback(suspect=0.1, detector_steps=5, epochs=2, batch_size=8), module_class()
        trainer = make_trainer([callback], 2, **settings)
        trainer.fit(module, DataLoader(Pictures(SAMPLES), batch_size=8, shuffle=True))
        result = {
            "scores": callback.verdict.scores,
            "suspect": callback.verdict.suspect,
            "trusted": callback.verdict.trusted,
            "history": [past.state_dict() for past in callback.history],
            "drawn": module.drawn,
            "weights": {key: value.clone() for key, value in module.state_dict().items()},
        }
        torch.save(result, folder / f"{name}-{processes}-{trainer.global_rank}.pt")
    if processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
