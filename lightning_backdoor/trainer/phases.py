"""Epochs that go through some samples first and through others next, in batches of one kind each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor.errors import DataError

__all__ = ["Phases", "require_batches"]


class Phases:
    """What the training loader draws while a defence unlearns some samples and learns others.

    Every epoch shuffles each phase by ``(seed, epoch)`` and cuts it into batches of nearly equal size. All processes
    draw equally many batches in each phase, so they change over at the same step; samples are repeated for that.

    Args:
        parts: Dataset positions of each phase, long ``(M,)``; a phase may be empty.
        size: Largest batch of one process.
        least: Batches that a phase is cut into where it has the samples for them, one number for each phase.
        mixed: Spread the batches of every phase over the epoch, instead of one phase after the other.
        seed: Seed of the shuffles.
        rank: This process.
        world: Number of processes.
        epoch: Says which epoch the next one is.
        most: Batches of all phases together, but one of each phase at least; where there are too many, each phase
            leaves samples out, in proportion, other ones in every epoch. ``None``: any number.
    """

    def __init__(
        self,
        parts: Sequence[Tensor],
        *,
        size: int,
        least: Sequence[int],
        mixed: bool,
        seed: int,
        rank: int,
        world: int,
        epoch: Callable[[], int],
        most: int | None = None,
    ) -> None:
        self._least, self._most, self._mixed = tuple(least), most, mixed
        self._parts, self._size, self._seed, self._rank, self._world = tuple(parts), size, seed, rank, world
        self._epoch = epoch
        self._drawn: tuple[int, list[list[int]]] = (-1, [])

    @property
    def most(self) -> int | None:
        """Batches of all phases together at most; ``None``: any number."""
        return self._most

    @property
    def lengths(self) -> list[int]:
        """Batches of each phase."""
        shares = [math.ceil(len(part) / self._world) for part in self._parts]
        fewest = [math.ceil(share / self._size) for share in shares]
        more = [max(min(share, least) - few, 0) for share, few, least in zip(shares, fewest, self._least, strict=True)]
        if self._most is not None and sum(fewest) > self._most:
            return _in_proportion(fewest, self._most)
        if self._most is not None and sum(fewest) + sum(more) > self._most:
            spare, wanted = self._most - sum(fewest), sum(more)
            more = [spare * wish // wanted for wish in more]
        return [few + some for few, some in zip(fewest, more, strict=True)]

    def phase_of(self, place: int) -> int:
        """Phase of the batch that is drawn at some place, counted from 0; a new pass begins after the last one."""
        return self._order[place % len(self)]

    def positions_of(self, place: int) -> Tensor:
        """Dataset positions of the batch that is drawn at some place of the current epoch, as in :meth:`phase_of`."""
        if self._drawn[0] != self._epoch():
            self._drawn = self._epoch(), list(self)
        return torch.tensor(self._drawn[1][place % len(self)])

    @cached_property
    def _order(self) -> list[int]:
        """Phase of every batch of an epoch."""
        places = [
            (place / length if self._mixed else 0, phase)
            for phase, length in enumerate(self.lengths)
            for place in range(length)
        ]
        return [phase for _, phase in sorted(places)]

    def __len__(self) -> int:
        return sum(self.lengths)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self._seed << 20) + self._epoch())
        phases = [
            iter(self._cut(part[torch.randperm(len(part), generator=generator)], batches))
            for part, batches in zip(self._parts, self.lengths, strict=True)
        ]
        for phase in self._order:
            yield next(phases[phase]).tolist()

    def _cut(self, order: Tensor, batches: int) -> Sequence[Tensor]:
        if not batches:
            return ()
        padded = order.repeat(2 if self._world <= len(order) else self._world)
        share = padded[: math.ceil(len(order) / self._world) * self._world][self._rank :: self._world]
        return torch.tensor_split(share[: batches * self._size], batches)


def _in_proportion(wanted: list[int], most: int) -> list[int]:
    """Batches of each phase, ``most`` together: in proportion to what is wanted, and one where any is wanted."""
    given: list[int] = []
    for place, want in enumerate(wanted):
        left, later = most - sum(given), wanted[place + 1 :]
        share = min(round(want * left / max(want + sum(later), 1)), left - sum(map(bool, later)))
        given.append(max(share, min(want, 1)))
    return given


def require_batches(loader: Any) -> None:
    """Check that the batches of a loader can be put together anew, and arrive in the order in which they were drawn.

    Raises:
        DataError: The loader does not batch, or gives batches in any order.
    """
    if loader.batch_sampler is None:
        raise DataError(
            "The training loader must form batches to unlearn some samples and relearn others, got `batch_size=None`. "
            "Give the DataLoader a `batch_size`, and let the dataset return single samples."
        )
    if not getattr(loader, "in_order", True):
        raise DataError(
            "The training loader must give batches in the order of its sampler, got `in_order=False`: which samples a "
            "batch holds would not be known. Leave it out."
        )
