"""Training steps on suspects turned around, within bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_backdoor.trainer.phases import Phases

__all__ = ["Ascent"]

MAX_NORM = 5.0  # of the gradient of a step that holds suspects


class Ascent:
    """Lets the user's training step climb on the batches of the first phase and descend on those of the second.

    The loss changes its sign in place, right before it is differentiated, so that accumulation, clipping, scaled
    precision and several processes work, and the logged loss stays the user's. Bounded, a batch whose loss has reached
    that of chance counts nothing, and the gradient has a limited length.

    Args:
        bound: Loss up to which a batch is climbed on; that of chance is ``log(K)``. ``None`` climbs without any bound.
    """

    def __init__(self, bound: float | None) -> None:
        self._bound = bound
        self._drawn = 0
        self._climbs = self._climbed = False  # with this batch; with one since the last step

    def at_epoch_start(self) -> None:
        """Begin a pass over the phases."""
        self._drawn = 0

    def at_batch_start(self, trainer: Any, phases: Phases, batch_idx: int) -> None:
        """Note which phase a batch is of; call in ``on_train_batch_start``.

        Counted by itself: after a resume in the middle of an epoch the loader begins anew, ``batch_idx`` does not.
        """
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._climbed = False
        self._climbs = phases.phase_of(self._drawn) == 0
        self._climbed |= self._climbs
        self._drawn += 1

    def at_backward(self, trainer: Any, loss: Tensor) -> None:
        """Turn the loss around where its batch is one of suspects; call in ``on_before_backward``."""
        if not self._climbs:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        value = float(loss.detach()) * trainer.accumulate_grad_batches / scale
        loss.mul_(-1.0 if self._bound is None or value < self._bound else 0.0)  # recorded: gradients turn, too

    def at_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Limit the gradient; call in ``on_before_optimizer_step``."""
        if self._climbed and self._bound is not None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
