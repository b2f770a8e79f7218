"""Selection networks: the minima and maxima that move the k-th smallest of several values to a known place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["select"]


class Comparison(NamedTuple):
    """Order two values; a result that no later comparison uses is not computed."""

    first: int
    second: int
    lower: bool
    upper: bool


def select(values: Sequence[Tensor], ranks: Sequence[int], presorted: int = 1) -> list[Tensor]:
    """Return the elementwise order statistics ``ranks`` (0 is the smallest) of tensors of one shape.

    Args:
        values: Tensors to be ordered against each other, element by element.
        ranks: Which of the sorted values are wanted.
        presorted: Length of the runs, from the start of ``values``, that are known to be sorted. Divides their number.
    """
    network, places = _network(len(values), tuple(ranks), presorted)
    slots = list(values)
    for first, second, lower, upper in network:
        a, b = slots[first], slots[second]
        if lower:
            slots[first] = torch.minimum(a, b)
        if upper:
            slots[second] = torch.maximum(a, b)
    return [slots[place] for place in places]


@cache
def _network(count: int, ranks: tuple[int, ...], run: int) -> tuple[tuple[Comparison, ...], tuple[int, ...]]:
    """Return the comparisons and the slots in which the wanted ranks end up.

    Batcher's odd-even merge sort on a power of two of wires. Runs start at multiples of a power of two, so the merges
    that would sort them are left out; wires without a value stand for infinity and cost nothing.
    """
    room = 1 << (run - 1).bit_length()
    size = 1 << (count // run * room - 1).bit_length()
    wires: list[int | None] = [None] * size
    for value in range(count):
        wires[value // run * room + value % run] = value
    pairs = []
    for i, j in _odd_even_merges(room, size):
        first, second = wires[i], wires[j]
        if first is None:
            wires[i], wires[j] = second, None
        elif second is not None:
            pairs.append((first, second))
    places = tuple(place for rank in ranks if (place := wires[rank]) is not None)
    wanted, kept = set(places), []
    for first, second in reversed(pairs):
        if wanted & {first, second}:
            kept.append(Comparison(first, second, first in wanted, second in wanted))
            wanted |= {first, second}
    return tuple(reversed(kept)), places


def _odd_even_merges(sorted_already: int, size: int) -> list[tuple[int, int]]:
    """Return Batcher's comparisons for ``size`` wires (a power of two) of which runs of a power of two are sorted."""
    pairs = []
    half = sorted_already
    while half < size:
        step = half
        while step >= 1:
            for start in range(step % half, size - step, 2 * step):
                for i in range(start, min(start + step, size - step)):
                    if i // (2 * half) == (i + step) // (2 * half):
                        pairs.append((i, i + step))
            step //= 2
        half *= 2
    return pairs
