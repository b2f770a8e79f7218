"""Whether images and labels are read as the user meant, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_backdoor.data.batches import BatchLayout, find_layout
from lightning_backdoor.data.nesting import copied, spelled
from lightning_backdoor.data.origins import Replaced, close
from lightning_backdoor.data.views import ScanLoader
from lightning_backdoor.errors import ArgumentError, DataError
from lightning_backdoor.scanning.isolation import prepare_batch

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

    from lightning_backdoor.scanning.scanner import DatasetScanner

__all__ = ["require_replaceable", "require_same_labels", "require_varied_labels"]

_SPREAD = 1024  # images whose labels are read where those of the first batch are all the same


def require_varied_labels(data: DatasetScanner, batch: Any, positions: Sequence[Tensor]) -> None:
    """Raise if ``batch_fn`` gives one label to images for which the batch itself holds different labels.

    Only where all labels of the first batch are equal, up to 1,024 images from all over the dataset are read. A dataset
    of one class passes, since the batch holds no other label.

    Args:
        data: The training set, with the labels of the first batch.
        batch: The first batch.
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


def require_same_labels(view: ScanLoader, layout: BatchLayout, indices: Tensor, labels: Tensor) -> None:
    """Check that the samples of `eval_dataset` are those of the training dataset, as far as labels tell.

    Raises:
        ArgumentError: The labels at some positions differ, or are at another place of the batch.
    """
    for own, batch in view:
        try:
            theirs = layout.labels(batch)
        except Exception as error:
            raise ArgumentError(
                "`eval_dataset` must give items built like those of the training dataset, but there are no labels in "
                f"the latter where they are in the former: {type(error).__name__}: {error}"
            ) from error
        known = dict(zip(indices.tolist(), labels.tolist(), strict=True))
        other = [place for place, label in zip(own.tolist(), theirs.tolist(), strict=True) if known[place] != label]
        if other:
            raise ArgumentError(
                "`eval_dataset` must have the samples of the training dataset in its order, but the labels differ at "
                f"{len(other)} of {len(own)} positions that were looked at ({other[:5]}…). Take the same files and the "
                "same subset of them, without shuffling."
            )


def require_replaceable(
    trainer: Trainer, pl_module: LightningModule, layout: BatchLayout, batch: Any, *, alone: bool
) -> None:
    """Check that a network takes other images than those of a batch.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
        layout: How the images are read from a batch, and where in it they came from.
        batch: A batch as the loader gave it.
        alone: Whether the network is called with the images alone.

    Raises:
        ArgumentError: ``batch_fn`` computes the images in a way that cannot be undone, and the network gets more
            than the images, or the transfer hooks change them further.
    """
    images = layout.images(batch).clone()
    other = layout.with_images(batch, images)
    if not isinstance(other, Replaced):
        return
    if alone:
        given, prepared = (prepare_batch(trainer, pl_module, each) for each in (other, copied(batch)))
        if close(given.images, layout.images(prepared)):
            return
    reason = "the transfer hooks change them" if alone else "`forward_fn` reads the batch"
    instead = (
        "move what the hooks do into `forward`"
        if alone
        else "leave out `forward_fn`, so that the module is called with what `batch_fn` returns"
    )
    raise ArgumentError(
        "`batch_fn` computes its images, by more than a factor and a summand for each channel, so that no batch can be "
        f"made that holds changed images; and the module does not take them alone, because {reason}. Let `batch_fn` "
        f"return a tensor of the batch, and compute in `forward`, in `forward_fn` or in the dataset; or {instead}."
    )


def _spread(size: int, seed: int) -> Tensor:
    """Positions from all over a dataset, one at random from each of up to 1,024 equal parts: labels may be periodic."""
    edges = torch.arange(min(size, _SPREAD) + 1) * size // min(size, _SPREAD)
    drawn = torch.rand(len(edges) - 1, generator=torch.Generator().manual_seed(seed))
    return edges[:-1] + (drawn * edges.diff()).long()
