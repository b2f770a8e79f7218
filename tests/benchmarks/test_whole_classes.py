"""Training sets in which all images of a class are changed, and the table of what is said of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.whole_classes import CASES, made, table

ROW: dict[str, Any] = {
    "source": "digits", "case": "sig", "seed": 3, "label": 3, "images": 1400, "accuracy": 0.9, "asr": 0.95,
    "named": [[], [[3, 0.9, 0.1, 0.0]]], "flagged": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_all_images_of_one_class_are_changed_and_no_label_is(name: str) -> None:
    images = torch.randint(50, 200, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels = torch.arange(40) % 10
    dataset = made(name, images, labels, 3, 3)
    changed = torch.stack([(dataset[i][0] != images[i]).any() for i in range(40)])
    assert torch.equal(changed, (labels == 3) & (name != "clean"))
    assert [int(dataset[i][1]) for i in range(40)] == labels.tolist()


def test_a_row_of_the_table() -> None:
    assert table([ROW]).endswith("| digits 1,400 | sig | 3 | 3 | 90 | 95 | 2 | none / 3 (90 %) |")
