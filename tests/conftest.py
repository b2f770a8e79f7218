"""Seeds, environment and thread counts shared by all tests."""

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Take back what a test leaves in the environment: Lightning keeps the seed of the workers there."""
    with mock.patch.dict(os.environ):
        yield
