"""One detection reads and decodes every image once, and measures what it would have measured otherwise."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning.pytorch as unified
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from lightning_backdoor import DBRCallback, NONECallback, UltraCleanCallback
from lightning_backdoor.callbacks.base import Procedure
from lightning_backdoor.data import loaded as loaded_module
from lightning_backdoor.data import memory
from lightning_backdoor.data.loaded import LoadedBatches, bytes_of
from lightning_backdoor.data.memory import free_memory
from lightning_backdoor.data.views import ScanLoader, scan_loader
from lightning_backdoor.scanning import scanner as scanner_module
from lightning_backdoor.scanning.early_neighbors import early_neighbors
from lightning_backdoor.scanning.isolation import transfers_plainly
from lightning_backdoor.scanning.measure_denoised import DenoisedScan, RowStore
from lightning_backdoor.scanning.measure_fct import Detector, _look
from lightning_backdoor.scanning.measure_units import UnitScan, find_layers
from lightning_backdoor.scanning.scanner import DatasetScanner
from tests.contract.problem import BATCH, IMAGES, WARNS, clean, fit, net_of, planted
from tests.contract.registry import of

pytestmark = WARNS

COMPARED = 64  # images that UltraClean reads again before it uses the kept ones

DEFENSES = {
    "UltraClean": lambda: UltraCleanCallback(warmup_epochs=2, response="report", max_removed_of_class=1),
    "NONE": lambda: NONECallback(warmup_epochs=2, response="reset", extra_epochs=1, rounds=1),
    "D-BR": lambda: DBRCallback(warmup_epochs=2, detector_steps=6, response="report"),
    "D-BR, unlearning": lambda: DBRCallback(warmup_epochs=2, detector_steps=6, epochs=1, suspect=0.1),
}


class Counted(Dataset[Any]):
    """Counts how often an image is read; with ``noisy``, every reading draws from all random streams."""

    def __init__(self, data: Any, *, noisy: bool = False) -> None:
        self.data, self.noisy, self.reads = data, noisy, 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> Any:
        self.reads += 1
        item = dict(self.data[i])
        if self.noisy:
            drawn = torch.randn(()) + float(np.random.rand()) + random.random()
            item["image"] = (item["image"] + 5 * drawn).clamp(0, 255).to(torch.uint8)
        return item


class Costs:
    """Images read and loaders started in the detections of a fit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, data: Counted) -> None:
        self.reads: list[int] = []
        self.starts: list[int] = []
        started = 0
        detect, collated = Procedure.detect, ScanLoader.collated

        def counting(view: ScanLoader) -> Iterator[Any]:
            nonlocal started
            started += 1
            return collated(view)

        def detecting(procedure: Procedure, epochs: int | None = None) -> None:
            reads, starts = data.reads, started
            detect(procedure, epochs)
            self.reads.append(data.reads - reads)
            self.starts.append(started - starts)

        monkeypatch.setattr(ScanLoader, "collated", counting)
        monkeypatch.setattr(Procedure, "detect", detecting)


def run(
    monkeypatch: pytest.MonkeyPatch, name: str, share: float, *, noisy: bool = False, module: Any = None, **kwargs: Any
) -> tuple[Costs, Any, Any]:
    """Costs of the detections, the verdict, and the final weights, where so much of the memory may be used."""
    with monkeypatch.context() as patched:
        patched.setattr(loaded_module, "SHARE", share)
        np.random.seed(0)
        random.seed(0)
        data = Counted(planted(), noisy=noisy)
        costs, callback = Costs(patched, data), DEFENSES[name]()
        done = fit([callback], data, module=module, **kwargs)
    return costs, callback.verdict, done.module.state_dict()


def same(one: Any, other: Any) -> bool:
    """Whether two runs came to the same verdict and the same weights, bit by bit."""
    verdicts = torch.equal(one[1].scores, other[1].scores) and torch.equal(one[1].keep, other[1].keep)
    return verdicts and all(torch.equal(value, other[2][key]) for key, value in one[2].items())


@pytest.mark.parametrize("name", DEFENSES)
def test_a_detection_reads_every_image_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """UltraClean has read them for its early neighbors, and reads 64 again to compare them."""
    found = run(monkeypatch, name, 0.25)
    assert found[0].reads
    assert set(found[0].reads) == {COMPARED if name == "UltraClean" else IMAGES}
    assert set(found[0].starts) == {1}
    again = run(monkeypatch, name, 0.0)
    assert min(again[0].reads) >= (IMAGES if name == "UltraClean" else 2 * IMAGES)
    assert same(found, again)


class Passes:
    """How often a fit has read all images: loaders that read every sample of this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.whole, self.compared = 0, 0
        read = ScanLoader.read

        def counting(view: ScanLoader) -> Iterator[Any]:
            self.whole += view.whole
            self.compared += not view.whole and len(view.dataset) == COMPARED
            return read(view)

        monkeypatch.setattr(ScanLoader, "read", counting)


def fit_of_ultraclean(
    monkeypatch: pytest.MonkeyPatch,
    *,
    share: float = 0.25,
    data: Any = None,
    response: str = "restart",
    cache_bytes: int = 2**31,
    **kwargs: Any,
) -> tuple[Passes, Any, Any, UltraCleanCallback]:
    """Early neighbors after one epoch, a scan after two, and one at the end after three."""
    with monkeypatch.context() as patched:
        patched.setattr(loaded_module, "SHARE", share)
        patched.setattr(scanner_module, "SHARE", share)
        random.seed(0)
        np.random.seed(0)
        passes = Passes(patched)
        callback = UltraCleanCallback(
            warmup_epochs=2, response=response, cache_bytes=cache_bytes, max_removed_of_class=1
        )
        done = fit([callback], clean() if data is None else data, **kwargs)
    return passes, callback.verdict, done.module.state_dict(), callback


@pytest.mark.parametrize("poisoned", [False, True], ids=["clean", "poisoned"])
def test_a_fit_of_ultraclean_reads_every_image_once(monkeypatch: pytest.MonkeyPatch, *, poisoned: bool) -> None:
    """Early neighbors and all scans, those after a restart included; measured is what a reading at each scan gives."""
    data = planted() if poisoned else clean()
    found = fit_of_ultraclean(monkeypatch, data=data)
    scans = len(found[3].history)
    assert scans >= 2
    assert any(event.removed for event in found[3].history) == poisoned
    assert (found[0].whole, found[0].compared) == (1, 1 + scans), "as many are read at the start of a fit"
    again = fit_of_ultraclean(monkeypatch, data=data, share=0)
    assert (again[0].whole, again[0].compared) == (1 + scans, 1)
    assert same(found, again)


def test_images_are_kept_within_the_bound_of_the_denoised_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two denoised copies of 96 images of 3 x 8 x 8 bytes; the images as they are, with labels and positions."""
    item = clean()[0]
    denoised = 2 * IMAGES * item["image"].numel()
    images = IMAGES * item["image"].numel()
    for cache_bytes, passes in ((denoised + 2 * images, 1), (denoised + images // 2, 3)):
        assert fit_of_ultraclean(monkeypatch, cache_bytes=cache_bytes)[0].whole == passes


@pytest.mark.parametrize("response", ["restart", "report"])
def test_nothing_of_the_images_is_left_after_the_last_scan(monkeypatch: pytest.MonkeyPatch, response: str) -> None:
    """Nor in the callback's state, nor in a pickle of it in the middle of a fit."""
    scanners: list[DatasetScanner] = []
    held: list[int] = []
    sizes: list[int] = []
    keep, on_train_epoch_end = DatasetScanner.keep, UltraCleanCallback.on_train_epoch_end

    def noted(scanner: DatasetScanner, *args: Any) -> None:
        scanners.append(scanner)
        keep(scanner, *args)

    def ended(callback: UltraCleanCallback, *args: Any) -> None:
        on_train_epoch_end(callback, *args)
        held.append(sum(store.kept_bytes for store in scanners[-1].kept))
        sizes.append(len(pickle.dumps(callback._procedure.detector)))

    monkeypatch.setattr(DatasetScanner, "keep", noted)
    monkeypatch.setattr(UltraCleanCallback, "on_train_epoch_end", ended)
    fit_of_ultraclean(monkeypatch, response=response)
    assert [size > 0 for size in held] == ([True] * 3 if response == "restart" else [True, False, False])
    assert not scanners[-1].kept
    assert max(sizes) < 10_000 < held[0]


def test_nothing_is_left_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    scanners: list[DatasetScanner] = []
    keep = DatasetScanner.keep
    monkeypatch.setattr(DatasetScanner, "keep", lambda scanner, *args: (scanners.append(scanner), keep(scanner, *args)))

    def failing(*args: Any, **kwargs: Any) -> Any:
        assert scanners[-1].kept[-1].kept_bytes
        raise Enough

    monkeypatch.setattr(DenoisedScan, "run", failing)
    with pytest.raises(Enough):
        fit_of_ultraclean(monkeypatch)
    assert not scanners[-1].kept


class Curriculum(Counted):
    """Images, or labels, that change after the early neighbors, at so many positions."""

    def __init__(self, data: Any, what: str, changed: int) -> None:
        super().__init__(data)
        self.what, self.changed, self.epoch = what, changed, 0

    def __getitem__(self, i: int) -> Any:
        item = super().__getitem__(i)
        if self.epoch > 1 and i < self.changed:
            item[self.what] = 255 - item[self.what] if self.what == "image" else (item[self.what] + 1) % 4
        return item


class CountingEpochs(pl.Callback):
    """Tells a dataset which epoch it is."""

    def __init__(self, data: Curriculum) -> None:
        self.data = data

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.data.epoch = trainer.current_epoch


@pytest.mark.parametrize(("what", "changed", "passes"), [("image", 0, 1), ("image", 40, 2), ("label", 40, 2)])
def test_images_that_change_during_the_fit_are_read_again(
    monkeypatch: pytest.MonkeyPatch, what: str, changed: int, passes: int
) -> None:
    """And denoised again; where more than a third of 96 images change, one of the 64 that are compared does."""
    denoised: list[int] = []
    write = RowStore.write
    monkeypatch.setattr(
        RowStore, "write", lambda store, rows, *args: (denoised.append(len(rows)), write(store, rows, *args))
    )
    data = Curriculum(clean(), what, changed)
    counted = Passes(monkeypatch)
    fit([CountingEpochs(data), UltraCleanCallback(warmup_epochs=2)], data)
    assert counted.whole == passes
    assert sum(denoised) == passes * 2 * IMAGES


def test_memory_that_has_become_scarce_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a scan, and before one; a quarter of what would be free without them has to hold the kept images."""
    store = LoadedBatches(10**6)
    list(whole(Items("tuple"), store))
    free = 3 * store.kept_bytes
    monkeypatch.setattr(loaded_module, "free_memory", lambda: free)
    callback = DEFENSES["UltraClean"]()

    def detect(session: Any) -> Any:
        nonlocal free
        session.scanner.kept[:] = [store]
        session.scanner.forget_if_scarce(session.trainer)
        assert session.scanner.kept
        free -= 8
        session.scanner.forget_if_scarce(session.trainer)
        assert not session.scanner.kept
        raise Enough

    callback._procedure.detector.detect = detect
    with pytest.raises(Enough):
        fit([callback])


@pytest.mark.parametrize(("given", "scanned", "trained"), [(None, 2 * BATCH, BATCH), (16, 16, 16)])
def test_larger_batches_of_scans_do_not_change_those_of_a_detector(
    monkeypatch: pytest.MonkeyPatch, given: int | None, scanned: int, trained: int
) -> None:
    """As on a GPU, for D-BR, whose copy of the model is trained from images that a scan has kept."""
    monkeypatch.setattr(scanner_module, "scan_batch_size", lambda loader, device_type: 2 * BATCH)
    sizes: dict[bool, list[int]] = {False: [], True: []}
    for name in ("outputs", "logits"):
        original = getattr(DatasetScanner, name)

        def noted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            sizes[torch.is_grad_enabled()].append(len(args[3]["image"]))
            return original(*args, **kwargs)

        monkeypatch.setattr(DatasetScanner, name, noted)
    data = Counted(planted())
    costs = Costs(monkeypatch, data)
    fit([DBRCallback(warmup_epochs=2, detector_steps=2, response="report", batch_size=given)], data)
    assert set(costs.reads) == {IMAGES}
    assert max(sizes[False]) == scanned
    assert sizes[True].count(trained) == 4


@pytest.mark.filterwarnings("ignore:Counted augments its images at random")
@pytest.mark.parametrize("name", ["NONE", "D-BR"])
def test_random_images_are_those_that_a_second_reading_gives(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found = run(monkeypatch, name, 0.25, noisy=True)
    assert set(found[0].reads) == {IMAGES}
    assert same(found, run(monkeypatch, name, 0.0, noisy=True))


def in_place(batch: Any, dataloader_idx: int) -> Any:
    """A transfer hook that changes the batch that it gets: done twice, it would give the first images again."""
    batch["image"].bitwise_not_()
    return batch


@pytest.mark.parametrize("name", ["NONE", "D-BR"])
def test_hooks_may_change_a_batch_in_place(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    modules = [net_of(), net_of()]
    for module in modules:
        module.on_before_batch_transfer = in_place
    found, again = (
        run(monkeypatch, name, share, module=module) for share, module in zip((0.25, 0), modules, strict=True)
    )
    assert set(found[0].reads) == {IMAGES}
    assert same(found, again)


def pop(batch: Any, dataloader_idx: int) -> Any:
    """A hook that cannot run twice on one batch."""
    batch.pop("index")
    return batch


@pytest.mark.parametrize("name", ["UltraCleanCallback", "DBRCallback", "DSTCallback"])
def test_hooks_may_take_a_key_from_a_batch(name: str) -> None:
    entry, module = of(name), net_of()
    module.training_step = lambda batch, batch_idx: torch.nn.functional.cross_entropy(
        module(batch["image"]), batch["label"]
    )
    module.on_before_batch_transfer = pop
    callback = entry.make()
    assert entry.acted(callback, fit([callback], module=module).trainer)


class Point(NamedTuple):
    """An item."""

    image: Any
    label: int


ITEMS = {
    "tuple": lambda i: (torch.full((3, 4, 5), float(i)), i),
    "permuted": lambda i: (torch.arange(60.0).reshape(4, 5, 3).permute(2, 0, 1) + i, i),
    "array": lambda i: {"image": np.full((3, 4, 5), i, dtype=np.uint8), "more": {"label": i, "weight": i / 3}},
    "named": lambda i: Point(torch.full((3, 4, 5), i, dtype=torch.uint8), i),
    "nested": lambda i: [(torch.full((3, 4, 5), float(i)), {"label": torch.tensor(i)}), torch.tensor([i, i])],
}


class Items(Dataset[Any]):
    """Items of one kind; counts those that are read."""

    def __init__(self, kind: str, n: int = 11) -> None:
        self.kind, self.n, self.reads = kind, n, 0

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        self.reads += 1
        return ITEMS[self.kind](i)


def whole(data: Any, store: LoadedBatches | None, **kwargs: Any) -> ScanLoader:
    return part(data, store, range(len(data)), whole=True, **kwargs)


def part(data: Any, store: LoadedBatches | None, positions: Any, *, whole: bool = False, **kwargs: Any) -> ScanLoader:
    collate_fn = kwargs.pop("collate_fn", None)
    view = scan_loader(DataLoader(data, batch_size=4, collate_fn=collate_fn), positions, seed=0, **kwargs)
    view.loaded, view.whole = store, whole
    return view


def spelled(node: Any) -> Any:
    """A batch as something that can be compared: structure, dtypes, strides and values."""
    if isinstance(node, Tensor):
        return node.dtype, node.shape, node.stride(), node.tolist()
    if isinstance(node, dict):
        return type(node), [(key, spelled(value)) for key, value in node.items()]
    return (type(node), [spelled(value) for value in node]) if isinstance(node, list | tuple) else node


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ITEMS)
def test_batches_of_other_samples_are_put_together_bit_by_bit(kind: str, workers: int) -> None:
    data, store = Items(kind), LoadedBatches(10**6)
    first = [spelled(pair) for pair in whole(data, store, num_workers=workers)]
    reads = data.reads
    positions = torch.tensor([9, 0, 10, 3, 3, 7, 2])
    found = [spelled(pair) for pair in part(data, store, positions, num_workers=workers)]
    second = [spelled(pair) for pair in whole(data, store, num_workers=workers)]
    assert data.reads == reads
    assert second == first == [spelled(pair) for pair in whole(data, None, num_workers=workers)]
    assert found == [spelled(pair) for pair in part(data, None, positions, num_workers=workers)]


def test_no_samples_are_no_batch() -> None:
    data, store = Items("tuple"), LoadedBatches(10**6)
    list(whole(data, store))
    assert not list(part(data, store, []))


def padded(items: list[Any]) -> dict[str, Any]:
    """What a user's ``collate_fn`` may make of items: containers in containers, and a different height every time."""
    images = torch.stack([image for image, _ in items])
    images = torch.nn.functional.pad(images, (0, 0, 0, len(items) % 3))
    return {"inputs": {"image": images}, "about": ([f"name {label}" for _, label in items], torch.tensor(len(items)))}


def test_batches_of_a_users_function_are_kept_as_they_are() -> None:
    data, store = Items("tuple"), LoadedBatches(10**6)
    first = [spelled(pair) for pair in whole(data, store, collate_fn=padded)]
    assert [spelled(pair) for pair in whole(data, store, collate_fn=padded)] == first
    assert data.reads == 11
    some = [spelled(pair) for pair in part(data, store, [5, 1], collate_fn=padded)]
    assert some == [spelled(pair) for pair in part(data, None, [5, 1], collate_fn=padded)]
    assert data.reads == 15


@pytest.mark.parametrize("pin", [False, True], ids=["ordinary", "page-locked"])
def test_what_is_handed_out_is_a_copy(monkeypatch: pytest.MonkeyPatch, *, pin: bool) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)  # as torch does where it is page-locked already
    data, store = Items("tuple"), LoadedBatches(10**6, pin=pin)
    for _ in range(2):
        for indices, (images, labels) in whole(data, store):
            for tensor in (indices, images, labels):
                tensor.zero_()
    found = [labels for _, (_, labels) in whole(data, store)]
    assert torch.cat(found).tolist() == list(range(11))


def test_more_than_there_is_room_for_is_read_again() -> None:
    """Known from the first batch, so that nothing is kept for a while in vain."""
    data, needed = Items("tuple"), LoadedBatches(10**6)
    size = sum(bytes_of(batch) or 0 for _, batch in whole(data, None))
    data.reads = 0
    assert len(list(whole(data, needed))) == 3
    for room, reads in ((size, 11), (size * 3 // 4, 22)):
        data.reads, store = 0, LoadedBatches(room)
        for _ in range(2):
            for _ in whole(data, store):
                assert (store.kept_bytes > 0) == (reads == 11)
        assert data.reads == reads
        assert store.kept_bytes <= room


def test_batches_that_grow_are_given_up_in_the_middle() -> None:
    def growing(items: list[Any]) -> Any:
        return torch.zeros(len(items), 3, 4, 1 + items[0][1] ** 2), torch.tensor([label for _, label in items])

    data, store = Items("tuple"), LoadedBatches(4000)
    for _ in range(2):
        sizes = [store.kept_bytes for _ in whole(data, store, collate_fn=growing)]
    assert data.reads == 22
    assert max(sizes) <= 4000
    assert store.kept_bytes == 0


def test_a_pass_that_was_left_is_not_kept() -> None:
    data, store = Items("tuple"), LoadedBatches(10**6)
    next(iter(whole(data, store)))
    assert len(list(whole(data, store))) == 3
    assert data.reads == 4 + 11


def test_what_cannot_be_counted_is_not_kept() -> None:
    class Opaque:
        __slots__ = ("images",)

        def __init__(self, images: Tensor) -> None:
            self.images = images

    def collate_fn(items: list[Any]) -> Any:
        return Opaque(torch.stack([image for image, _ in items]))

    data, store = Items("tuple"), LoadedBatches(10**6)
    for _ in range(2):
        assert len(list(whole(data, store, collate_fn=collate_fn))) == 3
    assert data.reads == 22


def test_bytes_are_those_of_the_memory_behind() -> None:
    values = torch.zeros(1000, 10)
    alone = bytes_of(values)
    assert alone is not None
    assert alone >= 40_000
    assert (bytes_of((values, values[:5], values[0].expand(50, 10))) or 0) < alone + 1000
    assert bytes_of({"a": np.zeros(500)}) in range(4000, 5000)
    assert bytes_of(object()) is None
    assert bytes_of(torch.eye(3).to_sparse()) is None


def test_free_memory_is_limited_by_the_container(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, own = tmp_path / "groups", tmp_path / "own"
    (groups / "jobs" / "one").mkdir(parents=True)
    own.write_text("0::/jobs/one\n")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       9000 kB\nMemAvailable:   5000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_GROUPS", groups)
    monkeypatch.setattr(memory, "_OWN_GROUPS", own)
    assert free_memory() == 5000 * 1024
    (groups / "jobs" / "one" / "memory.max").write_text("max\n")
    (groups / "jobs" / "one" / "memory.current").write_text("900000\n")
    assert free_memory() == 5000 * 1024
    (groups / "jobs" / "memory.max").write_text("1000000\n")
    (groups / "jobs" / "memory.current").write_text("900000\n")
    assert free_memory() == 100_000
    (groups / "jobs" / "memory.stat").write_text("anon 1\ninactive_file 300000\n")
    assert free_memory() == 400_000
    (groups / "jobs" / "memory.current").write_text("1900000\n")
    assert free_memory() == 0


def test_nothing_is_kept_after_a_detection(monkeypatch: pytest.MonkeyPatch) -> None:
    stores: list[LoadedBatches] = []
    made = LoadedBatches.__init__

    def noted(store: LoadedBatches, *args: Any, **kwargs: Any) -> None:
        stores.append(store)
        made(store, *args, **kwargs)

    monkeypatch.setattr(LoadedBatches, "__init__", noted)
    callback = DEFENSES["NONE"]()
    kept: list[int] = []
    respond = callback._procedure.response.respond
    callback._procedure.response.respond = lambda *args: (
        kept.append(len(callback._procedure.session.scanner.kept)),
        respond(*args),
    )[1]
    on_train_end = callback._procedure.response.on_train_end
    callback._procedure.response.on_train_end = lambda session: (
        kept.append(len(session.scanner.kept)),
        on_train_end(session),
    )[1]
    fit([callback])
    assert stores
    assert kept[0] == 1
    assert kept[-1] == 0


class Enough(Exception):
    """What a test wants to know is known."""


class Elsewhere:
    """Says that it is on a GPU."""

    device = torch.device("cuda")


class Plain(Elsewhere, pl.LightningModule):
    """Without hooks."""


class Unified(Elsewhere, unified.LightningModule):
    """The same of the other package."""


class Changing(Plain):
    """Changes batches before they are sent."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class Sending(Plain):
    """Sends batches by itself."""

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch


class Finishing(Plain):
    """Changes batches on the device."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


def patched() -> Plain:
    """Changes batches by a function that was put in place."""
    module = Plain()
    module.on_before_batch_transfer = in_place
    return module


class ChangingData(pl.LightningDataModule):
    """A datamodule that changes batches."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


@pytest.mark.parametrize(
    ("module", "data", "plain"),
    [
        (Plain(), None, True),
        (Unified(), None, True),
        (Finishing(), pl.LightningDataModule(), True),
        (Changing(), None, False),
        (Sending(), None, False),
        (patched(), None, False),
        (Plain(), ChangingData(), False),
        (net_of(), None, False),
    ],
    ids=["plain", "unified", "after", "before", "sends", "patched", "datamodule", "cpu"],
)
def test_images_go_to_the_device_early_only_past_no_hook(module: Any, data: Any, plain: bool) -> None:
    assert transfers_plainly(SimpleNamespace(datamodule=data), module) == plain  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_steps_get_images_on_the_device_and_labels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without memory: nothing is computed there."""
    callback = DEFENSES["UltraClean"]()
    seen: list[Any] = []

    def detect(session: Any) -> Any:
        monkeypatch.setattr(type(session.module), "device", torch.device("meta"))
        step = lambda indices, batch: (seen.append((batch, indices)), {"position": indices})[1]  # noqa: E731
        with session.scanner.loaded(session.trainer, session.module):
            for _ in range(2):
                session.scanner.scan(session.trainer, session.module, step, description="", finite=True)
        monkeypatch.undo()
        raise Enough

    callback._procedure.detector.detect = detect
    with pytest.raises(Enough):
        fit([callback])
    devices = {key: value.device.type for key, value in seen[0][0].items()}
    assert devices == {"image": "meta", "label": "cpu", "index": "cpu"}
    assert torch.cat([indices for _, indices in seen]).tolist() == 2 * list(range(IMAGES))


class Calls(TorchDispatchMode):
    """Counts operations: on a GPU each is a kernel launch, or a copy, or a wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def fct_scan(session: Any, scanner: Any) -> Any:
    detector = Detector("copy", None, steps=1, num_transforms=2, transform=None, seed=0)
    return _look(session.trainer, session.module, scanner, detector)


def unit_scan(session: Any, scanner: Any) -> UnitScan:
    return UnitScan(scanner, find_layers(session.trainer, session.module, scanner))


def denoised_scan(session: Any, scanner: Any) -> Any:
    scan = DenoisedScan(scanner, world_size=1, cache_bytes=2**20, softmax=False)
    scan.run(session.trainer, session.module)  # denoises; what follows does not
    with Calls() as calls:
        scan.run(session.trainer, session.module)
    return calls


SCANS: dict[str, tuple[Any, int]] = {
    "UltraClean": (denoised_scan, 110),
    "early neighbors": (lambda s, scanner: early_neighbors(s.trainer, s.module, scanner), 40),
    "NONE statistics": (lambda s, scanner: unit_scan(s, scanner).statistics(s.trainer, s.module, 0.9), 90),
    "NONE responses": (lambda s, scanner: unit_scan(s, scanner)._activations(s.trainer, s.module, torch.arange(8)), 35),
    "FCT": (fct_scan, 220),
    "predictions": (lambda s, scanner: scanner.predict(s.trainer, s.module, description=""), 35),
}
"""Every scan, with the most operations that a batch of it may take with a network of five layers."""


@pytest.mark.parametrize("name", SCANS)
def test_operations_of_a_batch(name: str) -> None:
    scan, most = SCANS[name]
    callback = DEFENSES["UltraClean"]()
    found: dict[int, Calls] = {}

    def detect(session: Any) -> Any:
        session.scanner.forget()  # of the early neighbors
        for batches in (2, 4):
            options = replace(session.scanner.options, batch_size=IMAGES // batches)
            scanner = replace(session.scanner, options=options)
            with Calls() as calls:
                inner = scan(session, scanner)
            found[batches] = inner if isinstance(inner, Calls) else calls
        raise Enough

    callback._procedure.detector.detect = detect
    with pytest.raises(Enough):
        fit([callback])
    added = found[4].found - found[2].found
    print(name, added.total() / 2, added.most_common(12))
    assert added.total() / 2 <= most
