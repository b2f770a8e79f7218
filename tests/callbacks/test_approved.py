"""The forms in which approved samples are passed, what is wrong with some, and what a verdict says of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_backdoor import UltraCleanCallback, Verdict
from lightning_backdoor.callbacks.approved import approved_samples, with_approved
from lightning_backdoor.errors import ArgumentError, DataError
from lightning_backdoor.report.table import csv_chunks
from lightning_backdoor.verdict import Finding
from tests.callbacks.helpers import LIGHTNING_WARNS, Net, Pictures, loader_of, make_trainer
from tests.callbacks.test_ultraclean_cli import CLIS, QUIET, cli_of, defense_of

pytestmark = LIGHTNING_WARNS
SIZE = 12
LABELS = torch.arange(SIZE) % 3
FILES = tuple(f"/moved/{place}.png" for place in range(SIZE))


class SizedFiles(SimpleNamespace):
    """A dataset that names its files."""

    def __len__(self) -> int:
        return len(self.paths)


class Scanner(SimpleNamespace):
    """What is read of a training set: two labels at the start, and those of single positions."""

    def __init__(self, labels: Tensor = LABELS) -> None:
        places = torch.tensor([0, 7])
        files = [f"/photos/{place}.png" for place in range(len(labels))]
        dataset = SizedFiles(paths=files)
        super().__init__(all=labels, probe=(places, labels[places]), loader=SimpleNamespace(dataset=dataset))

    def __len__(self) -> int:
        return len(self.all)

    def labels_at(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return indices, self.all[indices]


def mask(*places: int) -> Tensor:
    found = torch.zeros(SIZE, dtype=torch.bool)
    found[list(places)] = True
    return found


def verdict(**fields: Any) -> Verdict:
    given = {"scores": torch.arange(12.0), "keep": ~mask(9, 11), "threshold": 8.0, "rule": "known", "labels": LABELS}
    return Verdict(**{**given, **fields})


def finding(*places: int, **fields: Any) -> Finding:
    few = torch.zeros(1)
    return Finding(0, torch.tensor(places), "strict", (), few.long(), few, 0.5, **fields)


def read(given: Any, labels: Tensor = LABELS) -> list[int]:
    return approved_samples(given, Scanner(labels)).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([1, 5], [1, 5]),
        ((), []),
        (range(2), [0, 1]),
        (torch.tensor([5, 1, 1]), [1, 5]),
        (np.array([3], dtype=np.int32), [3]),
        (mask(2, 4), [2, 4]),
        (mask(2, 4).tolist(), [2, 4]),
        (verdict(), [9, 11]),
        (verdict(findings=(finding(4, 9),)), [4, 9, 11]),
        (verdict(approved=mask(3)), [3]),
        (verdict(approved=mask()), []),
        (verdict(labels=None), [9, 11]),
        (verdict(paths=FILES), [9, 11]),
    ],
)
def test_positions_masks_and_verdicts(given: Any, expected: list[int]) -> None:
    assert read(given) == expected


def test_files(tmp_path: Path) -> None:
    saved, table = tmp_path / "verdict.pt", tmp_path / "verdict.csv"
    verdict(approved=mask(3, 4)).save(saved)
    table.write_text("".join(csv_chunks(verdict(approved=mask(3, 4), paths=FILES))))
    assert read(saved) == read(str(saved)) == read(table) == read(str(table)) == [3, 4]


@pytest.mark.parametrize(
    "text",
    [
        "index,approved\n3,yes\n4,X\n5,\n6,no\n7,FALSE\n8,0\n9, True \n10,1\n",
        "\ufeffindex;approved;label\r\n3;yes;0\r\n4;x;1\r\n5;;2\r\n9;YES;0\r\n10;true;-1\r\n",
        "approved,label,note,index\nyes,,a,3\nyes,,b,4\n,,,5\nyes,,,9\nyes,,,10\n",
        "sep=;\r\nindex;approved\r\n3;TRUE\r\n4;x\r\n9;x\r\n10;x\r\n;\r\n ;;\r\n",
        "index,approved\r3,x\r4,x\r4,yes\r9,x\r10,x\r",
    ],
)
def test_tables_as_people_and_spreadsheets_write_them(text: str, tmp_path: Path) -> None:
    path = tmp_path / "reviewed.csv"
    path.write_bytes(text.encode())
    assert read(path) == [3, 4, 9, 10]
    path = tmp_path / "REVIEWED.CSV"
    path.write_bytes(text.removeprefix("\ufeff").encode("utf-16"))
    assert read(path) == [3, 4, 9, 10]


@pytest.mark.parametrize("data", ["index,approved,path\n3,yes,ä.png\n".encode("latin-1"), bytes(range(256))])
def test_a_table_in_another_encoding_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "reviewed.csv"
    path.write_bytes(data)
    with pytest.raises(ArgumentError, match=r"`approved` must be a table in UTF-8.*Save it as `CSV UTF-8`"):
        read(path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([12], "positions from 0 to 11, .* got 12"),
        ([3, -1], "positions from 0 to 11, .* got -1"),
        ([0.5], r"whole numbers of shape \(M,\), got torch.float"),
        ([[1]], r"whole numbers of shape \(M,\), got torch.int64 \(1, 1\)"),
        (torch.ones(5, dtype=torch.bool), "mask of the 12 training samples, got 5"),
        ({"a": 1}, "dataset positions, a verdict, or the path .* got dict"),
        ("nothing.csv", "path of a file that is there, got 'nothing.csv'"),
        (__file__, r"saved verdict \(.pt\) or a table \(.csv\)"),
    ],
)
def test_what_cannot_be_read_is_named(given: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=f"`approved` must .*{words}"):
        read(given)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("index,keep\n3,yes\n", "lacks approved; it has index, keep"),
        ("", "lacks index and approved; it has none"),
        ("index,approved,approved\n3,yes,\n", "two columns approved"),
        ("index,approved\n3,yes\n4,\n3,\n", r"sample 3 is approved in one row .* not in another \(line 4"),
        ("sep=,\nindex,approved\n3,maybe\n", "got 'maybe' in line 3 of"),
        ("index,approved\n3,maybe\n", "got 'maybe' in line 2 of"),
        ("index,approved\n3.5,yes\n", "whole numbers as index, got '3.5' in line 2"),
        ("index,approved\nyes\n", "whole numbers as index, got 'yes' in line 2"),
        ("index,approved,label\n3,yes,cat\n", "whole numbers as label, got 'cat'"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "reviewed.csv"
    path.write_text(text)
    with pytest.raises(ArgumentError, match=words):
        read(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("index,approved\n12,\n", "is on sample 12, the training dataset has 12"),
        ("index,approved,label\n7,,2\n", "sample 7 has label 2 there and 1 in the training dataset"),
        ("index,approved,label\n2,yes,0\n", "sample 2 has label 0 there and 2 in the training dataset"),
        ("index,path,approved\n3,a/3.png,\n4,a/3.png,\n", "sample 4 is a/3.png there and /photos/4.png in the"),
    ],
)
def test_a_table_of_another_dataset_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "reviewed.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=f"another dataset.*{words}"):
        read(path)


def test_a_verdict_on_another_dataset_is_refused() -> None:
    with pytest.raises(DataError, match=r"another dataset .*it knows 12 samples, the training dataset has 9"):
        read(verdict(), LABELS[:9])
    with pytest.raises(DataError, match="sample 0 has label 0 there and 2 in the training"):
        read(verdict(), LABELS.flip(0))
    with pytest.raises(DataError, match=r"sample 0 is /moved/11.png there and /photos/0.png"):
        read(verdict(paths=FILES[::-1]))


def test_a_verdict_with_approved_samples() -> None:
    findings = (finding(2), finding(9, 4, suggested_labels=torch.tensor([1, 2])))
    found = with_approved(verdict(findings=findings, suspect=mask(9, 11), trusted=mask(9)), mask(2, 9))
    assert found.removed.tolist() == [11]
    assert found.suspect.nonzero().flatten().tolist() == [11]
    assert torch.equal(found.approved, mask(2, 9))
    assert found.scores[[2, 9]].tolist() == [0.0, 0.0]
    (left,) = found.findings
    assert left.positions.tolist() == [4]
    assert left.suggested_labels.tolist() == [2], "of the same sample"
    assert torch.equal(with_approved(found, mask(3)).approved, mask(2, 3, 9)), "with those of the verdict before"
    assert bool(with_approved(verdict(), torch.ones(SIZE, dtype=torch.bool)).keep.all())


def test_what_cannot_be_approved_is_said_before_the_first_step() -> None:
    callback = UltraCleanCallback(approved=[64])
    with pytest.raises(ArgumentError, match="`approved` must hold positions from 0 to 63"):
        make_trainer([callback], 1).fit(Net(), loader_of(Pictures(), 16))


def test_representation() -> None:
    assert repr(UltraCleanCallback(approved="reviewed.csv")) == "UltraCleanCallback(approved='reviewed.csv')"
    assert repr(UltraCleanCallback(approved=[1, 2])) == "UltraCleanCallback(approved=[1, 2])"


@pytest.mark.parametrize("package", CLIS, ids=lambda package: package.__name__)
@pytest.mark.parametrize(("text", "value"), [("[1, 5]", [1, 5]), ("reviewed.csv", "reviewed.csv")])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_by_flag(package: Any, text: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fit"])
    flags = ["--trainer.callbacks+=lightning_backdoor.UltraCleanCallback", f"--trainer.callbacks.approved={text}"]
    assert defense_of(cli_of(package, [*QUIET, *flags], run=False)).approved == value
