"""The record that every defence leaves behind."""

from __future__ import annotations

import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_backdoor import Finding, Verdict
from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.verdict import GateFigure


def verdict(**changes: Any) -> Verdict:
    fields: dict[str, Any] = {
        "scores": torch.tensor([0.1, 3.0, 2.0, 5.0, 3.0]),
        "keep": torch.tensor([True, False, True, False, False]),
        "threshold": 2.0,
        "rule": "fraction(0.6)",
    }
    return Verdict(**{**fields, **changes})


def test_removed_are_positions_by_suspicion_and_ties_by_position() -> None:
    assert verdict().removed.tolist() == [3, 1, 4]
    assert verdict(keep=torch.ones(5, dtype=torch.bool), threshold=math.inf).removed.shape == (0,)
    assert len(verdict()) == 5


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict().threshold = 1.0  # type: ignore[misc]


def test_to_frame_has_one_row_per_sample() -> None:
    frame = verdict(labels=torch.tensor([4, 3, 2, 1, 0])).to_frame()
    assert list(frame.columns) == ["index", "label", "score", "keep", "finding", "suggested_label", "approved"]
    assert frame["finding"].isna().all()
    assert frame["index"].tolist() == [0, 1, 2, 3, 4]
    assert frame["label"].tolist() == [4, 3, 2, 1, 0]
    assert frame.loc[frame.score > 2.0, "keep"].tolist() == [False, False, False]


def test_to_frame_without_labels_and_with_masks() -> None:
    suspect = torch.tensor([False, True, False, True, False])
    frame = verdict(trusted=~suspect, suspect=suspect).to_frame()
    assert frame["label"].tolist() == [-1] * 5
    assert frame["suspect"].tolist() == suspect.tolist()
    assert frame["trusted"].tolist() == (~suspect).tolist()


FOUND = Finding(
    label=2,
    positions=torch.tensor([3, 1]),
    gate="strict",
    figures=(GateFigure("standardized_gap", 3.5, ">=", 2.5), GateFigure("enrichment", 40.0, ">=", 20.0)),
    units=torch.tensor([0, 2]),
    weights=torch.tensor([1.0, -1.0]),
    threshold=0.5,
    diagnosis="wrong labels",
    suggested_labels=torch.tensor([4, 2]),
    suggested_confidences=torch.tensor([0.9, 0.6]),
    reference_accuracy=0.8,
    reference_confidence=0.95,
    estimated_asr=0.97,
    control_asr=0.02,
    asr_method="blend",
)


def test_a_finding_says_how_many_keep_their_label_without_having_been_seen() -> None:
    assert FOUND.own_label_rate == 0.5
    assert dataclasses.replace(FOUND, suggested_labels=None).own_label_rate is None
    assert verdict(findings=(FOUND,)).suggested_labels.tolist() == [-1, 2, -1, 4, -1]


def test_approved_samples_are_kept_and_paths_are_as_many_as_samples(tmp_path: Path) -> None:
    approved = torch.tensor([True, False, True, False, False])
    paths = ("a.png", "b.png", "", "d.png", "e.png")
    verdict(approved=approved, paths=paths).save(tmp_path / "verdict.pt")
    read = Verdict.load(tmp_path / "verdict.pt")
    assert torch.equal(read.approved, approved)
    assert read.paths == paths
    assert read.to_frame()["approved"].tolist() == approved.tolist()
    with pytest.raises(ArgumentError, match="removed at position 1"):
        verdict(approved=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="got 2 for 5"):
        verdict(paths=("a", "b"))


def test_a_finding_is_applied_to_new_values() -> None:
    values = torch.tensor([[2.0, 9.0, 0.0], [0.0, 9.0, 0.0], [1.0, 9.0, 0.2]])
    assert FOUND.project(values.half()).tolist() == pytest.approx([2.0, 0.0, 0.8], abs=1e-3)
    assert FOUND.members(values).tolist() == [True, False, True]
    assert FOUND.members(values, torch.tensor([2, 2, 1])).tolist() == [True, False, False]
    assert len(FOUND) == 2


def test_findings_come_back_from_disk_and_stand_in_the_frame(tmp_path: Path) -> None:
    saved = verdict(findings=(FOUND,))
    saved.save(tmp_path / "verdict.pt")
    (found,) = Verdict.load(tmp_path / "verdict.pt").findings
    for field in dataclasses.fields(Finding):
        ours, theirs = getattr(FOUND, field.name), getattr(found, field.name)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    assert found.figures[0].criterion == "standardized_gap>=2.5"
    assert saved.finding_indices.tolist() == [-1, 0, -1, 0, -1]
    assert saved.to_frame()["finding"].dropna().to_dict() == {1: 0, 3: 0}


def test_a_record_without_findings_loads(tmp_path: Path) -> None:
    """As an earlier release wrote it."""
    record = {name: value for name, value in verdict().state_dict().items() if name != "findings"}
    torch.save(record, tmp_path / "verdict.pt")
    assert Verdict.load(tmp_path / "verdict.pt").findings == ()


@pytest.mark.parametrize("extra", [{}, {"labels": torch.arange(5)}, {"suspect": torch.zeros(5, dtype=torch.bool)}])
@pytest.mark.parametrize("threshold", [2.0, math.inf])
def test_comes_back_from_disk(tmp_path: Path, extra: dict[str, Any], threshold: float) -> None:
    saved = verdict(threshold=threshold, **extra)
    saved.save(tmp_path / "verdict.pt")
    loaded = Verdict.load(tmp_path / "verdict.pt")
    for field in dataclasses.fields(Verdict):
        ours, theirs = getattr(saved, field.name), getattr(loaded, field.name)
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype
        else:
            assert ours == theirs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda finding: finding.update(novelty=1), "unknown: novelty"),
        (lambda finding: finding.pop("units"), "missing: units"),
        (lambda finding: finding.pop("figures"), "missing: figures"),
        (lambda finding: finding["figures"][0].append(1), "`figures` must have 4 values"),
        (lambda finding: finding["figures"][0].pop(), "`figures` must have 4 values"),
    ],
)
def test_findings_of_another_release_are_refused_with_what_to_do(tmp_path: Path, change: Any, words: str) -> None:
    record = verdict(findings=(FOUND,)).state_dict()
    change(record["findings"][0])
    torch.save(record, tmp_path / "verdict.pt")
    with pytest.raises(ArgumentError, match=rf"`path`.*verdict\.pt.*another release.*{words}.*release that wrote"):
        Verdict.load(tmp_path / "verdict.pt")


def test_findings_that_are_no_records_are_refused(tmp_path: Path) -> None:
    torch.save(verdict().state_dict() | {"findings": [3]}, tmp_path / "verdict.pt")
    with pytest.raises(ArgumentError, match=r"`path` must be .* of this release wrote"):
        Verdict.load(tmp_path / "verdict.pt")


def test_a_finding_without_optional_fields_loads(tmp_path: Path) -> None:
    """As an earlier release wrote it."""
    record = verdict(findings=(FOUND,)).state_dict()
    for name in ("detectors", "reference_model", "estimated_asr"):
        del record["findings"][0][name]
    torch.save(record, tmp_path / "verdict.pt")
    (found,) = Verdict.load(tmp_path / "verdict.pt").findings
    assert found.reference_model == "unseen"


def test_an_interrupted_save_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict().save(str(tmp_path / "verdict.pt"))

    def half(state: Any, file: Any) -> None:
        file.write(b"PK half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        verdict(threshold=3.0).save(tmp_path / "verdict.pt")
    assert Verdict.load(tmp_path / "verdict.pt").threshold == 2.0
    assert len(list(tmp_path.iterdir())) == 1


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def test_load_runs_no_code(tmp_path: Path) -> None:
    torch.save({"scores": Evil(str(tmp_path / "ran"))}, tmp_path / "verdict.pt")
    with pytest.raises(pickle.UnpicklingError):
        Verdict.load(tmp_path / "verdict.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep": torch.ones(4, dtype=torch.bool)}, r"`keep` must have shape \(N,\).*\(5,\), got \(4,\)"),
        ({"scores": torch.zeros(5, 1)}, r"`scores` must have shape \(N,\)"),
        ({"keep": torch.ones(5)}, "`keep` must be a boolean mask, got dtype torch.float32"),
        ({"suspect": torch.ones(5, dtype=torch.long)}, "`suspect` must be a boolean mask"),
        ({"trusted": torch.ones(6, dtype=torch.bool)}, "`trusted` must have shape"),
        ({"labels": torch.zeros(5, 2)}, "`labels` must have shape"),
        ({"findings": [FOUND]}, r"`findings` must be a tuple of `Finding`, got \[Finding"),
        ({"findings": (FOUND.state_dict(),)}, "`findings` must be a tuple of `Finding`.*`Verdict.load`"),
    ],
)
def test_refuses_what_does_not_fit(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        verdict(**changes)
