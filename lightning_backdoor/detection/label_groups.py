"""Samples by label: sorted once, and labels of like size side by side, so that a step works on many labels at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LabelBatch", "LabelGroups", "block_size", "group_by_label"]

LIKE = 0.5  # of the largest label of a batch, at least: what is computed for the padding is less than for the samples


def block_size(device: torch.device) -> int:
    """Numbers that are worked on at once: what a CPU holds in its cache, or what keeps an accelerator busy."""
    return 2**19 if device.type == "cpu" else 2**23


@dataclass(frozen=True)
class LabelBatch:
    """L labels, padded to the size n of the largest one.

    Attributes:
        labels: Class indices, L of them.
        sizes: Samples of each label.
        rows: Positions of its samples in the dataset, long ``(L, n)``; any position where a label has no more samples.
        counts: ``sizes`` as a tensor, long ``(L,)``.
        inside: Which of ``rows`` are samples of the label, bool ``(L, n)``.
    """

    labels: list[int]
    sizes: list[int]
    rows: Tensor
    counts: Tensor
    inside: Tensor


@dataclass(frozen=True)
class LabelGroups:
    """The samples of every label, on the device of the values that are to be grouped.

    Attributes:
        labels: Labels of the samples, long ``(N,)``.
        order: Positions of the samples sorted by label, in rising order within a label, long ``(N,)``.
        starts: Label to the place in ``order`` where it begins.
        sizes: Label to the number of its samples; labels in rising order.
    """

    labels: Tensor
    order: Tensor
    starts: dict[int, int]
    sizes: dict[int, int]

    def _extents(self) -> Iterator[tuple[int, int]]:
        return zip(self.starts.values(), self.sizes.values(), strict=True)

    def positions(self, label: int) -> Tensor:
        """Dataset positions of a label's samples in rising order, long ``(n,)``."""
        return self.order[self.starts[label] : self.starts[label] + self.sizes[label]]

    def totals(self, values: Tensor) -> Tensor:
        """Sum of whole numbers, long ``(N,)``, of every label, in the order of ``sizes``: exact on any device."""
        ends = torch.tensor([start + size - 1 for start, size in self._extents()])
        return values[self.order].cumsum(0)[ends.to(values.device)].diff(prepend=values.new_zeros(1))

    def batches(self, least: int, width: int, rows: int = 1) -> Iterator[LabelBatch]:
        """All labels of at least ``least`` samples, largest first, as many at once as the memory allows.

        Args:
            least: Smallest size of a label.
            width: Numbers that are computed for each sample.
            rows: Rows of as many numbers that are computed for each label, however few its samples are.
        """
        remaining = sorted((label for label, size in self.sizes.items() if size >= least), key=lambda k: -self.sizes[k])
        block = block_size(self.order.device)
        while remaining:
            largest = self.sizes[remaining[0]]
            many = max(block // (max(largest, rows) * width), 1)
            taken = [label for label in remaining[:many] if self.sizes[label] >= LIKE * largest]
            remaining = remaining[len(taken) :]
            yield self._batch(taken, largest)

    def _batch(self, labels: list[int], n: int) -> LabelBatch:
        sizes = [self.sizes[label] for label in labels]
        both = torch.tensor([[self.starts[label] for label in labels], sizes]).to(self.order.device)
        places = torch.arange(n, device=self.order.device)
        inside = places < both[1][:, None]
        return LabelBatch(labels, sizes, self.order[(both[0][:, None] + places) * inside], both[1], inside)


def group_by_label(labels: Tensor) -> LabelGroups:
    """Sort samples by their label, long ``(N,)``."""
    present, counts = torch.unique(labels, return_counts=True)
    counts = counts.cumsum(0)
    names, ends = torch.stack([present, counts]).tolist()
    starts = dict(zip(names, [0, *ends[:-1]], strict=True))
    sizes = {label: end - starts[label] for label, end in zip(names, ends, strict=True)}
    return LabelGroups(labels, labels.argsort(stable=True), starts, sizes)
