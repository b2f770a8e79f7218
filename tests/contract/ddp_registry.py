"""What each of a number of processes does: ``python -m tests.contract.ddp_registry PROCESSES FOLDER [STRATEGY]``.

Lightning finds its rank in the environment, or starts the others by itself.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_backdoor.responses import Report, ResetUnits, Response, Unlearn
from tests.callbacks.helpers import Pictures, make_trainer, state_of
from tests.contract.problem import EPOCHS, assert_settled, net_of, planted
from tests.contract.registry import ENTRIES, Entry, given
from tests.responses.helpers import Scripts, Torn, pictures

SAMPLES, BATCH = 95, 8  # no multiple of two or of four
BROKEN = 79  # of the share of the last one of two or four processes, and not among the images that are looked at first
GREW = -2
CUT = "OSError: image {} is cut off"
FAILURES = {
    "first look": ("on_train_start", 0, CUT.format(0)),
    "look": ("on_train_epoch_end", BROKEN, CUT.format(BROKEN)),
    "detector": ("on_train_start", BROKEN, CUT.format(BROKEN)),
    "length": ("on_train_epoch_end", GREW, f"DataError: The training dataset had {SAMPLES} samples"),
}
"""Where the last process fails: the hook, the position of the image that it cannot read, and the error."""
FAILING = [
    (entry, where)
    for entry in ENTRIES
    if entry.kind != "watch"
    for where in FAILURES
    if where != "detector" or entry.kind == "own"  # that of D-BR is part of its look
]


def defense_of(entry: Entry) -> Any:
    """One that acts on as many samples as there are here."""
    return entry.make(**({"verdict": given(SAMPLES)} if "verdict" in entry.acting else {}))


def loader_of(data: Any) -> DataLoader[Any]:
    """Small batches: four processes have several of them."""
    return DataLoader(data, batch_size=BATCH, shuffle=True)


class Keeper(pl.Callback):
    """Writes down what a process has in the end: Lightning brings no callback back from those that it spawned."""

    def __init__(self, callback: Any, path: str) -> None:
        self.callback, self.path = callback, path
        self.states: list[dict[str, Any]] = []
        self.batches: list[tuple[int, list[int]]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.states.append(copy.deepcopy(self.callback.state_dict()))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append((len(self.states), batch["index"].tolist()))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("backdoor/")}
        result = {
            "states": [*self.states, self.callback.state_dict()],
            "batches": self.batches,
            "metrics": metrics,
            "weights": state_of(pl_module),
            "counts": (trainer.current_epoch, trainer.global_step, trainer.max_epochs),
        }
        torch.save(result, f"{self.path}-{trainer.world_size}-{trainer.global_rank}.pt")


def train(entry: Entry, path: Path, *, learning: bool, **settings: Any) -> None:
    """One fit; without learning, any number of processes has the same weights at every look."""
    torch.manual_seed(0)
    callback, module = defense_of(entry), net_of()
    if not learning:
        module.lr = module.body[1].momentum = 0.0
    if learning and entry.kind == "own":  # its projection is none of DDP's, and must agree when DDP does not
        settings["accumulate_grad_batches"] = 2
    trainer = make_trainer([callback, Keeper(callback, str(path))], EPOCHS, **settings)
    trainer.fit(module, loader_of(planted(SAMPLES)), DataLoader(Pictures(32, seed=1), batch_size=16))


def diagnose(path: Path, response: Response, module: Any, **settings: Any) -> None:
    """A fit that learns nothing; a copy that does is trained beside it from the same weights, without a finding."""
    data, members = pictures(wrong=True)
    callback = Scripts(members, response)
    module.lr = module.body[1].momentum = 0.0
    trainer = make_trainer([callback], 3, **settings)
    trainer.fit(module, loader_of(data))
    assert callback.verdict is not None
    torch.save(callback.verdict.state_dict(), f"{path}-{trainer.world_size}-{trainer.global_rank}.pt")


class Fragile(Pictures):
    """An image that cannot be read at times."""

    broken = -1

    def __len__(self) -> int:
        return super().__len__() + (self.broken == GREW)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if i == self.broken:
            raise OSError(f"image {i} is cut off")
        return super().__getitem__(i)


class Fuse(pl.Callback):
    """Breaks an image of the last process (or mends it: -1) in one hook."""

    def __init__(self, data: Fragile, hook: str, position: int) -> None:
        self.data, self.position = data, position
        setattr(self, hook, self.blow)

    def blow(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == trainer.world_size - 1:
            self.data.broken = self.position


def fail(entry: Entry, where: str, **settings: Any) -> str:
    """What the user reads in this process when the last one cannot read an image."""
    hook, position, _ = FAILURES[where]
    data, module = Fragile(SAMPLES), net_of()
    trainer = make_trainer([Fuse(data, hook, position), defense_of(entry), Fuse(data, hook, -1)], EPOCHS, **settings)
    try:
        trainer.fit(module, loader_of(data))
    except Exception as error:
        assert_settled(trainer, module)
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(processes: int, folder: Path, strategy: str = "ddp") -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    settings: dict[str, Any] = {} if processes == 1 else {"devices": processes, "strategy": strategy}
    for when, response in (("at-once", Report()), ("at-the-end", ResetUnits())):
        diagnose(folder / f"diagnosed-{when}", response, net_of(), **settings)
    for response in (Report(), Unlearn(epochs=1)):
        diagnose(folder / f"torn-{response.name}", response, Torn(), **settings)
    for entry in ENTRIES:
        train(entry, folder / f"still-{entry.name}", learning=False, **settings)
        if processes > 1:
            train(entry, folder / f"learning-{entry.name}", learning=True, **settings)
    if processes == 1:
        return
    said = {f"{entry.name} {where}": fail(entry, where, **settings) for entry, where in FAILING}
    rank = torch.distributed.get_rank() if strategy == "ddp" else "user"
    (folder / f"said-{processes}-{rank}.json").write_text(json.dumps(said))
    if strategy == "ddp":
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
