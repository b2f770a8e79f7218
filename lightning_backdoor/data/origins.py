"""Images that a user's function computes from a batch: where they come from, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_backdoor._lightning import plain
from lightning_backdoor.data.nesting import as_kind_of, get_at, leaves_of, put_at
from lightning_backdoor.data.pixels import exact_dtype, four_dimensions

__all__ = ["Origin", "Replaced", "close", "find_origin"]

_TOLERANCE = 16  # roundings of the images' dtype between them and the line through their smallest and largest value


@dataclass(frozen=True)
class Replaced:
    """A batch whose images are to be others than those that are computed from it.

    Attributes:
        batch: The user's batch, unchanged.
        images: What ``batch_fn`` gave would be these.
    """

    batch: Any
    images: Tensor


@dataclass(frozen=True)
class Origin:
    """The tensor of a batch from which its images are ``scale * tensor + shift``, one pair for each channel.

    Attributes:
        path: Keys that lead to the tensor.
        axes: Its axes in the order (B, C, H, W); three for grey images without a channel axis.
        scale: One number per channel; not 0.
        shift: The same.
    """

    path: tuple[Any, ...]
    axes: tuple[int, ...]
    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def put(self, batch: Any, images: Tensor) -> Any:
        """Return a batch from which ``images`` are computed, up to the rounding of its dtype."""
        given = get_at(batch, self.path)
        tensor = plain(given)
        values = four_dimensions(images).to(tensor.device, exact_dtype(tensor.dtype))
        scale, shift = (values.new_tensor(column).view(-1, 1, 1) for column in (self.scale, self.shift))
        values = (values - shift) / scale
        if not tensor.is_floating_point():
            limits = torch.iinfo(tensor.dtype)
            values = values.round().clamp(limits.min, limits.max)
        values = values.squeeze(1) if len(self.axes) == 3 else values
        back = torch.tensor(self.axes).argsort().tolist()
        values = values.permute(back).to(tensor.dtype).contiguous()
        return put_at(batch, self.path, as_kind_of(values, given))


def find_origin(batch: Any, compute: Callable[[Any], Tensor]) -> Origin | None:
    """Return where the images ``compute(batch)`` come from; None if it is not by a factor and a summand."""
    images = compute(batch).detach()
    wanted = four_dimensions(images)
    for leaf in leaves_of(batch):
        for axes, values in _arranged(plain(leaf.tensor)):
            line = _line(values, wanted) if values.shape == wanted.shape else None
            if line is None:
                continue
            origin = Origin(leaf.path, axes, *line)
            step = 0.0 if values.is_floating_point() else max(map(abs, origin.scale))
            other = images.flip(-1)
            if close(compute(origin.put(batch, other)), other, by=step):  # a twin of that tensor changes nothing
                return origin
    return None


def close(a: Tensor, b: Tensor, by: float = 0.0) -> bool:
    """Whether two tensors are the same but for rounding, to a hundredth of their largest value, or ``by`` more."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    x, y = a.detach().double().cpu(), b.detach().double().cpu()
    return float((x - y).abs().max()) <= by + 0.01 * float(y.abs().max())


def _arranged(tensor: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Yield the ways to read a tensor as (B, C, H, W)."""
    tensor = tensor.detach()
    if tensor.ndim == 3:
        yield (0, 1, 2), tensor.unsqueeze(1)
    elif tensor.ndim == 4:
        yield (0, 1, 2, 3), tensor
        yield (0, 3, 1, 2), tensor.permute(0, 3, 1, 2)


def _line(values: Tensor, images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Factor and summand of each channel, through the smallest and the largest value; None if others lie beside it."""
    x, y = (part.double().transpose(0, 1).flatten(1).cpu() for part in (values, images))
    ends = torch.stack([x.argmin(1), x.argmax(1)], dim=1)
    (x0, x1), (y0, y1) = (part.gather(1, ends).unbind(1) for part in (x, y))
    scale = (y1 - y0) / (x1 - x0)
    if not bool((scale.isfinite() & (scale != 0)).all()):
        return None
    shift = y0 - scale * x0
    rounding = torch.finfo(images.dtype).eps if images.is_floating_point() else 0.0
    beside = (x * scale[:, None] + shift[:, None] - y).abs()
    if float(beside.max()) > _TOLERANCE * rounding * float(y.abs().max()):
        return None
    return tuple(scale.tolist()), tuple(shift.tolist())
