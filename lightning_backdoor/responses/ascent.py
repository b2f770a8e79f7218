"""Training steps on suspects turned around, within bounds."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_backdoor._lightning import plain, unscales_by_itself
from lightning_backdoor.functional.unlearning import forgetting_loss
from lightning_backdoor.loading.batch_schedule import Phases
from lightning_backdoor.surgery.taps import eager_forward

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

__all__ = ["Ascent", "loss_scale"]

MAX_NORM = 5.0  # of the gradient of a step that holds suspects


class Ascent:
    """Lets the user's training step climb on the batches of the first phase and descend on those of the second.

    Right before the loss is differentiated it is changed in place, so that accumulation, clipping, scaled precision and
    several processes work, and the logged loss stays the user's. Without bounds it changes its sign.

    Bounded, it becomes :func:`~lightning_backdoor.functional.forgetting_loss` of the logits of the step, whatever the
    user's loss is (one with label smoothing, say, would teach a sure model its labels if it were climbed on), and the
    gradient of a step has a limited length. Compiled models run eagerly on such a batch, since hooks do not fire in
    compiled code. Where the logits of a batch are not to be seen in a forward pass, the whole loss changes its sign.

    Args:
        head: The layer whose output are the logits; ``None`` if there is none.
        bounded: Whether there are bounds.
    """

    def __init__(self, head: nn.Module | None, *, bounded: bool) -> None:
        self._head, self._bounded = head, bounded
        self._drawn = 0
        self._climbs = self._climbed = False  # with this batch; with one since the last step
        self._labels = torch.zeros(0, dtype=torch.long)
        self._logits: list[Tensor] = []  # of the forward passes since the last backward one
        self._watch = ExitStack()

    def count_from_zero(self) -> None:
        """Begin a pass over the phases."""
        self._drawn = 0

    def prepare_batch(self, trainer: Trainer, phases: Phases, labels: Tensor, batch_idx: int) -> None:
        """Note which phase a batch is of; call in ``on_train_batch_start``.

        Counted by itself: after a resume in the middle of an epoch the loader begins anew, ``batch_idx`` does not.

        Args:
            trainer: The running Trainer.
            phases: What is drawn.
            labels: Labels of all samples as given, long ``(N,)``: those of the batch may be mixed on the device.
            batch_idx: Lightning's.
        """
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._climbed = False
        self.release()
        place, self._drawn = self._drawn, self._drawn + 1
        self._climbs = phases.phase_of(place) == 0
        self._climbed |= self._climbs
        if self._climbs and self._bounded and self._head is not None:
            self._labels = labels[phases.positions_of(place)]
            self._watch.callback(self._head.register_forward_hook(self._see).remove)
            self._watch.enter_context(eager_forward())

    def turn_loss(self, trainer: Trainer, loss: Tensor) -> None:
        """Turn the loss around where its batch is one of suspects; call in ``on_before_backward``."""
        seen, self._logits = self._logits, []
        if not self._climbs:
            return
        if not seen:
            loss.mul_(-1.0)  # recorded: gradients turn, too
            return
        forgetting = torch.stack([forgetting_loss(logits, self._labels.to(logits.device)) for logits in seen]).mean()
        loss.copy_((forgetting * loss_scale(trainer)).to(loss))  # recorded, too; a loss without end is forgotten

    def limit_step(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Limit the gradient; call in ``on_before_optimizer_step``."""
        if self._climbed and self._bounded:
            unscales = unscales_by_itself(optimizer)  # by itself, later: a fused one
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM * (_precision_scale(trainer) if unscales else 1.0))

    def release(self) -> None:
        """Listen to the head no longer."""
        self._watch.close()
        self._logits = []

    def _see(self, _layer: nn.Module, _arguments: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.requires_grad or output.shape[2:].numel() != 1:
            return
        logits = plain(output).flatten(1) if output.ndim > 1 else plain(output)[:, None]
        if len(logits) == len(self._labels):
            self._logits.append(nn.functional.pad(logits, (1, 0)) if logits.shape[1] == 1 else logits)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running Trainer."""
        return {**self.__dict__, "_head": None, "_logits": [], "_watch": ExitStack()}


def loss_scale(trainer: Trainer) -> float:
    """What Lightning multiplied the user's loss with when it comes to ``on_before_backward``."""
    return _precision_scale(trainer) / float(trainer.accumulate_grad_batches)


def _precision_scale(trainer: Trainer) -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
