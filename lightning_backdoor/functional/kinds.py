"""Tensors of derived classes, as torchvision and MONAI make them."""

from __future__ import annotations

from torch import Tensor

__all__ = ["plain"]


def plain(tensor: Tensor) -> Tensor:
    """Return the values of a tensor of a derived class as a plain tensor.

    Derived classes attach rules of their own to indexing and arithmetic. Memory and graph stay those of ``tensor``, and
    a mode of ``torch.overrides`` receives this operation like others.
    """
    if type(tensor) is Tensor:
        return tensor
    # Tensor's own rule in place of the derived class's; active modes of torch.overrides still receive the operation
    values: Tensor = Tensor.__torch_function__(Tensor.view, (), (tensor, tensor.shape))  # type: ignore[no-untyped-call]
    return values
