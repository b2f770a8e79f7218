"""Contexts for forward passes that leave the state of the training around them as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_backdoor._lightning import before_batch_transfer, buffers_of, put_buffer, rank_zero_warn, trainer_of
from lightning_backdoor.data.origins import Replaced
from lightning_backdoor.data.random_state import isolated_rng
from lightning_backdoor.errors import TrainerError

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = [
    "evaluation_mode",
    "forward_context",
    "isolated_eval",
    "prepare_batch",
    "quiet",
    "require_automatic",
    "require_unsharded",
    "transfers_plainly",
    "warn_of_evaluation_mode",
]

SHARDED_STRATEGIES = frozenset({"DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"})


@contextmanager
def isolated_eval(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Run forward passes that leave weights, buffers, random streams, modes and logs of the training as they are.

    Inside: every module is in evaluation mode, ``trainer.validating`` is true (so augmentations written
    ``if self.trainer.training`` stay off), ``self.log`` is mute, gradients are not recorded, and all ranks see the
    buffers of rank 0 (batch-norm statistics differ between ranks during training). Afterwards everything is put back,
    each module's ``training`` flag included, so that layers the user froze stay frozen. Never ``inference_mode``: a
    model that caches a tensor in ``forward`` could not train on it.

    With several processes every rank must enter.
    """
    with ExitStack() as stack:
        for context in (
            isolated_rng(),
            evaluation_mode(pl_module),
            _validation_stage(trainer),
            _muted(pl_module),
            _buffers_of_rank_zero(trainer, pl_module),
            torch.no_grad(),
        ):
            stack.enter_context(context)
        yield


@contextmanager
def quiet(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """The part of :func:`isolated_eval` for a pass that trains: no logs, no augmentation by ``trainer.training``."""
    with _validation_stage(trainer), _muted(pl_module):
        yield


def prepare_batch(trainer: Trainer, pl_module: LightningModule, batch: Any) -> Any:
    """Take a batch from the loader to the device as Lightning does, with all transfer hooks of module and datamodule.

    The hooks belong to the user and may change ``batch`` in place: derive other versions of its images before. Images
    that a batch cannot hold (:class:`~lightning_backdoor.data.origins.Replaced`) go to the device by themselves.
    """
    if isinstance(batch, Replaced):
        return Replaced(batch.batch, trainer.precision_plugin.convert_input(batch.images).to(pl_module.device))
    batch = trainer.precision_plugin.convert_input(batch)
    batch = before_batch_transfer(pl_module)(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def transfers_plainly(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether tensors of a batch may go to the device before its transfer, which then finds them there.

    Not on the CPU, nor where a hook of the user's comes before the transfer or is the transfer: it is written for
    batches on the CPU.
    """
    if pl_module.device.type in ("cpu", "mps"):  # MPS takes no float64, which the precision may convert first
        return False
    owners = [owner for owner in (pl_module, getattr(trainer, "datamodule", None)) if owner is not None]
    hooks = [
        getattr(owner, name) for owner in owners for name in ("on_before_batch_transfer", "transfer_batch_to_device")
    ]
    packages = {str(getattr(hook, "__module__", "")).partition(".")[0] for hook in hooks}
    return packages <= {"lightning", "pytorch_lightning"}


def forward_context(pl_module: nn.Module) -> AbstractContextManager[Any]:
    """The Trainer's precision context (autocast, default dtype) around a forward; nothing without a Trainer."""
    trainer = trainer_of(pl_module)
    return nullcontext() if trainer is None else trainer.precision_plugin.forward_context()


def require_automatic(pl_module: LightningModule, what: str) -> None:
    """Raise when the module optimizes by hand: its steps then do not go through Lightning's hooks.

    Args:
        pl_module: The LightningModule under training.
        what: The defence and its verb, for the message.

    Raises:
        TrainerError: The module sets ``automatic_optimization = False``.
    """
    if not pl_module.automatic_optimization:
        raise TrainerError(
            f"{what} through the Trainer, but the module sets `automatic_optimization = False`. Let `training_step` "
            "return the loss, or use UltraCleanCallback."
        )


def require_unsharded(trainer: Trainer) -> None:
    """Raise when the strategy keeps parameters in pieces: the module cannot be called outside its wrapper then.

    Raises:
        TrainerError: The strategy is FSDP, DeepSpeed or ModelParallel (or a subclass).
    """
    sharded = SHARDED_STRATEGIES & {cls.__name__ for cls in type(trainer.strategy).__mro__}
    if sharded:
        raise TrainerError(
            "Trainer(strategy=...) must keep a whole copy of the model on each device, through which images are looked "
            f"at, got {type(trainer.strategy).__name__}, which shards it. Pass strategy='ddp' or a single device."
        )


def warn_of_evaluation_mode(pl_module: nn.Module, method: str) -> None:
    """Warn where everything that learns is in evaluation mode, as in a model that was loaded and evaluated.

    Lightning trains every module in the mode that it arrives in: through fixed batch-norm statistics, without dropout.
    A part alone, such as a frozen backbone, is the user's choice.

    Args:
        pl_module: The LightningModule at the start of a fit.
        method: Name of the defence, for readers.
    """
    learning = [part for part in pl_module.modules() if any(p.requires_grad for p in part.parameters(recurse=False))]
    if learning and not any(part.training for part in learning):
        rank_zero_warn(
            f"{method}: all layers of `{type(pl_module).__name__}` that learn are in evaluation mode, and Lightning "
            "trains them in it: with fixed batch-norm statistics and without dropout. Call `model.train()` before "
            "`fit`, unless this is what you want."
        )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Every module is in evaluation mode; afterwards each has its own flag again."""
    # Flags are written one by one: `train()` may be overridden by the user and would unfreeze frozen layers.
    flags = [(child, child.training) for child in module.modules()]
    try:
        for child, _ in flags:
            child.training = False
        yield
    finally:
        for child, flag in flags:
            child.training = flag


@contextmanager
def _validation_stage(trainer: Trainer) -> Iterator[None]:
    stage = trainer.state.stage
    try:
        trainer.validating = True
        yield
    finally:
        trainer.state.stage = stage


@contextmanager
def _muted(pl_module: nn.Module) -> Iterator[None]:
    loggers = [m for m in pl_module.modules() if hasattr(type(m), "log_dict") and hasattr(type(m), "log")]
    before: list[dict[str, Any]] = [{k: vars(m)[k] for k in ("log", "log_dict") if k in vars(m)} for m in loggers]
    try:
        for module in loggers:
            vars(module).update(log=_silence, log_dict=_silence)
        yield
    finally:
        for module, own in zip(loggers, before, strict=True):
            for name in ("log", "log_dict"):
                vars(module).pop(name, None)
            vars(module).update(own)


def _silence(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``self.log`` and ``self.log_dict``."""


@contextmanager
def _buffers_of_rank_zero(trainer: Trainer, pl_module: nn.Module) -> Iterator[None]:
    """Copy the buffers of rank 0 to all ranks; afterwards each rank has its own objects and values again."""
    own = [
        (module, name, buffer, buffer.detach().clone())
        for module in pl_module.modules()
        for name, buffer in buffers_of(module).items()
    ]
    try:
        if trainer.world_size > 1:
            with torch.no_grad():
                for _, _, buffer, _ in own:
                    _copy_from_rank_zero(buffer, trainer.strategy.root_device)
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in own:
                buffer.copy_(value)
                put_buffer(module, name, buffer)


def _copy_from_rank_zero(buffer: Tensor, device: torch.device) -> None:
    parcel = buffer.detach().to(device).contiguous()
    torch.distributed.broadcast(parcel, src=0)
    buffer.copy_(parcel)
