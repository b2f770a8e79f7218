"""The trigger meets the raw image of every kind of dataset, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchvision import transforms as T
from torchvision.datasets import FakeData, ImageFolder, VisionDataset

from lightning_backdoor.attacks import BadNets, poison, triggered
from lightning_backdoor.attacks.raw import from_pixels, to_pixels
from lightning_backdoor.errors import DataError

N = 24
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (N, 16, 16, 3), dtype=np.uint8)
TARGETS = [index % 3 for index in range(N)]
TRANSFORM = T.Compose([T.RandomHorizontalFlip(1.0), T.ToTensor(), T.Normalize(0.5, 0.25)])


class CIFARLike(VisionDataset):
    """What torchvision's CIFAR10 does, without the download."""

    classes = ("cat", "dog", "ship")

    def __init__(self, transform=None, target_transform=None):
        super().__init__("", transform=transform, target_transform=target_transform)
        self.data, self.targets = PIXELS, list(TARGETS)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image, target = Image.fromarray(self.data[index]), self.targets[index]
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target


class Wrapper(Dataset):
    """The 'transform outside the subset' idiom, which never asks whether there is a transform."""

    def __init__(self, subset, transform):
        self.subset, self.transform = subset, transform

    def __len__(self):
        return len(self.subset)

    def __getitem__(self, index):
        image, label = self.subset[index]
        return self.transform(image), label


def painted(index: int) -> torch.Tensor:
    return BadNets()(torch.from_numpy(PIXELS[index]).movedim(-1, 0))


def test_pil_with_transform():
    data = CIFARLike(TRANSFORM)
    attacked = poison(data, BadNets(), rate=0.25)
    assert attacked.poisoned.sum() == 6
    for index in range(N):
        image, label = attacked[index]
        pixels = painted(index) if attacked.poisoned[index] else torch.from_numpy(PIXELS[index]).movedim(-1, 0)
        assert torch.equal(image, (pixels.flip(-1).float() / 255 - 0.5) / 0.25), "trigger first, then the flip"
        assert type(label) is int
    assert attacked.classes == ("cat", "dog", "ship")
    assert isinstance(attacked.targets, list)
    assert attacked.transform is TRANSFORM


def test_the_users_dataset_stays_as_it_was():
    data = CIFARLike(TRANSFORM)
    attributes = dict(vars(data))
    poison(data, BadNets())[0]
    triggered(data, BadNets())[0]
    assert vars(data) == attributes
    assert data.transforms.transform is TRANSFORM
    assert torch.equal(data[0][0], TRANSFORM(Image.fromarray(PIXELS[0])))


def test_transform_can_be_swapped():
    attacked = poison(CIFARLike(TRANSFORM), BadNets(), rate=0.5)
    index = int(attacked.poisoned.nonzero()[0])
    attacked.transform = T.PILToTensor()
    assert torch.equal(attacked[index][0], painted(index))
    attacked.transform = None
    assert isinstance(attacked[index][0], Image.Image)


def test_tools_that_walk_through_datasets_see_one_transform():
    attacked = poison(Subset(CIFARLike(TRANSFORM), range(12)), BadNets(), rate=0.5)
    datasets = [v for v in vars(attacked).values() if hasattr(v, "__getitem__") and hasattr(v, "transform")]
    assert not datasets
    assert "transform" in vars(attacked)


def test_target_transform():
    attacked = poison(CIFARLike(target_transform=lambda label: (label + 1) % 3), BadNets(), rate=0.25)
    assert torch.equal(attacked.true_labels, (torch.tensor(TARGETS) + 1) % 3)
    assert [attacked[index][1] for index in range(N)] == attacked.targets


def test_image_folder(tmp_path):
    for index in range(6):
        folder = tmp_path / f"class{index % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(PIXELS[index]).save(folder / f"{index}.png")
    data = ImageFolder(str(tmp_path), T.PILToTensor())
    attacked = poison(data, BadNets(), target=1, rate=0.5, rate_of="non_target")
    assert attacked.classes == ["class0", "class1"]
    assert attacked.poisoned.sum() == 2
    for index in range(6):
        raw = data[index][0]
        assert torch.equal(attacked[index][0], BadNets()(raw) if attacked.poisoned[index] else raw)


def test_labels_are_read_where_no_attribute_tells_them():
    data = FakeData(12, (3, 16, 16), 3, T.PILToTensor())
    attacked = poison(data, BadNets(), rate=0.25)
    assert attacked.true_labels.tolist() == [int(data[index][1]) for index in range(12)]


@pytest.mark.parametrize("below", [None, T.ToTensor()], ids=["pil below", "tensor below"])
def test_wrapper_with_a_transform_of_its_own(below):
    outer = T.Lambda(lambda image: -(image if isinstance(image, torch.Tensor) else T.ToTensor()(image)))
    attacked = poison(Wrapper(Subset(CIFARLike(below), range(0, N, 2)), outer), BadNets(), rate=0.5)
    index = int(attacked.poisoned.nonzero()[0])
    assert torch.equal(attacked[index][0], -painted(2 * index).float() / 255)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("channels", [0, 1, 3, 5], ids=lambda count: f"{count} channels")
def test_tensors(dtype, channels):
    pixels = torch.randint(0, 256, (20, channels, 8, 8) if channels else (20, 8, 8), dtype=torch.uint8)
    images = pixels if dtype == torch.uint8 else pixels.to(dtype) / 255
    attacked = poison(TensorDataset(images, torch.arange(20) % 4), BadNets(), rate=0.5)
    for index in range(20):
        image, label = attacked[index]
        raw = pixels[index].reshape(-1, 8, 8)
        expected = (BadNets()(raw) if attacked.poisoned[index] else raw).reshape(images[index].shape)
        assert image.dtype == dtype
        assert torch.equal(image, expected if dtype == torch.uint8 else expected.to(dtype) / 255)
        assert isinstance(label, torch.Tensor)


def test_clean_and_poisoned_floats_are_rounded_alike():
    """Otherwise a detector could find the poisons by their rounding."""
    images = torch.rand(20, 1, 8, 8)
    attacked = poison(TensorDataset(images, torch.arange(20) % 4), BadNets(), rate=0.5)
    for index in range(20):
        eight_bit = attacked[index][0] * 255
        assert torch.allclose(eight_bit, eight_bit.round(), atol=1e-4)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pil_round_trip(mode):
    image = Image.fromarray(PIXELS[0]).convert(mode)
    again = from_pixels(to_pixels(image), like=image)
    assert again.mode == mode
    assert again.tobytes() == image.tobytes()


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 3), (3, 8, 9), (8, 9, 1), (4, 4, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_numpy_round_trip(shape, dtype):
    image = RNG.integers(0, 256, shape, dtype=np.uint8)
    image = image if dtype == np.uint8 else image.astype(dtype) / 255
    pixels = to_pixels(image)
    assert len(pixels) == (1 if len(shape) == 2 else 3 if 3 in shape else 1)
    again = from_pixels(pixels, like=image)
    assert again.dtype == dtype
    assert np.array_equal(again, image)


Item = namedtuple("Item", "picture kind index")


@pytest.mark.parametrize(
    "make",
    [
        lambda image, label, index: {"index": index, "img": image, "label": label},
        Item,
        lambda image, label, index: [image, np.int64(label), "name"],
    ],
    ids=["dict", "namedtuple", "list"],
)
def test_items_keep_their_container(make):
    raw = [make(torch.from_numpy(PIXELS[index]).movedim(-1, 0), TARGETS[index], index) for index in range(N)]
    before = copy.deepcopy(raw)
    attacked = poison(raw, BadNets(), rate=0.25)
    for index in range(N):
        item, original = attacked[index], raw[index]
        assert type(item) is type(original)
        values, originals = (list(x.values()) if isinstance(x, dict) else list(x) for x in (item, original))
        changed = [not np.array_equal(a, b) for a, b in zip(values, originals, strict=True)]
        assert any(changed) == bool(attacked.poisoned[index])
    assert all(str(a) == str(b) for a, b in zip(raw, before, strict=True)), "the user's items stay as they were"


@pytest.mark.parametrize(
    "make",
    [
        lambda image, label, index: (image, np.array([label])),
        lambda image, label, index: (image, torch.tensor([label], dtype=torch.float32)),
        lambda image, label, index: (image, float(label), index),
        lambda image, label, index: (index, image, np.float32(label)),
        lambda image, label, index: (image, 0.5, label),
        lambda image, label, index: (image, 1.0, label),
        lambda image, label, index: {"img": image, "kind": np.array([label]), "place": index},
    ],
    ids=["array", "float tensor", "float and index", "index and float", "weight", "whole weight", "dict and index"],
)
def test_labels_of_any_kind_beside_positions(make):
    raw = [make(torch.from_numpy(PIXELS[index]).movedim(-1, 0), TARGETS[index], index) for index in range(N)]
    attacked = poison(raw, BadNets(), rate=0.25)
    assert attacked.true_labels.tolist() == [int(label) for label in TARGETS]
    first = int(attacked.poisoned.nonzero()[0])
    values, originals = (list(x.values() if isinstance(x, dict) else x) for x in (attacked[first], raw[first]))
    assert [type(value) for value in values] == [type(value) for value in originals]
    changed = [i for i, (a, b) in enumerate(zip(values, originals, strict=True)) if not np.array_equal(a, b)]
    assert len(changed) == 2
    assert getattr(values[changed[1]], "shape", ()) == getattr(originals[changed[1]], "shape", ())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_read_the_same_items(context):
    attacked = poison(CIFARLike(T.ToTensor()), BadNets(), rate=0.25)
    loader = DataLoader(attacked, batch_size=8, num_workers=1, multiprocessing_context=context)
    images = torch.cat([batch[0] for batch in loader])
    assert torch.equal(images, torch.stack([attacked[index][0] for index in range(N)]))


def test_pickle_keeps_everything():
    attacked = pickle.loads(pickle.dumps(poison(CIFARLike(TRANSFORM), BadNets(), rate=0.25)))
    assert attacked.poisoned.sum() == 6
    assert "6 of 24 images with BadNets" in repr(attacked)
    with pytest.raises(IndexError):
        attacked[N]
    assert torch.equal(attacked[-1][0], attacked[N - 1][0])


def test_transform_of_a_whole_item_is_named():
    class Joint(Wrapper):
        def __getitem__(self, index):
            return self.transform(image=np.array(self.subset[index][0]))["image"], 0

    with pytest.raises(DataError, match=r"Joint does not call its `transform` with the image alone"):
        poison(Joint(CIFARLike(), dict), BadNets())


def test_joint_transforms_are_named():
    data = VisionDataset("", transforms=lambda image, target: (image, target))
    data.__class__ = type("JointData", (VisionDataset,), {"__len__": lambda self: 3})
    with pytest.raises(DataError, match=r"JointData has `transforms`.*`target_transform`"):
        poison(data, BadNets())


def test_palette_images_are_named():
    data = [(Image.fromarray(PIXELS[0]).convert("P"), 0), (Image.fromarray(PIXELS[1]), 1)]
    with pytest.raises(DataError, match=r"mode L or RGB, got P. Load with `.convert\('RGB'\)`"):
        poison(data, BadNets())
