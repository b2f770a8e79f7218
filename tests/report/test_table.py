from __future__ import annotations

import csv
import io
import time

import numpy as np
import pytest
import torch

from lightning_backdoor.report.table import class_rows, csv_chunks
from lightning_backdoor.verdict import Finding, Verdict
from tests.report.helpers import verdict


def read(judged: Verdict, rows: int = 7) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO("".join(csv_chunks(judged, rows)))))


def test_csv_holds_the_verdict_exactly():
    judged = verdict(50, 5)
    rows = read(judged)
    assert [int(row["index"]) for row in rows] == list(range(50))
    assert [int(row["label"]) for row in rows] == judged.labels.tolist()
    assert torch.equal(torch.tensor([float(row["score"]) for row in rows]), judged.scores)
    assert [row["keep"] for row in rows] == [str(kept) for kept in judged.keep.tolist()]


def test_csv_of_double_scores_is_exact():
    scores = torch.rand(20, dtype=torch.float64) * 1e-7
    rows = read(Verdict(scores=scores, keep=torch.ones(20, dtype=torch.bool), threshold=1.0, rule="r"))
    assert [float(row["score"]) for row in rows] == scores.tolist()
    assert {row["label"] for row in rows} == {"-1"}


def test_csv_reads_back_as_the_frame(tmp_path):
    pd = pytest.importorskip("pandas")
    suggested = torch.tensor([2, -1])
    found = tuple(
        Finding(k, torch.arange(2) + k, "strict", (), torch.arange(1), torch.ones(1), 0.5, suggested_labels=suggested)
        for k in (0, 7)
    )
    judged = verdict(30, 3)
    masks = {"trusted": torch.arange(30) > 20, "suspect": torch.arange(30) < 3, "approved": judged.keep}
    paths = tuple(f'a "{i}", b.png' for i in range(30))
    judged = Verdict(**{**vars(judged), **masks, "findings": found, "paths": paths})
    read_back = pd.read_csv(io.StringIO("".join(csv_chunks(judged))))
    frame = judged.to_frame()
    assert list(read_back.columns) == list(frame.columns)
    for column in frame.columns:
        assert read_back[column].astype(frame[column].dtype).equals(frame[column])
    assert frame["finding"].dropna().to_dict() == {0: 0, 1: 0, 7: 1, 8: 1}
    assert frame["suggested_label"].dropna().to_dict() == {0: 2, 7: 2}
    assert frame["path"].tolist() == list(paths)


def test_class_rows_equal_counting_by_hand():
    judged = verdict(203, 21, classes=5)
    rows = class_rows(judged)
    assert sum(row.images for row in rows) == 203
    for row in rows:
        mine = judged.labels == row.label
        assert row.images == int(mine.sum())
        assert row.removed == int((mine & ~judged.keep).sum())
        assert row.median == pytest.approx(float(np.median(judged.scores[mine].numpy())))
    assert [row.removed for row in rows] == sorted((row.removed for row in rows), reverse=True)
    assert class_rows(verdict(10, 2, labels=False)) == []


def test_a_chunk_is_bounded_and_a_large_table_is_quick():
    judged = verdict(300_000, 3_000)
    start = time.process_time()
    sizes = [len(chunk) for chunk in csv_chunks(judged)]
    assert time.process_time() - start < 30  # about half a second; a row-by-row frame takes minutes
    assert len(sizes) == 4
    assert max(sizes) < 5_000_000
