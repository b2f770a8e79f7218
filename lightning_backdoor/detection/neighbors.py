"""Agreement of labels among nearest neighbours in feature space, and the use of it for uncertain samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_backdoor.detection.directions import full_precision
from lightning_backdoor.errors import ArgumentError

__all__ = ["neighbor_agreement", "reconsider_uncertain"]

MAJORITY = 0.5
RARE = 0.01  # of the trusted samples of a label
BLOCK = 2**13  # samples whose neighbours are searched at once


def neighbor_agreement(features: Tensor, labels: Tensor, trusted: Tensor, k: int = 20, *, gpu: bool = True) -> Tensor:
    """Share of the ``k`` nearest trusted samples, by the cosine of their features, that have a sample's own label.

    A trusted sample is not its own neighbour. The search is exact: by faiss for features in main memory, else on the
    device of the features, by products with all trusted ones.

    Args:
        features: Float ``(N, D)``, on any device.
        labels: Labels as given, long ``(N,)``.
        trusted: Samples among which neighbours are searched, bool ``(N,)``.
        k: At least 1; fewer where there are not so many trusted samples.
        gpu: Search features in main memory on all GPUs, where faiss has any; it takes a share of their memory.

    Returns:
        Float ``(N,)`` in ``[0, 1]``, on the CPU; for features of length zero any neighbours are as near as others.

    Raises:
        ArgumentError: The shapes do not fit, ``k`` is below 1, or fewer than two samples are trusted.

    Example:
        >>> import torch
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.2, 0.8]])
        >>> trusted = torch.tensor([True, True, True, True, False])
        >>> neighbor_agreement(features, torch.tensor([0, 0, 1, 1, 0]), trusted, k=1)
        tensor([1., 1., 1., 1., 0.])
    """
    size = len(features)
    if features.ndim != 2 or labels.shape != (size,) or trusted.shape != (size,):
        raise ArgumentError(
            f"`features` must have shape (N, D), `labels` and `trusted` (N,), got {tuple(features.shape)}, "
            f"{tuple(labels.shape)} and {tuple(trusted.shape)}."
        )
    own = trusted.cpu().nonzero().squeeze(1)
    if k < 1 or len(own) < 2:
        raise ArgumentError(f"`k` must be at least 1 and two samples be trusted, got {k} and {len(own)}.")
    k = min(k, len(own) - 1)
    given = labels.cpu()
    nearest = _nearest(_directions(features[own.to(features.device)]), k + 1, gpu)
    shares = []
    for rows in torch.split(torch.arange(size), BLOCK):
        near = own[nearest(_directions(features[rows.to(features.device)]))]
        itself = near == rows[:, None]
        drop = torch.where(itself.any(dim=1), itself.int().argmax(dim=1), k)  # itself, or the furthest
        others = near[torch.arange(k + 1) != drop[:, None]].view(len(rows), k)
        shares.append((given[others] == given[rows, None]).float().mean(dim=1))
    return torch.cat(shares)


def _directions(features: Tensor) -> Tensor:
    return F.normalize(features.detach().float(), dim=1).contiguous()


def _nearest(references: Tensor, count: int, gpu: bool) -> Callable[[Tensor], Tensor]:
    """A function from queries ``(B, D)`` to the places of the references with the largest inner product.

    They are long ``(B, count)``, on the CPU.
    """
    if references.device.type == "cpu":
        index = _index(references, gpu)
        return lambda queries: torch.from_numpy(index.search(queries.numpy(), count)[1])

    def on_device(queries: Tensor) -> Tensor:
        with full_precision():
            return (queries @ references.T).topk(count, dim=1).indices.cpu()

    return on_device


def _index(references: Tensor, gpu: bool) -> Any:
    """An exact index of the references by inner product."""
    import faiss  # noqa: PLC0415

    index: Any = faiss.IndexFlatIP(references.shape[1])
    if gpu and getattr(faiss, "get_num_gpus", lambda: 0)():
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(references.numpy())
    return index


def reconsider_uncertain(
    agreement: Tensor, labels: Tensor, trusted: Tensor, uncertain: Tensor, *, most: int
) -> tuple[Tensor, Tensor]:
    """Select the uncertain samples that can be trusted, and those that are suspect, by the labels of their neighbours.

    An uncertain sample is trusted if at least half of its neighbours have its label, provided that this is so for half
    of the trusted samples of its label; otherwise the features are too weak for it, and no sample of the label becomes
    trusted. It is suspect if at most one in a hundred trusted samples of its label has so small an agreement.

    Args:
        agreement: From :func:`neighbor_agreement`, float ``(N,)``.
        labels: Labels as given, long ``(N,)``.
        trusted: Bool ``(N,)``.
        uncertain: Samples that may become trusted or suspect, bool ``(N,)``; none of them trusted.
        most: How many may become suspect; those with the smallest agreement come first.

    Returns:
        Two masks, bool ``(N,)``: newly trusted and newly suspect samples.

    Example:
        >>> import torch
        >>> agreement, trusted = torch.tensor([0.9, 0.8, 0.6, 0.1]), torch.tensor([True, True, False, False])
        >>> reconsider_uncertain(agreement, torch.zeros(4, dtype=torch.long), trusted, ~trusted, most=1)
        (tensor([False, False,  True, False]), tensor([False, False, False, False]))
    """
    agree, rare = torch.zeros_like(trusted), torch.zeros_like(trusted)
    for label in torch.unique(labels[trusted]).tolist():
        of_label = labels == label
        usual = agreement[of_label & trusted].sort().values
        if float((usual >= MAJORITY).float().mean()) >= MAJORITY:
            agree |= uncertain & of_label & (agreement >= MAJORITY)
        as_little = torch.searchsorted(usual, agreement.contiguous(), right=True)
        rare |= uncertain & of_label & ((as_little + 1) / (len(usual) + 1) <= RARE)
    positions = (rare & ~agree).nonzero().squeeze(1)
    suspect = torch.zeros_like(trusted)
    suspect[positions[agreement[positions].argsort(stable=True)[: max(most, 0)]]] = True
    return agree, suspect
