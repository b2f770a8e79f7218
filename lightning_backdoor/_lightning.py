"""Both Lightning packages as one, and every private name of Lightning and torch that this library uses."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.data.dataloader import _BaseDataLoaderIter

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer

__all__ = [
    "BUFFERS",
    "CHILD",
    "LEDGER",
    "TORCH_LEDGER",
    "CallbackBase",
    "attach",
    "before_batch_transfer",
    "buffers_of",
    "callbacks_of",
    "combined_length",
    "combined_loader",
    "epochs_processed",
    "forget_iterator",
    "forget_saved_step",
    "has_batch_norm",
    "hosted",
    "idle_trainer",
    "is_early_stopping",
    "is_fast_dev_run",
    "limited",
    "load_again",
    "may_stop_early",
    "package_of",
    "parameters_of",
    "plain",
    "put_buffer",
    "put_parameter",
    "rank_zero_info",
    "rank_zero_warn",
    "reset_of",
    "restart_fetcher",
    "running_iterators",
    "set_limits",
    "timer_lets_epoch_end",
    "trainer_of",
    "unscales_by_itself",
    "validates_by_time",
    "validation_loaders",
    "version_of",
    "with_parameters",
    "wrapped_sampler",
]

PACKAGES = ("pytorch_lightning", "lightning.pytorch")

CHILD = "model"
"""Name of a model within the LightningModule that stands for it."""

LEDGER = {
    "trainer._data_connector.attach_data": "an audit of a LightningModule is an error",
    "trainer.fit_loop.setup_data": "the training loader cannot be distinguished from others: nothing is removed",
    "trainer.strategy.process_dataloader": "the training loader cannot be replaced by its filtering clone: the same",
    "trainer.fit_loop.max_batches": "epoch lengths stay as they were before pruning",
    "trainer.val_check_batch": "validation stops after pruning",
    "trainer.fit_loop._combined_loader": "float `limit_train_batches` and a mask that is lifted keep the old length",
    "trainer.fit_loop._combined_loader._iterator": "the same",
    "trainer.fit_loop._data_fetcher": "the first epoch after a rewind or a late scan may draw removed samples",
    "trainer.fit_loop.epoch_progress": "no rewind",
    "trainer.fit_loop.epoch_loop.batch_progress": "no rewind",
    "trainer.fit_loop.epoch_loop.scheduler_progress": "no rewind",
    "trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress": "no rewind",
    "trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress": "no rewind",
    "trainer.fit_loop._can_stop_early": "a stop that `min_epochs` forbids still brings the scan forward",
    "trainer.fit_loop._last_train_dl_reload_epoch": "after a rewind, reloads wait for the epoch of the last one",
    "trainer.fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch": "the same for validation",
    "trainer.fit_loop.epoch_loop.val_loop._data_source": "a resumed run may read the images by the training transform",
    "trainer._val_check_time_interval": "validation by the clock becomes validation by batches (Lightning 2.6 on)",
    "pl_module._trainer": "forward passes ignore the Trainer's precision",
    "pl_module._on_before_batch_transfer": "scans pass a datamodule's `on_before_batch_transfer` over",
    "Timer._interval": "a repair within `Timer(interval='epoch')` may be evaluated before the last batch of its epoch",
    "EarlyStopping._run_early_stopping_check": "early stopping in the warm-up ends the run without a scan",
    "ModelCheckpoint._last_global_step_saved": "a step number that was saved before a rewind is not saved again",
    "DistributedSamplerWrapper.dataset._sampler": "a user's sampler is filtered after it is sharded, not before",
}
"""Names that Lightning does not promise, and what is lost without each of them.

They begin at the running Trainer, at its module, or at an object of the named class.
"""

TORCH_LEDGER = {
    "torch.Tensor._version": "units cannot be followed through operations in place",
    "torch.nn.Module._buffers": "buffers that a scan replaced are not put back; averages of buffers are not found",
    "torch.nn.Module._parameters": "units cannot be reset to new random weights",
    "torch.nn.MultiheadAttention._reset_parameters": "a copy for a diagnosis keeps the weights of attention",
    "torch.nn.modules.batchnorm._BatchNorm": "the package cannot be imported",
    "torch.optim.Optimizer._step_supports_amp_scaling": "the ascent's limit is off by the loss scale (fused, float16)",
    "torch.utils.data.DataLoader._iterator": "a clone shares the running workers of its loader",
    "torch.utils.data.dataloader._BaseDataLoaderIter": "the package cannot be imported",
}
"""The same for torch; besides, a loader's attributes must live in its ``__dict__``."""


def _callback_classes() -> tuple[type, ...]:
    found = []
    for package in PACKAGES:
        try:
            found.append(importlib.import_module(package).Callback)
        except ModuleNotFoundError:
            continue
        except Exception as error:  # one broken package must not take the other one down
            warnings.warn(f"`import {package}` failed ({error}); its Trainer cannot use these callbacks.", stacklevel=2)
    if not found:
        raise ImportError(
            "lightning_backdoor needs Lightning: pip install pytorch-lightning (or: pip install lightning)"
        )
    return tuple(dict.fromkeys(found))


if TYPE_CHECKING:
    CallbackBase = Callback
else:
    CallbackBase = type(
        "CallbackBase",
        _callback_classes(),
        {"__doc__": "A callback of every installed Lightning package at once.", "__module__": __name__},
    )


def package_of(*users: Any) -> Any:
    """The Lightning package that a module or datamodule comes from; the first that is installed if none is of one."""
    names = [cls.__module__ for user in users for cls in type(user).__mro__]
    installed = [cls.__module__.removesuffix(".callbacks.callback") for cls in CallbackBase.__bases__]
    used = [package for package in PACKAGES if any(name.startswith(f"{package}.") for name in names)]
    return importlib.import_module([*used, *installed][0])


def hosted(model: nn.Module, package: Any) -> LightningModule:
    """The model as a LightningModule; one with the model as its child :data:`CHILD`, if it is none."""
    if any(cls.__module__ == f"{package.__name__}.core.module" for cls in type(model).__mro__):
        return model  # type: ignore[return-value]
    host: LightningModule = package.LightningModule()
    host.add_module(CHILD, model)
    host.validation_step = _nothing  # type: ignore[method-assign]  # without one, a datamodule has no validation set
    return host


def _nothing(*args: Any) -> None:
    """Stand in for a step."""


def idle_trainer(package: Any, *, accelerator: str, devices: Any, precision: str, progress: bool) -> Trainer:
    """A Trainer on one device that logs and saves nothing, whatever the job that it runs in has set for others."""
    environments = importlib.import_module(f"{package.__name__}.plugins.environments")
    bar = [package.callbacks.TQDMProgressBar()] if progress else []
    trainer: Trainer = package.Trainer(
        accelerator=accelerator,
        devices=devices,
        precision=precision,
        plugins=[environments.LightningEnvironment()],
        callbacks=bar,
        enable_progress_bar=progress,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    return trainer


def attach(trainer: Trainer, pl_module: LightningModule, datamodule: Any = None) -> None:
    """Connect a Trainer with a module as at the start of a fit, so that batches go through the hooks of both."""
    trainer.strategy.connect(pl_module)
    trainer._data_connector.attach_data(pl_module, datamodule=datamodule)


def combined_loader(trainer: Trainer) -> Any | None:
    """The CombinedLoader that the fit loop draws from; ``None`` before it exists."""
    return getattr(trainer.fit_loop, "_combined_loader", None)


def combined_length(combined: Any, otherwise: int | float) -> int | float:
    """Batches per epoch of a CombinedLoader, infinite for endless loaders; ``otherwise`` while it is not iterated."""
    try:
        return len(combined)
    except RuntimeError:
        return otherwise
    except (TypeError, OverflowError):
        return float("inf")


def limited(length: int | float, limit: int | float) -> int | float:
    """Batches of a loader after ``limit_train_batches``, by Lightning's rule: int counts batches, float is a share."""
    if isinstance(limit, int):
        return min(length, limit)
    return length if length == float("inf") else int(length * limit)


def set_limits(combined: Any, limits: list[int | float]) -> None:
    """Replace the batches per loader of a CombinedLoader, also in the iterator that its length is read from."""
    combined.limits = limits
    iterator = getattr(combined, "_iterator", None)
    if iterator is not None:
        iterator.limits = limits


def restart_fetcher(trainer: Trainer) -> None:
    """Throw prefetched batches away and start a new epoch of the training loader."""
    fetcher = getattr(trainer.fit_loop, "_data_fetcher", None)
    if fetcher is not None:
        iter(fetcher)


def load_again(trainer: Trainer) -> None:
    """Load the data of the current epoch where the user wants loaders reloaded; later reloads count from here."""
    if not trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]  # a connector sets it
        return
    trainer.fit_loop._last_train_dl_reload_epoch = float("-inf")
    trainer.fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch = float("-inf")  # at the next validation
    trainer.fit_loop.setup_data()


def validation_loaders(trainer: Trainer) -> Any:
    """The validation loaders in the user's nesting, ``None`` if there are none.

    Lightning calls the user's ``val_dataloader()`` at the first validation, sooner in a new run than in a resumed one.
    Before that, this calls it, too; its loaders are then not those that Lightning validates on.
    """
    loaders = trainer.val_dataloaders
    if loaders is None and trainer.enable_validation:
        source = getattr(trainer.fit_loop.epoch_loop.val_loop, "_data_source", None)
        loaders = None if source is None else source.dataloader()
    return getattr(loaders, "iterables", loaders)


def wrapped_sampler(sampler: DistributedSampler[Any]) -> Any | None:
    """The user's sampler inside Lightning's ``DistributedSamplerWrapper``, which shards it by position.

    ``None`` for other samplers, and where the private name is gone: the wrapper is then filtered like any sampler.
    """
    if type(sampler).__name__ != "DistributedSamplerWrapper":
        return None
    return getattr(sampler.dataset, "_sampler", None)


def validates_by_time(trainer: Trainer) -> bool:
    """Whether ``val_check_interval`` is a duration (Lightning 2.6 on) instead of a number or share of batches."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The callbacks of a Trainer, in the order in which it calls them."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # a connector sets it
    return callbacks


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Whether the fit is a trial of a few batches; Lightning sets the attribute beside the class."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def epochs_processed(trainer: Trainer) -> int:
    """Epochs of the fit whose batches are all trained on; in ``on_train_epoch_end`` with the one that ends."""
    return int(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]  # of its tracker


def may_stop_early(trainer: Trainer) -> bool:
    """Whether ``min_epochs`` and ``min_steps`` are reached, so that ``trainer.should_stop`` ends the fit."""
    return bool(getattr(trainer.fit_loop, "_can_stop_early", True))


def is_early_stopping(callback: Callback) -> bool:
    """Whether a callback is an EarlyStopping of either package."""
    return hasattr(callback, "_run_early_stopping_check")


def timer_lets_epoch_end(timer: Any) -> bool:
    """Whether a Timer lets the running epoch end before it stops the fit: ``Timer(interval="epoch")``."""
    return bool(getattr(timer, "_interval", "step") != "step")


def forget_saved_step(callback: Callback) -> None:
    """Let a ModelCheckpoint save at step numbers that it has saved at before; other callbacks stay as they are."""
    if hasattr(callback, "_last_global_step_saved"):
        callback._last_global_step_saved = 0


def trainer_of(module: nn.Module) -> Trainer | None:
    """The Trainer that a LightningModule is attached to; ``None`` for any other module."""
    return getattr(module, "_trainer", None)


def before_batch_transfer(pl_module: LightningModule) -> Callable[..., Any]:
    """``on_before_batch_transfer`` of the datamodule or else of the module, with Lightning's choice between them.

    The module's own where Lightning's private dispatcher is gone.
    """
    hook: Callable[..., Any] = getattr(pl_module, "_on_before_batch_transfer", pl_module.on_before_batch_transfer)
    return hook


BUFFERS = "_buffers"
"""Attribute of a module that holds its own buffers by name."""


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of a module itself, without those that are ``None``."""
    return {name: buffer for name, buffer in module._buffers.items() if buffer is not None}


def put_buffer(module: nn.Module, name: str, buffer: Tensor) -> None:
    """Make a tensor the buffer of this name, without ``__setattr__``, which the user's class may override."""
    module._buffers[name] = buffer


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module itself, without those that are ``None``."""
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def put_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Make a parameter the one of this name, as :func:`put_buffer` does."""
    module._parameters[name] = parameter


def with_parameters(module: nn.Module, parameters: dict[str, nn.Parameter]) -> nn.Module:
    """A shallow copy of a module with other parameters of its own; what is not named is shared with the module."""
    twin = copy.copy(module)
    twin._parameters = {**module._parameters, **parameters}
    return twin


def reset_of(module: nn.Module) -> Callable[[], Any] | None:
    """The method that draws the weights of a layer anew; ``None`` if it has none."""
    name = "_reset_parameters" if isinstance(module, nn.MultiheadAttention) else "reset_parameters"
    method = getattr(module, name, None)
    return method if callable(method) else None


def has_batch_norm(module: nn.Module) -> bool:
    """Whether some part is one of torch's batch norms, of any number of dimensions."""
    return any(isinstance(part, _BatchNorm) for part in module.modules())


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 for tensors of the inference mode, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


def unscales_by_itself(optimizer: Optimizer) -> bool:
    """Whether an optimizer takes scaled gradients, as fused ones do with a GradScaler."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def running_iterators(loader: DataLoader[Any]) -> list[str]:
    """Attributes in which a loader keeps a running iterator, other than that of torch's persistent workers."""
    return [k for k, value in vars(loader).items() if k != "_iterator" and isinstance(value, _BaseDataLoaderIter)]


def forget_iterator(loader: DataLoader[Any]) -> None:
    """Let a copy of a loader start workers of its own instead of sharing the persistent ones of the first loader."""
    vars(loader)["_iterator"] = None


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
