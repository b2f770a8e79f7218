"""Poisoned training sets and triggered test sets, made from somebody's dataset."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_backdoor.attacks.raw import RawSource, from_pixels, label_like, to_pixels
from lightning_backdoor.errors import ArgumentError

__all__ = ["PoisonedDataset", "poison", "poisoned_mask", "triggered"]

RateOf = Literal["dataset", "non_target", "target_class"]
Labels = Literal["dirty", "clean", "all_to_all"]


class PoisonedDataset(Dataset[Any]):
    """The user's dataset with a trigger and a label in some of its items; made by :func:`poison` and :func:`triggered`.

    The trigger is painted on the raw image, then the transform runs. Clean images take the same way (through 8-bit
    pixels and back), so nothing but the trigger tells them apart. Items keep their container, image kind and dtype.

    Attributes:
        poisoned: Which items carry the trigger, bool, shape ``(N,)``. Ground truth: for attacks and metrics only.
        targets: Labels as a victim receives them, ``N`` ints, in the container of the user's dataset (tensor if none).
        true_labels: Labels before the attack, long, shape ``(N,)``.
        classes: Names of the classes, ``None`` if the user's dataset does not say.
        transform: The user's transform of the image; may be replaced at any time.
        trigger: The trigger.
    """

    def __init__(
        self,
        source: RawSource,
        trigger: Callable[[Tensor], Tensor],
        positions: Tensor,
        poisoned: Tensor,
        labels: Tensor,
    ) -> None:
        self.trigger = trigger
        self.transform: Callable[[Any], Any] | None = source.transform
        self.classes = source.classes
        self.poisoned = poisoned
        self.targets = source.targets(labels)
        self.true_labels = source.labels[positions]
        self._labels: list[int] = labels.tolist()
        self._source = source
        self._positions: list[int] = positions.tolist()
        self._painted = poisoned.tolist()

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        item, image, label = self._source(self._positions[index])
        pixels = to_pixels(image)
        if self._painted[index]:
            pixels = self.trigger(pixels)
        image = from_pixels(pixels, like=image)
        if self.transform is not None:
            image = self.transform(image)
        return self._source.rebuilt(item, image, label_like(self._labels[index], like=label))

    def __repr__(self) -> str:
        return f"<PoisonedDataset: {int(self.poisoned.sum())} of {len(self)} images with {self.trigger!r}>"


def poison(  # noqa: PLR0917  (the order is promised to users)
    dataset: Dataset[Any],
    trigger: Callable[[Tensor], Tensor],
    target: int = 0,
    rate: float = 0.05,
    rate_of: RateOf = "dataset",
    labels: Labels = "dirty",
    seed: int = 0,
) -> PoisonedDataset:
    """Return ``dataset`` as an attacker would hand it over.

    Args:
        dataset: Map-style dataset of (image, label): torchvision datasets, ``TensorDataset``, your own, or a ``Subset``
            of one. Images are PIL, or numpy or tensors in uint8 or in ``[0, 1]``. It is not changed.
        trigger: One of :mod:`lightning_backdoor.attacks`, or any function of uint8 images ``(C, H, W)``.
        target: The class that the attacker wants; without meaning for ``"all_to_all"``.
        rate: Poisoned fraction, in ``[0, 1]``. 0 gives the clean twin, on the same way through 8-bit pixels.
        rate_of: Fraction of what. ``"dataset"``: of all images (BackdoorBench; UltraClean and NONE for dirty labels);
            ``"non_target"``: of the images outside the target class (D-BR and D-ST for dirty labels);
            ``"target_class"``: of the target class (clean-label attacks in UltraClean, NONE, D-BR and D-ST).
            The count is rounded to the nearest whole number, halves up.
        labels: ``"dirty"``: images outside the target class are labelled ``target``; ``"clean"``: images of the target
            class keep their label; ``"all_to_all"``: any image, label ``(y + 1) mod K``.
        seed: Seed of the choice. With the same seed, a higher rate poisons a superset.

    Returns:
        A dataset of the same length and order with ``poisoned``, ``targets``, ``true_labels``, ``classes`` and
        ``transform``. Poisoning a poisoned dataset adds to it: images poisoned before are not chosen again.

    Raises:
        ArgumentError: If an argument is out of range, or the rate asks for no image or for more than there are.
        DataError: If the dataset is empty, iterable, or its items cannot be understood.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_backdoor.attacks import BadNets
        >>> images, y = torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.arange(100) % 10
        >>> poison(TensorDataset(images, y), BadNets(), rate=0.05)
        <PoisonedDataset: 5 of 100 images with BadNets(pattern='grid', size=None, margin=None)>
    """
    _check_choice("labels", labels, get_args(Labels))
    _check_choice("rate_of", rate_of, get_args(RateOf))
    if not 0 <= rate <= 1:
        raise ArgumentError(f"`rate` must be a fraction between 0 and 1, got {rate}. For five per cent, pass 0.05.")
    if labels == "all_to_all" and rate_of != "dataset":
        raise ArgumentError(
            f"An all-to-all attack has no target class, so `rate_of` must be 'dataset', got {rate_of!r}."
        )
    source = RawSource(dataset)
    classes = _count_classes(source)
    _check_target(target, classes)
    before = poisoned_mask(dataset)
    before = torch.zeros(len(source.labels), dtype=torch.bool) if before is None else before
    in_target = source.labels == target
    base = {"dataset": torch.ones_like(in_target), "non_target": ~in_target, "target_class": in_target}[rate_of]
    eligible = {"dirty": ~in_target, "clean": in_target, "all_to_all": torch.ones_like(in_target)}[labels] & ~before
    chosen = _choose(eligible, _count(rate, int(base.sum()), int(eligible.sum()), rate_of, labels), seed)
    attacked = torch.where(chosen, _attack_labels(source.labels, target, labels, classes), source.labels)
    result = PoisonedDataset(source, trigger, torch.arange(len(chosen)), chosen, attacked)
    result.poisoned = chosen | before
    truth = _carried(dataset, "true_labels")
    result.true_labels = source.labels if truth is None else truth
    return result


def triggered(
    dataset: Dataset[Any], trigger: Callable[[Tensor], Tensor], target: int = 0, labels: Labels = "dirty"
) -> PoisonedDataset:
    """Return the test set of the attack success rate: every image with the trigger, labelled as the attacker wants.

    Args:
        dataset: Untouched test data, as for :func:`poison`.
        trigger: The trigger of training; its test-time form is used (``trigger.at_test()``, see :class:`SIG`).
        target: The attacked class. Its images are left out: they would count as a success without any trigger.
        labels: As for :func:`poison`. ``"all_to_all"`` uses all images with the label ``(y + 1) mod K``.

    Returns:
        A dataset of (image, attack label) with the ground truth in ``true_labels``, for the recovered accuracy.

    Raises:
        ArgumentError: If an argument is out of range or every image belongs to the target class.
        DataError: If the dataset is empty, iterable, or its items cannot be understood.
    """
    _check_choice("labels", labels, get_args(Labels))
    source = RawSource(dataset)
    classes = _count_classes(source)
    _check_target(target, classes)
    used = torch.ones(len(source.labels), dtype=torch.bool) if labels == "all_to_all" else source.labels != target
    positions = used.nonzero().squeeze(1)
    if not len(positions):
        raise ArgumentError(
            f"All {len(used)} test images belong to the `target` {target}: pass test data of other classes."
        )
    aim: Labels = "all_to_all" if labels == "all_to_all" else "dirty"
    attacked = _attack_labels(source.labels, target, aim, classes)[positions]
    shown = trigger.at_test() if hasattr(trigger, "at_test") else trigger
    return PoisonedDataset(source, shown, positions, torch.ones(len(positions), dtype=torch.bool), attacked)


def poisoned_mask(dataset: Any) -> Tensor | None:
    """Return the ground truth that ``dataset`` carries, bool ``(N,)``, also through ``Subset``, or ``None``."""
    mask = _carried(dataset, "poisoned")
    return None if mask is None else mask.bool()


def _carried(dataset: Any, name: str) -> Tensor | None:
    """Return the per-sample attribute ``name`` of a dataset, seen through ``Subset``."""
    if isinstance(dataset, Subset):
        values = _carried(dataset.dataset, name)
        return None if values is None else values[torch.as_tensor(dataset.indices)]
    values = getattr(dataset, name, None)
    return None if values is None else torch.as_tensor(values)


def _attack_labels(labels: Tensor, target: int, kind: Labels, classes: int) -> Tensor:
    return (labels + 1) % classes if kind == "all_to_all" else torch.full_like(labels, target)


def _count(rate: float, base: int, eligible: int, rate_of: str, labels: str) -> int:
    count = math.floor(rate * base + 0.5)
    if count > eligible:
        raise ArgumentError(
            f"`rate` {rate} of {base} images (`rate_of`={rate_of!r}) asks for {count} poisoned images, but only "
            f"{eligible} can be poisoned with `labels`={labels!r}. Pass a lower `rate` or another `rate_of`."
        )
    if rate > 0 and count == 0:
        raise ArgumentError(
            f"`rate` {rate} of {base} images (`rate_of`={rate_of!r}) rounds to no image. Pass a higher `rate`, or 0."
        )
    return count


def _choose(eligible: Tensor, count: int, seed: int) -> Tensor:
    candidates = eligible.nonzero().squeeze(1)
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros_like(eligible)
    chosen[candidates[order[:count]]] = True
    return chosen


def _count_classes(source: RawSource) -> int:
    return max(len(source.classes or ()), int(source.labels.max()) + 1)


def _check_target(target: int, classes: int) -> None:
    if not 0 <= target < classes:
        raise ArgumentError(f"`target` must be a class index from 0 to {classes - 1}, got {target}.")


def _check_choice(name: str, value: object, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ArgumentError(f"`{name}` must be {' or '.join(map(repr, options))}, got {value!r}.")
