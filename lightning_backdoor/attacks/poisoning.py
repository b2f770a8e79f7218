"""Poisoned training sets and triggered test sets, made from the user's dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Sized
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_backdoor.attacks.raw import RawSource, from_pixels, label_like, to_pixels
from lightning_backdoor.attacks.triggers import CraftedTrigger
from lightning_backdoor.errors import ArgumentError

__all__ = ["PoisonedDataset", "carried", "poison", "poisoned_mask", "triggered"]

RateOf = Literal["dataset", "non_target", "target_class"]
Labels = Literal["dirty", "clean", "all_to_all"]
_MASKS = ("poisoned", "covers")


class PoisonedDataset(Dataset[Any]):
    """The user's dataset with a trigger and a label in some of its items; made by :func:`poison` and :func:`triggered`.

    The trigger is painted on the raw image, then the transform runs. Clean images take the same way (through 8-bit
    pixels and back), so that only the trigger distinguishes them. Items keep their container, image kind and dtype.

    Attributes:
        poisoned: Which items teach the backdoor: trigger and attack label, bool, shape ``(N,)``. Ground truth: for
            attacks and metrics only.
        covers: Which items are cover samples: trigger and their own label, bool, shape ``(N,)``; none is ``poisoned``.
        targets: Labels as a victim receives them, ``N`` ints, in the container of the user's dataset (tensor if none).
        true_labels: Labels before the attack, long, shape ``(N,)``.
        classes: Names of the classes, ``None`` if the user's dataset has none.
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
        *,
        covers: Tensor | None = None,
        crafted: Tensor | None = None,
    ) -> None:
        self.trigger = trigger
        self.transform: Callable[[Any], Any] | None = source.transform
        self.classes = source.classes
        self.poisoned = poisoned
        self.covers = torch.zeros_like(poisoned) if covers is None else covers
        self.targets = source.targets(labels)
        self.true_labels = source.labels[positions]
        self._labels: list[int] = labels.tolist()
        self._source = source
        self._positions: list[int] = positions.tolist()
        self._painted: dict[int, Callable[[Tensor], Tensor]] = dict.fromkeys(_places(poisoned), trigger)
        self._painted |= dict.fromkeys(_places(self.covers), _form(trigger, "on_covers"))
        self._crafted = {} if crafted is None else dict(zip(_places(poisoned), crafted, strict=True))

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        item, image, label = self._source(self._positions[index])
        pixels = to_pixels(image)
        if index in self._crafted:
            pixels = self._crafted[index]
        elif index in self._painted:
            pixels = self._painted[index](pixels)
        image = from_pixels(pixels, like=image)
        if self.transform is not None:
            image = self.transform(image)
        return self._source.rebuilt(item, image, label_like(self._labels[index], like=label))

    def __repr__(self) -> str:
        covers = f" and {int(self.covers.sum())} covers" if self.covers.any() else ""
        return f"<PoisonedDataset: {int(self.poisoned.sum())}{covers} of {len(self)} images with {self.trigger!r}>"


def poison(  # noqa: PLR0917  (the order is promised to users)
    dataset: Dataset[Any],
    trigger: Callable[[Tensor], Tensor],
    target: int = 0,
    rate: float = 0.05,
    rate_of: RateOf = "dataset",
    labels: Labels = "dirty",
    seed: int = 0,
    covers: float = 0.0,
    sources: Sequence[int] | None = None,
) -> PoisonedDataset:
    """Return ``dataset`` with a trigger and the attack's labels in some of its items.

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
        covers: Fraction, of the same images as ``rate``, of cover samples: images outside the target class that get the
            trigger (in its form for covers, see :class:`WaNet`) and keep their label, so that a backdoor
            responds only to the trigger in the form of the poisons. Adaptive attacks and WaNet's noise mode need them.
        sources: Classes to poison images of, ``None`` for all. Covers come from the other classes: with covers this is
            TaCT (`Tang et al., 2021 <https://arxiv.org/abs/1908.00686>`_), a trigger that works on the sources alone.
            Not for ``labels="clean"``, whose poisons are of the target class.

    Returns:
        A dataset of the same length and order with ``poisoned``, ``covers``, ``targets``, ``true_labels``, ``classes``
        and ``transform``. Poisoning a poisoned dataset adds to it: poisons and covers are not chosen again.

    Raises:
        ArgumentError: If an argument is out of range, or a rate gives no image or more than there are, or the
            trigger is crafted (:class:`CraftedTrigger`) and ``labels`` are not ``"clean"``.
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
    for name, share in {"rate": rate, "covers": covers}.items():
        if not 0 <= share <= 1:
            raise ArgumentError(
                f"`{name}` must be a fraction between 0 and 1, got {share}. For five per cent, pass 0.05."
            )
    if labels == "all_to_all" and rate_of != "dataset":
        raise ArgumentError(
            f"An all-to-all attack has no target class, so `rate_of` must be 'dataset', got {rate_of!r}."
        )
    if labels == "clean" and sources is not None:
        raise ArgumentError(
            "Clean-label poisons are images of the target class: pass `sources` to `triggered` only, "
            f"got {sources} with `labels`='clean'."
        )
    if isinstance(trigger, CraftedTrigger) and labels != "clean":
        raise ArgumentError(f"The poisons of {trigger!r} keep their label: pass `labels`='clean', got {labels!r}.")
    source = RawSource(dataset)
    classes = _count_classes(source)
    _check_target(target, classes)
    nothing = torch.zeros(len(source.labels), dtype=torch.bool)
    poisons, screens = (nothing if mask is None else mask for mask in map(partial(carried, dataset), _MASKS))
    in_target, in_sources = source.labels == target, _in_sources(source.labels, sources, classes)
    base = {"dataset": ~nothing, "non_target": ~in_target, "target_class": in_target}[rate_of]
    usable = {"dirty": ~in_target, "clean": in_target, "all_to_all": ~nothing}[labels] & in_sources
    chosen = _choose(
        "rate", rate, base, usable & ~(poisons | screens), seed=seed, how=f"poisoned with `labels`={labels!r}"
    )
    honest = (~nothing if labels == "all_to_all" else ~in_target) & (~in_sources if sources is not None else ~nothing)
    screen = _choose("covers", covers, base, honest & ~(poisons | screens | chosen), seed=seed, how="covers")
    attacked = torch.where(chosen, _attack_labels(source.labels, target, labels, classes), source.labels)
    crafted = _crafted(source, trigger, chosen, target) if isinstance(trigger, CraftedTrigger) else None
    result = PoisonedDataset(
        source, trigger, torch.arange(len(chosen)), chosen, attacked, covers=screen, crafted=crafted
    )
    result.poisoned, result.covers = chosen | poisons, screen | screens
    truth = carried(dataset, "true_labels")
    result.true_labels = source.labels if truth is None else truth
    return result


def triggered(
    dataset: Dataset[Any],
    trigger: Callable[[Tensor], Tensor],
    target: int = 0,
    labels: Labels = "dirty",
    sources: Sequence[int] | None = None,
) -> PoisonedDataset:
    """Return the test set of the attack success rate: every image with the trigger, labelled as the attacker wants.

    Args:
        dataset: Untouched test data, as for :func:`poison`.
        trigger: The trigger of training; its test-time form is used (``trigger.at_test()``, see :class:`SIG`).
        target: The attacked class. Its images are left out: they would count as a success without any trigger.
        labels: As for :func:`poison`. ``"all_to_all"`` uses all images with the label ``(y + 1) mod K``.
        sources: Classes whose images are used, ``None`` for all. For an attack with ``sources``, pass the same ones.

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
    if not used.any():
        raise ArgumentError(
            f"All {len(used)} test images belong to the `target` {target}: pass test data of other classes."
        )
    used &= _in_sources(source.labels, sources, classes)
    positions = used.nonzero().squeeze(1)
    if not len(positions):
        raise ArgumentError(f"No test image outside the `target` {target} is of the `sources` {sources}.")
    aim: Labels = "all_to_all" if labels == "all_to_all" else "dirty"
    attacked = _attack_labels(source.labels, target, aim, classes)[positions]
    shown = _form(trigger, "at_test")
    return PoisonedDataset(source, shown, positions, torch.ones(len(positions), dtype=torch.bool), attacked)


def poisoned_mask(dataset: Any) -> Tensor | None:
    """Return the ground truth that ``dataset`` carries, bool ``(N,)``, also through ``Subset``, or ``None``."""
    mask = carried(dataset, "poisoned")
    return None if mask is None else mask.bool()


def carried(dataset: Any, name: str) -> Tensor | None:
    """Return the per-sample attribute ``name`` of a dataset, seen through ``Subset``."""
    if isinstance(dataset, Subset):
        values = carried(dataset.dataset, name)
        return None if values is None else values[torch.as_tensor(dataset.indices)]
    values = getattr(dataset, name, None)
    return None if values is None else torch.as_tensor(values)


def _attack_labels(labels: Tensor, target: int, kind: Labels, classes: int) -> Tensor:
    return (labels + 1) % classes if kind == "all_to_all" else torch.full_like(labels, target)


def _form(trigger: Callable[[Tensor], Tensor], form: str) -> Callable[[Tensor], Tensor]:
    """Return a trigger as shown at test time or on covers; plain functions have one form."""
    return getattr(trigger, form)() if hasattr(trigger, form) else trigger


def _places(mask: Tensor) -> list[int]:
    return mask.nonzero().squeeze(1).tolist()


def _crafted(source: RawSource, trigger: CraftedTrigger, chosen: Tensor, target: int) -> Tensor | None:
    """Return the crafted poisons, in the order of their positions."""
    images = [to_pixels(source(position)[1]) for position in _places(chosen)]
    if len({image.shape for image in images}) > 1:
        raise ArgumentError(
            f"The poisons of {trigger!r} are crafted together, so the images must have one size. Resize them first."
        )
    return trigger.craft(torch.stack(images), target) if images else None


def _in_sources(labels: Tensor, sources: Sequence[int] | None, classes: int) -> Tensor:
    if sources is None:
        return torch.ones_like(labels, dtype=torch.bool)
    if not sources or not all(0 <= source < classes for source in sources):
        raise ArgumentError(f"`sources` must be class indices from 0 to {classes - 1}, got {sources}.")
    return torch.isin(labels, torch.tensor(sources))


def _choose(name: str, rate: float, base: Tensor, eligible: Tensor, *, seed: int, how: str) -> Tensor:
    """Return a random mask of ``rate`` times the images in ``base``, among the eligible."""
    size, candidates = int(base.sum()), eligible.nonzero().squeeze(1)
    count = math.floor(rate * size + 0.5)
    if count > len(candidates):
        raise ArgumentError(
            f"`{name}` {rate} of {size} images asks for {count} images, but only {len(candidates)} can be {how}. "
            f"Pass a lower `{name}` or another `rate_of`."
        )
    if rate > 0 and count == 0:
        raise ArgumentError(f"`{name}` {rate} of {size} images rounds to no image. Pass a higher `{name}`, or 0.")
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros_like(eligible)
    chosen[candidates[order[:count]]] = True
    return chosen


def _count_classes(source: RawSource) -> int:
    named = len(source.classes) if isinstance(source.classes, Sized) else 0  # it may be a count, or a method
    return max(named, int(source.labels.max()) + 1)


def _check_target(target: int, classes: int) -> None:
    if not 0 <= target < classes:
        raise ArgumentError(f"`target` must be a class index from 0 to {classes - 1}, got {target}.")


def _check_choice(name: str, value: object, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ArgumentError(f"`{name}` must be {' or '.join(map(repr, options))}, got {value!r}.")
