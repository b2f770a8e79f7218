"""Global random streams: seeded for a while and then restored."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["isolated_rng", "seed_all"]


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Give the random streams of torch (CPU and CUDA), numpy and ``random`` back as they were.

    Args:
        seed: Seed of these streams inside the context, CUDA's excepted; None continues the outer streams.
    """
    cpu, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    try:
        if seed is not None:
            seed_all(seed)
        yield
    finally:
        torch.set_rng_state(cpu)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def seed_all(seed: int) -> None:
    """Seed the streams of torch's CPU generator, numpy and ``random``; call it inside of :func:`isolated_rng`.

    ``torch.manual_seed`` would seed CUDA as well, also later, when CUDA starts, which could not be undone.

    Args:
        seed: Below 2**64; numpy takes its lower 32 bits.
    """
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)
