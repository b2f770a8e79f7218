"""Batches of derived tensor classes, as torchvision and MONAI make them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors

_LOOKS_AT_SAMPLES = {"__getitem__", "unbind", "stack", "cat", "split", "chunk", "__iter__"}


class Meta(Tensor):
    """A tensor with a record for each sample, as MONAI's MetaTensor: results of operations have it, too.

    Taking samples apart or together is refused, as MONAI does where records and samples do not fit together.
    """

    meta: list[str]

    @classmethod
    def of(cls, values: Tensor) -> Meta:
        made = values.as_subclass(cls)
        made.meta = [f"file {i}" for i in range(len(values))]
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [value for value in args if isinstance(value, Meta)]
        given += [value for part in args if isinstance(part, list | tuple) for value in part if isinstance(value, Meta)]
        if given and func.__name__ in _LOOKS_AT_SAMPLES:
            raise ValueError("Inconsistent batched metadata dicts when slicing a batch of MetaTensors")
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, Meta):
            for value in given:
                if hasattr(value, "meta"):
                    result.meta = value.meta
        return result


KINDS: dict[str, Any] = {"MetaTensor": Meta.of, "tv_tensors.Image": tv_tensors.Image}
CLASSES: dict[str, type] = {"MetaTensor": Meta, "tv_tensors.Image": tv_tensors.Image}


class Wrapped:
    """A ``collate_fn`` of floats in 0..1 that makes images (MONAI: and labels) of a derived class; ``None``: plain."""

    def __init__(self, kind: str | None) -> None:
        self.kind = kind

    def __call__(self, items: list[Any]) -> Any:
        batch = torch.utils.data.default_collate(items)
        made = KINDS.get(self.kind or "", lambda values: values)
        label = made(batch["label"]) if self.kind == "MetaTensor" else batch["label"]
        return {**batch, "image": made(batch["image"].float() / 255), "label": label}
