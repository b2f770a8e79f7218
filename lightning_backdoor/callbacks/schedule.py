"""When a defence acts: pure functions of counts."""

from __future__ import annotations

import math

__all__ = ["is_due", "warmup_or_half"]

DEFAULT_WARMUP = 10


def warmup_or_half(warmup_epochs: int | None, max_epochs: int | None) -> int:
    """The user's warm-up, else half of the planned epochs, else 10 where their number is not known."""
    if warmup_epochs is not None:
        return warmup_epochs
    return max(1, math.ceil(max_epochs / 2)) if max_epochs is not None and max_epochs > 0 else DEFAULT_WARMUP


def is_due(epochs: int, *, last_scan: int | None, warmup: int, every: int | None, ends: bool) -> bool:
    """Whether to scan now.

    Args:
        epochs: Epochs trained so far, counted from the last restart.
        last_scan: The same count at the latest scan, 0 after a restart; ``None`` before the first scan.
        warmup: Epochs before the first scan.
        every: Epochs between later scans, ``None`` for no periodic scans.
        ends: Whether training is about to end and a last scan is wanted.
    """
    if last_scan is None:
        return ends or epochs >= warmup
    return (ends and epochs > last_scan) or (every is not None and epochs - last_scan >= every)
