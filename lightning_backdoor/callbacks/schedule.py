"""When a defence acts: pure functions of counts."""

from __future__ import annotations

import math
import sys

__all__ = ["is_due", "never_looked", "repair_begins", "warmup_or_half"]

DEFAULT_WARMUP = 10


def warmup_or_half(warmup_epochs: int | None, max_epochs: int | None) -> int:
    """The user's warm-up, else half of the planned epochs, else 10 where their number is not known."""
    if warmup_epochs is not None:
        return warmup_epochs
    return max(1, math.ceil(max_epochs / 2)) if max_epochs is not None and max_epochs > 0 else DEFAULT_WARMUP


def repair_begins(end: int | None, needed: int, extra_epochs: int) -> int:
    """Epochs after which a repair has to begin, so that it fits into the plan and into ``extra_epochs`` beyond it.

    It takes at most half of the plan. Without a plan it begins when training is about to end.

    Args:
        end: Epochs that the fit will have had at the end of the plan; ``None`` without a plan.
        needed: Largest number of epochs of the repair.
        extra_epochs: Epochs that it may have beyond the plan.
    """
    return sys.maxsize if end is None else end - max(0, min(needed - extra_epochs, end // 2))


def is_due(epochs: int, *, last_scan: int | None, warmup: int, every: int | None, ends: bool) -> bool:
    """Whether to scan now.

    Args:
        epochs: Epochs trained so far, counted from the last rewind.
        last_scan: The same count at the latest scan, 0 after a rewind; ``None`` before the first scan.
        warmup: Epochs before the first scan.
        every: Epochs between later scans, ``None`` for no periodic scans.
        ends: Whether training is about to end and a last look is wanted.
    """
    if last_scan is None:
        return ends or epochs >= warmup
    return (ends and epochs > last_scan) or (every is not None and epochs - last_scan >= every)


def never_looked(*, frozen: bool) -> str:
    """Say that no look came before the end, and what to do; ``frozen``: no unit could be reset when it was time."""
    if frozen:
        return "no layer could learn when it was time to look. Thaw layers before the end, or use UltraCleanCallback."
    return "training ended before it could look. Pass `warmup_epochs`, a number of epochs."
