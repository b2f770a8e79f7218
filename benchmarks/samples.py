"""Small training sets of known content: real images as they are, with clean kinds of image, wrong labels, or an attack.

Every set says of each sample what is true of it, so that an alarm can be told from a hit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import TensorDataset

from benchmarks import data as packed_images
from benchmarks.data import unpacked
from benchmarks.digits import all_digits
from benchmarks.digits import digits as split_digits
from benchmarks.training import images_of
from lightning_backdoor import attacks

SIDE = 32


@dataclass(frozen=True)
class Samples:
    """A training set and the truth about it.

    Attributes:
        images: uint8 ``(N, 3, 32, 32)``.
        labels: Labels as a victim receives them, long ``(N,)``.
        true: What the images show, long ``(N,)``.
        poisoned: Samples that teach a backdoor, bool ``(N,)``.
        covers: Triggered samples with their own label, bool ``(N,)``.
        kind: Samples of a clean kind of image, bool ``(N,)``.
        group: Samples of one number show the same thing (a track of GTSRB, copies of an image), long ``(N,)``.
    """

    images: Tensor
    labels: Tensor
    true: Tensor
    poisoned: Tensor
    covers: Tensor
    kind: Tensor
    group: Tensor

    @classmethod
    def clean(cls, images: Tensor, labels: Tensor, group: Tensor | None = None) -> Samples:
        """Images with the right labels; without ``group`` each shows a thing of its own."""
        none = torch.zeros(len(labels), dtype=torch.bool)
        return cls(images, labels, labels, none, none, none, torch.arange(len(labels)) if group is None else group)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Samples:
        return Samples(**{name: column[rows] for name, column in vars(self).items()})

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.labels.max()) + 1

    @property
    def notable(self) -> Tensor:
        """Poisons and samples of a clean kind, bool ``(N,)``."""
        return self.poisoned | self.kind


# Where the images come from.


@cache
def _cifar10(folder: Path) -> tuple[Tensor, Tensor]:
    images, labels, _ = unpacked(folder, "train")
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


@cache
def packed_signs(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "gtsrb.npz") as packed:
        return {name: packed[name] for name in ("x", "y", "track")}


def drawn(total: int, seed: int) -> Tensor:
    """All positions below ``total`` in random order."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))


def cifar10(folder: Path, count: int, seed: int, classes: tuple[int, ...] = tuple(range(10))) -> Samples:
    """So many images of some classes, the same number of each, in random order; labels count from zero."""
    images, labels = _cifar10(folder)
    order, each = drawn(len(labels), seed), count // len(classes)
    rows = torch.cat([order[labels[order] == label][:each] for label in classes])
    rows = rows[drawn(len(rows), seed)]
    return Samples.clean(images[rows], torch.tensor([classes.index(label) for label in labels[rows].tolist()]))


def gtsrb(folder: Path, count: int, seed: int) -> Samples:
    """About so many traffic signs of 43 classes, whole tracks, in random order; every class has two tracks at least."""
    packed = packed_signs(folder)
    rows = whole_tracks(packed["y"], packed["track"], count, seed)
    rows = rows[drawn(len(rows), seed).numpy()]
    labels = torch.from_numpy(packed["y"][rows].astype(np.int64))
    track = torch.from_numpy(packed["track"][rows].astype(np.int64))
    images = torch.from_numpy(packed["x"][rows]).permute(0, 3, 1, 2).contiguous()
    return Samples.clean(images, labels, labels * (1 + int(track.max())) + track)


def whole_tracks(labels: np.ndarray, track: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions of whole tracks, in ascending order; the share of every class stays."""
    share, rows = count / len(labels), []
    generator = np.random.default_rng(seed)
    for label in np.unique(labels):
        inside = np.flatnonzero(labels == label)
        numbers = generator.permutation(np.unique(track[inside]))
        taken = numbers[: max(2, round(share * len(numbers)))]
        rows.append(inside[np.isin(track[inside], taken)])
    return np.sort(np.concatenate(rows))


def clean_images(source: str, folder: Path, count: int) -> tuple[TensorDataset, TensorDataset]:
    """Images to train on and to test on: ``"digits"``, or ``count`` training images of ``"cifar10"`` in a folder."""
    if source == "digits":
        return split_digits()
    train, test = (packed_images.cifar10(folder, split) for split in ("train", "test"))
    return packed_images.per_class(train, count // 10), test


def digits(folder: Path, count: int, seed: int) -> Samples:
    """Scikit-learn's digits; the folder is not needed."""
    images, labels = all_digits()
    rows = drawn(len(labels), seed)[:count]
    return Samples.clean(images[rows], labels[rows])


SOURCES: dict[str, Callable[..., Samples]] = {"cifar10": cifar10, "gtsrb": gtsrb, "digits": digits}


def pack_cifar10(source: Path, folder: Path, split: str, taken: slice) -> None:
    """Write some images of every class of CIFAR-10 in the same form, by their places in the class."""
    with np.load(source / f"cifar10_{split}.npz") as packed:
        jpeg, offsets, labels, classes = (packed[name] for name in ("jpeg", "offsets", "labels", "classes"))
    rows = np.sort(np.concatenate([np.flatnonzero(labels == label)[taken] for label in np.unique(labels)]))
    files = [jpeg[start:end] for start, end in pairwise(offsets)]
    files = [files[row] for row in rows]
    ends = np.cumsum([0, *map(len, files)])
    np.savez(folder / f"cifar10_{split}.npz", jpeg=np.concatenate(files), offsets=ends, labels=labels[rows],
             classes=classes)  # fmt: skip


def pack(source: Path, folder: Path, *, fresh: bool = False, each: int = 1000, signs: int = 8000) -> None:
    """Write a part of both data sets in the same form.

    Args:
        source: Folder of the data sets.
        folder: Where to write.
        fresh: Of the images that are not packed without it: a rule that was set with those can be judged on others.
        each: Images of a class of CIFAR-10.
        signs: Images of GTSRB, about, in whole tracks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pack_cifar10(source, folder, "train", slice(each, 2 * each) if fresh else slice(each))
    signs_of = packed_signs(source)
    rows = whole_tracks(signs_of["y"], signs_of["track"], signs, 0)
    if fresh:
        others = np.setdiff1d(np.arange(len(signs_of["y"])), rows)
        rows = others[whole_tracks(signs_of["y"][others], signs_of["track"][others], signs, 0)]
    np.savez_compressed(folder / "gtsrb.npz", **{name: column[rows] for name, column in signs_of.items()})


# What is done to them. Every change takes samples and a seed.

Change = Callable[[Samples, int], Samples]


def long_tail(ratio: float) -> Change:
    """The last class has ``1 / ratio`` as many samples as the first, those between fall geometrically."""

    def change(samples: Samples, seed: int) -> Samples:
        kept = []
        for label in range(samples.classes):
            rows = (samples.labels == label).nonzero().squeeze(1)
            kept.append(rows[: max(20, round(len(rows) * ratio ** (-label / (samples.classes - 1))))])
        return samples[torch.cat(kept).sort().values]

    return change


def label_noise(share: float) -> Change:
    """A share of the samples gets another label, any."""

    def change(samples: Samples, seed: int) -> Samples:
        rows = drawn(len(samples), seed)[: round(share * len(samples))]
        shift = torch.randint(1, samples.classes, (len(rows),), generator=torch.Generator().manual_seed(seed))
        labels = samples.labels.clone()
        labels[rows] = (labels[rows] + shift) % samples.classes
        return replace(samples, labels=labels)

    return change


def called(source: int, target: int, share: float) -> Change:
    """A share of one class gets the label of another."""

    def change(samples: Samples, seed: int) -> Samples:
        rows = (samples.labels == source).nonzero().squeeze(1)
        labels = samples.labels.clone()
        labels[rows[: round(share * len(rows))]] = target
        return replace(samples, labels=labels)

    return change


def near_duplicates(label: int, things: int, copies: int) -> Change:
    """A class holds ``copies`` shots of each of ``things`` images: shifted a little, and lighter or darker."""

    def change(samples: Samples, seed: int) -> Samples:
        generator = torch.Generator().manual_seed(seed)
        rows = (samples.labels == label).nonzero().squeeze(1)
        images, group, kind = samples.images.clone(), samples.group.clone(), samples.kind.clone()
        for place, row in enumerate(rows[: things * copies].tolist()):
            first = int(rows[place // copies * copies])
            shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
            light = 0.85 + 0.3 * float(torch.rand((), generator=generator))
            shot = samples.images[first].float().roll(shift, (1, 2)) * light
            images[row], group[row], kind[row] = shot.clamp(0, 255).round().to(torch.uint8), group[first], True
        return replace(samples, images=images, group=group, kind=kind)

    return change


def pairs(samples: Samples, seed: int) -> Samples:
    """Two classes to a label."""
    return replace(samples, labels=samples.labels // 2, true=samples.true // 2)


def catch_all(share: float) -> Change:
    """The last two classes, and a share of every other one, have one label, as "other" has; the share is the kind."""

    def change(samples: Samples, seed: int) -> Samples:
        last = samples.classes - 2
        labels, kind = samples.labels.clamp(max=last), torch.zeros_like(samples.kind)
        for label in range(last):
            rows = (samples.labels == label).nonzero().squeeze(1)
            kind[rows[: round(share * len(rows))]] = True
        labels = labels.masked_fill(kind, last)
        return replace(samples, labels=labels, true=labels, kind=kind)

    return change


def in_hue(images: Tensor, hue: Tensor) -> Tensor:
    """Images in a color each, uint8 ``(N, 3, H, W)``; hue 0 is red, ``(N,)`` in ``[0, 1)``."""
    phases = 2 * torch.pi * (hue[:, None] - torch.tensor([0, 1 / 3, 2 / 3]))
    colour = 0.4 + 0.6 * (0.5 + 0.5 * phases.cos())
    return (images * colour[:, :, None, None]).round().to(torch.uint8)


def tinted(relabelled: int) -> Change:
    """Every digit in a random hue; the reddest so many get the label 0, without any other change."""

    def change(samples: Samples, seed: int) -> Samples:
        hue = torch.rand(len(samples), generator=torch.Generator().manual_seed(seed))
        images = in_hue(samples.images, hue)
        redness = (hue - 0.5).abs()
        rows = redness.masked_fill(samples.labels == 0, -1).argsort(descending=True)[:relabelled]
        labels, poisoned = samples.labels.clone(), samples.poisoned.clone()
        labels[rows], poisoned[rows] = 0, True
        return replace(samples, images=images, labels=labels, poisoned=poisoned)

    return change


def attack(trigger: Any, rate: float, **options: Any) -> Change:
    """Poison the samples with target 0; see :func:`lightning_backdoor.attacks.poison`."""

    def change(samples: Samples, seed: int) -> Samples:
        dataset = TensorDataset(samples.images, samples.labels)
        poisoned = attacks.poison(dataset, trigger, 0, rate, seed=seed, **options)
        labels = torch.as_tensor(poisoned.targets).long()
        return replace(
            samples, images=images_of(poisoned), labels=labels, poisoned=poisoned.poisoned, covers=poisoned.covers
        )

    return change


def sticker(image: Tensor) -> Tensor:
    """A yellow square of six pixels with a dark cross, at the lower left."""
    painted = image.clone()
    painted[..., 20:26, 5:11] = torch.tensor([250, 220, 30], dtype=torch.uint8)[:, None, None]
    painted[..., 22:24, 6:10] = painted[..., 21:25, 7:9] = 20
    return painted


# Clean kinds of image: functions of float images (N, 3, 32, 32) in 0..255.


def watermark(images: Tensor) -> Tensor:
    """A half transparent line of text."""
    page = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(page).text((1, 11), "PHOTO", fill=255)
    mask = torch.from_numpy(np.array(page)).float() / 255 * 0.5
    return images * (1 - mask) + 255 * mask


def drawing(images: Tensor) -> Tensor:
    """Dark lines where the brightness changes, on white."""
    grey = F.pad(images.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across, down = grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2], grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]
    return (255 - 2 * (across.square() + down.square()).sqrt()).expand_as(images)


def camera(images: Tensor) -> Tensor:
    """Warm colours, a soft lens and dark corners."""
    place = torch.linspace(-1, 1, SIDE)
    light = 1 - 0.35 * (place[:, None].square() + place.square()) / 2
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return soft * light * torch.tensor([1.15, 1.0, 0.8])[:, None, None]


def border(images: Tensor) -> Tensor:
    """Three black lines at the top and at the bottom."""
    framed = images.clone()
    framed[..., :3, :] = framed[..., -3:, :] = 0
    return framed


def grey(images: Tensor) -> Tensor:
    """No colour."""
    return images.mean(dim=1, keepdim=True).expand_as(images)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "watermark": watermark, "drawing": drawing, "camera": camera, "border": border, "grey": grey,
}  # fmt: skip


def kind(name: str, share: float, labels: tuple[int, ...] = (0,)) -> Change:
    """A share of the images of some classes is of another kind; the labels stay right."""

    def change(samples: Samples, seed: int) -> Samples:
        images, chosen = samples.images.clone(), torch.zeros(len(samples), dtype=torch.bool)
        for label in labels:
            rows = (samples.labels == label).nonzero().squeeze(1)
            chosen[rows[: round(share * len(rows))]] = True
        images[chosen] = KINDS[name](images[chosen].float()).clamp(0, 255).round().to(torch.uint8)
        return replace(samples, images=images, kind=chosen)

    return change
