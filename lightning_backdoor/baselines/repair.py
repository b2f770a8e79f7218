"""What the repairs from the literature share: the arguments, with the defaults of a loop without bounds."""

from __future__ import annotations

from typing import Any

from lightning_backdoor.callbacks.options import DEFAULTS, ScanArguments, document_scan

__all__ = ["REPAIR_DEFAULTS", "RepairArguments"]


class RepairArguments(ScanArguments, total=False):
    """What all repairs from the literature take, beside :class:`~lightning_backdoor.callbacks.options.ScanArguments`.

    Every epoch of repair goes through the samples to unlearn first, if there are any, and through those to learn next,
    at a constant rate and **without any bound: what suffers is not put back**.

    Args:
        epochs: Epochs of repair, at most as many as are left of the plan and of ``extra_epochs``. The repair begins as
            late as that leaves time for it, and takes half of the plan at most.
        extra_epochs: Epochs that it may have beyond the plan (``max_epochs``, ``max_steps``, ``max_time``).
        lr: Learning rate of the repair. ``None``: 5 % of the largest so far.
        max_removed: Largest share of the training set that may be unlearned, in ``(0, 1)``.
    """

    epochs: int
    extra_epochs: int
    lr: float | None
    max_removed: float


document_scan(RepairArguments)
REPAIR_DEFAULTS: dict[str, Any] = {**DEFAULTS, "epochs": 20, "extra_epochs": 0, "lr": None, "max_removed": 0.5}
