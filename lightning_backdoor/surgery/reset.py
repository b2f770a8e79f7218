"""Cut units out of a network in place, for good or to let them learn again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, cast

import torch
from torch import Tensor, nn

from lightning_backdoor._lightning import with_parameters
from lightning_backdoor.errors import ArgumentError, ModelError
from lightning_backdoor.surgery.unit_trace import Slice
from lightning_backdoor.surgery.units import UnitLayer

__all__ = ["reset_units"]


def reset_units(
    layer: UnitLayer,
    units: Tensor,
    *,
    mode: Literal["reinit", "prune"] = "reinit",
    optimizers: Iterable[torch.optim.Optimizer] = (),
    seed: int | None = None,
) -> None:
    """Take what some units compute out of the network, in place; the logits are then those without these units.

    Entries are overwritten, tensors stay the same objects, so compiled models, data-parallel wrappers and optimizers
    go on. The global random streams stay as they are.

    Args:
        layer: From :func:`~lightning_backdoor.surgery.find_units`.
        units: Which of its units, long ``(M,)`` in ``[0, layer.size)``.
        mode: ``"prune"`` zeroes all parameters of the unit and the columns that read it: no gradient ever reaches it
            again (what NONE's code does, see *Training with More Confidence*, Wang et al., 2022,
            https://arxiv.org/abs/2202.06382). ``"reinit"`` draws its row anew as the layer's class does
            (``reset_parameters``, else normal with the weight's own deviation), resets its norms (scale 1, shift 0,
            statistics 0 and 1) and zeroes the columns that read it, so that it starts silent and learns again. On its
            way into a sum it is turned down to the square of the machine epsilon, since a ReLU has no slope at zero.
        optimizers: Their state (momentum, second moments) of the touched entries is set to zero.
        seed: For the draw; None continues from the state of the global stream. Processes must share it.

    Raises:
        ArgumentError: ``units`` are not whole numbers in range.
        ModelError: The mode is not ``"prune"`` and the layer is frozen (``layer.trainable`` is False).
    """
    _check(layer, units, mode)
    if len(units) == 0:
        return
    value = _zero if mode == "prune" else _fresh(seed)
    optimizers = list(optimizers)
    with torch.no_grad():
        for piece in layer.slices:
            new = value(piece)
            if new is not None:
                _write(piece, units, new, optimizers)
        for piece in layer.switches if mode == "reinit" else ():
            _write(piece, units, piece.tensor * torch.finfo(piece.tensor.dtype).eps ** 2, optimizers)


def _write(piece: Slice, units: Tensor, value: Tensor, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    tensor, mask = piece.tensor, piece.mask(units)
    tensor.copy_(torch.where(mask, value.to(tensor), tensor))
    for optimizer in optimizers:
        for state in optimizer.state.get(tensor, {}).values():
            if isinstance(state, Tensor) and state.shape == tensor.shape:
                state.masked_fill_(mask, 0)


def _zero(piece: Slice) -> Tensor | None:
    return None if piece.role in ("mean", "variance") else torch.zeros(())


def _fresh(seed: int | None) -> Callable[[Slice], Tensor | None]:
    """New values for each role; every layer is drawn once, its columns are not."""
    constants = {"scale": 1.0, "variance": 1.0}
    drawn: dict[nn.Module, nn.Module] = {}

    def value(piece: Slice) -> Tensor | None:
        if piece.role not in ("weight", "bias"):
            return torch.tensor(constants.get(piece.role, 0.0))
        if piece.module not in drawn:
            drawn[piece.module] = _redrawn(piece.module, seed)
        return cast("Tensor", getattr(drawn[piece.module], piece.attribute))

    return value


def _redrawn(layer: nn.Module, seed: int | None) -> nn.Module:
    """A layer of the same kind with new weights, on the CPU, so that every device and process draws the same."""
    own = {key: nn.Parameter(p.detach().cpu().clone()) for key, p in layer.named_parameters(recurse=False)}
    twin = with_parameters(layer, own)
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        reset = getattr(twin, "reset_parameters", None)
        if callable(reset):
            reset()
        else:
            for parameter in own.values():
                deviation = parameter.std() if parameter.ndim > 1 else 0.0
                parameter.data = torch.randn_like(parameter) * deviation
    return twin


def _check(layer: UnitLayer, units: Tensor, mode: str) -> None:
    if mode not in ("reinit", "prune"):
        raise ArgumentError(f'`mode` must be "reinit" or "prune", got {mode!r}.')
    whole = units.dtype in (torch.int64, torch.int32) and units.ndim == 1
    if not whole or bool(((units < 0) | (units >= layer.size)).any()):
        raise ArgumentError(
            f"`units` must be a 1-D tensor of whole numbers in [0, {layer.size}), the units of {layer.name!r}, "
            f"got {units.dtype} {units.tolist()}. For a mask, pass mask.nonzero()[:, 0]."
        )
    if mode != "prune" and not layer.trainable:
        raise ModelError(
            f"The units of {layer.name!r} cannot learn again, because its weights or those that read it are frozen. "
            'Reset only layers with `trainable`, or pass mode="prune".'
        )
