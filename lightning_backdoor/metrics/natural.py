"""Success of small triggers that are optimized against a classifier, without any poisoned data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional.inversion import (
    Classifier,
    InvertedTrigger,
    PixelModel,
    count_classes,
    invert_trigger,
    rate_trigger,
)

__all__ = ["REASR"]

_NONE_BUDGETS = (0.02, 0.04, 0.06, 0.08, 0.10, 0.12)
_ENOUGH = 0.99  # success from which no larger trigger is searched, as in NONE's evaluation
_FIRST_LOOK = 2  # a search that only serves the choice of the targets gets the steps divided by this


class REASR(Metric):
    """Attack success rate of the best reverse-engineered trigger: how prone a model is to natural backdoors.

    Implements the measure of NONE (`Wang et al., 2022 <https://arxiv.org/abs/2202.06382>`_, natural backdoors) with
    :func:`~lightning_backdoor.functional.invert_trigger` in place of ABS, so that any differentiable classifier will
    do. Lower is better for the defender. Every number is a maximum over what the search found, a lower bound of what
    an attacker can reach: compare models with the same settings and images.

    ``update`` collects labelled clean images. ``compute`` splits them by ``seed``: at most ``inversion_images`` of
    them, and at most half, make the triggers; the others score them. For every budget the
    number is the highest success, over the targets, of a trigger of at most this size (one that was found for a smaller
    budget also counts, so the numbers never fall as the budget grows). Success is the share of the scoring images with
    a true class other than the target that are taken for the target; mistakes that the model makes anyway are in it.

    ``compute`` returns a dict of floats in ``[0, 1]``: ``reasr`` (the largest budget's) and, for each budget,
    ``reasr@2%``, ... Afterwards ``triggers`` maps each budget to its best
    :class:`~lightning_backdoor.functional.InvertedTrigger`, with ``success`` on the scoring images.

    Costs ``len(targets) * len(budgets) * starts * steps`` forward and backward passes of ``batch_size`` images, fewer
    where small triggers suffice, and half a search for every class where targets are chosen. The model's modes and
    gradients and the global random streams stay as they are. The model is not a part of this metric: it is not moved,
    saved or trained with it. The answer does not depend on how the images are spread over processes.

    Args:
        model: Differentiable callable from images to logits ``(N, K)``.
        budgets: Sizes of the triggers as shares of the pixels of an image, in ``(0, 1]``.
        num_classes: Number of classes; None reads it from the model's output.
        targets: Classes to try; None tries the ``candidates`` most promising ones, found by a short inversion of every
            class at the largest budget.
        candidates: See ``targets``.
        steps: Optimiser steps for each trigger.
        starts: How often each search begins.
        inversion_images: Most images that triggers are made from (NONE uses 240).
        batch_size: Images per step.
        mean: Normalisation that ``model`` expects, per channel or one for all, as a fraction of the pixel range.
        std: The same. A model that takes pixels in 0..255 has ``std=1/255``.
        seed: Seed of the split and of every search.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ArgumentError: If an argument is out of range.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
        >>> _ = model[1].weight.data.zero_(), model[1].bias.data.zero_()
        >>> model[1].weight.data[1, 0] = 1.0  # one pixel decides
        >>> reasr = REASR(model, budgets=(0.02,), targets=(1,), steps=50)
        >>> reasr.update(torch.zeros(8, 1, 8, 8), torch.zeros(8, dtype=torch.long))
        >>> reasr.compute()
        {'reasr': tensor(1.), 'reasr@2%': tensor(1.)}
        >>> reasr.triggers[0.02].mask.nonzero().tolist()
        [[0, 0, 0, 0]]
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    images: list[Tensor]
    labels: list[Tensor]

    def __init__(
        self,
        model: Classifier,
        *,
        budgets: Sequence[float] = _NONE_BUDGETS,
        num_classes: int | None = None,
        targets: Sequence[int] | None = None,
        candidates: int = 3,
        steps: int = 150,
        starts: int = 1,
        inversion_images: int = 240,
        batch_size: int = 64,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not budgets or not all(0 < budget <= 1 for budget in budgets):
            raise ArgumentError(
                f"`budgets` must be shares of the pixels in (0, 1], got {tuple(budgets)}. For two per cent, pass 0.02."
            )
        counts = {"candidates": candidates, "steps": steps, "starts": starts, "inversion_images": inversion_images}
        for name, value in {**counts, "batch_size": batch_size}.items():
            if value < 1:
                raise ArgumentError(f"`{name}` must be at least 1, got {value}.")
        if targets is not None and len(targets) == 0:
            raise ArgumentError("`targets` must name at least one class, got none. None tries the most promising ones.")
        pixel_model = PixelModel(model, 0.0 if mean is None else mean, 1.0 if std is None else std)
        self._model = (pixel_model,)  # in a tuple: a model that holds this metric must not become a part of it
        self.budgets = tuple(sorted(set(budgets)))
        self.num_classes, self.targets, self.candidates = num_classes, targets, candidates
        self.steps, self.starts, self.batch_size = steps, starts, batch_size
        self.inversion_images, self.seed = inversion_images, seed
        self.triggers: dict[float, InvertedTrigger] = {}
        self.add_state("images", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Add clean images.

        Args:
            images: Pixels, shape ``(N, C, H, W)``: uint8, or floats in ``[0, 1]``, not normalised.
            labels: True labels, whole numbers, shape ``(N,)``.

        Raises:
            ArgumentError: If they are something else, or a label or target is no class of the model.
            ModelError: If the model does not return logits.
        """
        if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise ArgumentError(
                "`images` must be pixels of shape (N, C, H, W), uint8 or floats in 0..1, "
                f"got {images.dtype} {tuple(images.shape)}."
            )
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise ArgumentError(
                f"`labels` must be whole numbers of shape ({len(images)},), got {labels.dtype} {tuple(labels.shape)}."
            )
        if len(images) == 0:
            return
        images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        low, high = float(images.min()), float(images.max())
        if not (low >= 0 and high <= 1):
            raise ArgumentError(
                f"`images` must be uint8 or floats in 0..1, got values from {low:.3g} to {high:.3g}. "
                "Pass pixels, and the normalisation that the model expects as `mean` and `std`."
            )
        if self.num_classes is None:
            self.num_classes = count_classes(self._model[0], images.to(self._device_of_model(images)))
        for name, values in (("labels", labels.tolist()), ("targets", self.targets or ())):
            if not all(0 <= value < self.num_classes for value in values):
                raise ArgumentError(
                    f"`{name}` must be classes from 0 to {self.num_classes - 1}, "
                    f"got values from {min(values)} to {max(values)}."
                )
        self.images.append(images)
        self.labels.append(labels.long())

    def reset(self) -> None:
        """Drop the images and the triggers."""
        super().reset()
        self.triggers = {}

    def compute(self) -> dict[str, Tensor]:
        """Search for triggers and return ``reasr`` and ``reasr@b%`` for each budget ``b``, float scalars.

        Raises:
            ArgumentError: If there are too few images or classes to search with, or a budget is less than a pixel.
        """
        made, scoring = self._halves()
        area = made[0][0, 0].numel()
        sizes = {budget: math.floor(budget * area + 1e-9) for budget in self.budgets}
        if sizes[self.budgets[0]] < 1:
            raise ArgumentError(
                f"`budgets` must allow at least one pixel of {area}, got {self.budgets[0]:g}. "
                f"Pass {math.ceil(1e4 / area) / 1e4:g} or more."
            )
        targets = self._reachable(made[1], scoring[1])
        if self.targets is None and len(targets) > self.candidates:
            steps = max(1, self.steps // _FIRST_LOOK)
            looks = [self._invert(made, target, sizes[self.budgets[-1]], steps=steps) for target in targets]
            looks.sort(key=lambda look: (-look.success, look.loss))
            targets = [look.target for look in looks[: self.candidates]]
        found: dict[float, list[InvertedTrigger]] = {budget: [] for budget in self.budgets}
        for target in targets:
            for budget, size in sizes.items():
                trigger = self._invert(made, target, size, steps=self.steps)
                found[budget].append(rate_trigger(self._model[0], *scoring, trigger))
                if trigger.success > _ENOUGH:
                    break
        best: list[InvertedTrigger] = []
        for budget in self.budgets:
            best = [max([*best, *found[budget]], key=lambda trigger: trigger.success)]
            self.triggers[budget] = best[0]
        rates = {f"reasr@{100 * b:g}%": torch.tensor(t.success, device=self.device) for b, t in self.triggers.items()}
        return {"reasr": torch.tensor(best[0].success, device=self.device), **rates}

    def _invert(self, made: tuple[Tensor, Tensor], target: int, pixels: int, *, steps: int) -> InvertedTrigger:
        return invert_trigger(
            self._model[0],
            *made,
            target=target,
            pixels=pixels,
            steps=steps,
            starts=self.starts,
            batch_size=self.batch_size,
            seed=self.seed,
        )

    def _halves(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Split images and labels into those that make triggers and those that score them.

        The images are brought into an order of their own first, so that the split is the same on any number of
        processes.
        """
        count = len(dim_zero_cat(self.labels)) if len(self.labels) else 0
        if count < 2:
            raise ArgumentError(f"REASR needs clean images to make triggers from and others to score, got {count}.")
        images, labels = dim_zero_cat(self.images), dim_zero_cat(self.labels)
        device = self._device_of_model(images)
        generator = torch.Generator().manual_seed(self.seed)
        weights = torch.rand(images[0].numel(), generator=generator, dtype=torch.float64)
        order = (images.flatten(1).cpu().double() @ weights).argsort(stable=True)
        order = order[torch.randperm(count, generator=generator)].to(images.device)
        images, labels = images[order].to(device), labels[order].to(device)
        made = min(self.inversion_images, count // 2)
        return (images[:made], labels[:made]), (images[made:], labels[made:])

    def _reachable(self, *labels: Tensor) -> list[int]:
        """Return the targets for which both halves have images of other classes."""
        wanted = range(self.num_classes or 0) if self.targets is None else self.targets
        targets = [target for target in wanted if all(bool((part != target).any()) for part in labels)]
        if not targets:
            raise ArgumentError(
                "REASR needs images of other classes than the target, got none for any target. Add more classes."
            )
        return targets

    def _device_of_model(self, images: Tensor) -> torch.device:
        model = self._model[0].model
        first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        return images.device if first is None else first.device
