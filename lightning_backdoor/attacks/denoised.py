"""A trigger against UltraClean: what its denoisers would take away is not there to begin with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lightning_backdoor.attacks.painting import to_uint8
from lightning_backdoor.attacks.triggers import Trigger
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.functional import local_median, nl_means

__all__ = ["Denoised"]

GREY = 128


@dataclass(frozen=True)
class Denoised(Trigger):
    """Add only what UltraClean's two denoisers leave of another trigger.

    The trigger is painted on a mid-grey image. This and the mid-grey image without it go ``passes`` times through the
    local median and then non-local means; their difference is what is added to every image, saturating at 0 and 255.
    Images themselves are not denoised: apart from the trigger, their pixels stay.

    Args:
        trigger: The trigger to make robust, such as :class:`Blended` or :class:`BadNets`.
        passes: How often it is denoised, at least 1.

    Raises:
        ArgumentError: If ``passes`` is out of range or, when called, if nothing of the trigger is left.
    """

    trigger: Trigger
    passes: int = 3

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise ArgumentError(f"`passes` must be at least 1, got {self.passes}.")

    def paint(self, images: Tensor) -> Tensor:
        """Return the triggered copy of a uint8 batch ``(N, C, H, W)``."""
        return to_uint8(images + _rest(self, tuple(images.shape[1:])).to(images.device))

    def at_test(self) -> Denoised:
        """Return what is left of the trigger's form of test time."""
        return Denoised(self.trigger.at_test(), self.passes)

    def on_covers(self) -> Denoised:
        """Return what is left of the trigger's form on cover samples."""
        return Denoised(self.trigger.on_covers(), self.passes)


@lru_cache(maxsize=16)
def _rest(denoised: Denoised, shape: tuple[int, ...]) -> Tensor:
    """Return what is left of a trigger on an image of this shape, in signed grey levels."""
    gray = torch.full((1, *shape), GREY, dtype=torch.uint8)
    shown = torch.cat([denoised.trigger(gray), gray])
    for _ in range(denoised.passes):
        shown = nl_means(local_median(shown))
    rest = shown[0].float() - shown[1].float()
    if not rest.any():
        raise ArgumentError(
            f"{denoised.passes} passes of denoising leave nothing of {denoised.trigger!r}. Pass fewer `passes` or a "
            "larger or stronger trigger."
        )
    return rest
