"""The time of a detection, in passes over the images."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import detections
from tests.callbacks.helpers import LIGHTNING_WARNS

pytestmark = LIGHTNING_WARNS


def test_a_detection_is_timed_beside_a_pass_and_an_epoch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--images", "40", "--pixels", "16", "--batch-size", "20", "--workers", "0", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["detections", *small, "--only", "NONE"])
    detections.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["defence"] == "NONE"
    assert min(found[f"{what}_s"] for what in ("detection", "pass", "epoch")) > 0
    assert found["detection_passes"] == pytest.approx(found["detection_s"] / found["pass_s"], rel=0.2)
