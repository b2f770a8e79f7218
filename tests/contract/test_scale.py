"""What grows with the number of training images, as a formula: state, files, masks."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_backdoor import Verdict
from lightning_backdoor.loading.batch_schedule import Phases
from lightning_backdoor.loading.samplers import Kept
from lightning_backdoor.report import write_report
from tests.contract.registry import Entry, every_defense

SIZES = [10_000, 100_000]
FIXED = 2**14  # bytes that do not depend on N: names, numbers, the frame of the file


def verdict_of(n: int, *, masks: bool = False) -> Verdict:
    keep = torch.arange(n) % 50 != 0
    scores = torch.rand(n, generator=torch.Generator().manual_seed(0)) + (~keep).float()
    more = {"trusted": keep, "suspect": ~keep} if masks else {}
    return Verdict(scores, keep, 1.0, "planted", torch.arange(n) % 100, **more)


def saved(value: Any) -> int:
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


@every_defense
@pytest.mark.parametrize("masks", [False, True], ids=["plain", "with masks"])
def test_state_in_a_checkpoint_takes_13_bytes_per_image_and_15_with_masks(entry: Entry, masks: bool) -> None:
    callback = entry.make()
    for n in SIZES:
        callback._procedure.verdict = verdict_of(n, masks=masks)
        assert 13 * n <= saved(callback.state_dict()) <= (15 if masks else 13) * n + FIXED


@pytest.mark.parametrize("masks", [False, True], ids=["plain", "with masks"])
def test_files_of_a_verdict(masks: bool, tmp_path: Path) -> None:
    pages = []
    for n in SIZES:
        verdict = verdict_of(n, masks=masks)
        verdict.save(tmp_path / "verdict.pt")
        assert (tmp_path / "verdict.pt").stat().st_size <= (15 if masks else 13) * n + FIXED
        write_report(tmp_path, verdict, method="planted")
        assert (tmp_path / "verdict.csv").stat().st_size <= (46 if masks else 35) * n + FIXED
        pages.append((tmp_path / "report.html").stat().st_size)
    assert abs(pages[1] - pages[0]) < 10_000, "the page does not grow"


def test_a_mask_in_force_takes_eleven_bytes_per_image() -> None:
    for n in SIZES:
        kept = Kept(torch.ones(n, dtype=torch.bool))
        parts = (kept.positions, kept._flags)
        assert sum(map(sys.getsizeof, parts)) + kept.mask.nbytes <= 11 * n + 200


def test_the_phase_of_a_batch_is_not_looked_up_by_sorting_all_batches() -> None:
    phases = Phases(
        [torch.arange(1000), torch.arange(1000, 9000)],
        size=1,
        least=(0, 0),
        mixed=True,
        seed=0,
        rank=0,
        world=1,
        epoch=lambda: 0,
    )
    assert phases._order is phases._order
    assert sum(phases.phase_of(place) for place in range(9000)) == 8000
