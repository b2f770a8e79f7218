"""Training batches of which it is known what they hold, with strong views of their images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_backdoor._lightning import epochs_processed
from lightning_backdoor.data.random_state import isolated_rng, seed_all
from lightning_backdoor.data.strong import strong_view
from lightning_backdoor.data.views import batch_size_of, unwrapped
from lightning_backdoor.errors import DataError, TrainerError
from lightning_backdoor.loading.batch_schedule import Phases
from lightning_backdoor.loading.loader_filter import LoaderFilter
from lightning_backdoor.scanning.scan import raise_on_all_ranks
from lightning_backdoor.scanning.scanner import DatasetScanner

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Batch", "FlaggedBatches", "Flags", "require_plain_batches"]


@dataclass(frozen=True)
class Flags:
    """What is known of N training samples: labels as given, long ``(N,)``, and two masks, bool ``(N,)``."""

    labels: Tensor
    trusted: Tensor
    suspect: Tensor


@dataclass(frozen=True)
class Batch:
    """B samples: batches with views of their images, before all transfer hooks, and their flags on the device."""

    views: list[Any]
    labels: Tensor
    trusted: Tensor
    suspect: Tensor


class FlaggedBatches:
    """Draws the batches of a fit in the place of the user's samplers, so that the position of every sample is known.

    Args:
        data: The training set.
        loader_filter: The training loader.
        views: ``views(pixels)`` takes and returns uint8 ``(B, C, H, W)``; ``None``:
            :func:`~lightning_backdoor.data.strong.strong_view`.
        seed: Seed of order and views.
    """

    def __init__(
        self, data: DatasetScanner, loader_filter: LoaderFilter, views: Callable[[Tensor], Tensor] | None, seed: int
    ) -> None:
        self._data, self._loader_filter, self._views, self._seed = data, loader_filter, views, seed
        self._phases: Phases | None = None
        self._seen: Any = None
        self._drawn = 0

    def draw(self, trainer: Trainer, drawn: Tensor) -> None:
        """Draw these samples, bool ``(N,)``, from the next epoch on."""
        self._phases = Phases(
            [(drawn & ~self._data.unread).nonzero().squeeze(1)],  # `collate_fn` drops the others
            size=batch_size_of(self._data.loader),
            least=(0,),
            mixed=False,
            seed=self._seed,
            rank=trainer.global_rank,
            world=trainer.world_size,
            epoch=lambda: epochs_processed(trainer),
        )
        self._loader_filter.set_phases(self._phases)
        self._loader_filter.refresh()

    def restart(self) -> None:
        """Begin an epoch whose iterator exists already; call in ``on_train_start``."""
        self._loader_filter.restart_iterator()
        self.count_from_zero()

    def count_from_zero(self) -> None:
        """Call in ``on_train_epoch_start``."""
        self._drawn = 0

    def see(self, batch: Any) -> None:
        """Keep a batch as the loader gave it, with images of its own: transfer hooks may change them in place."""
        layout = self._data.layout
        self._seen = layout.with_images(batch, layout.images(batch).clone())

    def next(self, trainer: Trainer, pl_module: LightningModule, flags: Flags, count: int) -> Batch:
        """Flags of the batch that was seen, and ``count`` views of its images; call in ``on_train_batch_start``.

        Counted by itself: after a resume in the middle of an epoch the loader begins anew, ``batch_idx`` does not.

        Raises:
            TrainerError: There is no batch, but an iterator.
            DataError: The batch does not hold what was drawn.
        """
        batch, layout, pixels = self._seen, self._data.layout, self._data.pixels
        if batch is None:
            raise TrainerError(
                "D-ST needs the batches of the training loader, but `training_step` takes an iterator over them "
                "(`dataloader_iter`). Let it take a batch."
            )
        assert self._phases is not None
        indices, place = self._phases.positions_of(self._drawn), self._drawn
        self._seen, self._drawn = None, place + 1
        labels = flags.labels[indices]
        if not self._holds(batch, labels):
            raise DataError(
                "The labels of a batch are not those of the samples that were drawn. Does `collate_fn` mix, drop or "
                "sort samples? Use torch's default_collate: D-ST augments the images itself."
            )
        images, device = layout.images(batch).to(pl_module.device), pl_module.device
        original = pixels.to_pixels(images)
        views = [
            layout.with_images(batch, pixels.to_model(self._view(trainer, original, place, i), like=images))
            for i in range(count)
        ]
        return Batch(views, labels.to(device), flags.trusted[indices].to(device), flags.suspect[indices].to(device))

    def _holds(self, batch: Any, labels: Tensor) -> bool:
        try:
            return torch.equal(self._data.labels(batch).cpu(), labels)
        except DataError:  # not even class indices, but mixed ones
            return False

    def release(self) -> None:
        """Draw by the user's samplers again."""
        if self._phases is not None:
            self._loader_filter.set_phases(None)
        self._phases = self._seen = None

    def _view(self, trainer: Trainer, pixels: Tensor, place: int, i: int) -> Tensor:
        seed = self._seed
        for part in (trainer.current_epoch, place, trainer.global_rank, i):
            seed = (seed * 1_000_003 + part) % 2**63
        if self._views is None:
            return strong_view(pixels, seed=seed)
        with isolated_rng():
            seed_all(seed)
            return self._views(pixels)


def require_plain_batches(trainer: Trainer, data: DatasetScanner) -> None:
    """Check that a training batch holds samples of the curated loader as they are, and nothing else.

    Raises:
        DataError: The training data are a collection of loaders, or ``collate_fn`` mixes labels.
    """
    if not isinstance(unwrapped(trainer.train_dataloader), DataLoader):
        raise DataError(
            f"D-ST makes the training steps itself and needs one training loader, got a "
            f"{type(trainer.train_dataloader).__name__} of loaders. Pass the DataLoader alone."
        )
    with raise_on_all_ranks(trainer, "first batches"):
        if data.mixes_labels():
            raise DataError(
                "D-ST needs to know the label of every image, but `collate_fn` mixes labels (CutMix or MixUp). Use "
                "torch's default_collate: D-ST augments the images itself."
            )
