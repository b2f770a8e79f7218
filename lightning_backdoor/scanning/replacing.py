"""Whether a network can be shown other images than those of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_backdoor.data.batches import BatchLayout
from lightning_backdoor.data.origins import Replaced, close
from lightning_backdoor.data.structure import copied
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.scanning.isolation import prepare_batch

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["require_replaceable"]


def require_replaceable(
    trainer: Trainer, pl_module: LightningModule, layout: BatchLayout, batch: Any, *, alone: bool
) -> None:
    """Check that a network can be shown other images than those of a batch.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
        layout: How the images are read; it knows their origin.
        batch: A batch as the loader gave it.
        alone: Whether the network is called with the images alone.

    Raises:
        ArgumentError: ``batch_fn`` computes the images in a way that cannot be undone, and the network is shown more
            than that, or the transfer hooks do more to the images.
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
