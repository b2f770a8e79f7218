"""Read class logits from any classifier, whatever its ``forward`` returns."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lightning_backdoor._lightning import plain
from lightning_backdoor.errors import ModelError
from lightning_backdoor.scanning.isolation import forward_context
from lightning_backdoor.surgery.taps import eager_forward

__all__ = ["call_model", "require_logits"]

CHILDREN = ("model", "net", "backbone", "network", "classifier")
REMEDY = "Pass `forward_fn(pl_module, batch)` that returns class logits of shape (B, K)."

_checked: WeakSet[nn.Module] = WeakSet()


def call_model(
    pl_module: nn.Module,
    images: Tensor,
    forward_fn: Callable[[Any, Any], Any] | None = None,
    batch: Any = None,
) -> Tensor:
    """Class logits of a batch of images, in the Trainer's precision.

    Without ``forward_fn`` the module is called with the images alone. If it has no ``forward`` of its own, its only
    child named model, net, backbone, network or classifier is called instead. Outputs may be a tensor, an object with
    ``.logits``, a mapping with ``"logits"`` or a tuple or list whose first item is one of these. Warns once per module
    when rows are non-negative and sum to 1.

    Args:
        pl_module: The user's module (or any ``nn.Module``).
        images: ``(B, C, H, W)`` as the model expects them, on its device.
        forward_fn: The user's way from batch to logits.
        batch: What ``forward_fn`` receives, prepared for the device. None: the images.

    Returns:
        Logits ``(B, K)`` in float32, K ≥ 2. A binary model's single logit z becomes the columns (0, z).

    Raises:
        ModelError: No logits of this shape come out; the message names ``forward_fn``.
    """
    with forward_context(pl_module):
        if forward_fn is not None:
            output = forward_fn(pl_module, images if batch is None else batch)
        else:
            output = _call(pl_module, images)
    logits = _as_matrix(plain(_unwrap(output)), len(images))
    if logits.shape[1] == 1:
        return nn.functional.pad(logits, (1, 0))
    _warn_about_probabilities(pl_module, logits)
    return logits


def require_logits(pl_module: nn.Module, logits: Tensor, run: Callable[[], Any]) -> None:
    """Raise if a binary model returns a sigmoid: taken for a logit, a number in (0, 1) would always mean class 1.

    Args:
        pl_module: The user's module.
        logits: What :func:`call_model` returned.
        run: Takes the same images through the model again.

    Raises:
        ModelError: The outputs are the sigmoid of some layer's output; the message names ``forward_fn``.
    """
    values = logits[:, 1]
    if logits.shape[1] != 2 or bool(logits[:, 0].any()) or bool(((values < 0) | (values > 1)).any()):
        return
    found: list[Tensor] = []

    def see(_layer: nn.Module, _arguments: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.numel() == len(values):
            found.append(plain(output).detach().flatten().float())

    with ExitStack() as stack:
        for module in pl_module.modules():
            stack.callback(module.register_forward_hook(see).remove)
        stack.enter_context(eager_forward())
        run()
    if any(torch.allclose(output.sigmoid(), values, atol=1e-2) for output in found):
        raise ModelError(
            f"`{type(pl_module).__name__}` returns a probability (a sigmoid) where a logit is needed. Pass `forward_fn`"
            ", e.g. forward_fn=lambda module, batch: torch.logit(module(batch[0]), 1e-6), or let `forward` return the "
            "logit and train by BCEWithLogitsLoss, which is also more exact."
        )


def _call(pl_module: nn.Module, images: Tensor) -> Any:
    network = pl_module if _has_forward(pl_module) else _only_child(pl_module)
    try:
        return network(images)
    except TypeError as error:
        raise ModelError(
            f"`{type(network).__name__}.forward` must work with the images as its only argument, got: {error}. {REMEDY}"
        ) from error


def _has_forward(module: nn.Module) -> bool:
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    package = owner.__module__.split(".")[0]
    return owner is not nn.Module and package not in {"lightning", "pytorch_lightning"}


def _only_child(pl_module: nn.Module) -> nn.Module:
    children = {name: child for name, child in pl_module.named_children() if name in CHILDREN}
    if len(children) != 1:
        raise ModelError(
            f"`{type(pl_module).__name__}` must define `forward` or hold exactly one child named "
            f"{', '.join(CHILDREN)}, got {', '.join(children) or 'none'}. {REMEDY}"
        )
    return next(iter(children.values()))


def _unwrap(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return _unwrap(output.logits)
    if isinstance(output, Mapping) and "logits" in output:
        return _unwrap(output["logits"])
    if isinstance(output, tuple | list) and output:
        return _unwrap(output[0])
    kind = f"a mapping with {list(output)}" if isinstance(output, Mapping) else type(output).__name__
    raise ModelError(
        "The model must return a tensor, `.logits`, `['logits']` or a tuple that begins with logits, "
        f"got {kind}. {REMEDY}"
    )


def _as_matrix(logits: Tensor, size: int) -> Tensor:
    if not logits.is_floating_point():
        raise ModelError(f"The model must return float logits, got {logits.dtype} (class indices?). {REMEDY}")
    matrix = logits.flatten(1) if logits.ndim > 1 and logits.shape[2:].numel() == 1 else logits
    matrix = matrix[:, None] if matrix.ndim == 1 else matrix
    if matrix.ndim != 2 or len(matrix) != size or matrix.shape[1] == 0:
        raise ModelError(
            f"The model must return logits of shape (B, K) with B = {size}, got shape {tuple(logits.shape)}. {REMEDY}"
        )
    return matrix.float()


def _warn_about_probabilities(pl_module: nn.Module, logits: Tensor) -> None:
    if pl_module in _checked:
        return
    _checked.add(pl_module)
    sums = logits.detach().sum(dim=1)
    if bool((logits >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all()):
        warnings.warn(
            f"The outputs of `{type(pl_module).__name__}` look like probabilities (rows sum to 1); the scores are best "
            f"on logits. {REMEDY}",
            UserWarning,
            stacklevel=3,
        )
