"""How much a network's answer moves when its input is denoised (UltraClean)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_backdoor.errors import ArgumentError

__all__ = ["susceptibility_scores"]


def susceptibility_scores(original: Tensor, denoised: Sequence[Tensor]) -> Tensor:
    r"""Sum of L1 distances between the output on an image and on its denoised versions; larger is more suspicious.

    .. math:: s_i = \sum_v \lVert F(x_i) - F(v(x_i)) \rVert_1

    Susceptibility of UltraClean (`Zhao and Lao, 2023 <https://arxiv.org/abs/2312.10657>`_), with local median and
    non-local means as the two versions. Logits rank poisons better than softmax outputs, which saturate.

    Args:
        original: Outputs on the images as they are, float, shape ``(N, K)``.
        denoised: Outputs on each denoised version, each of shape ``(N, K)``.

    Returns:
        One score per image, float, shape ``(N,)``, at least zero.

    Raises:
        ArgumentError: If the shapes disagree or no denoised output is given.

    Example:
        >>> import torch
        >>> susceptibility_scores(torch.tensor([[2.0, 0.0]]), [torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 3.0]])])
        tensor([4.])
    """
    if not denoised:
        raise ArgumentError("`denoised` must hold at least one output of shape (N, K), got an empty sequence.")
    for output in denoised:
        if output.shape != original.shape or original.ndim != 2:
            raise ArgumentError(
                f"`original` and every entry of `denoised` must share one shape (N, K), "
                f"got {tuple(original.shape)} and {tuple(output.shape)}."
            )
    return torch.stack([(original - output).abs().sum(dim=1) for output in denoised]).sum(dim=0)
