"""Estimated attack success rate: what groups of training images have in common, put on images of other classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_backdoor.detection.common_pattern import WAYS, agreed_region, put_on, resized
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.scanning.isolation import isolated_eval
from lightning_backdoor.scanning.scan import raise_on_all_ranks
from lightning_backdoor.scanning.scanner import DatasetScanner

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["Estimate", "control_rates", "drawn", "estimate_asr"]

IMAGES = 256  # of all classes, on which it is tried: a standard error of 3 points at most
MEMBERS = 64  # of a group, and as many ordinary images of its label
GROUPS = 10  # the largest ones; each costs as much as six passes over those images
OTHER_LABELS = 6  # those with the most ordinary images
QUARTILE = 0.75  # of the rates that patterns of other labels reach: a trigger must reach more
LEARNED = 0.5  # of the members get their label: else the model has not learned what they have in common
DESCRIPTION = "estimate of the attack success rate"


@dataclass(frozen=True)
class Estimate:
    """What a model does when the common pattern of a group is put on images of other classes.

    Attributes:
        asr: Share of these images that get the label of the group, in ``[0, 1]``.
        control: The same with ordinary images in the place of the group, for the label that they have: those of the
            label of the group, or the upper quartile of other labels, whichever is larger. Where the group is nearly
            all of its label, ordinary images of the label are few and odd.
        method: How it was put on them, a key of :data:`~lightning_backdoor.detection.common_pattern.WAYS`: the one for
            which both differ most.
    """

    asr: float
    control: float
    method: str


@dataclass(frozen=True)
class _Group:
    """A label, images that may have something in common, those that they are compared with, and where they agree."""

    label: int
    members: Tensor
    ordinary: Tensor
    region: Tensor


@dataclass(frozen=True)
class _Tried:
    """Images whose common pattern is put on others, where it lies, and the label that is counted."""

    label: int
    members: Tensor
    region: Tensor

    def to(self, device: torch.device) -> _Tried:
        return _Tried(self.label, self.members.to(device), self.region.to(device))


def estimate_asr(
    trainer: Trainer,
    pl_module: LightningModule,
    data: DatasetScanner,
    groups: Sequence[tuple[int, Tensor]],
    *,
    labels: Tensor,
    ordinary: Tensor,
    seed: int = 0,
) -> list[Estimate | None]:
    """Estimate the attack success rate of groups of training images, without knowing a trigger.

    The difference of mean images is added, half of a member is blended in, and the region in which members agree far
    more than ordinary images of their label is pasted. Reads at most 256 images of all classes, 64 of each group, and
    64 ordinary ones of its label and of each of six other labels. Weights, buffers, random streams and logs of the
    training stay as they are; every process calls it and gets the same result.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule, with weights that have learned what the groups have in common.
        data: The training set.
        groups: Label and positions of each, most suspicious first.
        labels: Labels as given, long ``(N,)``, -1 where there is none.
        ordinary: Samples in no group, bool ``(N,)``.
        seed: Of the choice of images.

    Returns:
        For each group the estimate; ``None`` if the model gives fewer than half of its members their label, if there
        is no other image, or for groups beyond the ten largest.
    """
    estimates: list[Estimate | None] = [None] * len(groups)
    try:
        data.require_replaceable(trainer, pl_module)
    except ArgumentError:
        return estimates
    ordinary = ordinary & (labels >= 0) & ~data.unread
    usual, places = drawn(ordinary, IMAGES, seed), _places(trainer, pl_module, data, groups, labels[ordinary])
    if not places or not len(usual):
        return estimates
    other_labels = _other_labels(labels[ordinary], [label for label, _ in groups])
    with isolated_eval(trainer, pl_module), raise_on_all_ranks(trainer, DESCRIPTION):
        pixels = data.images(usual.tolist())
        made = [_group(data, *groups[place], ordinary & (labels == groups[place][0]), seed) for place in places]
        others = [_other(data, label, ordinary & (labels == label), pixels, seed) for label in other_labels]
        # in this order: of each group its members and the ordinary images of its label, then those of other labels
        pairs = [(group, members) for group in made for members in (group.members, group.ordinary)]
        pairs += [(other, other.members) for other in others]
        tried = [_Tried(group.label, members, group.region).to(pl_module.device) for group, members in pairs]
        pixels = pixels.to(pl_module.device)
    given, shown = _given(trainer, pl_module, data, tried, usual=usual, pixels=pixels), labels[usual]
    rates = [_share(column, shown != one.label) for one, column in zip(tried, given.unbind(1), strict=True)]
    of_others = rates[2 * len(places) :]
    for number, place in enumerate(places):
        if bool((shown != groups[place][0]).any()):
            own, control = rates[2 * number], control_rates(rates[2 * number + 1], of_others)
            best = int((own - control).argmax())
            estimates[place] = Estimate(float(own[best]), float(control[best]), list(WAYS)[best])
    return estimates


def _places(
    trainer: Trainer,
    pl_module: LightningModule,
    data: DatasetScanner,
    groups: Sequence[tuple[int, Tensor]],
    ordinary_labels: Tensor,
) -> list[int]:
    """Of the ten largest groups, those most of whose members get their label, which ordinary samples have, too."""
    largest = sorted(range(len(groups)), key=lambda place: -len(groups[place][1]))[:GROUPS]
    shares = _given_their_label(trainer, pl_module, data, [groups[place] for place in largest])
    learned = [place for place, share in zip(largest, shares, strict=True) if share >= LEARNED]
    return [place for place in learned if bool((ordinary_labels == groups[place][0]).any())]


def _given(
    trainer: Trainer,
    pl_module: LightningModule,
    data: DatasetScanner,
    tried: Sequence[_Tried],
    *,
    usual: Tensor,
    pixels: Tensor,
) -> Tensor:
    """Which images get the label of a group when what some images have in common is put on them.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule.
        data: The training set.
        tried: P groups of images whose common pattern is put on, on the device of the module.
        usual: Positions of the B images that it is put on.
        pixels: These images, uint8 ``(B, C, H, W)``, on that device.

    Returns:
        Bool ``(B, P, W)``, for the W ways in the order of ``WAYS``.
    """

    def step(indices: Tensor, batch: Any) -> dict[str, Tensor]:
        images = data.layout.images(batch)
        shown = data.pixels.to_pixels(images).to(pl_module.device)
        given = []
        for one in tried:
            for way in WAYS:
                changed = put_on(shown, indices, one.members, usual=pixels, region=one.region, way=way)
                version = data.layout.with_images(batch, data.pixels.to_model(changed, like=images))
                given.append(data.logits(trainer, pl_module, version).argmax(dim=1) == one.label)
        return {"given": torch.stack(given, dim=1)}

    found = data.scan(trainer, pl_module, step, description=DESCRIPTION, positions=usual)
    return found["given"].view(len(usual), len(tried), len(WAYS))


def control_rates(of_label: Tensor, of_others: Sequence[Tensor]) -> Tensor:
    """What ordinary images reach in each way, float ``(W,)``.

    Args:
        of_label: Share of images of other classes that get the label of ordinary images of a group's label.
        of_others: The same of ordinary images of other labels, ``(W,)`` each.

    Returns:
        The larger of the first, and the upper quartile of the others.

    Example:
        >>> import torch
        >>> control_rates(torch.tensor([0.25]), [torch.tensor([rate]) for rate in (0.0, 0.5, 0.5, 0.5)])
        tensor([0.5000])
    """
    if not len(of_others):
        return of_label
    return torch.maximum(of_label, torch.stack(list(of_others)).quantile(QUARTILE, dim=0))


def _share(given: Tensor, shown: Tensor) -> Tensor:
    """Share of the shown images, bool ``(B,)``, that get the label, from bool ``(B, W)``: float ``(W,)``."""
    return given[shown].float().mean(dim=0) if bool(shown.any()) else torch.zeros(given.shape[1])


def _other_labels(labels: Tensor, without: list[int]) -> list[int]:
    """The labels with the most ordinary images, without those of groups."""
    present, counts = torch.unique(labels, return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return [label for label in present[order].tolist() if label not in without][:OTHER_LABELS]


def drawn(mask: Tensor, count: int, seed: int = 0) -> Tensor:
    """At most so many positions of a mask, drawn at random, in rising order."""
    positions = mask.nonzero().squeeze(1)
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(seed))
    return positions[order[:count]].sort().values


def _given_their_label(
    trainer: Trainer, pl_module: LightningModule, data: DatasetScanner, groups: list[tuple[int, Tensor]]
) -> list[float]:
    """Share of the first members of each group that get its label, in ``[0, 1]``."""
    first = [positions[:MEMBERS] for _, positions in groups]
    every = torch.cat(first).unique()  # type: ignore[no-untyped-call]
    predicted = data.predict(trainer, pl_module, description=DESCRIPTION, positions=every)
    answers = [predicted[torch.searchsorted(every, positions)] for positions in first]
    return [float((given == label).float().mean()) for given, (label, _) in zip(answers, groups, strict=True)]


def _group(data: DatasetScanner, label: int, positions: Tensor, ordinary: Tensor, seed: int) -> _Group:
    """The first members of a group, and ordinary images of its label."""
    members = data.images(positions[:MEMBERS].tolist())
    others = data.images(drawn(ordinary, MEMBERS, seed).tolist())
    return _Group(label, members, others, agreed_region(members, resized(others, members.shape[2:])))


def _other(data: DatasetScanner, label: int, ordinary: Tensor, usual: Tensor, seed: int) -> _Group:
    """Ordinary images of a label, as if they were a group that is compared with usual images of all labels."""
    members = data.images(drawn(ordinary, MEMBERS, seed).tolist())
    return _Group(label, members, usual, agreed_region(members, resized(usual, members.shape[2:])))
