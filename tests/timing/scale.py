"""One process that goes through everything that grows with the training set, and prints seconds and bytes as JSON.

``python -m tests.timing.scale N``: the dataset makes its items when they are asked for, and what a scan would have
measured is drawn from a generator, so that no network runs.
"""

from __future__ import annotations

import gc
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_backdoor import Verdict
from lightning_backdoor.detection.decision import decide
from lightning_backdoor.functional import HyperplaneStatistics, neighbor_agreement
from lightning_backdoor.loading.batch_schedule import Phases
from lightning_backdoor.loading.loader_filter import batch_count, clone
from lightning_backdoor.loading.samplers import KeepState, Kept
from lightning_backdoor.report import Evidence, write_report
from lightning_backdoor.scanning.early_neighbors import REFERENCES

CLASSES, UNITS, BATCH = 100, 64, 256


class Generated(Dataset[tuple[Tensor, int]]):
    """As many images as one likes, none of them in memory."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(i)
        return torch.randint(0, 256, (3, 32, 32), generator=generator, dtype=torch.uint8), i % CLASSES


def verdict_of(n: int) -> Verdict:
    """One in fifty is removed."""
    scores = torch.rand(n, generator=torch.Generator().manual_seed(0))
    keep = torch.arange(n) % 50 != 0
    return Verdict(scores + (~keep).float(), keep, 1.0, "planted", torch.arange(n) % CLASSES)


def saved(value: Any) -> int:
    """Bytes of a value in a file."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a piece of work, and how far it raised the peak of memory."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, started = status("VmRSS"), time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - started, "peak": max(status("VmHWM") - before, 0)}


def steps(n: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    data, verdict, generator = Generated(n), verdict_of(n), torch.Generator().manual_seed(1)

    def epoch(curates: bool) -> None:
        loader = DataLoader(data, batch_size=BATCH, shuffle=True)
        state = KeepState()
        twin = clone(loader, state) if curates else loader
        state.kept = Kept(verdict.keep) if curates else None
        drawn = sum(1 for _ in twin.batch_sampler)  # type: ignore[arg-type, union-attr]
        assert drawn == batch_count(twin) == -(-(int(verdict.keep.sum()) if curates else n) // BATCH)

    def phases() -> None:
        parts = [(~verdict.keep).nonzero().squeeze(1), verdict.keep.nonzero().squeeze(1)]
        drawn = Phases(parts, size=BATCH, least=(0, 0), mixed=True, seed=0, rank=0, world=1, epoch=lambda: 0)
        assert sum(drawn.phase_of(place) for place in range(len(drawn))) == drawn.lengths[1]

    def statistics() -> None:
        found = HyperplaneStatistics(UNITS, CLASSES)
        for _ in range(0, n, 1000):
            values = torch.randn(1000, UNITS, generator=generator)
            found.update(values, torch.rand(1000, CLASSES, generator=generator).softmax(dim=1))
        found.scores()

    def responses() -> Tensor:
        values, centers = torch.empty(n, UNITS, dtype=torch.half), 3 * torch.randn(CLASSES, UNITS, generator=generator)
        for start in range(0, n, 100 * CLASSES):
            part = values[start : start + 100 * CLASSES]
            part.copy_(torch.randn(part.shape, generator=generator) + centers.repeat(100, 1)[: len(part)])
        return values

    def decision() -> None:
        values = responses()
        members = values[:: 5 * CLASSES]  # a fifth of label 0
        members.copy_(values[1 : 1 + len(members)].clone())  # images of other classes
        members[:, 0] += 60
        for other in range(1, 9):
            values[other::CLASSES, 0] += 60  # eight labels lie beside it, so that all are asked whether it splits them
        found = decide(values, verdict.scores, verdict.labels, all_to_all=True)
        assert [one.label for one in found.subpopulations] == [0]
        assert found.subpopulations[0].gate == "overlap"

    def neighbors() -> None:
        assert verdict.labels is not None
        references = torch.rand(n, generator=generator) < REFERENCES / n
        assert float(neighbor_agreement(responses(), verdict.labels, references).mean()) > 0.99

    def report() -> None:
        def images(positions: Any) -> Tensor:
            return torch.stack([data[i][0] for i in positions])

        write_report(folder, verdict, method="planted", evidence=Evidence(images=images))

    return {
        "an epoch of torch's sampler": lambda: epoch(False),
        "an epoch of the kept samples": lambda: epoch(True),
        "an epoch of repair": phases,
        "verdict, saved and loaded": lambda: (verdict.save(folder / "v.pt"), Verdict.load(folder / "v.pt")),
        "NONE's statistics": statistics,
        "decision": decision,
        "early neighbours": neighbors,
        "report": report,
    }


def main(n: int) -> dict[str, Any]:
    """Everything, for N samples."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for work in steps(200 * CLASSES, folder).values():
            work()  # imports, caches
        found = {title: measured(work) for title, work in steps(n, folder).items()}
        files = {path.name: path.stat().st_size for path in folder.iterdir()}
    return {"n": n, "steps": found, "files": files}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
