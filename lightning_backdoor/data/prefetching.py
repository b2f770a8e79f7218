"""timm's loaders: PrefetchLoader, which normalises 8-bit batches on the device, and samplers that repeat for ever."""

from __future__ import annotations

import copy
from typing import Any

import torch

__all__ = ["Finish", "finish_of", "unrepeated", "unwrapped"]


class Finish:
    """What a PrefetchLoader does to the batches of the loader inside: on the CPU, without random erasing.

    Args:
        wrapper: The PrefetchLoader; it is only read.

    Attributes:
        mean: Of its normalisation, one number per channel, in 0..1 units.
        std: The same.
    """

    def __init__(self, wrapper: Any) -> None:
        mean, std = wrapper.mean.cpu(), wrapper.std.cpu()
        self.mean, self.std = (tuple((part.double().flatten() / 255).tolist()) for part in (mean, std))
        self._wrapper = copy.copy(wrapper)  # does the arithmetic, so that a scan shows what the training shows
        on_cpu = {"device": torch.device("cpu"), "is_cuda": False, "is_npu": False, "mean": mean, "std": std}
        vars(self._wrapper).update(on_cpu, loader=(), stream=None, random_erasing=None)

    def __call__(self, batch: Any) -> Any:
        """Return the batch as the training gets it."""
        self._wrapper.loader = (batch,)
        (finished,) = self._wrapper
        self._wrapper.loader = ()
        return finished


def unwrapped(loader: Any) -> Any:
    """Return the loader inside a PrefetchLoader; any other as it is."""
    return loader.loader if _is_prefetching(loader) else loader


def unrepeated(sampler: Any) -> Any:
    """The sampler that timm's MultiEpochsDataLoader repeats for ever; any other as it is."""
    return sampler.sampler if type(sampler).__name__.endswith("RepeatSampler") else sampler


def finish_of(loader: Any) -> Finish | None:
    """Return what a PrefetchLoader does to the batches of the loader inside; ``None`` for any other loader."""
    return Finish(loader) if _is_prefetching(loader) else None


def _is_prefetching(loader: Any) -> bool:
    return any(
        (kind.__module__, kind.__name__) == ("timm.data.loader", "PrefetchLoader") for kind in type(loader).__mro__
    )
