"""What a training costs: seconds, images through the network, peak memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.model import Classifier

_REFRESH = Path("/proc/self/clear_refs")


class Meter:
    """What :func:`measured` has counted.

    Attributes:
        forward: Images that went through the network or a copy of it, in training, scans and detectors.
        backward: Those of them that went through it with gradients.
        seconds: Wall time.
        peak_mb: Largest resident memory of the process while it was measured, or memory on the GPU, in MB; ``None``
            where the system cannot say.
    """

    def __init__(self) -> None:
        self.forward = self.backward = 0
        self.seconds = 0.0
        self.peak_mb: float | None = None

    def row(self, images: int, shared_epochs: int) -> dict[str, Any]:
        """The fields of a result row.

        One epoch-equivalent is the work of one epoch of ordinary training on all ``images``; a backward pass counts as
        two forward passes, so a scan of all images is a third. ``shared_epochs`` were trained by the undefended run.
        """
        epochs = (self.forward + 2 * self.backward) / (3 * images)
        return {
            "seconds": round(self.seconds, 1),
            "epochs_shared_with_undefended": shared_epochs,
            "images_forward": self.forward,
            "images_backward": self.backward,
            "epoch_equivalents": round(epochs + shared_epochs, 2),
            "peak_memory_mb": self.peak_mb,
        }


@contextmanager
def measured(device: str, kind: type[nn.Module] = Classifier) -> Iterator[Meter]:
    """Measure what happens inside, by a hook on all modules that leaves them as they are; networks are of ``kind``."""
    meter = Meter()

    def count(module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        if isinstance(module, kind):
            meter.forward += len(inputs[0])
            meter.backward += len(inputs[0]) * torch.is_grad_enabled()

    known = _forget_peak(device)
    hook = nn.modules.module.register_module_forward_hook(count)
    began = time.perf_counter()
    try:
        yield meter
    finally:
        hook.remove()
        meter.seconds = time.perf_counter() - began
        meter.peak_mb = round(_peak_mb(device)) if known else None


def _forget_peak(device: str) -> bool:
    """Begin a new peak; ``False`` where the system keeps the old one."""
    if device == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        _REFRESH.write_text("5")  # Linux: the high-water mark falls to what is in use
    except OSError:
        return False
    return True


def _peak_mb(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
