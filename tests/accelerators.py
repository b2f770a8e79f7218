"""Where the Trainers of the tests run: ``pytest --accelerator cpu`` (the default), ``gpu`` or ``strict``.

``strict`` is a second device that needs no GPU (``tests/gpu/strict.py``). On either, a run covers what
:data:`RUNS_ON_ANY` names; tests that are about the CPU or about several processes are marked ``cpu`` and skip.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from tests.gpu import strict

CHOICES = ("cpu", "gpu", "strict")
RUNS_ON_ANY = ("contract", "scanning", "responses", "metrics", "gpu")
"""Folders of the tests that run on another device."""

_chosen = "cpu"


def choose(config: Any) -> None:
    """Take the option; on a GPU, kernels whose sums have one order, as with ``Trainer(deterministic=True)``."""
    global _chosen  # noqa: PLW0603
    _chosen = config.getoption("accelerator")
    config.addinivalue_line("filterwarnings", "ignore:.*GPU available but not used")  # by a Trainer on the CPU
    if _chosen == "cpu":
        return
    config.option.markexpr = config.option.markexpr.replace("not gpu and ", "" if _chosen == "gpu" else "not gpu and ")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # these two before CUDA starts
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # convolutions as exact as the tolerances of the tests want
    torch.use_deterministic_algorithms(True, warn_only=True)
    config.addinivalue_line("filterwarnings", "ignore:.*frobenius_norm is deprecated")  # norms on an unknown device
    config.addinivalue_line(
        "filterwarnings", "ignore:CUDA is not available or torch_xla is imported. Disabling autocast"
    )
    # its gradients are sums of a fixed order where windows do not overlap, as in all models of the tests
    config.addinivalue_line("filterwarnings", "ignore:adaptive_avg_pool2d_backward_cuda does not have a deterministic")


def device() -> torch.device:
    """Where the tensors of a fit are."""
    if _chosen == "strict":
        return strict.DEVICE
    return torch.device("cuda:0" if _chosen == "gpu" else "cpu")


def trainer_settings(package: Any) -> dict[str, Any]:
    """The arguments of a Trainer of this package that put it there."""
    if _chosen != "strict":
        return {"accelerator": _chosen, "devices": 1}
    return strict.accelerator_of(package)


def active() -> AbstractContextManager[Any]:
    """What a test runs in."""
    return strict.second_device() if _chosen == "strict" else nullcontext()


def on_cpu(values: Any) -> Any:
    """Tensors, also in dicts and lists, on the CPU, so that they can be compared with any other."""
    return tree_map_only(torch.Tensor, lambda value: value.detach().cpu(), values)


@contextmanager
def without_optional_packages() -> Iterator[None]:
    """On another device, skip a test whose package is not installed there."""
    try:
        yield
    except ModuleNotFoundError as error:
        if _chosen == "cpu" or error.name not in ("kornia", "faiss"):
            raise
        pytest.skip(f"needs {error.name}")


def select(items: list[Any]) -> None:
    """Skip what is about the CPU; on the CPU, nothing."""
    if _chosen == "cpu":
        return
    for item in items:
        room = item.nodeid.split("/")[1] if "/" in item.nodeid else ""
        if item.get_closest_marker("cpu") or room not in RUNS_ON_ANY:
            item.add_marker(pytest.mark.skip(reason="runs on the CPU"))
