"""Images and labels are found in any batch, and never guessed."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_backdoor.data import find_layout
from lightning_backdoor.data.origins import Replaced
from lightning_backdoor.errors import ArgumentError, DataError

Pair = namedtuple("Pair", ["img", "cat"])


@dataclass(frozen=True)
class Record:
    picture: torch.Tensor
    kind: torch.Tensor
    note: str = "kept"


@dataclass(frozen=True, slots=True)
class SlimRecord:
    picture: torch.Tensor
    kind: torch.Tensor


class Encoding(UserDict):
    """Like the batches of tokenizers and image processors: a UserDict with extra state."""

    def __init__(self, data: Any, kind: str = "?") -> None:
        super().__init__(data)
        self.kind = kind


class Shelf(Mapping):
    """A mapping that shares its dictionary when copied shallowly."""

    def __init__(self, data: Mapping) -> None:
        self._data = dict(data)

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __iter__(self):
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)


X = torch.rand(4, 3, 8, 8)
Y = torch.tensor([0, 2, 1, 2])

BATCHES = {
    "tuple": (X, Y),
    "list": [X, Y],
    "labels first": (Y, X),
    "nested": [(X, {"deep": Y}), "text"],
    "dict": {"picture": X, "klass": Y},
    "int32": {"a": X, "b": Y.int()},
    "uint8 labels": (X, Y.to(torch.uint8)),
    "uint8 images": ((X * 255).byte(), Y),
    "uint16 images": ((X * 65535).int().to(torch.uint16), Y),
    "int16 images": ((X * 4000 - 1000).short(), Y),
    "int64 images": {"image": (X * 255).long(), "label": Y},
    "grey integers": ((X[:, 0] * 4000).int(), Y),
    "integer mask beside": {"image": X, "segmentation": (X[:, :1] * 9).long(), "label": Y},
    "named integers": {"image": (X * 4000).short(), "depth": X[:, :1], "label": Y},
    "boxes beside integers": {"image": (X * 4000).short(), "boxes": torch.rand(4, 5, 4), "label": Y},
    "half": (X.half(), Y),
    "grey": (X[:, 0], Y),
    "namedtuple": Pair(X, Y),
    "dataclass": Record(X, Y),
    "slots": SlimRecord(X, Y),
    "ordered": OrderedDict(a=X, b=Y),
    "encoding": Encoding({"pixel_values": X, "labels": Y, "attention_mask": torch.ones(4, 5).long()}, "vision"),
    "mapping": Shelf({"x": X, "y": Y}),
    "index named": {"image": X, "label": Y, "index": torch.arange(4)},
    "index unnamed label": {"image": X, "species": Y, "idx": torch.arange(4)},
    "mask beside": {"image": X, "mask": torch.rand(4, 1, 8, 8), "y": Y},
    "trailing box": (X, Y, torch.rand(4, 2)),
    "poison flag": (X, Y, torch.ones(4, dtype=torch.bool)),
}


@pytest.mark.parametrize("name", BATCHES)
def test_images_and_labels_are_found_and_replaced(name: str) -> None:
    batch = BATCHES[name]
    before = repr(batch)
    layout = find_layout(batch)
    images = layout.images(batch)
    assert images.shape[0] == 4
    assert layout.labels(batch).dtype == torch.int64
    assert layout.labels(batch).tolist() == Y.tolist()
    new = torch.zeros_like(images)
    changed = layout.with_images(batch, new)
    assert type(changed) is type(batch)
    assert layout.images(changed) is new
    assert layout.labels(changed).tolist() == Y.tolist()
    assert layout.images(batch) is images
    assert repr(batch) == before, "the user's batch is not changed"


def test_extra_state_of_containers_survives() -> None:
    layout = find_layout(BATCHES["encoding"])
    assert layout.with_images(BATCHES["encoding"], X).kind == "vision"
    assert find_layout(BATCHES["dataclass"]).with_images(BATCHES["dataclass"], X).note == "kept"


def test_the_given_names_win_over_order() -> None:
    batch = {"index": torch.arange(4), "image": X, "target": Y}
    assert find_layout(batch).label_path == ("target",)


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y, torch.arange(4)),
        {"image": X, "fine_label": Y, "coarse_label": Y},
        {"image": X, "a": Y, "b": Y},
        (X, X.clone(), Y),
        (torch.arange(4), Y),
        (X, torch.rand(4, 3), Y),
        ["text", 3],
        None,
    ],
    ids=["index", "fine and coarse", "two keys", "two views", "no image", "soft then index", "nothing", "none"],
)
def test_ambiguity_is_an_error_that_names_batch_fn(batch: Any) -> None:
    with pytest.raises(ArgumentError, match=r"`batch_fn`.*\(images, labels\).*batch_fn=lambda batch"):
        find_layout(batch)


def test_integers_are_images_only_where_no_others_are() -> None:
    mask = torch.randint(0, 9, (4, 8, 8))
    assert find_layout((mask, X, Y)).image_path == (1,)
    assert find_layout((mask.unsqueeze(1), X[:, 0], Y)).image_path == (1,)
    assert find_layout({"image": (X * 9).long(), "mask": X[:, :1], "label": Y}).image_path == ("image",)
    assert find_layout({"image": X, "input": (X * 9).long(), "label": Y}).image_path == ("image",)
    with pytest.raises(ArgumentError, match="no tensor of the batch looks like images"):
        find_layout((torch.ones(4, 3, 8, 8, dtype=torch.bool), Y))


def test_the_message_lists_what_arrived() -> None:
    with pytest.raises(
        ArgumentError, match=r"\[.a.\]: int64 \(4,\), values 0, 2, 1, 2 \(3 different\); batch\[.b.\]: int64"
    ):
        find_layout({"image": X, "a": Y, "b": Y})


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.rand(4, 3), r"float32 \(4, 3\)"),
        (torch.rand(4), r"float32 \(4,\)"),
        (torch.ones(4, 3).long(), r"int64 \(4, 3\)"),
        (Y - 1, "smallest is -1"),
    ],
    ids=["one-hot", "floating", "multi-label", "negative"],
)
@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_labels_that_are_not_class_indices(labels: torch.Tensor, words: str, form: str) -> None:
    batch = (X, labels) if form == "tuple" else {"image": X, "label": labels, "index": torch.arange(4)}
    layout = find_layout(batch)
    with pytest.raises(DataError, match=f"labels that are not class indices: .*{words}"):
        layout.labels(batch)


def test_a_batch_without_labels_still_has_images() -> None:
    layout = find_layout([X])
    assert layout.images([X]) is X
    with pytest.raises(ArgumentError, match=r"no labels.*`batch_fn`"):
        layout.labels([X])


def test_channels_last_arrays_are_explained() -> None:
    batch = (X.permute(0, 2, 3, 1).contiguous(), Y)
    with pytest.raises(ArgumentError, match=r"\(B, H, W, C\).*permute\(0, 3, 1, 2\)"):
        find_layout(batch)


RAW = torch.randint(0, 65536, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)).int()
SCALE = torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
COMPUTED: dict[str, tuple[Any, Any, float]] = {
    "fractions": ((RAW.to(torch.uint16), Y), lambda b: b[0].float() / 65535, 1e-5),
    "normalised": ({"x": RAW.byte(), "y": Y}, lambda b: (b["x"].float() / 255 - 0.4) / SCALE, 1e-2),
    "doubled": ((X, Y), lambda b: b[0] * 2, 1e-6),
    "inverted": ((RAW, Y), lambda b: 1 - b[0].double() / 65535, 1e-5),
    "channels last": ([RAW.permute(0, 2, 3, 1).contiguous(), Y], lambda b: b[0].permute(0, 3, 1, 2) / 65535.0, 1e-5),
    "grey": ((RAW[:, 0].short(), Y), lambda b: b[0].float() / 1000 - 1, 1e-3),
    "grey with a channel": ((RAW[:, 0].contiguous(), Y), lambda b: b[0].unsqueeze(1) / 65535.0, 1e-5),
    "half": ((RAW.byte(), Y), lambda b: (b[0] / 255).half(), 2e-3),
}


class TestBatchFn:
    def test_picks_and_replaces_by_identity(self) -> None:
        other = torch.rand(4, 3, 8, 8)
        batch = {"views": [other, X], "t": {"y": Y, "i": torch.arange(4)}}
        layout = find_layout(batch, lambda b: (b["views"][1], b["t"]["y"]))
        new = torch.zeros_like(X)
        changed = layout.with_images(batch, new)
        assert changed["views"][0] is other
        assert changed["views"][1] is new
        assert batch["views"][1] is X
        assert layout.labels(batch).tolist() == Y.tolist()

    def test_works_on_the_next_batch(self) -> None:
        layout = find_layout((X, X + 1, Y), lambda b: (b[1], b[2]))
        second = (X * 2, X * 3, Y)
        assert torch.equal(layout.with_images(second, X)[1], X)
        assert torch.equal(layout.images(second), X * 3)

    @pytest.mark.parametrize("form", ["permuted", "sliced"])
    def test_writes_through_views(self, form: str) -> None:
        if form == "permuted":
            whole, view = X.permute(0, 2, 3, 1).contiguous(), lambda t: t.permute(0, 3, 1, 2)
        else:
            whole, view = torch.rand(4, 2, 3, 8, 8), lambda t: t[:, 1]
        before = whole.clone()
        layout = find_layout((whole, Y), lambda b: (view(b[0]), b[1]))
        new = torch.rand(4, 3, 8, 8)
        changed = layout.with_images((whole, Y), new)
        assert torch.equal(view(changed[0]), new)
        assert torch.equal(whole, before)
        assert changed[0].shape == whole.shape
        if form == "sliced":
            assert torch.equal(changed[0][:, 0], whole[:, 0])

    @pytest.mark.parametrize("name", COMPUTED)
    def test_computed_images_are_traced_back(self, name: str) -> None:
        batch, compute, tolerance = COMPUTED[name]
        before = repr(batch)
        layout = find_layout(batch, lambda b: (compute(b), Y)).traced(batch)
        images = layout.images(batch)
        new = images.flip(0, -1)
        changed = layout.with_images(batch, new)
        assert type(changed) is type(batch)
        assert layout.images(changed).dtype == images.dtype
        assert torch.allclose(layout.images(changed), new, atol=tolerance)
        assert torch.allclose(layout.images(layout.with_images(batch, images)), images, atol=tolerance)
        leaf, twin = (next(iter(b.values())) if isinstance(b, dict) else b[0] for b in (batch, changed))
        assert (leaf.dtype, leaf.shape) == (twin.dtype, twin.shape)
        assert repr(batch) == before, "the user's batch is not changed"

    @pytest.mark.parametrize(
        "compute",
        [
            lambda x: x.sqrt(),
            lambda x: x.clamp(max=0.9),
            lambda x: (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True),
            lambda x: torch.nn.functional.avg_pool2d(x, 2),
            lambda x: x.mean(1),
            lambda x: x * 0,
        ],
        ids=["root", "clamp", "by image", "smaller", "grey", "constant"],
    )
    def test_images_computed_otherwise_stand_beside_the_batch(self, compute: Any) -> None:
        layout = find_layout((X, Y), lambda b: (compute(b[0]), b[1])).traced((X, Y))
        new = layout.images((X, Y)) + 1
        changed = layout.with_images((X, Y), new)
        assert isinstance(changed, Replaced)
        assert changed.batch[0] is X
        assert layout.images(changed) is new
        assert layout.labels(changed).tolist() == Y.tolist()
        assert layout.images(layout.with_images(changed, new * 2)).equal(new * 2)
        assert find_layout(changed, layout.batch_fn).images(changed) is new

    def test_of_two_tensors_that_one_is_changed_that_is_read(self) -> None:
        batch = {"shown": X * 2, "read": X, "y": Y}
        layout = find_layout(batch, lambda b: (b["read"] * 3, b["y"])).traced(batch)
        changed = layout.with_images(batch, X.flip(0) * 3)
        assert changed["shown"] is batch["shown"]
        assert torch.allclose(changed["read"], X.flip(0))

    def test_tensors_of_the_batch_have_no_origin(self) -> None:
        for batch_fn in (None, lambda b: (b[0].transpose(2, 3), b[1])):
            layout = find_layout((X, Y), batch_fn)
            assert layout.traced((X, Y)) is layout

    def test_must_return_a_pair_of_images_and_labels(self) -> None:
        with pytest.raises(ArgumentError, match="`batch_fn` must return a pair"):
            find_layout((X, Y), lambda b: b[0])
        with pytest.raises(ArgumentError, match=r"`batch_fn` must return .*int64 \(4,\)"):
            find_layout((X, Y), lambda b: (b[1], b[0]))

    def test_can_repair_labels(self) -> None:
        hot = torch.eye(3)[Y]
        assert find_layout((X, hot), lambda b: (b[0], b[1].argmax(1))).labels((X, hot)).tolist() == Y.tolist()


@settings(max_examples=60, deadline=None)
@given(
    form=st.recursive(
        st.just("pair"), lambda inner: st.tuples(st.sampled_from(["tuple", "list", "dict"]), inner), max_leaves=4
    ),
    size=st.integers(1, 5),
    channels=st.integers(1, 5),
    gray=st.booleans(),
    swap=st.booleans(),
    keyed=st.booleans(),
)
def test_any_nesting(*, form: Any, size: int, channels: int, gray: bool, swap: bool, keyed: bool) -> None:
    images = torch.rand(size, 6, 7) if gray else torch.rand(size, channels, 6, 7)
    labels = torch.arange(size)

    def build(shape: Any) -> Any:
        if shape == "pair":
            pair = [labels, images] if swap else [images, labels]
            return {"p": pair[0], "q": pair[1]} if keyed else tuple(pair)
        inner = build(shape[1])
        return {"tuple": (inner, "meta"), "list": [inner, 3.0], "dict": {"k": inner, "n": None}}[shape[0]]

    batch = build(form)
    layout = find_layout(batch)
    assert layout.images(batch) is images
    assert torch.equal(layout.labels(batch), labels)
    twin = layout.with_images(batch, images + 1)
    assert torch.equal(layout.images(twin), images + 1)
    assert torch.equal(layout.labels(twin), labels)
    assert layout.images(batch) is images
