"""Run the contract and print its counts: ``python -m tests.contract``; further arguments go to pytest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.exit(pytest.main([str(Path(__file__).parent), "-q", *sys.argv[1:]]))
