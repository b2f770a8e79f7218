"""Training steps on suspects turned around, within bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_backdoor.functional.unlearning import forgetting_factors
from lightning_backdoor.trainer.phases import Phases

__all__ = ["Ascent"]

MAX_NORM = 5.0  # of the gradient of a step that holds suspects


class Ascent:
    """Lets the user's training step climb on the batches of the first phase and descend on those of the second.

    Without bounds the loss changes its sign in place, right before it is differentiated, so that accumulation,
    clipping, scaled precision and several processes work, and the logged loss stays the user's.

    Bounded, the gradient turns around where it enters the logits, image by image (see
    :func:`~lightning_backdoor.functional.forgetting_factors`), and that of a step has a limited length. Where the
    logits of a batch are not to be seen in a forward pass, the whole loss changes its sign.

    Args:
        head: The layer whose output are the logits; ``None`` if there is none.
        bounded: Whether there are bounds.
    """

    def __init__(self, head: nn.Module | None, *, bounded: bool) -> None:
        self._head, self._bounded = head, bounded
        self._drawn = 0
        self._climbs = self._climbed = False  # with this batch; with one since the last step
        self._turned = False  # at the logits
        self._labels = torch.zeros(0, dtype=torch.long)
        self._hook: RemovableHandle | None = None

    def at_epoch_start(self) -> None:
        """Begin a pass over the phases."""
        self._drawn = 0

    def at_batch_start(self, trainer: Any, phases: Phases, labels: Tensor, batch_idx: int) -> None:
        """Note which phase a batch is of; call in ``on_train_batch_start``.

        Counted by itself: after a resume in the middle of an epoch the loader begins anew, ``batch_idx`` does not.
        """
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._climbed = False
        self.release()
        self._climbs, self._turned = phases.phase_of(self._drawn) == 0, False
        self._climbed |= self._climbs
        self._drawn += 1
        if self._climbs and self._bounded and self._head is not None:
            self._labels = labels.clone()
            self._hook = self._head.register_forward_hook(self._turn)

    def at_backward(self, loss: Tensor) -> None:
        """Turn the loss around where its batch is one of suspects; call in ``on_before_backward``."""
        if self._climbs and not self._turned:
            loss.mul_(-1.0)  # recorded: gradients turn, too

    def at_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Limit the gradient; call in ``on_before_optimizer_step``."""
        if self._climbed and self._bounded:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)

    def _turn(self, _layer: nn.Module, _arguments: Any, logits: Any) -> None:
        labels = self._labels
        seen = isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(labels) and logits.requires_grad
        if seen:
            factors = forgetting_factors(logits.detach(), labels)[:, None]
            logits.register_hook(lambda gradient: gradient * factors.to(gradient.dtype))
            self._turned = True

    def release(self) -> None:
        """Listen to the head no longer."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
