"""What every trigger is: a change of 8-bit pixel images that an attacker makes."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from lightning_backdoor.errors import ArgumentError

__all__ = ["CraftedTrigger", "Trigger"]


class Trigger(ABC):
    """A deterministic change of pixel images. Call it with uint8 images ``(N, C, H, W)`` or ``(C, H, W)``.

    The result has the same shape and dtype, on the same device; the input stays as it was. A subclass implements
    :meth:`paint`, the form of the poisons, and :meth:`at_test` or :meth:`on_covers` where the attacker shows another
    form at test time or on cover samples.
    """

    def __call__(self, images: Tensor) -> Tensor:
        """Return a copy of ``images`` with the trigger in it.

        Raises:
            ArgumentError: If the images are not uint8 tensors of 3 or 4 dimensions.
        """
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim not in (3, 4):
            got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ArgumentError(
                f"`images` must be a uint8 tensor of shape (N, C, H, W) or (C, H, W), got {got}. "
                "For a dataset of other images, use `attacks.poison`, which converts them."
            )
        return self.paint(images) if images.ndim == 4 else self.paint(images.unsqueeze(0)).squeeze(0)

    @abstractmethod
    def paint(self, images: Tensor) -> Tensor:
        """Return the triggered copy of a uint8 batch ``(N, C, H, W)``."""

    def at_test(self) -> Trigger:
        """Return the trigger that the attacker shows at test time (by default this one)."""
        return self

    def on_covers(self) -> Trigger:
        """Return the trigger of cover samples, which keep their label (by default this one; see :func:`poison`)."""
        return self


class CraftedTrigger(Trigger):
    """A trigger whose poisons are made together, once, with the help of a model.

    Called, it is the trigger of test time. :func:`poison` takes the poisoned images from :meth:`craft` and stores them.
    """

    @abstractmethod
    def craft(self, images: Tensor, target: int) -> Tensor:
        """Return the poisons made of the uint8 images ``(N, C, H, W)`` of the attacked class, in the same order."""
