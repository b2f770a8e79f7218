"""A scan reads every item by index, repeatably, and leaves no trace."""

from __future__ import annotations

import gc
import pickle
import random
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, default_collate
from torch.utils.data import get_worker_info as worker_info
from torchvision.transforms import v2

from lightning_backdoor.data import IndexedView, check_dataset, find_layout, scan_loader
from lightning_backdoor.data.views import read_items, scan_batch_size
from lightning_backdoor.errors import DataError


@pytest.fixture(autouse=True)
def _workers_gone():
    """A failed pass lives on in its traceback; collected inside a later worker, it would hold that worker up."""
    yield
    gc.collect()


class Noisy(Dataset):
    """Every item draws from torch, NumPy and random, as augmentation does."""

    def __init__(self, n: int = 13) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        noise = torch.rand(1, 4, 4) + float(np.random.rand()) + random.random()
        return noise + i, i % 3


class HubLike:
    """Not a torch Dataset; dict items, as Hugging Face datasets give them."""

    def __init__(self, n: int = 10) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: Any) -> dict[str, Any]:
        assert isinstance(i, int)
        return {"img": torch.full((3, 4, 4), float(i)), "fine_label": i % 4, "id": i}


def scanned(loader: Any, indices: Any = None, **settings: Any) -> dict[int, torch.Tensor]:
    n = len(loader.dataset)
    view = scan_loader(loader, range(n) if indices is None else indices, **{"seed": 0, **settings})
    found: dict[int, torch.Tensor] = {}
    for positions, batch in view:
        assert positions.dtype == torch.int64
        images = find_layout(batch).images(batch)
        assert len(images) == len(positions)
        found.update(zip(positions.tolist(), images, strict=True))
    return found


def equal(a: dict[int, torch.Tensor], b: dict[int, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[i], b[i]) for i in a)


def test_items_do_not_depend_on_batch_size_order_or_workers() -> None:
    loader = DataLoader(Noisy(), batch_size=4, shuffle=True)
    want = scanned(loader)
    assert sorted(want) == list(range(13))
    assert equal(want, scanned(loader, batch_size=5))
    assert equal(want, scanned(loader, num_workers=1))
    assert equal(
        want, {**scanned(loader, [12, 3, 7]), **scanned(loader, [i for i in range(13) if i not in (3, 7, 12)])}
    )
    assert not equal(want, scanned(loader, seed=1))
    noise = {round(float((image - i).flatten()[0]), 5) for i, image in want.items()}
    assert len(noise) == 13, "items have noise of their own"


def test_the_users_worker_settings_are_used() -> None:
    view = scan_loader(DataLoader(Noisy(), num_workers=1, prefetch_factor=3, timeout=50), [0], seed=0)
    assert (view.num_workers, view.prefetch_factor, view.timeout) == (1, 3, 50)
    plain = scan_loader(DataLoader(Noisy(), num_workers=1, timeout=50), [0], seed=0, num_workers=0)
    assert (plain.num_workers, plain.timeout) == (0, 0)


def test_random_streams_are_untouched() -> None:
    loader = DataLoader(Noisy(), batch_size=4, shuffle=True, collate_fn=drawing_collate)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for _ in scan_loader(loader, range(13), seed=0):
        assert torch.equal(torch.get_rng_state(), states[0]), "also between batches"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_random_streams_are_restored_when_an_item_fails() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        IndexedView(Broken(), [0], 0)[0]
    assert torch.equal(torch.get_rng_state(), state)


class Broken(Noisy):
    def __getitem__(self, i: int) -> Any:
        torch.rand(3)
        return 1 / 0


def drawing_collate(items: list[Any]) -> Any:
    images, labels = default_collate(items)
    return images + torch.rand(()) + random.random(), labels


def test_a_random_collate_is_repeatable() -> None:
    loader = DataLoader(Noisy(), batch_size=4, collate_fn=drawing_collate)
    first = scanned(loader)
    torch.manual_seed(99)
    assert equal(first, scanned(loader))
    assert not equal(first, scanned(DataLoader(Noisy(), batch_size=4)))


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"batch_size": 6}, 6),
        ({"batch_sampler": BatchSampler(SequentialSampler(range(13)), 5, drop_last=True)}, 5),
        ({"batch_sampler": [[0, 1], [2]]}, 128),
        ({"batch_size": None}, 128),
        ({"batch_size": None, "sampler": BatchSampler(SequentialSampler(range(13)), 7, drop_last=False)}, 7),
    ],
    ids=["batch_size", "batch sampler", "list of lists", "no batching", "sampler of lists"],
)
def test_batch_size_is_the_loaders(settings: dict[str, Any], size: int) -> None:
    view = scan_loader(DataLoader(Noisy(), **settings), range(13), seed=0)
    assert view.batch_size == size
    positions, batch = next(iter(view))
    assert batch[0].shape == (min(size, 13), 1, 4, 4)
    assert positions.tolist() == list(range(min(size, 13)))
    assert scan_loader(DataLoader(Noisy(), **settings), range(13), seed=0, batch_size=3).batch_size == 3


@pytest.mark.parametrize(
    ("settings", "cpu", "cuda"),
    [
        ({"batch_size": 6}, 6, 24),
        ({"batch_sampler": BatchSampler(SequentialSampler(range(13)), 5, drop_last=True)}, 5, 20),
        ({"batch_sampler": [[0, 1], [2]]}, 128, 512),
        ({"batch_size": None}, 128, 512),
        ({"batch_size": 200}, 200, 512),
        ({"batch_size": 600}, 600, 600),
    ],
    ids=["batch_size", "batch sampler", "list of lists", "no batching", "up to a limit", "beyond it"],
)
def test_scans_on_a_gpu_take_more_images_at_once(settings: dict[str, Any], cpu: int, cuda: int) -> None:
    loader = DataLoader(Noisy(), **settings)
    assert [scan_batch_size(loader, device) for device in ("cpu", "mps", "cuda")] == [cpu, cpu, cuda]


def test_datasets_that_are_not_torch_datasets() -> None:
    (positions, batch), *_ = scan_loader(DataLoader(HubLike(), batch_size=4), torch.tensor([1, 8, 5]), seed=0)
    assert positions.tolist() == [1, 8, 5]
    layout = find_layout(batch)
    assert layout.labels(batch).tolist() == [1, 0, 1]
    assert layout.images(batch)[:, 0, 0, 0].tolist() == [1.0, 8.0, 5.0]


def test_a_rank_without_work_gets_nothing() -> None:
    assert list(scan_loader(DataLoader(Noisy()), [], seed=0)) == []


def named_collate(items: list[Any]) -> dict[str, Any]:
    images, labels = default_collate(items)
    return {"pic": images, "label": labels}


def test_the_users_collate_is_used_and_the_loader_is_not_touched() -> None:
    loader = DataLoader(Noisy(), batch_size=4, shuffle=True, collate_fn=named_collate)
    before = dict(vars(loader))
    _, batch = next(iter(scan_loader(loader, range(13), seed=0)))
    assert set(batch) == {"pic", "label"}
    assert vars(loader).keys() == before.keys()
    assert all(vars(loader)[key] is value for key, value in before.items())


class TestMixingCollate:
    @staticmethod
    def loader(workers: int = 0) -> DataLoader:
        return DataLoader(Noisy(), batch_size=4, collate_fn=mixing_collate, num_workers=workers)

    @pytest.mark.case("52")
    @pytest.mark.parametrize("workers", [0, 1])
    def test_is_replaced_with_one_warning(self, workers: int) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = scanned(self.loader(workers))
        assert len(caught) == 1
        assert "mixes labels" in str(caught[0].message)
        assert "Training is not affected" in str(caught[0].message)
        assert equal(got, scanned(DataLoader(Noisy(), batch_size=4)))

    def test_soft_labels_of_the_dataset_are_not_mixing(self) -> None:
        loader = DataLoader(Soft(), batch_size=4, collate_fn=list_collate)
        _, batch = next(iter(scan_loader(loader, range(8), seed=0)))
        assert isinstance(batch, list)
        with pytest.raises(DataError, match="labels that are not class indices"):
            find_layout(batch).labels(batch)

    @pytest.mark.parametrize("mixed", [False, True])
    def test_a_column_of_floats_is_mixed_only_if_it_has_fractions(self, mixed: bool) -> None:
        def binary_collate(items: list[Any]) -> Any:
            images, labels = default_collate(items)
            column = (labels[:, None] > 0).float()
            return images, 0.7 * column + 0.3 * column.roll(1) if mixed else column

        loader = DataLoader(Noisy(), batch_size=4, collate_fn=binary_collate)
        collated = scan_loader(loader, range(8), seed=0).collated()
        assert [unmixed for _, _, unmixed in collated] == [mixed, mixed]


class Soft(Noisy):
    def __getitem__(self, i: int) -> Any:
        return torch.zeros(1, 4, 4), torch.tensor([0.3, 0.7])


def list_collate(items: list[Any]) -> list[Any]:
    return list(default_collate(items))


def mixing_collate(items: list[Any]) -> Any:
    return v2.RandomChoice([v2.CutMix(num_classes=3), v2.MixUp(num_classes=3)])(*default_collate(items))


def dropping_collate(items: list[Any]) -> Any:
    return default_collate([item for item in items if item[1] != 2])


def losing_collate(items: list[Any]) -> None:
    return None


def merging_collate(items: list[Any]) -> Any:
    return default_collate(items[: max(1, len(items) // 2)])


class Holes(Noisy):
    """Some files cannot be read, two of them in a row."""

    def __getitem__(self, i: int) -> Any:
        return None if i in (1, 4, 5, 12) else super().__getitem__(i)


class HalfHoles(Holes):
    """The same, with labels."""

    def __getitem__(self, i: int) -> Any:
        item = super().__getitem__(i)
        return (None, i % 3) if item is None else item


def filtering_collate(items: list[Any]) -> Any:
    return default_collate([item for item in items if item is not None and item[0] is not None])


def yielding_collate(items: list[Any]) -> Any:
    """A collate that gives nothing for nothing, which Lightning skips."""
    left = [item for item in items if item is not None]
    return default_collate(left) if left else None


@pytest.mark.case("52")
@pytest.mark.parametrize("size", [1, 2, 4, 13])
@pytest.mark.parametrize(
    ("data", "collate", "dropped"),
    [
        (Noisy(), dropping_collate, {2, 5, 8, 11}),
        (Holes(), filtering_collate, {1, 4, 5, 12}),
        (HalfHoles(), filtering_collate, {1, 4, 5, 12}),
        (Holes(), yielding_collate, {1, 4, 5, 12}),
    ],
    ids=["by label", "none", "image none", "nothing for nothing"],
)
def test_positions_of_what_a_collate_drops_are_left_out(data: Any, collate: Any, dropped: set[int], size: int) -> None:
    size += collate is dropping_collate  # which raises for a batch that holds nothing else, in the training, too
    loader = DataLoader(data, batch_size=size, shuffle=True, collate_fn=collate)
    got = scanned(loader)
    assert got.keys() == set(range(13)) - dropped
    assert equal(got, {i: image for i, image in scanned(DataLoader(Noisy(), batch_size=4)).items() if i not in dropped})


def test_a_worker_knows_what_was_dropped() -> None:
    loader = DataLoader(Holes(), batch_size=2, collate_fn=filtering_collate, num_workers=1)
    assert equal(scanned(loader), scanned(loader, num_workers=0))


@pytest.mark.parametrize("collate", [merging_collate])
def test_a_collate_that_merges_samples_is_an_error(collate: Any) -> None:
    loader = DataLoader(Noisy(), batch_size=4, collate_fn=collate)
    with pytest.raises(DataError, match=r"`collate_fn` returned 2 images for 4 samples.*leave bad samples out"):
        list(scan_loader(loader, range(13), seed=0))


def test_a_collate_that_drops_everything_leaves_nothing() -> None:
    assert list(scan_loader(DataLoader(Noisy(), batch_size=4, collate_fn=losing_collate), range(13), seed=0)) == []


def test_an_error_of_the_collate_is_its_own() -> None:
    with pytest.raises(ZeroDivisionError):
        list(scan_loader(DataLoader(Noisy(), batch_size=4, collate_fn=failing_collate), range(13), seed=0))
    with pytest.raises(TypeError, match="NoneType"):
        list(scan_loader(DataLoader(Holes(), batch_size=4, collate_fn=named_collate), range(13), seed=0))


def failing_collate(items: list[Any]) -> Any:
    return 1 / 0


class Opened(Noisy):
    """Opens its file in worker_init_fn, so it cannot be read elsewhere."""

    handle = None

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        assert self.handle == "open", "read outside a worker"
        return torch.zeros(1, 4, 4), i


def open_in_worker(_: int) -> None:
    worker_info().dataset.handle = "open"


def test_worker_init_meets_the_users_dataset() -> None:
    loader = DataLoader(Opened(), batch_size=4, num_workers=1, worker_init_fn=open_in_worker)
    assert len(scanned(loader)) == 13
    assert [label for _, label in read_items(loader, [0, 12])] == [0, 12]


def test_everything_that_spawned_workers_need_can_be_pickled() -> None:
    view = scan_loader(DataLoader(Noisy(), num_workers=1), [3, 4], seed=0)
    dataset, collate, _ = pickle.loads(pickle.dumps((view.dataset, view.collate_fn, view.worker_init_fn)))
    positions, batch, unmixed = collate(dataset.__getitems__([0, 1]))
    assert positions.tolist() == [3, 4]
    assert not unmixed
    assert torch.equal(batch[0][0], scanned(DataLoader(Noisy()))[3])


@pytest.mark.slow
def test_spawned_workers_can_read_the_view() -> None:
    loader = DataLoader(Noisy(4), batch_size=2, num_workers=1, multiprocessing_context="spawn")
    assert equal(scanned(loader), scanned(loader, num_workers=0))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


class Endless(Dataset):
    def __getitem__(self, i: int) -> int:
        return i


@pytest.mark.parametrize(
    ("dataset", "words"),
    [(Stream(), "map-style.*Stream"), (Noisy(0), "empty.*length 0"), (Endless(), "must have a length, Endless")],
)
def test_datasets_that_cannot_be_scanned(dataset: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        check_dataset(dataset)
    with pytest.raises(DataError, match=words):
        scan_loader(SimpleNamespace(dataset=dataset), [0], seed=0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(-(2**70), 2**70), index=st.integers(0, 10**12))
def test_any_seed_and_index(seed: int, index: int) -> None:
    class Far:
        def __getitem__(self, i: int) -> float:
            return float(torch.rand(())) + i * 0

        def __len__(self) -> int:
            return 2

    values = [IndexedView(Far(), [i], s)[0][1] for i, s in ((index, seed), (index, seed), (index + 1, seed))]
    assert values[0] == values[1]
    assert values[0] != values[2]
