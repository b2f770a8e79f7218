"""The verdict of every defense names the files of the training dataset, where it has any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Subset

from tests.callbacks.test_ultraclean_resume import SaveAll
from tests.contract.problem import IMAGES, WARNS, fit, planted
from tests.contract.registry import ENTRIES, Entry

pytestmark = WARNS


def of(name: str) -> Entry:
    """How a defense takes part in the contract; two of them: after some epochs, and before the first one."""
    return next(entry for entry in ENTRIES if entry.name == name)


def named() -> tuple[Any, tuple[str, ...]]:
    """Planted data with files, in another order, and their files in this order."""
    data = planted()
    data.files = [f"images/{position}.png" for position in range(IMAGES)]
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0)).tolist()
    return Subset(data, order), tuple(data.files[position] for position in order)


@pytest.mark.parametrize("entry", [of("UltraCleanCallback"), of("DSTCallback")], ids=lambda entry: entry.name)
def test_a_verdict_has_the_files_of_the_dataset(entry: Entry) -> None:
    callback, (data, files) = entry.make(), named()
    fit([callback], data)
    assert callback.verdict.paths == files


def test_a_resumed_run_has_them(tmp_path: Path) -> None:
    saver, (data, files) = SaveAll(tmp_path), named()
    fit([of("UltraCleanCallback").make(), saver], data)
    callback = of("UltraCleanCallback").make()
    fit([callback], data, ckpt=saver.paths[-1])
    assert callback.verdict.paths == files


def test_data_without_files_have_a_verdict_without_paths() -> None:
    callback = of("UltraCleanCallback").make()
    fit([callback])
    assert callback.verdict.paths is None
