"""A verdict that takes most of a label away is told, whatever its rule."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_backdoor._lightning import rank_zero_warn
from lightning_backdoor.verdict import Verdict

__all__ = ["warn_of_majorities"]

NAMED = 5  # labels in a warning, at most


def warn_of_majorities(verdict: Verdict, before: Tensor | None, title: str) -> None:
    """Warn if a verdict removes most samples of a label, and more of them than the one before.

    Args:
        verdict: The verdict.
        before: Samples that the verdict before kept, bool ``(N,)``; ``None`` if there was none.
        title: Name of the defence for readers.
    """
    if verdict.labels is None:
        return
    present, places, counts = torch.unique(verdict.labels, return_inverse=True, return_counts=True)
    removed = torch.bincount(places[~verdict.keep], minlength=len(present))
    earlier = removed.new_zeros(len(present))
    if before is not None:
        earlier = torch.bincount(places[~before], minlength=len(present))
    most = ((2 * removed > counts) & (removed > earlier)).nonzero().squeeze(1).tolist()
    if not most:
        return
    told = [f"{int(removed[i])} of the {int(counts[i])} with label {int(present[i])}" for i in most[:NAMED]]
    further = f", and most of those with {len(most) - NAMED} more labels" if len(most) > NAMED else ""
    rank_zero_warn(
        f"{title} takes most images of a label for poisoned: {', '.join(told)}{further}. Either they carry a trigger, "
        "or they are a kind of image that no other label has (of another camera, with a border), which the model will "
        "then not know. Look at them in the report. To keep those of label k and leave out the others, train without "
        "this callback on `torch.utils.data.Subset(dataset, positions)`, where `positions` are "
        "`(callback.verdict.keep | (callback.verdict.labels == k)).nonzero().flatten().tolist()`."
    )
