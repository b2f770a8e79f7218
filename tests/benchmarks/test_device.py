"""The benchmark of one device: ratios, budget, and that an interrupted run goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import device, rows
from tests.benchmarks.helpers import pack, row


def main(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> None:
    told = ["--data", str(folder), "--cache", str(folder / "cache"), "--results", str(folder / "device.jsonl")]
    small = ["--images", "60", "--epochs", "1", "--model", "resnet9-relu-0.26M", "--threads", "1", "--device", "cpu"]
    monkeypatch.setattr("benchmarks.training.BATCH", 20)
    monkeypatch.setattr(sys, "argv", ["device", *told, *small, *arguments])
    device.main()


def test_an_interrupted_run_goes_on_and_the_table_has_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pack(tmp_path, "train", 600, 0)
    pack(tmp_path, "test", 40, 1)
    chosen = ["--only", "clean/undefended", "badnets-5%/ultraclean"]
    main(monkeypatch, tmp_path, *chosen, "--budget", "0")
    assert rows.read(tmp_path / "device.jsonl") == []
    assert "the budget ends" in capsys.readouterr().out
    main(monkeypatch, tmp_path, *chosen[:2])
    main(monkeypatch, tmp_path, *chosen)
    found = rows.read(tmp_path / "device.jsonl")
    assert [one["defence"] for one in found] == ["undefended", "ultraclean"]
    assert {"tpr", "fpr", "rule"} <= found[1].keys()
    assert "| resnet9-relu-0.26M, 60, 1 | badnets-5% | ultraclean |" in capsys.readouterr().out


def test_a_ratio_is_to_the_undefended_training_on_the_same_machine_and_commit() -> None:
    def one(defence: str, seconds: float, hardware: str = "card", **other: Any) -> rows.Row:
        told = {"hardware": hardware, "workers": 0, "recipe": "one-cycle", "versions": {"commit": "a"}}
        return row("clean", defence, 0.8, 0.1, seconds, **{**told, **other})

    plain = [one("undefended", seconds) for seconds in (90.0, 100.0, 500.0)]
    others = [one("undefended", 1.0, "another"), one("undefended", 1.0, versions={"commit": "b"})]
    assert device.ratio(one("NONE", 120.0), [*plain, *others]) == pytest.approx(1.2)
    assert device.ratio(one("NONE", 120.0), others) is None


def test_every_training_has_a_key_of_its_own_and_the_comparison_comes_first() -> None:
    keys = [rows.cell_key(cell) for cell in device.TRAININGS]
    assert len(set(keys)) == len(keys)
    for cell in device.TRAININGS:
        plain = next(one for one in device.TRAININGS if one.setting == cell.setting)
        assert (plain.attack, plain.defence) == ("clean", device.UNDEFENDED)


def test_the_commit_may_be_told_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rows, "__file__", str(tmp_path / "rows.py"))
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc1234")
    assert rows.commit.__wrapped__() == "abc1234"


@pytest.mark.slow
def test_the_script_for_a_gpu_passes_a_dry_run(tmp_path: Path) -> None:
    pack(tmp_path, "train", 2000, 0)
    pack(tmp_path, "test", 40, 1)
    script = Path(device.__file__).with_name("device.sh")
    told = ["--dry-run", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--budget", "150"]
    known = {**os.environ, "PYTHON": sys.executable}
    found = subprocess.run([str(script), *told], env=known, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert (tmp_path / "out" / "device_ratios.jsonl").read_text()
    assert rows.read(tmp_path / "out" / "device.jsonl")
