"""Do groups of samples look like samples of other labels? Exact tests of wrong labels, from the pictures alone.

A direction that splits most labels shows that they share something: the trigger of an all-to-all attack, or a clean
kind of image, such as that of a second camera. What the images show tells these apart. Under the attack, the members of
a label look like images of another label, the same for most of them. What an image looks like is measured by its
neighbor label: the most frequent label among the images that are most like it and in the lower groups, which are the
labels themselves. What the groups have in common is taken out of all pictures before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_backdoor.detection.directions import full_precision
from lightning_backdoor.detection.near_duplicates import BLOCK, NEAR, near_duplicates

__all__ = ["LikeOthers", "like_others", "tell_labels_apart", "wrong_labels_p_value"]

NEIGHBORS, PART = 20, 4  # whose most frequent label is taken: at most a quarter of what a label has on average
CHOOSING = 3  # every third member has a part in the choice of the other label; the rest are tested
MEMBERS, REST, COMPARED = 2000, 6000, 20_000  # at most, drawn at random where there are more: members, others, and
# those of the lower groups among which neighbors are sought
FIRM = 0.5  # of the neighbors, more than that, have one label, which no other can have as well: the image looks like it
ORDINARY = 2000  # samples of other labels, at most, that the members of a single label are compared with
TRIED = 500  # samples, at most, by which it is seen whether pictures tell labels apart


def wrong_labels_p_value(pictures: Tensor, labels: Tensor, upper: Tensor, usual: float) -> float:
    """Probability that images with right labels look so much like those of other labels.

    Two tests, of which both must succeed (the larger p-value counts). How often a label is the neighbor label of its
    own samples, and how often of those of other labels, are the ends of a scale:

    - Members have their own label as neighbor label less than half way up that scale. An image of a clean kind can be
      hard to tell, but is more like its own label than like others.
    - Members have one other neighbor label more than a third of the way up: that which other members of their label
      have most often. A kind of image that is like no ordinary image has neighbor labels without a rule.

    In each label, members are compared with as many samples of its own as of others, or half as many. If members have
    a neighbor label as often as these, the number of those that have it is hypergeometric; that of all labels is the
    sum.
    Near-duplicates count once.

    Args:
        pictures: From :func:`~lightning_backdoor.detection.near_duplicates.thumbnails`, ``(N, 144)``.
        labels: Labels as given, long ``(N,)``, on the device of the pictures.
        upper: The groups of all labels, bool ``(N,)``. Samples of labels without a group have no part in the test.
        usual: Distance of two pictures of a label, from
            :func:`~lightning_backdoor.detection.near_duplicates.usual_distance`.

    Returns:
        The p-value; 1 where fewer than two labels have a group.
    """
    present = torch.unique(labels[upper])
    inside = torch.isin(labels, present).nonzero().squeeze(1)
    labels, upper = torch.searchsorted(present, labels[inside]), upper[inside]
    if len(present) < 2 or bool(upper.all()):
        return 1.0
    pictures = _without_common(pictures[inside].float(), labels, upper)
    members = _different(pictures, _drawn(upper, MEMBERS), usual)
    rest = _different(pictures, _drawn(~upper, REST), usual)
    among = _drawn(~upper, COMPARED)
    of_members, of_rest = (_neighbors(pictures, labels, some, among, usual) for some in (members, rest))
    excess = of_members - of_rest.mean(dim=0)
    found = _LowerGroups(labels[rest].cpu(), of_rest.argmax(dim=1).cpu())
    labels, nearest = labels[members].cpu(), of_members.argmax(dim=1).cpu()
    choosing = torch.arange(len(members)) % CHOOSING == 0
    own, other = [], []
    for label in range(len(present)):
        mine = labels == label
        own.append(found.compared(nearest[mine] == label, label, 1))
        chosen = excess[(mine & choosing).to(excess.device)].sum(dim=0)
        chosen[label] = -torch.inf
        most = int(chosen.argmax())
        other.append(found.compared(nearest[mine & ~choosing] == most, most, 2).reversed())
    return max(few_p_value(own), few_p_value(other))


@dataclass(frozen=True)
class LikeOthers:
    """Whether a group in one label looks like images of other labels.

    Attributes:
        p_value: Probability of so many members that do, if they were no more than half way between ordinary samples
            that look like another label than theirs, and those that look like their own.
        excess: Members that look like another label, over the samples of an ordinary label that do: of as many samples
            as this label has, or as other labels have on average, if these are more.
        labels: Effective number of labels that the members look like, by Simpson's index.
    """

    p_value: float
    excess: float
    labels: float


def like_others(pictures: Tensor, labels: Tensor, members: Tensor, usual: float) -> LikeOthers:
    """Compare a group in one label with images of other labels.

    A picture looks like a label if more than half of its nearest ones have it. What the group has in common is taken
    out of all pictures before. Near-duplicates among the group count once, but not among the neighbors. Where pictures
    do not tell labels apart, nothing follows.

    Where labels are wrong throughout the data, as many samples of ordinary labels look like other labels, or as large a
    share of them.

    Args:
        pictures: From :func:`~lightning_backdoor.detection.near_duplicates.thumbnails`, ``(N, 144)``.
        labels: Labels as given, long ``(N,)``, on the device of the pictures; two at least.
        members: The group, bool ``(N,)``; neither empty nor all of its label.
        usual: Distance of two pictures of a label, from
            :func:`~lightning_backdoor.detection.near_duplicates.usual_distance`.
    """
    present, labels = torch.unique(labels, return_inverse=True)
    own = labels == labels[members][0]
    group, size = int(members.sum()), max(int(own.sum()), int((~own).sum()) / (len(present) - 1))
    everything = torch.ones_like(own)
    compared = _drawn(everything, COMPARED)
    drawn = [_drawn(members, MEMBERS), _drawn(own & ~members, MEMBERS), _drawn(~own, ORDINARY), compared]
    rows = torch.unique(torch.cat(drawn))
    pictures, labels, own, members = pictures[rows].float(), labels[rows], own[rows], members[rows]
    common = F.normalize(pictures[members].mean(dim=0) - pictures[own & ~members].mean(dim=0), dim=0)
    pictures = F.normalize(pictures - (pictures @ common)[:, None] * common, dim=1)
    some, ordinary = (_different(pictures, _drawn(*of), usual) for of in ((members, MEMBERS), (~own, ORDINARY)))
    among = torch.searchsorted(rows, compared)  # in which labels have the shares that they have in the data
    of_members, of_ordinary = (_neighbors(pictures, labels, part, among, usual) for part in (some, ordinary))
    _, hit = _firm(of_members, labels[some])
    right, wrong = _firm(of_ordinary, labels[ordinary])
    half, hits = len(ordinary) // 2, int(hit.sum())
    mixed = int(right[:half].sum()) + int(wrong[half : 2 * half].sum())
    counts = torch.bincount(_others(of_members, labels[some]).argmax(dim=1)[hit]).double()
    return LikeOthers(
        p_value=few_p_value([Counts(hits, len(some), mixed, 2 * half).reversed()]),
        excess=group * hits / len(some) / (size * max(int(wrong.sum()), 1) / len(wrong)),
        labels=float(counts.sum().square() / counts.square().sum().clamp(min=1)),
    )


def tell_labels_apart(pictures: Tensor, labels: Tensor, usual: float) -> bool:
    """Whether most pictures look like their own label: those of digits do, those of natural photographs do not."""
    labels = torch.unique(labels, return_inverse=True)[1]
    rows = _drawn(torch.ones_like(labels, dtype=torch.bool), COMPARED)
    pictures, labels, places = F.normalize(pictures[rows].float(), dim=1), labels[rows], torch.arange(len(rows))
    some = places[:TRIED].to(rows.device)
    right, _ = _firm(_neighbors(pictures, labels, some, places.to(rows.device), usual), labels[some])
    return 2 * int(right.sum()) > len(some)


def _others(shares: Tensor, own: Tensor) -> Tensor:
    """Shares of labels among neighbors, ``(n, labels)``, without those of the samples' own labels, long ``(n,)``."""
    return shares.scatter(1, own[:, None], 0)


def _firm(shares: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Samples that look like their own label, and like another one, bool ``(n,)`` each."""
    return shares.gather(1, own[:, None]).squeeze(1) > FIRM, _others(shares, own).amax(dim=1) > FIRM


@dataclass(frozen=True)
class Counts:
    """How many of some samples have a neighbor label, and how many of those that they are compared with."""

    hits: int
    samples: int
    other_hits: int
    others: int

    def reversed(self) -> Counts:
        """Those that have not."""
        return Counts(self.samples - self.hits, self.samples, self.others - self.other_hits, self.others)


@dataclass(frozen=True)
class _LowerGroups:
    """Samples of the lower groups, in random order: labels and neighbor labels, ``(n,)`` each, on the CPU."""

    labels: Tensor
    nearest: Tensor

    def compared(self, hits: Tensor, label: int, times: int) -> Counts:
        """How many have a neighbor label: of samples, and of those of this label and ``times`` as many of others."""
        of_own, of_others = (self.nearest[mask] == label for mask in (self.labels == label, self.labels != label))
        count = min(len(of_own), len(of_others) // times)
        other_hits = int(of_own[:count].sum()) + int(of_others[: times * count].sum())
        return Counts(int(hits.sum()), len(hits), other_hits, (1 + times) * count)


def few_p_value(tables: Sequence[Counts]) -> float:
    """Probability of so few hits in all tables together, if in none of them samples have fewer than the others.

    Each number of hits is hypergeometric, given the number among samples and others together; the sum of independent
    ones has the convolution of their distributions.
    """
    chance, hits = torch.ones(1, dtype=torch.float64), 0
    for table in tables:
        both, total = table.hits + table.other_hits, table.samples + table.others
        possible = torch.arange(max(both - table.others, 0), min(both, table.samples) + 1, dtype=torch.float64)
        ways = _log_ways(both, possible) + _log_ways(total - both, table.samples - possible)
        single = torch.zeros(int(possible[-1]) + 1, dtype=torch.float64)
        single[possible.long()] = (ways - _log_ways(total, torch.tensor(float(table.samples)).double())).exp()
        chance = F.conv1d(chance[None, None], single.flip(0)[None, None], padding=len(single) - 1)[0, 0]
        hits += table.hits
    return min(float(chance[: hits + 1].sum()), 1.0)


def _log_ways(of: int, taken: Tensor) -> Tensor:
    """Logarithm of the number of ways to take some of so many."""
    whole = torch.tensor(float(of), dtype=torch.float64)
    return torch.lgamma(whole + 1) - torch.lgamma(taken + 1) - torch.lgamma(whole - taken + 1)


def _without_common(pictures: Tensor, labels: Tensor, upper: Tensor) -> Tensor:
    """Pictures without the direction in which the groups differ from the rest of their labels, on average of these."""
    count, means = int(labels.max()) + 1, []
    for mask in (upper, ~upper):
        sums = torch.zeros(count, pictures.shape[1], device=pictures.device).index_add_(0, labels[mask], pictures[mask])
        means.append(sums / torch.bincount(labels[mask], minlength=count).clamp(min=1)[:, None])
    common = F.normalize((means[0] - means[1]).mean(dim=0), dim=0)
    return F.normalize(pictures - (pictures @ common)[:, None] * common, dim=1)


def _drawn(mask: Tensor, count: int) -> Tensor:
    """At most so many positions of a mask, in random order, long ``(n,)``."""
    positions = mask.nonzero().squeeze(1)
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))[:count]
    return positions[order.to(positions.device)]


def _different(pictures: Tensor, positions: Tensor, usual: float) -> Tensor:
    """Positions without all but the first of near-duplicates."""
    numbers = near_duplicates(pictures[positions], usual)
    places = torch.arange(len(positions), device=positions.device)
    first = torch.full_like(places, len(places)).scatter_reduce(0, numbers, places, "amin")
    return positions[first[first < len(places)].sort().values]


def _neighbors(pictures: Tensor, labels: Tensor, positions: Tensor, among: Tensor, usual: float) -> Tensor:
    """Share of every label among the nearest pictures that are no near-duplicates, ``(n, labels)``."""
    count = int(labels.max()) + 1
    nearest = max(min(NEIGHBORS, len(among) // (PART * count)), 1)
    found = []
    with full_precision():
        for rows in torch.split(positions, max(BLOCK // len(among), 1)):
            alike = pictures[rows] @ pictures[among].T
            alike = alike.masked_fill((alike > 1 - NEAR * usual) | (rows[:, None] == among), -1)
            labeled = labels[among[alike.topk(nearest, dim=1).indices]]
            counts = torch.zeros(len(rows), count, device=rows.device)  # whole, so that a half is exactly 0.5
            found.append(counts.scatter_add_(1, labeled, torch.ones_like(labeled, dtype=counts.dtype)) / nearest)
    return torch.cat(found)
