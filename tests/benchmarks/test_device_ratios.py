"""The ratios of single steps on a device: a dry run on the CPU."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

from benchmarks import device_ratios


def test_a_dry_run_prints_a_line_with_a_ratio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten())
    monkeypatch.setattr(device_ratios, "batches", lambda device: [(torch.zeros(1, 3, 8, 8).byte(), network)])
    monkeypatch.setattr(sys, "argv", ["device_ratios", "--device", "cpu", "--threads", "1", "--only", "nl_means"])
    device_ratios.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = next(line for line in lines if line["measurement"] == "nl_means")
    assert found["ratio"] == pytest.approx(found["nl_means_ms"] / found["forward_ms"], rel=0.01)


def test_a_scan_has_a_ratio_to_an_epoch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """That a detection can be timed is tested with its benchmark."""
    timed = {"defence": "NONE", "detection_epochs": 1.5}
    monkeypatch.setattr(device_ratios.detections, "detection", lambda name, data, options: timed)
    monkeypatch.setattr(sys, "argv", ["device_ratios", "--device", "cpu", "--threads", "1", "--only", "scan"])
    device_ratios.main()
    (found,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found["measurement"] == "scan"
    assert found["ratio"] == 1.5
