"""What each of a number of processes does: ``python -m tests.baselines.ddp_baselines PROCESSES FOLDER``.

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

from lightning_backdoor.baselines import ABL, STRIP, ActivationClustering, SpectralSignatures
from tests.callbacks.ddp_ultraclean import SAMPLES, Fixed
from tests.callbacks.helpers import Net, Pictures, make_trainer


def callbacks() -> list[Any]:
    """Fresh ones that remove something, and learn in one epoch more."""
    return [
        ActivationClustering(size=0.6, silhouette=0.01),
        SpectralSignatures(eps=0.1),
        STRIP(draws=4, false_rejection=0.4),
        ABL(isolate=0.1, gamma=1.3, epochs=1, warmup_epochs=1, lr=1e-3),
    ]


def main(processes: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    settings: dict[str, Any] = {} if processes == 1 else {"devices": processes, "strategy": "ddp"}
    for name, module_class in {"fixed": Fixed, "learning": Net}.items():
        for callback in callbacks():
            torch.manual_seed(0)
            module = module_class()
            trainer = make_trainer([callback], 1, **settings)
            trainer.fit(module, DataLoader(Pictures(SAMPLES), batch_size=8, shuffle=True))
            result = {
                "scores": callback.verdict.scores,
                "keep": callback.verdict.keep,
                "weights": {key: value.clone() for key, value in module.state_dict().items()},
                "counts": (trainer.current_epoch, trainer.global_step, trainer.max_epochs),
            }
            torch.save(result, folder / f"{name}-{callback.method}-{processes}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
