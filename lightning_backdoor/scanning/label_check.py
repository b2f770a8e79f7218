"""Whether what reads the labels tells the classes apart, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_backdoor.data.batches import find_layout
from lightning_backdoor.data.structure import spelled
from lightning_backdoor.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from lightning_backdoor.scanning.scanner import DatasetScanner

__all__ = ["require_varied_labels"]

_PROBE = 1024  # images whose labels are read where those of the first look are all the same


def require_varied_labels(data: DatasetScanner, batch: Any, positions: Sequence[Tensor]) -> None:
    """Refuse a ``batch_fn`` that gives one label to images which differ by the label that the batch shows itself.

    Looks closer only if all labels of the first look are equal: then it reads up to 1,024 images from all over the
    dataset. A dataset of one class passes, since the batch itself shows no other.

    Args:
        data: The training set, with the labels of the first look.
        batch: The batch of the first look.
        positions: Its dataset positions; see :func:`~lightning_backdoor.data.batches.find_layout`.

    Raises:
        ArgumentError: All labels are equal, those in the batch are not.
    """
    seen = data.probe[1]
    if data.options.batch_fn is None or bool((seen != seen[0]).any()):
        return
    try:
        found = find_layout(batch, positions=positions)
        shown = {*found.labels(batch).tolist()}
    except (ArgumentError, DataError):  # nothing to compare with
        return
    some = _spread(len(data), data.options.seed)
    with data.read(some, min(data.loader.num_workers, 1)) as view:
        for _, other in view:
            if bool((data.labels(other) != seen[0]).any()):
                return
            shown.update(found.labels(other).tolist())
    if len(shown) < 2:
        return
    raise ArgumentError(
        f"`batch_fn` gives label {int(seen[0])} to all of {len(some)} images from all over the training set, where "
        f"{spelled(batch, found.label_path or ())} holds {len(shown)} different labels. Leave `batch_fn` out, by which "
        "these are used, or let it return labels that differ."
    )


def _spread(size: int, seed: int) -> Tensor:
    """Positions from all over a dataset, one at random from each of up to 1,024 equal parts: labels may be periodic."""
    edges = torch.arange(min(size, _PROBE) + 1) * size // min(size, _PROBE)
    drawn = torch.rand(len(edges) - 1, generator=torch.Generator().manual_seed(seed))
    return edges[:-1] + (drawn * edges.diff()).long()
