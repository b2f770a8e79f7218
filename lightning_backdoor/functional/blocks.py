"""Work through many images in blocks that fit the cache, one processor core per block."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["map_blocks"]


def map_blocks(function: Callable[[Tensor], Tensor], batch: Tensor, size: int) -> Tensor:
    """Apply ``function`` to ``size`` images at a time; the result has the shape, dtype and device of ``batch``.

    On a CPU, blocks run side by side in as many threads as torch may use, each block on one of them. Single operations
    on maps of a few hundred kilobytes gain little from several cores and wait for all of them after every step.
    """
    result = torch.empty_like(batch, memory_format=torch.contiguous_format)
    threads = torch.get_num_threads() if batch.device.type == "cpu" else 1

    def work(source: Tensor, target: Tensor) -> None:
        with torch.inference_mode():  # grad and inference mode belong to a thread
            target.copy_(function(source))

    if threads == 1:
        for source, target in zip(torch.split(batch, size), torch.split(result, size), strict=True):
            work(source, target)
        return result
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(work, torch.split(batch, size), torch.split(result, size)):
                pass  # raises what a block raised
    finally:
        torch.set_num_threads(threads)
    return result
