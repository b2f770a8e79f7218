"""The training images as a defence reads them: by position, without augmentation, as pixels, labels and logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_backdoor._lightning import rank_zero_info, rank_zero_warn
from lightning_backdoor.data.batches import BatchLayout, find_layout
from lightning_backdoor.data.loaded import SHARE, LoadedBatches, room_for_batches
from lightning_backdoor.data.memory import return_page_locked
from lightning_backdoor.data.nesting import copied, positions_in, spelled, transforms_of
from lightning_backdoor.data.origins import Replaced, close
from lightning_backdoor.data.pixels import PixelSpace, check_finite, infer_pixel_space
from lightning_backdoor.data.siblings import is_dataset, over_sibling
from lightning_backdoor.data.transforms import EvalTransform, choose_transform, transforms_swapped
from lightning_backdoor.data.views import (
    Finish,
    Key,
    Keyed,
    ScanLoader,
    batch_size_of,
    check_dataset,
    finish_of,
    key_of,
    read_items,
    scan_batch_size,
    scan_loader,
    unwrapped,
)
from lightning_backdoor.errors import ArgumentError, DataError, ModelError
from lightning_backdoor.scanning.isolation import isolated_eval, prepare_batch, transfers_plainly
from lightning_backdoor.scanning.outputs import call_model, require_logits
from lightning_backdoor.scanning.scan import raise_on_all_ranks, scan_read, shard
from lightning_backdoor.surgery.heads import Head, find_head
from lightning_backdoor.surgery.taps import Taps

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = [
    "DatasetScanner",
    "ScanOptions",
    "open_scanner",
    "require_replaceable",
    "require_same_labels",
    "require_varied_labels",
]

_PROBE = 64  # images that the pixel space is inferred from
_PROBE_FORWARD = 4  # of them that go through the model, with all activations kept

_SPREAD = 1024  # images whose labels are read where those of the first batch are all the same


@dataclass(frozen=True)
class ScanOptions:
    """The user's settings for reading the training images; ``None``: found from the data or the model.

    Attributes:
        forward_fn: ``forward_fn(pl_module, batch)`` returns logits ``(B, K)``.
        batch_fn: ``batch_fn(batch)`` returns images and labels.
        feature_layer: Name of the layer whose output are the features.
        eval_transform: Transform without augmentation.
        mean: Mean of the pixel normalisation, one number per channel in ``[0, 1]`` units, or ``"per_image"``.
        std: Standard deviation of the pixel normalisation, as ``mean``.
        batch_size: Images per forward pass; by default the loader's, and more of them in a scan on a GPU, see
            :func:`~lightning_backdoor.data.views.scan_batch_size`.
        num_workers: Worker processes of the reading loader.
        seed: Seed of whatever is random in the training transform.
        features: Whether penultimate features are needed at all; where not, no classifier head is searched.
        eval_dataset: Dataset without augmentation, or a function from the training dataset to it.

    Raises:
        ArgumentError: ``eval_dataset`` is neither, or is there beside ``eval_transform``.
    """

    forward_fn: Callable[[Any, Any], Any] | None = None
    batch_fn: Callable[[Any], tuple[Tensor, Tensor]] | None = None
    feature_layer: str | None = None
    eval_transform: Callable[[Any], Any] | None = None
    mean: Sequence[float] | Literal["per_image"] | None = None
    std: Sequence[float] | None = None
    batch_size: int | None = None
    num_workers: int | None = None
    seed: int = 0
    features: bool = True
    eval_dataset: Callable[[Any], Any] | Dataset[Any] | None = None

    def __post_init__(self) -> None:
        if self.eval_dataset is None:
            return
        if not (is_dataset(self.eval_dataset) or callable(self.eval_dataset)):
            raise ArgumentError(
                "`eval_dataset` must be a dataset, or a function from the training dataset to one, got "
                f"{type(self.eval_dataset).__name__}."
            )
        if self.eval_transform is not None:
            raise ArgumentError("`eval_dataset` and `eval_transform` are two ways to the same end: pass one of them.")


@dataclass(frozen=True)
class DatasetScanner:
    """Reads all samples of a training set; made by :func:`open_scanner` from a few of its images."""

    loader: DataLoader[Any]
    size: int
    options: ScanOptions
    transform: EvalTransform
    layout: BatchLayout
    pixels: PixelSpace
    head_or_none: Head | None
    """Where penultimate features are; ``None`` where they are not needed."""
    num_classes: int
    probe: tuple[Tensor, Tensor]
    """A few dataset positions and their labels, by which a resumed run checks that the dataset is the same."""
    some: Any
    """A batch of a few images as the loader gave it, for finding layers; hand out copies."""
    finish: Finish | None = None
    """What timm's PrefetchLoader around this loader does to its batches."""
    unread: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    """Samples that the user's ``collate_fn`` was seen to drop, bool ``(N,)``; scans add to it."""
    source: DataLoader[Any] | None = None
    """What is read in place of that loader: one over ``eval_dataset``, or by position where its samplers do not."""
    kept: list[LoadedBatches] = field(default_factory=list)
    """The batches that were read inside of :meth:`loaded` or since :meth:`keep`; else empty."""

    def __len__(self) -> int:
        return self.size

    @property
    def head(self) -> Head:
        """Where penultimate features are found."""
        if self.head_or_none is None:
            raise RuntimeError("This scanner was opened by ScanOptions(features=False), without a search for features.")
        return self.head_or_none

    @contextmanager
    def loaded(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """Read every image once: what is read of the training set from here to the end is kept in memory.

        The batches are those that would be read again, bit by bit, as copies. They take a quarter of the free memory at
        most, for all processes of a machine together; a larger training set is read at every pass. On a GPU they are
        page-locked.
        """
        if self.kept and self.kept[-1].serves:
            yield
            return
        before = list(self.kept)
        self._start_keeping(trainer, pl_module, room_for_batches(trainer.num_devices))
        try:
            yield
        finally:
            self.forget()
            self.kept.extend(before)

    def keep(self, trainer: Trainer, pl_module: LightningModule, room: int) -> bool:
        """Keep the batches of the next scan of all samples for later scans, until :meth:`forget`.

        An image without augmentation is taken to be the same at every scan of a fit. Where batches are kept already, up
        to 64 of their samples are read again: if images or labels differ, or there is too little free memory now, the
        kept ones are dropped, and the next scan reads all anew. Every process must call it.

        Args:
            trainer: The running Trainer.
            pl_module: The LightningModule under training.
            room: Bytes that may be taken at most, beside the share of :meth:`loaded` of the free memory.

        Returns:
            Whether samples of this process were seen to have changed.
        """
        changed = False
        with isolated_eval(trainer, pl_module), raise_on_all_ranks(trainer, "second reading of some images"):
            self.forget_if_scarce(trainer)
            if self.kept and self._has_changed(self.kept[-1]):
                changed = True
                self.forget()
        if not self.kept:
            self._start_keeping(trainer, pl_module, min(room, room_for_batches(trainer.num_devices)))
        return changed

    def forget_if_scarce(self, trainer: Trainer) -> None:
        """Drop what is kept if, of the memory that would be free without it, it takes more than the share."""
        taken = sum(store.kept_bytes for store in self.kept)
        if taken and (1 - SHARE) * taken > room_for_batches(trainer.num_devices):
            self.forget()

    def forget(self) -> None:
        """Drop all batches that are kept."""
        pinned = any(store.pin for store in self.kept)
        self.kept.clear()
        if pinned:
            return_page_locked()

    def _start_keeping(self, trainer: Trainer, pl_module: LightningModule, room: int) -> None:
        pin, copies = pl_module.device.type == "cuda", not self._sends(trainer, pl_module)
        self.kept.append(LoadedBatches(room, pin=pin, copies=copies))

    def _has_changed(self, store: LoadedBatches) -> bool:
        """Whether some of the kept samples have other images or labels when they are read again."""
        some = store.some(_PROBE)
        if some is None:
            return False
        indices, before = some
        workers = min(self.loader.num_workers, 1)
        with self.read(indices, workers, batch_size=len(indices)) as view:
            positions, now = next(view.read(), (indices[:0], None))
        if not torch.equal(positions, indices):
            return True
        return any(
            old.shape != new.shape or old.dtype != new.dtype or not torch.equal(old, new)
            for old, new in (
                (self.layout.images(before), self.layout.images(now)),
                (self.layout.labels(before), self.layout.labels(now)),
            )
        )

    def load(self, trainer: Trainer) -> None:
        """Inside of :meth:`loaded`, read all samples now if samples in another order can then be taken from memory.

        Several processes keep a part each, so that each of them has to read other samples.
        """
        if trainer.world_size > 1 or not self.kept:
            return
        with self.read(range(len(self)), batch_size=self._scanned(trainer), whole=True) as view:
            if view.stacks and self.kept[-1].may_keep:
                for _ in view:
                    if not self.kept[-1].may_keep:
                        break

    def scan(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        step: Callable[[Tensor, Any], dict[str, Tensor]],
        *,
        description: str,
        positions: Tensor | None = None,
        finite: bool = False,
        stay: bool = False,
    ) -> dict[str, Tensor]:
        """Run ``step(indices, batch)`` over all samples; see :func:`lightning_backdoor.scanning.scan.scan`.

        The images of ``batch`` are on the device already, where nothing of the user's speaks against it, so that they
        are sent there once and other versions of them are made there; all else is as the loader gave it. With
        ``finite`` they are checked before: on a GPU a check would wait for all work before it. With ``stay``, results
        ``(N, D)`` remain where ``step`` made them, if they fit (:func:`lightning_backdoor.scanning.scan.scan_read`).

        With ``positions``, long ``(M,)`` in rising order, over these samples alone: results have M rows. Samples that
        the user's ``collate_fn`` drops are noted in :attr:`unread`; their rows are those of others, drawn at random.
        """
        sends = self._sends(trainer, pl_module)

        def sent(indices: Tensor, batch: Any) -> dict[str, Tensor]:
            images = self.layout.images(batch) if finite or sends else None
            if finite and images is not None:
                check_finite(images, indices)
            if sends and images is not None:
                batch = self.layout.with_images(batch, images.to(pl_module.device, non_blocking=True))
            return step(indices, batch)

        mine = shard(len(self) if positions is None else len(positions), trainer)
        with ExitStack() as stack:
            with raise_on_all_ranks(trainer, description):
                wanted = mine if positions is None else positions[mine]
                whole, size = positions is None, self._scanned(trainer)
                view = stack.enter_context(self.read(wanted, batch_size=size, whole=whole))
            read, found, _ = scan_read(trainer, pl_module, view, sent, description=description, stay=stay)
        every = torch.arange(len(self)) if positions is None else positions
        if len(read) == len(every):
            return found
        present = torch.isin(every, read)
        self.unread[every[~present]] = True
        generator = torch.Generator().manual_seed(self.options.seed)
        rows = torch.randint(len(read), (len(every),), generator=generator)
        rows[present] = torch.arange(len(read))
        return {name: column[rows] for name, column in found.items()}

    def _scanned(self, trainer: Trainer) -> int:
        """Images per batch of a scan."""
        return self.options.batch_size or scan_batch_size(self.loader, trainer.strategy.root_device.type)

    def _sends(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether the images of a batch may go to the device alone, before the rest."""
        return self.layout.batch_fn is None and transfers_plainly(trainer, pl_module)

    def require_class(self, name: str, label: int | None) -> None:
        """Raise an ArgumentError unless ``label`` is None or a class of the model; ``name`` is the argument's."""
        if label is not None and label >= self.num_classes:
            raise ArgumentError(f"`{name}` must be a class index below {self.num_classes}, got {label}.")

    def require_replaceable(self, trainer: Trainer, pl_module: LightningModule, *, alone: bool | None = None) -> None:
        """Check that the model takes other images than those of a batch, for methods that change images.

        Args:
            trainer: The running Trainer.
            pl_module: The LightningModule under training.
            alone: Whether a network is called with the images alone; ``None``: as the user's ``forward_fn`` says.

        Raises:
            ArgumentError: ``batch_fn`` computes the images in a way that cannot be undone, and the model does not take
                what it returns.
        """
        if self.layout.batch_fn is None:
            return
        with isolated_eval(trainer, pl_module), raise_on_all_ranks(trainer, "first look at the training images"):
            batch = copied(self.some)
            alone = self.options.forward_fn is None if alone is None else alone
            require_replaceable(trainer, pl_module, self.layout, batch, alone=alone)

    def labels(self, batch: Any) -> Tensor:
        """Class indices of a batch, long ``(B,)``, checked against the number of logits."""
        labels = self.layout.labels(batch)
        if len(labels) and int(labels.max()) >= self.num_classes:
            raise DataError(
                f"Labels must be class indices below {self.num_classes} (the number of logits), got "
                f"{int(labels.max())}. Give the model more outputs or number the classes from 0."
            )
        return labels

    def outputs(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *, gradients: bool = False, cut: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Logits ``(B, K)`` and penultimate features ``(B, D)`` of a batch as the loader gave it, float32.

        With ``gradients`` features can be differentiated; with ``cut`` no gradient of the logits passes through them.
        """
        with Taps(pl_module, [self.head.name], place=self.head.place, gradients=gradients, cut=cut) as taps:
            logits = _logits(trainer, pl_module, self.layout, self.options, batch)
            return logits, taps.read()[self.head.name]

    def activations(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, names: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Logits ``(B, K)`` of a batch, and the largest response of every unit of the named layers, float32 ``(B, U)``.

        The units of a layer are the channels of its raw output, before any normalisation or activation.
        """
        with Taps(pl_module, names, pooling="max") as taps:
            logits = _logits(trainer, pl_module, self.layout, self.options, batch)
            return logits, torch.cat(list(taps.read().values()), dim=1)

    def logits(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Tensor:
        """Logits ``(B, K)`` of a batch as the loader gave it, float32."""
        return _logits(trainer, pl_module, self.layout, self.options, batch)

    def answers(
        self, trainer: Trainer, pl_module: LightningModule, *, description: str, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Classes that the model gives to all samples, long ``(N,)``, or to those at ``positions``, ``(M,)``.

        -1 where logits are NaN: after weights have diverged, ``argmax`` would give some class. Beside them the
        probabilities of these classes, float.
        """

        def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
            confidence, predicted = self.logits(trainer, pl_module, batch).softmax(dim=1).max(dim=1)
            unknown = confidence.isnan()
            return {"predicted": predicted.masked_fill(unknown, -1), "confidence": confidence.masked_fill(unknown, 0)}

        found = self.scan(trainer, pl_module, step, description=description, positions=positions)
        return found["predicted"], found["confidence"]

    def predict(
        self, trainer: Trainer, pl_module: LightningModule, *, description: str, positions: Tensor | None = None
    ) -> Tensor:
        """The classes of :meth:`answers` alone."""
        return self.answers(trainer, pl_module, description=description, positions=positions)[0]

    def features(
        self, trainer: Trainer, pl_module: LightningModule, *, description: str, positions: Tensor | None = None
    ) -> Tensor:
        """Penultimate features of all samples, float32 ``(N, D)``, or of those at ``positions``, ``(M, D)``.

        They stay on the device if they fit there.
        """

        def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
            return {"features": self.outputs(trainer, pl_module, batch)[1]}

        found = self.scan(trainer, pl_module, step, description=description, positions=positions, stay=True)
        return found["features"]

    def read_labels(self, trainer: Trainer, pl_module: LightningModule) -> Tensor:
        """Labels of all samples, long ``(N,)``."""

        def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
            return {"labels": self.labels(batch).clone()}

        return self.scan(trainer, pl_module, step, description="reading labels")["labels"]

    def labels_at(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Some dataset positions without those that are unread, long ``(n,)``, and their labels."""
        with self.read(indices, num_workers=min(self.loader.num_workers, 1)) as view:
            found = [(read, self.labels(batch).clone()) for read, batch in view]
        if not found:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        read, labels = zip(*found, strict=True)
        return torch.cat(read), torch.cat(labels)

    def few(self, trainer: Trainer, pl_module: LightningModule) -> Callable[[], Tensor]:
        """A function that takes a few images through the model and returns their logits; for finding layers."""
        return lambda: _logits(trainer, pl_module, self.layout, self.options, copied(self.some))

    def mixes_labels(self) -> bool:
        """Whether the user's ``collate_fn`` mixes labels (CutMix, MixUp), tried on two batches."""
        size = self.options.batch_size or batch_size_of(self.loader)
        with self.read(range(min(len(self), 2 * size)), num_workers=min(self.loader.num_workers, 1)) as view:
            return any([unmixed for _, _, unmixed in view.collated()])

    def images(self, indices: Sequence[int]) -> Tensor:
        """Images at some dataset positions as 8-bit pixels, uint8 ``(n, C, H, W)``; black if they are unread.

        Batches of smaller images than others get black margins.
        """
        with self.read(indices, num_workers=min(self.loader.num_workers, 1)) as view:
            found = [(read, self.pixels.to_pixels(self.layout.images(batch))) for read, batch in view]
        if not found:
            raise DataError(f"`collate_fn` drops all of {len(indices)} images that are to be shown.")
        height, width = (max(images.shape[side] for _, images in found) for side in (2, 3))
        margins = [(0, width - images.shape[3], 0, height - images.shape[2]) for _, images in found]
        read = torch.cat([positions for positions, _ in found])
        images = torch.cat([F.pad(part, margin) for (_, part), margin in zip(found, margins, strict=True)])
        wanted = torch.as_tensor(indices, dtype=torch.long)
        if len(read) == len(wanted):
            return images
        present = torch.isin(wanted, read)
        self.unread[wanted[~present]] = True
        all_images = images.new_zeros(len(wanted), *images.shape[1:])
        all_images[present] = images
        return all_images

    @contextmanager
    def read(
        self,
        indices: Sequence[int] | Tensor,
        num_workers: int | None = None,
        *,
        batch_size: int | None = None,
        whole: bool = False,
    ) -> Iterator[ScanLoader]:
        """A loader of ``(indices, batch)`` at some dataset positions, in their order and without augmentation.

        Args:
            indices: Dataset positions.
            num_workers: Worker processes; the user's by default.
            batch_size: Images per batch; the user's, or the loader's, by default.
            whole: Whether these are all samples of this process, which :meth:`loaded` may keep.

        Raises:
            DataError: The dataset has another length than at the start of the fit.
        """
        size = check_dataset(self.loader.dataset)
        if size != self.size:
            raise DataError(
                f"The training dataset had {self.size} samples at the start of the fit and has {size} now, so that "
                "positions may mean other images. Give it one length for the whole fit."
            )
        workers = self.options.num_workers if num_workers is None else num_workers
        source = self.loader if self.source is None else self.source
        with transforms_swapped(source.dataset, self.transform):
            view = scan_loader(
                source,
                indices,
                seed=self.options.seed,
                batch_size=self.options.batch_size if batch_size is None else batch_size,
                num_workers=workers,
                finish=self.finish,
            )
            view.loaded, view.whole = self.kept[-1] if self.kept else None, whole
            yield view


def open_scanner(
    trainer: Trainer, pl_module: LightningModule, loader: Any, options: ScanOptions, val_dataset: Any = None
) -> DatasetScanner:
    """Find out from a few training images how to read all of them.

    Reads 64 images and takes four of them through the model; weights, buffers and random streams stay as they are.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
        loader: The training loader as Lightning prepared it, or timm's PrefetchLoader around one.
        options: The user's settings.
        val_dataset: Dataset of the first validation loader, whose transform is preferred for reading.

    Raises:
        ArgumentError: If images, labels or the pixel space cannot be told, naming the argument that helps.
        DataError: If the dataset is empty or iterable, an image is not finite, or labels are not class indices.
        ModelError: If no logits come out of the model, or none that are finite.
    """
    with isolated_eval(trainer, pl_module):
        with raise_on_all_ranks(trainer, "first look at the sampler"):
            key = key_of(loader)
        key = trainer.strategy.broadcast(key, src=0)  # all processes read images in one size
        with raise_on_all_ranks(trainer, "first look at the training images"):
            return _open(trainer, pl_module, loader, options, val_dataset=val_dataset, key=key)


def _open(
    trainer: Trainer,
    pl_module: LightningModule,
    loader: Any,
    options: ScanOptions,
    *,
    val_dataset: Any,
    key: Key | None,
) -> DatasetScanner:
    loader, finish = unwrapped(loader), finish_of(loader)
    by_position = loader if key is None else over_sibling(loader, Keyed(loader.dataset, key))
    size = check_dataset(loader.dataset)
    source, transform = by_position, EvalTransform("dataset", "Training images are read from `eval_dataset`.")
    if options.eval_dataset is None:
        transform = choose_transform(source, val_dataset, options.eval_transform)
    else:
        source = _readable(over_sibling(loader, options.eval_dataset), key)
    if transform.source == "dataset's own":
        rank_zero_warn(transform.description)
    probe = [i * size // min(size, _PROBE) for i in range(min(size, _PROBE))]
    workers = min(loader.num_workers, 1)  # a dataset that opens its files in workers is not opened here
    settings: dict[str, Any] = {"seed": options.seed, "num_workers": workers, "finish": finish}
    with transforms_swapped(source.dataset, transform):
        first = next(iter(scan_loader(source, probe, batch_size=len(probe), **settings)), None)
        if first is None:
            raise DataError(
                f"`collate_fn` drops all of {len(probe)} training samples that were looked at first. Look at what the "
                "dataset returns."
            )
        indices, batch = first
        some = indices[:_PROBE_FORWARD]
        _, few = next(iter(scan_loader(source, some, batch_size=len(some), **settings)))
        transforms = [*transforms_of(source.dataset), *([] if finish is None else [finish])]
    positions = positions_in(source.dataset, indices)
    layout = find_layout(batch, options.batch_fn, positions).traced(batch)
    images = layout.images(batch)
    check_finite(images, indices)
    found: list[Tensor] = []

    def run() -> Tensor:
        found.append(_logits(trainer, pl_module, layout, options, copied(few)))  # transfer hooks may change it in place
        if not bool(found[-1].isfinite().all()):
            raise ModelError(
                "The model answers NaN or infinity to the first training images, so nothing can be told from its "
                "answers. Look for weights that have diverged, or pass `forward_fn`."
            )
        return found[-1]

    head = find_head(pl_module, run, options.feature_layer) if options.features else None
    logits = found[-1] if found else run()
    require_logits(pl_module, logits, run)
    pixels = infer_pixel_space(
        images,
        transform=transforms,
        model=pl_module,
        beside=(source.dataset, loader.collate_fn, options.batch_fn),
        mean=options.mean,
        std=options.std,
    )
    if pixels.note:
        rank_zero_info(pixels.note)
    training_set = DatasetScanner(
        loader,
        size,
        options,
        transform,
        layout,
        pixels,
        head,
        logits.shape[1],
        (indices, indices),
        few,
        finish,
        torch.zeros(size, dtype=torch.bool),
        None if source is loader else source,
    )
    if head is not None:
        training_set.outputs(trainer, pl_module, copied(few))  # raises now if the feature layer does not run
    labels = training_set.labels(batch)
    if options.eval_dataset is not None:
        require_same_labels(
            scan_loader(by_position, indices, batch_size=len(indices), **settings), layout, indices, labels
        )
    training_set = replace(training_set, probe=(indices, labels))
    require_varied_labels(training_set, batch, positions)
    return training_set


def _readable(source: DataLoader[Any], key: Key | None) -> DataLoader[Any]:
    """The loader over ``eval_dataset``, by position also where its items are named as those of the training dataset."""
    if key is None:
        return source
    try:
        read_items(source, [0])
    except Exception:
        return over_sibling(source, Keyed(source.dataset, key))
    return source


def _logits(
    trainer: Trainer, pl_module: LightningModule, layout: BatchLayout, options: ScanOptions, batch: Any
) -> Tensor:
    prepared = prepare_batch(trainer, pl_module, batch)
    source = prepared if options.forward_fn is None else batch  # transfer hooks may rebuild the batch
    images = layout.given_images(source)
    return call_model(pl_module, images, options.forward_fn, prepared)


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
