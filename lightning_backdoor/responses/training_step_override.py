"""Training steps of a defence's own, in the place of the user's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["TrainingStepOverride"]


class TrainingStepOverride:
    """Calls a defence's step where Lightning calls ``training_step``, and shows it batches as the loader gave them.

    Two methods of the Trainer's strategy and precision are wrapped. The module has another ``training_step`` only
    while a step runs, so that it can be copied and saved in between; inside of the strategy's own wrapper (DDP) the
    step runs where the user's would.

    Args:
        trainer: The running Trainer.
        pl_module: The LightningModule under training.
        see: Called with every training batch, before all transfer hooks.
        step: Called without arguments for the loss of a batch, in the Trainer's precision.
    """

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, see: Callable[[Any], None], step: Callable[[], Tensor]
    ) -> None:
        strategy, precision = trainer.strategy, trainer.precision_plugin
        training_step, convert_input = strategy.training_step, precision.convert_input

        def own_step(*args: Any, **kwargs: Any) -> Any:
            before = {name: value for name, value in vars(pl_module).items() if name == "training_step"}
            vars(pl_module)["training_step"] = lambda *_, **__: step()
            try:
                return training_step(*args, **kwargs)
            finally:
                vars(pl_module).pop("training_step")
                vars(pl_module).update(before)

        def seen(batch: Any) -> Any:
            if trainer.training:
                see(batch)
            return convert_input(batch)

        self._replaced = [(strategy, "training_step"), (precision, "convert_input")]
        self._before = [vars(owner).get(name) for owner, name in self._replaced]
        vars(strategy)["training_step"] = own_step
        vars(precision)["convert_input"] = seen

    def release(self) -> None:
        """Give both methods back."""
        for (owner, name), before in zip(self._replaced, self._before, strict=True):
            vars(owner).pop(name, None)
            if before is not None:
                vars(owner)[name] = before
        self._replaced = []
        self._before = []
