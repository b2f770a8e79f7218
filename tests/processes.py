"""Several processes of one fit, as a launcher would start them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.scanning.ddp_scan import free_port


@contextmanager
def processes(count: int, module: str, folder: Path) -> Iterator[None]:
    """Run ``python -m module count folder`` in all, beside the block; afterwards all must have ended well."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count), "NODE_RANK": "0"}
    with ExitStack() as stack:
        said = [stack.enter_context((folder / f"said-{rank}.txt").open("w")) for rank in range(count)]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", module, str(count), str(folder)],
                cwd=Path(__file__).parents[1],
                env={**os.environ, **address, "OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank)},
                stderr=said[rank],
            )
            for rank in range(count)
        ]
        for process in ranks:
            stack.callback(process.kill)
        yield
        for process, file in zip(ranks, said, strict=True):
            assert process.wait(timeout=600) == 0, Path(file.name).read_text()[-3000:]
