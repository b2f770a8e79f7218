"""A copy of the model that is trained without some samples, for what it makes of them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lightning_backdoor._lightning import reset_of
from lightning_backdoor.data.random_state import isolated_rng
from lightning_backdoor.errors import ModelError
from lightning_backdoor.scanning.isolation import isolated_eval
from lightning_backdoor.scanning.measure_fct import Detector, order_of_samples, thaw, trained_copy
from lightning_backdoor.scanning.scanner import DatasetScanner

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["trained_without"]


def trained_without(
    trainer: Trainer,
    pl_module: LightningModule,
    data: DatasetScanner,
    *,
    left_out: Tensor,
    initial: dict[str, Tensor] | None,
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
        initial: State of the module that the copy starts from. ``None``: the weights of all layers that can draw them
            (``reset_parameters``, and ``nn.MultiheadAttention``) are drawn anew, and all weights learn.
        steps: Steps of training, of a batch each.
        seed: Of the order of the samples.

    Returns:
        The copy, and how the training set goes through it.

    Raises:
        ModelError: The module cannot be copied, a layer cannot draw its weights, or nothing of it can be trained.
    """
    kept = (~left_out & ~data.unread).nonzero().squeeze(1)
    settings = Detector("fresh", None, steps, 1, None, seed, repulsion_steps=0)
    with isolated_eval(trainer, pl_module):
        data.load(trainer)
        order = kept[order_of_samples(trainer, data, len(kept), steps=steps, seed=seed)]
        return trained_copy(trainer, lambda: (_copy(trainer, pl_module, initial, seed), data), settings, order)


def _copy(
    trainer: Trainer, pl_module: LightningModule, initial: dict[str, Tensor] | None, seed: int
) -> LightningModule:
    try:
        twin = copy.deepcopy(pl_module)
    except Exception as error:
        raise ModelError(f"`copy.deepcopy` of `{type(pl_module).__name__}` failed: {error}") from error
    twin.trainer = trainer
    if initial is None:
        _draw_anew(twin, seed)
        thaw(twin)
    else:
        twin.load_state_dict(initial)
    return twin


def _draw_anew(module: nn.Module, seed: int) -> None:
    with isolated_rng(seed):
        for part in module.modules():
            reset = reset_of(part)
            if reset is None:
                continue
            try:
                reset()
            except Exception as error:
                raise ModelError(
                    f"`{type(part).__name__}.reset_parameters()` must draw the weights of the layer anew, but failed: "
                    f"{error}. Give its arguments defaults."
                ) from error
