"""Scans without augmentation: choose a deterministic transform and set it in the user's dataset for a while."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_backdoor.data.nesting import attributes_of, chains_of, image_transform, is_standard, random_streams_in
from lightning_backdoor.data.random_state import isolated_rng
from lightning_backdoor.data.views import Keyed, check_dataset, read_items
from lightning_backdoor.errors import ArgumentError

__all__ = ["EvalTransform", "Recorder", "choose_transform", "same", "transforms_swapped", "without_random_steps"]

_SLOTS = ("transform", "transforms")
_READ_TWICE = 8  # items, to find out whether they are random

_DRAWS = 8  # a step that acts on half of the images is seen to be random in 127 of 128 cases
_LIBRARIES = {"torchvision", "albumentations", "timm", "kornia"}


class _Joint:
    """A transform of images in the place of one that is called with (image, target), or with the image alone."""

    def __init__(self, transform: Callable[..., Any]) -> None:
        self.transform = transform

    def __call__(self, *args: Any, **named: Any) -> Any:
        if not args:  # by name, as albumentations is
            return self.transform(**named)
        image, *targets = args
        return (self.transform(image), *targets) if targets else self.transform(image)


class _Reseeded:
    """A copy of a transform with a random stream of its own, seeded from torch's at every call.

    The scan seeds torch's stream by the position of the image. The user's transform draws no numbers meanwhile.
    """

    def __init__(self, transform: Any) -> None:
        self.transform = copy.deepcopy(transform)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.transform.set_random_seed(int(torch.randint(2**31, ())))
        return self.transform(*args, **kwargs)


def _identity(*args: Any, **named: Any) -> Any:
    return args[0] if args else named  # called by name, it returns a mapping of names


@dataclass(frozen=True)
class EvalTransform:
    """Which transform the scan reads the training images with.

    Attributes:
        source: ``"argument"`` (the user's ``eval_transform``), ``"validation"`` (the validation dataset's),
            ``"training"`` (the training transform without its random steps, or seeded per index),
            ``"dataset's own"`` (random, but no attribute: seeded per index), ``"dataset"`` (the user's
            ``eval_dataset`` is read) or ``"none"`` (there is none).
        description: One sentence for the user.
        given: The user's transform.
        by_leaf: For each class of raw dataset the transforms that are set, outermost first.
    """

    source: Literal["argument", "validation", "training", "dataset's own", "dataset", "none"]
    description: str
    given: Callable[[Any], Any] | None = None
    by_leaf: Mapping[type, tuple[Callable[..., Any], ...]] = field(default_factory=dict)

    def plan(self, dataset: Any) -> list[tuple[Any, Callable[..., Any]]] | None:
        """Return (node, new image transform) pairs for ``dataset``; None when a transform has no counterpart."""
        pairs: dict[int, tuple[Any, Callable[..., Any]]] = {}
        for chain in chains_of(dataset) if self.given is not None or self.by_leaf else ():
            new = (self.given,) if self.given is not None else self.by_leaf.get(chain.leaf)
            nodes = chain.nodes[:1] if self.given is not None else chain.nodes
            if new == () and len(nodes) == 1:
                new = (_identity,)
            if nodes and (new is None or len(new) != len(nodes)):
                return None
            pairs.update((id(node), (node, transform)) for node, transform in zip(nodes, new or (), strict=False))
        return list(pairs.values())


def _replacements(node: Any, new: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Yield (attribute, value) for every attribute of ``node`` that holds its image transform."""
    for name in _SLOTS:
        old: Any = attributes_of(node).get(name)
        if is_standard(old):
            yield name, type(old)(new, old.target_transform)
        elif callable(old):
            yield name, _Joint(new) if name == "transforms" else new


@contextmanager
def transforms_swapped(dataset: Any, choice: EvalTransform | None) -> Iterator[None]:
    """Set ``choice`` in ``dataset`` and the datasets inside it; each attribute is restored at the end.

    Only instance attributes ``transform`` and ``transforms`` that hold a callable are replaced, and those that hold a
    callable with a random stream of its own (``set_random_seed``, as albumentations has it): by a copy that the seed
    of the scan reaches. Worker processes that start inside have the new transform, those already running keep theirs.
    """
    pairs = choice.plan(dataset) if choice is not None else []
    old = []

    def put(node: Any, name: str, value: Any) -> None:
        old.append((node, name, attributes_of(node)[name]))
        attributes_of(node)[name] = value

    try:
        for node, new in pairs or []:
            for name, value in list(_replacements(node, new)):
                put(node, name, value)
        for node, name in list(random_streams_in(dataset)):
            put(node, name, _Reseeded(attributes_of(node)[name]))
        yield
    finally:
        for node, name, value in reversed(old):
            attributes_of(node)[name] = value


def _signature(item: Any) -> Any:
    """Return structure, shapes and dtypes of an item."""
    if isinstance(item, Tensor | np.ndarray):
        return tuple(item.shape), str(item.dtype)
    if isinstance(item, Mapping):
        return {key: _signature(value) for key, value in item.items()}
    if isinstance(item, Sequence) and not isinstance(item, str | bytes):
        return [_signature(value) for value in item]
    return "number" if isinstance(item, int | float | np.number) else type(item)


def _probe(train: Any) -> Any:
    last = check_dataset(_dataset_of(train)) - 1
    return [_signature(item) for item in _items(train, sorted({0, last}))]


def _items(train: Any, positions: Sequence[int], *, seed: int = 0) -> list[Any]:
    """Items as they are read now; transforms with a random stream of their own draw from copies of it."""
    with transforms_swapped(_dataset_of(train), None):
        return read_items(train, positions, seed=seed)


def _draws(train: Any) -> bool:
    """Whether some items are not the same under two seeds."""
    size = check_dataset(_dataset_of(train))
    positions = sorted({place * (size - 1) // (_READ_TWICE - 1) for place in range(_READ_TWICE)})
    first, second = (_items(train, positions, seed=seed) for seed in (0, 1))
    return not same(first, second)


def _dataset_of(train: Any) -> Any:
    return train.dataset if isinstance(train, DataLoader) else train


def choose_transform(
    train: Any, val_dataset: Any = None, eval_transform: Callable[[Any], Any] | None = None
) -> EvalTransform:
    """Choose the transform that the scan reads the training images with.

    In this order: the user's ``eval_transform``; the transform of the validation dataset, if both are built on the same
    class of raw dataset and give items of the same shape and dtype; the training transform without its random steps,
    made repeatable by a seed per index where some stay. Nothing is changed; two training items are read.

    Args:
        train: The training loader (preferred: its workers read the items) or its dataset.
        val_dataset: The validation dataset, if there is one.
        eval_transform: From what the training dataset gives to its transform to what the model takes.

    Returns:
        The choice, for :func:`transforms_swapped`; ``description`` states it in words.

    Raises:
        ArgumentError: ``eval_transform`` cannot be put in place, or fails on a training image.
        DataError: The training dataset is empty or not map-style.
    """
    dataset = _dataset_of(train)
    check_dataset(dataset)
    if eval_transform is not None:
        return _checked_argument(train, eval_transform)
    if not any(chain.nodes for chain in chains_of(dataset)):
        name = type(dataset.dataset if isinstance(dataset, Keyed) else dataset).__name__
        if _draws(train):
            return EvalTransform(
                "dataset's own",
                f"{name} augments its images at random and has no `transform` that could be exchanged: they are read "
                "as they come, under a fixed seed per image. Better pass `eval_dataset`, the same samples without "
                "augmentation: a dataset, or a function from this one to it, e.g. "
                "lambda dataset: dataset.with_transform(plain) for Hugging Face's.",
            )
        return EvalTransform("none", f"{name} has no `transform`: its items are read as they are.")
    found = "there is no validation dataset" if val_dataset is None else _from_validation(train, val_dataset)
    if isinstance(found, EvalTransform):
        return found
    remedy = "Pass `eval_transform` for a transform without augmentation."
    plain = _without_random_steps(train, found)
    if plain is None:
        words = f"Training images are read with the training transform, seeded per image, because {found}. {remedy}"
        return EvalTransform("training", words)
    with transforms_swapped(dataset, plain):
        random = _draws(train)
    words = f"{plain.description} What else is random in it is seeded per image. {remedy}"
    return replace(plain, description=words) if random else plain


def _without_random_steps(train: Any, why: str) -> EvalTransform | None:
    """Return the training transform without its random steps; None if there are none, or it cannot be searched.

    Augmentation can remove a trigger, such as one in a corner that is rotated out of the image.
    """
    dataset = _dataset_of(train)
    olds: dict[type, tuple[Any, ...]] = {}
    for chain in chains_of(dataset):
        transforms = tuple(image_transform(node) for node in chain.nodes)
        if any(old is not new for old, new in zip(olds.setdefault(chain.leaf, transforms), transforms, strict=False)):
            return None  # the class of the raw images does not say which transform
    try:
        with tempfile.TemporaryDirectory() as folder:
            recorders = {
                leaf: tuple(Recorder(old, Path(folder) / f"{i}-{j}") for j, old in enumerate(parts))
                for i, (leaf, parts) in enumerate(olds.items())
            }
            with transforms_swapped(dataset, EvalTransform("training", "", by_leaf=recorders)):
                before = _probe(train)
            found = {
                leaf: [without_random_steps(old, *one.read()) for old, one in zip(parts, recorders[leaf], strict=True)]
                for leaf, parts in olds.items()
            }
        names = list(dict.fromkeys(name for parts in found.values() for _, out in parts for name in out))
        words = (
            f"Training images are read with the training transform without its random steps ({', '.join(names)}), "
            f"because {why}."
        )
        by_leaf = {leaf: tuple(left or _identity for left, _ in parts) for leaf, parts in found.items()}
        choice = EvalTransform("training", words, by_leaf=by_leaf)
        with transforms_swapped(dataset, choice):
            return choice if names and before == _probe(train) else None
    except Exception:  # a transform whose parts cannot be called or compared is used whole
        return None


def _from_validation(train: Any, val_dataset: Any) -> EvalTransform | str:
    """Return the choice of the validation dataset's transform, or why it cannot be."""
    dataset = _dataset_of(train)
    by_leaf: dict[type, tuple[Callable[..., Any], ...]] = {}
    for chain in chains_of(val_dataset):
        found = [image_transform(node) for node in chain.nodes]
        by_leaf.setdefault(chain.leaf, tuple(transform for transform in found if transform is not None))
    words = "Training images are read with the transform of the validation dataset."
    choice = EvalTransform("validation", words, by_leaf=by_leaf)
    pairs = choice.plan(dataset)
    if pairs is None:
        return "the validation dataset is built differently"
    if all(new is image_transform(node) for node, new in pairs):
        return "the validation dataset shares it"
    before = _probe(train)
    try:
        with transforms_swapped(dataset, choice):
            after = _probe(train)
    except Exception as error:
        return f"the validation transform fails on training images with {type(error).__name__}"
    return choice if before == after else "the validation transform gives another shape or dtype"


def _checked_argument(train: Any, eval_transform: Any) -> EvalTransform:
    if not callable(eval_transform):
        raise ArgumentError(f"`eval_transform` must be callable, got {type(eval_transform).__name__}.")
    choice = EvalTransform("argument", "Training images are read with `eval_transform`.", given=eval_transform)
    dataset = _dataset_of(train)
    if not choice.plan(dataset):
        raise ArgumentError(
            f"`eval_transform` was given, but {type(dataset).__name__} and the datasets in it have no `transform` or "
            "`transforms` attribute that holds a callable. Pass `eval_dataset` instead, the same samples without "
            "augmentation: a dataset, or a function from this one to it."
        )
    _probe(train)
    try:
        with transforms_swapped(dataset, choice):
            _probe(train)
    except Exception as error:
        raise ArgumentError(
            f"`eval_transform` fails on a training image: {type(error).__name__}: {error}. It must accept what "
            f"{type(dataset).__name__} passes to its own transform."
        ) from error
    return choice


class Recorder:
    """Does what a transform does, by a copy of it, and writes down what it was first called with in any process."""

    def __init__(self, transform: Callable[..., Any], path: Path) -> None:
        self.transform, self.path = copy.deepcopy(transform), path

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Write the arguments to the file and return them."""
        if not self.path.exists():
            torch.save(
                ([_written(value) for value in args], {name: _written(v) for name, v in named.items()}), self.path
            )
        return self.transform(*args, **named)

    def read(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What was written down."""
        args, named = torch.load(self.path, weights_only=True)
        return tuple(map(_read, args)), {name: _read(value) for name, value in named.items()}


def _written(value: Any) -> Any:
    """An image as a tensor with a note of what it was; plain values as they are."""
    if isinstance(value, Image.Image):
        return {"image": torch.from_numpy(np.array(value))}
    if isinstance(value, np.ndarray):
        return {"array": torch.from_numpy(value.copy())}
    return value.detach().as_subclass(Tensor) if isinstance(value, Tensor) else value


def _read(value: Any) -> Any:
    if isinstance(value, dict) and "image" in value:
        return Image.fromarray(value["image"].numpy())
    return value["array"].numpy() if isinstance(value, dict) and "array" in value else value


def without_random_steps(
    transform: Any, args: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[Callable[..., Any] | None, list[str]]:
    """Leave out the steps that are random and change only the pixels of an image.

    Each step is tried under several seeds. One of a known library whose outputs differ, and have the type and the shape
    of the input, is augmentation. Steps that crop to another size or make tensors stay, and so do steps of the user's
    own, which may do more than one thing.

    Args:
        transform: The transform; compositions are searched.
        args: An image, if the transform is called with it.
        named: What the transform is called with by name, if it is (as albumentations is).

    Returns:
        The transform without them, ``None`` if nothing is left; and the names of what was left out.
    """
    left, names, _ = _reduced(transform, dict(named) if named else args[0])
    return left, names


def _reduced(transform: Any, value: Any) -> tuple[Any, list[str], Any]:
    """The transform without random steps, their names, and what becomes of the value."""
    if isinstance(transform, nn.Sequential) or "Compose" in type(transform).__name__:
        kept, names = [], []
        for step in transform.children() if isinstance(transform, nn.Sequential) else transform.transforms:
            left, out, value = _reduced(step, value)
            kept += [] if left is None else [left]
            names += out
        if not names:
            return transform, [], value
        if isinstance(transform, nn.Sequential):
            return nn.Sequential(*kept), names, value
        composition = copy.copy(transform)
        composition.transforms = kept
        return composition, names, value
    outputs = [_draw(transform, value, seed) for seed in range(_DRAWS)]
    is_random = not all(same(outputs[0], output) for output in outputs[1:])
    known = type(transform).__module__.partition(".")[0] in _LIBRARIES and type(transform).__name__ != "Lambda"
    if known and is_random and all(_kind(output) == _kind(value) for output in outputs):
        return None, [type(transform).__name__], value
    return transform, [], outputs[0]


def _draw(transform: Any, value: Any, seed: int) -> Any:
    with isolated_rng(seed):
        drawing, value = copy.deepcopy((transform, value))
        if hasattr(drawing, "set_random_seed"):
            drawing.set_random_seed(seed)
        return drawing(**value) if isinstance(value, dict) else drawing(value)


def _kind(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _kind(part) for key, part in value.items()}
    if isinstance(value, Tensor):
        return type(value), value.shape, value.dtype
    return type(value), np.asarray(value).shape, np.asarray(value).dtype


def same(first: Any, second: Any) -> bool:
    """Whether two items hold the same numbers; what cannot be compared is taken for the same."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    try:
        one, two = (np.asarray(part.float() if isinstance(part, Tensor) else part) for part in (first, second))
        return bool(np.array_equal(one, two, equal_nan=True))
    except Exception:  # cannot be compared
        return True
