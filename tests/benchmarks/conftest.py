"""The benchmark's usual network is as small as can be: what the tests look at does not depend on its widths."""

from __future__ import annotations

import pytest

from benchmarks.networks import NAME, NETWORKS, resnet9


@pytest.fixture(autouse=True)
def _small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, NAME, lambda classes=10: resnet9((4, 4, 8, 8), classes))
