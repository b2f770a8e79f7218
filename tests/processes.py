"""Several processes of one fit, as a launcher would start them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.trainer.ddp_scan import free_port


@contextmanager
def processes(count: int, module: str, folder: Path) -> Iterator[None]:
    """Run ``python -m module count folder`` in all, beside the block; afterwards all must have ended well."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count), "NODE_RANK": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(count), str(folder)],
            cwd=Path(__file__).parents[1],
            env={**os.environ, **address, "OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        yield
        for process in ranks:
            _, said = process.communicate(timeout=600)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in ranks:
            process.kill()
