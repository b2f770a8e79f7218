"""Labels as people have them: columns, floats and flags, beside positions and beside other columns."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from lightning_backdoor.data import find_layout
from lightning_backdoor.data.batches import class_indices
from lightning_backdoor.data.nesting import positions_in
from lightning_backdoor.errors import ArgumentError, DataError

X = torch.rand(6, 3, 8, 8)
Y = torch.tensor([0, 2, 1, 2, 0, 1])
TWO = Y.clamp(max=1)
AT = torch.tensor([3, 11, 40, 41, 50, 63])  # dataset positions


@pytest.mark.parametrize("form", ["tuple", "dict", "batch_fn"])
@pytest.mark.parametrize(
    "labels",
    [Y[:, None], Y[:, None].to(torch.uint8), Y.float(), Y[:, None].double(), Y.half(), TWO.bool(), TWO[:, None].bool()],
    ids=["column", "uint8 column", "float", "double column", "half", "bool", "bool column"],
)
def test_one_whole_number_for_each_image_is_its_class(labels: Tensor, form: str) -> None:
    batch = {"image": X, "label": labels, "index": AT} if form == "dict" else (X, labels)
    layout = find_layout(batch, (lambda b: (b[0], b[1])) if form == "batch_fn" else None)
    found = layout.labels(batch)
    assert found.dtype == torch.int64
    assert found.tolist() == (TWO if labels.dtype == torch.bool else Y).tolist()


def test_flags_and_weights_stand_beside_labels() -> None:
    for batch in (
        (X, Y.bool(), Y),
        {"image": X, "label": Y, "poisoned": Y.bool()},
        (X, Y, torch.rand(6)),
        (X, Y, torch.ones(6)),
        (X, Y, Y[:, None]),
        (X, Y.float(), torch.rand(6, 4)),
    ):
        assert find_layout(batch).labels(batch).tolist() == Y.tolist()


HOT = torch.eye(3)[Y]
MANY = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0]]).repeat(2, 1)


@pytest.mark.parametrize(
    ("labels", "words", "change"),
    [
        (HOT, "look one-hot", ".argmax(1)"),
        (HOT.long(), "look one-hot", ".argmax(1)"),
        (0.9 * HOT + 0.1 * HOT.flip(0), "look mixed or smoothed", ".argmax(1)"),
        (torch.randn(6, 3), "look like scores", ".argmax(1)"),
        (torch.stack([Y, Y + 5], 1), "have 2 columns", "[:, 0]"),
        (MANY, "look multi-label: an image has 0 to 2 classes", None),
        (MANY.float(), "look multi-label", None),
        (MANY.bool(), "look multi-label", None),
        (Y + 0.3, "have fractions", None),
        (torch.full((6, 1), torch.nan), "have fractions", None),
    ],
    ids=["hot", "int hot", "mixed", "scores", "two columns", "many", "float many", "bool many", "fractions", "nan"],
)
@pytest.mark.parametrize("form", ["tuple", "dict", "batch_fn"])
def test_what_is_refused_is_named_and_the_remedy_works(
    labels: Tensor, words: str, change: str | None, form: str
) -> None:
    batch: Any = {"image": X, "label": labels} if form == "dict" else (X, labels)
    layout = find_layout(batch, (lambda b: (b[0], b[1])) if form == "batch_fn" else None)
    with pytest.raises(DataError, match=f"labels that are not class indices: .*They {words}") as error:
        layout.labels(batch)
    said = str(error.value)
    if change is None:
        assert "argmax" not in said
    elif form == "batch_fn":
        assert f"Let `batch_fn` return (images, labels{change})" in said
    else:
        line = re.search(r"batch_fn=(lambda batch: \(.*?\))(?:,| if)", said)
        assert line is not None
        expected = labels[:, 0] if change == "[:, 0]" else labels.argmax(1)
        assert find_layout(batch, eval(line[1])).labels(batch).tolist() == expected.tolist()


def test_labels_that_are_no_tensor_or_a_class_for_every_pixel() -> None:
    with pytest.raises(DataError, match=r"got list\. Let the dataset return the number of the class"):
        class_indices(["cat", "dog"])
    with pytest.raises(DataError, match=r"int64 \(2, 4, 4\).*for every pixel"):
        class_indices(torch.zeros(2, 4, 4).long())


@pytest.mark.parametrize("positions", [[AT], [torch.arange(6), AT]], ids=["flat", "nested"])
def test_a_column_of_dataset_positions_is_not_the_label(positions: list[Tensor]) -> None:
    for batch in ((X, Y, AT), (X, AT, Y), (X, Y.float()[:, None], AT), {"image": X, "a": AT.int(), "b": Y}):
        assert find_layout(batch, positions=positions).labels(batch).tolist() == Y.tolist()
        with pytest.raises(ArgumentError, match="2 tensors could be the labels"):
            find_layout(batch, positions=[AT + 1])
    assert find_layout((X, TWO.bool(), AT), positions=positions).labels((X, TWO.bool(), AT)).tolist() == TWO.tolist()


def test_a_lone_column_is_the_label_whatever_it_holds() -> None:
    assert find_layout((X, AT), positions=[AT]).labels((X, AT)).tolist() == AT.tolist()
    with pytest.raises(ArgumentError, match="2 tensors"):  # three samples may be numbered so by chance
        find_layout((X[:3], Y[:3], torch.arange(3)), positions=[torch.arange(3)])


def test_positions_are_followed_through_subsets_and_wrappers() -> None:
    class Wrapper:
        def __init__(self, dataset: Any) -> None:
            self.dataset = dataset

        def __len__(self) -> int:
            return len(self.dataset)

        def __getitem__(self, i: int) -> Any:
            return self.dataset[i]

    whole = TensorDataset(torch.arange(20))
    nested = Subset(Wrapper(Subset(whole, list(range(19, -1, -2)))), [1, 3, 5, 7, 9])
    found = [positions.tolist() for positions in positions_in(nested, torch.tensor([0, 2, 4]))]
    assert found[0] == [0, 2, 4]
    assert found[-1] == [17, 9, 1]
    assert [1, 5, 9] in found
    assert [int(nested[i][0]) for i in (0, 2, 4)] == found[-1]


def test_candidates_are_listed_and_the_line_for_the_first_works() -> None:
    batch = {"image": X, "fine_label": Y, "coarse_label": TWO.int()}
    with pytest.raises(ArgumentError) as error:
        find_layout(batch)
    said = str(error.value)
    assert 'batch["fine_label"]: int64 (6,), values 0, 2, 1, 2, 0, ... (3 different)' in said
    assert 'batch["coarse_label"]: int32 (6,), values 0, 1, 1, 1, 0, ... (2 different)' in said
    line = said[said.index("batch_fn=") + len("batch_fn=") : -1]
    assert line == 'lambda batch: (batch["image"], batch["fine_label"])'
    assert find_layout(batch, eval(line)).labels(batch).tolist() == Y.tolist()
