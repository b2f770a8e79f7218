"""Seeds, environment and thread counts shared by all tests."""

import os
from collections.abc import Iterator
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; the processes that they start read it, too

import pytest
import torch

from tests import accelerators

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
pytest_plugins = ["tests.contract.tally"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accelerator", choices=accelerators.CHOICES, default="cpu", help="where Trainers run")


def pytest_configure(config: pytest.Config) -> None:
    accelerators.choose(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    accelerators.select(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Iterator[None]:
    with accelerators.without_optional_packages():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    with accelerators.without_optional_packages():
        return (yield)


@pytest.fixture(autouse=True, scope="session")
def _accelerator() -> Iterator[None]:
    with accelerators.active():
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Take back what a test leaves in the environment: Lightning keeps the seed of the workers there."""
    with mock.patch.dict(os.environ):
        yield
