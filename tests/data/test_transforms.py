"""Augmentation goes off for the scan, and every attribute of the user's datasets comes back."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split
from torchvision import transforms as v1
from torchvision.datasets import FakeData, ImageFolder, VisionDataset, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from lightning_backdoor.data import choose_transform, scan_loader, transforms_of, transforms_swapped
from lightning_backdoor.errors import ArgumentError, DataError

TRAIN = v1.Compose([v1.RandomCrop(8, padding=4), v1.ColorJitter(0.5), v1.ToTensor()])
EVAL = v1.Compose([v1.CenterCrop(8), v1.ToTensor()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(8):
        (root / f"class{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (10, 10, 3), dtype=np.uint8)).save(root / f"class{i % 2}" / f"{i}.png")
    return root


class Outside(Dataset):
    """The 'transform outside Subset' wrapper that everybody writes after random_split."""

    def __init__(self, subset: Any, transform: Any) -> None:
        self.subset, self.transform = subset, transform

    def __len__(self) -> int:
        return len(self.subset)

    def __getitem__(self, i: int) -> Any:
        image, label = self.subset[i]
        return self.transform(image), label


class Duck:
    """Not a torch Dataset, holds others in a dict, calls its attribute `transforms` with the image alone."""

    def __init__(self, base: Any, transforms: Any) -> None:
        self.parts = {"only": base}
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.parts["only"])

    def __getitem__(self, i: int) -> dict[str, Any]:
        image, label = self.parts["only"][i]
        return {"image": self.transforms(image), "label": label}


class JointVision(VisionDataset):
    """Calls `transforms` with image and target, as detection datasets do."""

    def __init__(self, base: Any, **settings: Any) -> None:
        super().__init__(root="", **settings)
        self.base = base

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, i: int) -> Any:
        return self.transforms(*self.base[i])


def fake(transform: Any = None) -> FakeData:
    return FakeData(8, (3, 10, 10), 4, transform=transform)


FORMS = {
    "fake": lambda root, t: fake(t),
    "folder": lambda root, t: ImageFolder(str(root), transform=t),
    "subset": lambda root, t: Subset(ImageFolder(str(root), transform=t), [5, 1, 3]),
    "split": lambda root, t: random_split(fake(t), [6, 2], torch.Generator().manual_seed(0))[0],
    "concat": lambda root, t: ConcatDataset([fake(t), Subset(fake(t), [2, 3])]),
    "mixed concat": lambda root, t: ConcatDataset([fake(t), ImageFolder(str(root), transform=t)]),
    "outside": lambda root, t: Outside(Subset(ImageFolder(str(root)), [4, 0, 2]), t),
    "duck": lambda root, t: Duck(fake(), t),
    "joint": lambda root, t: JointVision(fake(), transform=t),
    "joint callable": lambda root, t: JointVision(fake(), transforms=JointOf(t)),
    "timm": lambda root, t: ImageDataset(str(root), transform=t),
    "wrapped v2": lambda root, t: wrap_dataset_for_transforms_v2(ImageFolder(str(root), transform=t)),
}

# timm leaves closing its image files to the garbage collector
CLOSES_LATE = [
    pytest.mark.filterwarnings(f"ignore::{name}")
    for name in ("ResourceWarning", "pytest.PytestUnraisableExceptionWarning")
]
EVERY_FORM = [pytest.param(form, marks=CLOSES_LATE if form == "timm" else ()) for form in FORMS]


class JointOf:
    def __init__(self, transform: Any) -> None:
        self.inner = transform

    def __call__(self, image: Any, target: Any = None) -> Any:
        return self.inner(image) if target is None else (self.inner(image), target)


def image_of(item: Any) -> torch.Tensor:
    return item["image"] if isinstance(item, dict) else item[0]


def anatomy(node: Any, seen: set[int] | None = None) -> list[tuple[int, list[tuple[str, int]]]]:
    """Identity of every attribute of every object that hangs on a dataset."""
    seen = set() if seen is None else seen
    if id(node) in seen or not hasattr(node, "__dict__") or isinstance(node, type | torch.Tensor):
        return []
    seen.add(id(node))
    found = [(id(node), [(name, id(value)) for name, value in vars(node).items()])]
    for value in list(vars(node).values()):
        for inner in value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]:
            found += anatomy(inner, seen)
    return found


@pytest.mark.case("51")
@pytest.mark.parametrize("form", EVERY_FORM)
@pytest.mark.parametrize("source", ["argument", "validation"])
def test_random_before_fixed_inside_restored_after(form: str, source: str, folder: Path) -> None:
    dataset = FORMS[form](folder, TRAIN)
    twin = FORMS[form](folder, EVAL)
    before = anatomy(dataset)
    choice = choose_transform(dataset, None, EVAL) if source == "argument" else choose_transform(dataset, twin)
    assert choice.source == source, choice.description
    with transforms_swapped(dataset, choice):
        for i in range(len(dataset)):
            assert torch.equal(image_of(dataset[i]), image_of(twin[i]))
    assert anatomy(dataset) == before
    assert not torch.equal(image_of(dataset[0]), image_of(dataset[0])), "augmentation is back"


@pytest.mark.case("51")
@pytest.mark.parametrize("form", EVERY_FORM)
def test_restored_on_errors(form: str, folder: Path) -> None:
    dataset = FORMS[form](folder, TRAIN)
    before = anatomy(dataset)
    with pytest.raises(KeyboardInterrupt), transforms_swapped(dataset, choose_transform(dataset, None, EVAL)):
        raise KeyboardInterrupt
    assert anatomy(dataset) == before


def test_a_different_wrapper_on_the_same_raw_data_still_counts(folder: Path) -> None:
    train = Outside(Subset(ImageFolder(str(folder)), [0, 1, 2]), TRAIN)
    choice = choose_transform(train, ImageFolder(str(folder), transform=EVAL))
    assert choice.source == "validation"
    with transforms_swapped(train, choice):
        assert torch.equal(train[1][0], train[1][0])


def test_a_validation_set_without_transform_means_none() -> None:
    class Tensors(Dataset):
        def __init__(self, transform: Any = None) -> None:
            self.x, self.transform = torch.rand(6, 1, 8, 8), transform

        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> Any:
            return (self.transform(self.x[i]) if self.transform else self.x[i]), 0

    train = Tensors(v2.RandomCrop(8, padding=3))
    choice = choose_transform(train, Tensors())
    assert choice.source == "validation"
    with transforms_swapped(train, choice):
        assert torch.equal(train[2][0], train.x[2])
    assert isinstance(train.transform, v2.RandomCrop)


def test_two_transforms_one_inside_the_other() -> None:
    def build(inner: Any, outer: Any) -> Outside:
        return Outside(fake(inner), outer)

    train = build(v1.RandomCrop(9), TRAIN)
    choice = choose_transform(train, build(v1.CenterCrop(9), EVAL))
    assert choice.source == "validation"
    want = build(v1.CenterCrop(9), EVAL)
    with transforms_swapped(train, choice):
        assert torch.equal(train[3][0], want[3][0])
    given = choose_transform(train, None, EVAL)
    with transforms_swapped(train, given):
        assert isinstance(train.subset.transform, v1.RandomCrop), "only the outermost is the user's to replace"
        assert train.transform is EVAL


def test_target_transforms_stay() -> None:
    dataset = JointVision(fake(), transform=TRAIN, target_transform=lambda label: label + 100)
    with transforms_swapped(dataset, choose_transform(dataset, None, EVAL)):
        assert dataset[0][1] >= 100


class OtherRaw(FakeData):
    pass


@pytest.mark.parametrize(
    ("val", "reason"),
    [
        (None, "no validation dataset"),
        (OtherRaw(4, (3, 10, 10), transform=EVAL), "built differently"),
        (TensorDataset(torch.zeros(3, 3, 8, 8)), "built differently"),
        (fake(TRAIN), "shares it"),
        (fake(v1.Compose([v1.CenterCrop(6), v1.ToTensor()])), "another shape or dtype"),
        (fake(v1.Compose([v1.CenterCrop(8), v1.PILToTensor()])), "another shape or dtype"),
        (fake(v1.Normalize(0.5, 0.5)), "fails on training images with TypeError"),
    ],
    ids=["none", "other class", "tensors", "same transform", "shape", "dtype", "fails"],
)
def test_else_the_training_transform_stays_and_says_why(val: Any, reason: str) -> None:
    train = fake(TRAIN)
    before = anatomy(train)
    choice = choose_transform(train, val)
    assert choice.source == "training"
    assert reason in choice.description
    assert "`eval_transform`" in choice.description
    with transforms_swapped(train, choice):
        assert train.transform.transforms == [TRAIN.transforms[0], TRAIN.transforms[2]], "all but ColorJitter"
    assert anatomy(train) == before


def test_data_without_transform_are_read_as_they_are() -> None:
    data = TensorDataset(torch.rand(4, 3, 8, 8), torch.arange(4))
    choice = choose_transform(data, data)
    assert choice.source == "none"
    assert "TensorDataset" in choice.description
    with transforms_swapped(data, choice):
        pass
    with transforms_swapped(data, None):
        pass


class Flipping(TensorDataset):
    """Augments by itself."""

    def __getitem__(self, i: int) -> Any:
        image, label = super().__getitem__(i)
        return [image.flip(1) if torch.rand(()) < 0.5 else image, {"label": label, "text": "x"}]


def test_augmentation_without_an_attribute_is_told() -> None:
    data = Flipping(torch.rand(9, 3, 8, 8), torch.arange(9))
    for train in (data, DataLoader(data, batch_size=2)):
        choice = choose_transform(train)
        assert choice.source == "dataset's own"
        assert "Flipping augments its images at random" in choice.description
        assert "`eval_dataset`" in choice.description


def test_items_that_cannot_be_compared_are_not_taken_for_random() -> None:
    class Odd(TensorDataset):
        def __getitem__(self, i: int) -> Any:
            return torch.full((3,), torch.nan), object(), None, Image.new("RGB", (2, 2)), torch.ones(2).bfloat16()

    assert choose_transform(Odd(torch.rand(2, 3))).source == "none"


class TestArgument:
    def test_needs_something_to_replace(self) -> None:
        with pytest.raises(
            ArgumentError, match=r"`eval_transform` was given, but TensorDataset.*Pass `eval_dataset` instead"
        ):
            choose_transform(TensorDataset(torch.rand(4, 3)), None, EVAL)

    def test_must_be_callable(self) -> None:
        with pytest.raises(ArgumentError, match="`eval_transform` must be callable, got str"):
            choose_transform(fake(TRAIN), None, "center crop")  # type: ignore[arg-type]

    def test_must_accept_the_raw_image(self) -> None:
        train = fake(TRAIN)
        before = anatomy(train)
        with pytest.raises(ArgumentError, match=r"`eval_transform` fails on a training image: TypeError.*FakeData"):
            choose_transform(train, None, v1.Normalize(0.5, 0.5))
        assert anatomy(train) == before

    def test_may_change_the_shape(self) -> None:
        assert choose_transform(fake(TRAIN), None, v1.ToTensor()).source == "argument"


def test_reading_goes_through_the_workers_of_the_loader() -> None:
    loader = DataLoader(OnlyInWorkers(8, (3, 10, 10), transform=TRAIN), num_workers=1)
    assert choose_transform(loader, OnlyInWorkers(8, (3, 10, 10), transform=EVAL)).source == "validation"
    assert choose_transform(loader, None, EVAL).source == "argument"


class OnlyInWorkers(FakeData):
    def __getitem__(self, index: int) -> Any:
        assert torch.utils.data.get_worker_info() is not None
        return super().__getitem__(index)


def test_choosing_draws_nothing() -> None:
    state = torch.get_rng_state()
    choose_transform(fake(TRAIN), fake(EVAL))
    choose_transform(DataLoader(fake(TRAIN), shuffle=True), None, EVAL)
    assert torch.equal(torch.get_rng_state(), state)


def test_empty_data() -> None:
    with pytest.raises(DataError, match="empty"):
        choose_transform(FakeData(0, transform=TRAIN))


def test_transforms_in_the_order_of_application() -> None:
    inner, outer = v1.CenterCrop(9), v1.ToTensor()
    assert transforms_of(Subset(Outside(fake(inner), outer), [0])) == [inner, outer]
    assert transforms_of(TensorDataset(torch.rand(2, 3))) == []


def test_datasets_that_hold_each_other() -> None:
    a, b = Outside(fake(), TRAIN), Outside(fake(), TRAIN)
    a.peer, b.peer = b, a
    assert choose_transform(a, None, EVAL).source == "argument"


def test_a_swapped_dataset_can_go_to_spawned_workers(folder: Path) -> None:
    for form in ("folder", "joint", "duck"):
        dataset = FORMS[form](folder, TRAIN)
        with transforms_swapped(dataset, choose_transform(dataset, None, EVAL)):
            copy = pickle.loads(pickle.dumps(dataset))
            assert torch.equal(image_of(copy[0]), image_of(dataset[0]))


class OwnStream:
    """What matters of albumentations' Compose: keywords, items, a length, and a random stream of its own."""

    def __init__(self, strength: float) -> None:
        self.strength, self.random = strength, np.random.default_rng(0)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> Any:
        return self

    def set_random_seed(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def __call__(self, *, image: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": image + np.float32(self.strength * self.random.random())}


class Composed(Dataset):
    """Calls its attribute by keyword, whatever its name is."""

    def __init__(self, transform: Any, name: str = "transform") -> None:
        self.images, self.name = np.zeros((12, 3, 4, 4), np.float32), name
        setattr(self, name, transform)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        transform = getattr(self, self.name)
        return self.images[i] if transform is None else transform(image=self.images[i])["image"], i % 3


def values(dataset: Any, choice: Any, workers: int = 0) -> torch.Tensor:
    """One number of every image as the scan reads it."""
    with transforms_swapped(dataset, choice):
        view = scan_loader(DataLoader(dataset, batch_size=4), range(12), seed=0, num_workers=workers)
        return torch.cat([images[:, 0, 0, 0] for _, (images, _) in view])


@pytest.mark.parametrize("name", ["transform", "augment"])
def test_a_transform_with_a_random_stream_of_its_own_is_read_by_the_seed_of_the_scan(name: str) -> None:
    dataset = Composed(OwnStream(1.0), name)
    choice = choose_transform(dataset)
    first = values(dataset, choice)
    assert len(first.unique()) == 12, "every image has its own draw"
    assert torch.equal(first, values(dataset, choice))
    untouched = np.random.default_rng(0).random()
    assert getattr(dataset, name).random.random() == untouched, "the training draws what it would have drawn"


@pytest.mark.slow
def test_a_transform_with_a_random_stream_of_its_own_is_read_alike_in_workers() -> None:
    dataset = Composed(OwnStream(1.0))
    choice = choose_transform(dataset)
    assert torch.equal(values(dataset, choice), values(dataset, choice, workers=2))


@pytest.mark.parametrize("val", [OwnStream(0.0), None])
@pytest.mark.parametrize("name", ["transform", "transforms"])
def test_compositions_with_items_and_a_length_are_no_datasets(val: Any, name: str) -> None:
    train = Composed(OwnStream(1.0), name)
    choice = choose_transform(train, Composed(val, name))
    assert choice.source == "validation"
    assert not values(train, choice).any()
    assert transforms_of(train) == [getattr(train, name)]


AUGMENTING = {
    "v1": lambda: v1.Compose([v1.RandomAffine(15), v1.RandomHorizontalFlip(), v1.ColorJitter(0.5), v1.ToTensor()]),
    "nested": lambda: v1.Compose([v1.Compose([v1.RandomCrop(10, padding=2), v1.ToTensor()]), v1.RandomErasing()]),
}


@pytest.mark.parametrize("way", ["v1", "nested"])
@pytest.mark.parametrize("form", ["fake", "subset", "outside", "wrapped v2"])
def test_without_validation_the_random_steps_of_the_training_transform_are_left_out(
    way: str, form: str, folder: Path
) -> None:
    transform = AUGMENTING[way]()
    dataset = FORMS[form](folder, transform)
    steps = list(transform.transforms)
    choice = choose_transform(dataset)
    assert choice.source == "training"
    words = "RandomAffine, RandomHorizontalFlip, ColorJitter" if way == "v1" else "RandomCrop, RandomErasing"
    assert f"without its random steps ({words}), because there is no validation dataset." in choice.description
    assert "eval_transform" not in choice.description
    plain = FORMS[form](folder, v1.ToTensor())
    with transforms_swapped(dataset, choice):
        assert all(torch.equal(dataset[i][0], plain[i][0]) for i in range(3))
    assert transform.transforms == steps
    assert transforms_of(dataset) == [transform]


def test_what_is_random_and_cannot_be_left_out_is_seeded() -> None:
    dataset = fake(TRAIN)
    choice = choose_transform(dataset)
    assert "without its random steps (ColorJitter)" in choice.description
    assert "What else is random in it is seeded per image. Pass `eval_transform`" in choice.description


class Own:
    """A step of the user's own, which may do more than to augment."""

    def __call__(self, image: Any) -> Any:
        return v1.functional.adjust_brightness(image, 0.5 + float(torch.rand(())))


@pytest.mark.parametrize("step", [Own(), v2.Lambda(Own()), v1.ToTensor()])
def test_other_steps_than_the_random_ones_of_libraries_stay(step: Any) -> None:
    choice = choose_transform(fake(v1.Compose([step])))
    assert "with the training transform, seeded per image" in choice.description


def test_a_lone_random_transform_is_replaced_by_none() -> None:
    dataset = fake(v2.RandomAffine(15))
    with transforms_swapped(dataset, choose_transform(dataset)):
        assert np.array_equal(dataset[0][0], fake()[0][0])
