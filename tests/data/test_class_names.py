"""Names of classes from a dataset's own attribute, which holds other things in other datasets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_backdoor.data.nesting import class_names
from lightning_backdoor.report import Evidence


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        (("cat", None, 7), ["cat", "", "7"]),
        (np.array(["cat", "dog"]), ["cat", "dog"]),
        (torch.tensor([3, 5]), ["3", "5"]),
        ([], []),
        (None, None),
        (10, None),
        (torch.tensor(10), None),
        (np.int64(10), None),
        ("cat", None),
        (b"cat", None),
        ({"cat": 0}, None),
        ({"cat"}, None),
        pytest.param(lambda: ["cat"], None, id="a method"),
    ],
)
def test_names_are_texts_of_a_sequence_or_there_are_none(classes: Any, names: list[str] | None) -> None:
    assert class_names(SimpleNamespace(classes=classes)) == names


def test_a_dataset_without_the_attribute_has_no_names() -> None:
    assert class_names([]) is None


def test_a_label_without_a_name_is_told_by_its_number() -> None:
    evidence = Evidence(classes=class_names(SimpleNamespace(classes=["cat", None])))
    assert [evidence.class_name(label) for label in (-1, 0, 1, 2)] == ["class -1", "cat", "class 1", "class 2"]
