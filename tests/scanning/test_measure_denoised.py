"""Rows in memory and on disk behave alike."""

from __future__ import annotations

import errno
import os
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_backdoor.errors import DataError
from lightning_backdoor.scanning import measure_denoised
from lightning_backdoor.scanning.measure_denoised import RowStore

SHAPE = (3, 4, 5)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go during the test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def draw(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("limit", [0, 20 * 60 - 1, 20 * 60, 2**31], ids=["disk", "just-disk", "just-memory", "memory"])
def test_reads_what_was_written(folder: Path, limit: int) -> None:
    values, order = draw(20), torch.randperm(20, generator=torch.Generator().manual_seed(1))
    store = RowStore(20, limit)
    for positions in order.split(7):
        assert not store.has(positions)
        store.write(positions, values[positions])
        assert store.has(positions)
    assert store.on_disk == (limit < 20 * 60)
    assert any(folder.iterdir()) == store.on_disk
    found = store.read(torch.tensor([4, 19, 4, 0]))
    assert found.dtype == torch.uint8
    assert torch.equal(found, values[[4, 19, 4, 0]])
    store.close()


@pytest.mark.parametrize("limit", [0, 2**31])
def test_what_was_read_is_a_copy(folder: Path, limit: int) -> None:
    store, one = RowStore(3, limit), torch.tensor([1])
    store.write(one, draw(1))
    store.read(one).zero_()
    assert torch.equal(store.read(one), draw(1))
    store.close()


@pytest.mark.parametrize("limit", [0, 2**31])
def test_rows_can_be_written_again(folder: Path, limit: int) -> None:
    store, one = RowStore(3, limit), torch.tensor([2])
    store.write(one, draw(1))
    store.write(one, draw(1, seed=5))
    assert torch.equal(store.read(one), draw(1, seed=5))
    store.close()


@pytest.mark.parametrize("limit", [0, 2**31])
def test_unwritten_rows_are_no_zeros(folder: Path, limit: int) -> None:
    store = RowStore(3, limit)
    with pytest.raises(KeyError, match="never written"):
        store.read(torch.tensor([0]))
    store.write(torch.tensor([0]), draw(1))
    with pytest.raises(KeyError, match="never written"):
        store.read(torch.tensor([0, 1]))
    store.close()


class Arrival:
    """Stands in for an event of a GPU: values are in main memory once it has been waited for."""

    def __init__(self, host: Tensor, values: Tensor) -> None:
        self.host, self.values, self.waits = host, values, 0

    def synchronize(self) -> None:
        self.waits += 1
        self.host.copy_(self.values)


@pytest.mark.parametrize("limit", [0, 2**31])
def test_rows_from_a_gpu_are_waited_for_when_the_next_ones_come(
    folder: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    arrivals: list[Arrival] = []

    def to_host(values: Tensor) -> tuple[Tensor, Any]:
        host = torch.zeros_like(values)
        arrivals.append(Arrival(host, values))
        return host, arrivals[-1]

    monkeypatch.setattr(measure_denoised, "_to_host", to_host)
    values, store = draw(20), RowStore(20, limit)
    for number, positions in enumerate(torch.arange(20).split(5)):
        store.write(positions, values[positions])
        assert store.has(positions)
        assert [arrival.waits for arrival in arrivals] == [1] * number + [0]
    assert torch.equal(store.read(torch.arange(20)), values)
    store.write(torch.tensor([0]), values[:1])
    store.close()
    assert [arrival.waits for arrival in arrivals] == [1] * 4 + [0]
    store.write(torch.tensor([3]), values[3:4])
    assert torch.equal(store.read(torch.tensor([3])), values[3:4])
    store.close()


@pytest.mark.gpu
def test_rows_from_a_gpu() -> None:
    values, store = draw(20), RowStore(20)
    for positions in torch.arange(20).split(5):
        store.write(positions, values[positions].cuda())
    assert torch.equal(store.read(torch.arange(20)), values)


def test_close_deletes_the_file_and_the_store_can_be_used_again(folder: Path) -> None:
    store = RowStore(3, 0)
    store.write(torch.tensor([0]), draw(1))
    assert len(list(folder.iterdir())) == 1
    store.close()
    assert not list(folder.iterdir())
    assert not store.has(torch.tensor([0]))
    store.close()
    store.write(torch.tensor([0]), torch.zeros(1, 2, dtype=torch.uint8))
    assert torch.equal(store.read(torch.tensor([0])), torch.zeros(1, 2, dtype=torch.uint8))
    store.close()


def test_a_forgotten_store_leaves_no_file(folder: Path) -> None:
    store = RowStore(3, 0)
    store.write(torch.tensor([0]), draw(1))
    with pytest.warns(ResourceWarning, match="Implicitly cleaning up"):
        del store
    assert not list(folder.iterdir())


def test_images_of_another_size_name_the_remedy(folder: Path) -> None:
    store = RowStore(3)
    store.write(torch.tensor([0]), draw(1))
    with pytest.raises(DataError, match=r"one shape, got \(3, 9, 9\) after \(3, 4, 5\)"):
        store.write(torch.tensor([1]), torch.zeros(1, 3, 9, 9, dtype=torch.uint8))
    assert not store.has(torch.tensor([1]))


@pytest.mark.cpu
def test_memory_does_not_grow_with_the_rows_on_disk(folder: Path) -> None:
    def peak(rows: int) -> int:
        tracemalloc.start()
        store = RowStore(rows, 0)
        for start in range(0, rows, 50):
            store.write(torch.arange(start, start + 50), draw(50))
            store.read(torch.arange(start, start + 50))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        store.close()
        return found

    peak(50)
    assert peak(4000) < peak(200) + 20_000  # 4,000 rows are 240 kB


def full_disk(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_file_has_its_blocks_before_the_first_row(folder: Path) -> None:
    store = RowStore(5000, 0)
    store.write(torch.tensor([0]), draw(1))
    (file,) = folder.glob("*/rows.dat")
    assert file.stat().st_size == 5000 * 60
    assert file.stat().st_blocks * 512 >= 5000 * 60, "a hole in the file is space that can run out"
    store.close()


@pytest.mark.parametrize("function", ["os.posix_fallocate", "tempfile.mkdtemp"])
def test_a_full_disk_is_an_error_that_names_the_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    monkeypatch.setattr(function, full_disk)
    store = RowStore(3 * 2**20, 0)
    with pytest.raises(DataError, match=rf"`cache_bytes`.*0\.18 GiB.*'{folder}'.*No space left.*TMPDIR.*raise"):
        store.write(torch.tensor([0]), draw(1))
    assert not list(folder.iterdir())
    assert not store.on_disk
    assert not store.has(torch.tensor([0]))


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, None], ids=["not on this file system", "not on this platform"])
def test_where_space_cannot_be_claimed_it_works_as_before(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    def unsupported(*args: Any) -> None:
        raise OSError(code, "unsupported")

    monkeypatch.delattr(os, "posix_fallocate")
    if code is not None:
        monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    store = RowStore(3, 0)
    store.write(torch.tensor([2]), draw(1))
    assert torch.equal(store.read(torch.tensor([2])), draw(1))
    store.close()
