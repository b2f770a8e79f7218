"""A second device without a GPU: its tensors live on the CPU, report another device and refuse to meet CPU tensors.

What CUDA refuses is refused: operands on two devices, generators of another device, a CPU tensor that is indexed by
tensors of the device, ``numpy()``, kernels without a deterministic implementation where these are not allowed. What
CUDA allows is allowed: CPU tensors without dimensions as operands, CPU indices, copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("xla:0")
"""What the tensors report: a type that no test machine has, and for which torch starts nothing."""

_aten = torch.ops.aten
_COPIES = {_aten.copy_.default, _aten._to_copy.default}
_BY_INDEX = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}
_WITH_SCALARS = {_aten.fill_.Tensor, _aten.where.self, _aten.masked_fill.Tensor, _aten.masked_fill_.Tensor}
_NOT_DETERMINISTIC = {  # on CUDA, of the operations that https://docs.pytorch.org lists
    _aten.cumsum.default,
    _aten.histc.default,
    _aten.kthvalue.default,
    _aten.median.dim,
    _aten.put_.default,
    _aten.reflection_pad2d_backward.default,
    _aten.replication_pad2d_backward.default,
    _aten.upsample_bicubic2d_backward.default,
    _aten.upsample_bilinear2d_backward.default,
    _aten.grid_sampler_2d_backward.default,
    _aten.adaptive_max_pool2d_backward.default,
}


class StrictTensor(Tensor):
    """A tensor on the second device; ``elem`` is the one on the CPU that holds its values."""

    __slots__ = ("elem",)  # none of the attributes that a tensor of the same class takes over from another
    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> StrictTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.shape,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device="meta",  # a device that autograd needs no start for; what Python sees is below
        )
        made.elem = elem
        return made

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    data = property(lambda self: self.detach(), lambda self, value: setattr(self, "elem", value.elem))  # type: ignore[assignment]

    def get_device(self) -> int:
        return DEVICE.index

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def untyped_storage(self) -> Any:
        return self.elem.untyped_storage()

    def tolist(self) -> Any:
        return self.elem.tolist()

    def new_tensor(self, data: Any, dtype: Any = None) -> Any:
        return torch.tensor(data, dtype=dtype or self.dtype).to(DEVICE)

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.elem.numpy(force=True)
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself where nothing is to change, as ever."""
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        wanted = [*args, *kwargs.values()]
        same = all(_is_here(value) or value is self.dtype or value is None or value is False for value in wanted)
        return self if same and not kwargs.get("copy") else super().to(*args, **kwargs)

    def __repr__(self, **kwargs: Any) -> str:
        return f"StrictTensor({self.elem!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """In files and pickles it is what it is after loading them to the CPU."""
        return self.elem.detach().__reduce_ex__(protocol)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _is_here(value: Any) -> bool:
    """Whether this names the device; torch itself, which makes the zero of ``x[0] = 0.0``, names the wrapper's."""
    return isinstance(value, (str, torch.device)) and str(value).partition(":")[0] in (DEVICE.type, "meta")


def _refuse(func: Any, why: str) -> None:
    raise RuntimeError(f"Expected all tensors to be on the same device, but {why} ({func})")


def _check(func: Any, args: Any, kwargs: Any) -> None:
    """Raise where CUDA would, for an operation with at least one tensor on the device."""
    if func in _COPIES:
        return
    if func in _BY_INDEX:
        values = [args[0], *args[2:3]]
        if not isinstance(args[0], StrictTensor):
            _refuse(func, "indices should be on the cpu like the indexed tensor")
        args, kwargs = values, {}
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    others = [tensor for tensor in tensors if not isinstance(tensor, StrictTensor)]
    if not others:
        return
    scalars = torch.Tag.pointwise in func.tags or func in _WITH_SCALARS or func in _BY_INDEX
    if not scalars or any(other.dim() for other in others):
        _refuse(func, f"found at least two devices, {DEVICE} and cpu")
    if func._schema.is_mutable and not isinstance(args[0], StrictTensor):
        _refuse(func, f"the result on {DEVICE} cannot be stored on the cpu")


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Do on the CPU what CUDA would do on its device, or refuse it."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, StrictTensor)]
    device = kwargs.get("device")
    there = bool(tensors) if device is None else _is_here(device)
    if tensors:
        _check(func, args, kwargs)
    if there:
        if any(isinstance(leaf, torch.Generator) for leaf in tree_leaves((args, kwargs))):
            raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator but found 'cpu' ({func})")
        exact = func is _aten.cumsum.default and not args[0].is_floating_point()
        if torch.are_deterministic_algorithms_enabled() and func in _NOT_DETERMINISTIC and not exact:
            raise RuntimeError(f"{func} does not have a deterministic implementation on CUDA")
    if device is not None and there:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda leaf: leaf.elem if isinstance(leaf, StrictTensor) else leaf, (args, kwargs))
    found = func(*args, **kwargs)
    by_elem = {id(tensor.elem): tensor for tensor in tensors}

    def outside(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in by_elem:  # changed in place
            return by_elem[id(leaf)]
        return StrictTensor(leaf) if there and func is not _aten.copy_.default else leaf

    return tree_map(outside, found)


class _Factories(TorchDispatchMode):
    """Makes tensors on the device where a call names it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if StrictTensor in types or _is_here(kwargs.get("device")):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


class _Conversions(TorchFunctionMode):
    """Puts what is made of Python's numbers on the device: torch makes it beneath the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _is_here(kwargs.get("device")):
            kwargs = {**kwargs, "device": None}
            return func(*args, **kwargs).to(DEVICE)
        return func(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Inside, :data:`DEVICE` can be used like one of CUDA's."""
    with _Factories(), _Conversions():
        yield DEVICE


def accelerator_of(package: Any) -> dict[str, Any]:
    """Arguments of a Trainer, of either package of Lightning, that make it run on the second device."""

    class Strict(package.accelerators.Accelerator):  # type: ignore[misc, name-defined]
        def setup_device(self, device: torch.device) -> None: ...

        def teardown(self) -> None: ...

        def get_device_stats(self, device: Any) -> dict[str, Any]:
            return {}

        @staticmethod
        def parse_devices(devices: Any) -> Any:
            return devices

        @staticmethod
        def get_parallel_devices(devices: Any) -> list[torch.device]:
            return [DEVICE]

        @staticmethod
        def auto_device_count() -> int:
            return 1

        @staticmethod
        def is_available() -> bool:
            return True

        @staticmethod
        def name() -> str:
            return "strict"

    strategy = package.strategies.SingleDeviceStrategy(device=DEVICE)  # type: ignore[arg-type]
    return {"accelerator": Strict(), "devices": 1, "strategy": strategy}
