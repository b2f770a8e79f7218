"""A copy of the model that is trained without some samples, for what it makes of them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from lightning_backdoor.data.random_state import isolated_rng
from lightning_backdoor.errors import ModelError
from lightning_backdoor.scanning.isolation import isolated_eval
from lightning_backdoor.scanning.measure_fct import Detector, order_of_samples, trained_copy
from lightning_backdoor.scanning.scanner import DatasetScanner

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

M = TypeVar("M", bound=nn.Module)

__all__ = ["fresh_weights", "trained_without"]


def trained_without(
    trainer: Trainer,
    pl_module: LightningModule,
    data: DatasetScanner,
    *,
    left_out: Tensor,
    initial: dict[str, Tensor],
    steps: int,
    seed: int = 0,
) -> tuple[LightningModule, DatasetScanner]:
    """Train a copy of the model from given weights, without some samples; the model and its training stay as they are.

    The copy learns the labels of all other samples, by AdamW and without augmentation.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
        data: The training set.
        left_out: Samples that the copy is not trained on, bool ``(N,)``.
        initial: State of the module that the copy starts from.
        steps: Steps of training, of a batch each.
        seed: Of the order of the samples.

    Returns:
        The copy, and how the training set goes through it.

    Raises:
        ModelError: The module cannot be copied, or nothing of it can be trained.
    """
    kept = (~left_out & ~data.unread).nonzero().squeeze(1)
    settings = Detector("fresh", initial, steps, 1, None, seed, repulsion_steps=0)
    with isolated_eval(trainer, pl_module):
        data.load(trainer)
        order = kept[order_of_samples(trainer, data, len(kept), steps=steps, seed=seed)]
        return trained_copy(trainer, lambda: (_copy(trainer, pl_module, initial), data), settings, order)


def _copy(trainer: Trainer, pl_module: LightningModule, initial: dict[str, Tensor]) -> LightningModule:
    twin = _copied(pl_module)
    twin.trainer = trainer
    twin.load_state_dict(initial)
    return twin


def _copied(module: M) -> M:
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise ModelError(f"`copy.deepcopy` of `{type(module).__name__}` failed: {error}") from error


def fresh_weights(pl_module: nn.Module, seed: int) -> dict[str, Any]:
    """State of the module with the weights of all layers drawn anew that can draw them (``reset_parameters``)."""
    twin = _copied(pl_module)
    with isolated_rng(seed):
        for part in twin.modules():
            reset: Any = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
    return {name: value.detach().cpu() for name, value in twin.state_dict().items()}
