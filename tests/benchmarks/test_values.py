"""Small training sets say the truth about themselves, and what was measured on them comes back from a file."""

from __future__ import annotations

import tarfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import judged, rows, values
from benchmarks.networks import resnet9
from benchmarks.samples import (
    KINDS,
    Samples,
    attack,
    called,
    catch_all,
    kind,
    label_noise,
    long_tail,
    near_duplicates,
    pairs,
    sticker,
    tinted,
)
from benchmarks.values import Archives, Case, load, run, save
from lightning_backdoor import attacks


def pictures(each: int = 30, classes: int = 4) -> Samples:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat(each)
    images = torch.randint(0, 256, (len(labels), 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Samples.clean(images, labels)


def changed(before: Samples, after: Samples) -> Tensor:
    return (before.images != after.images).flatten(1).any(dim=1)


@pytest.mark.parametrize("name", KINDS)
def test_a_clean_kind_changes_the_images_of_a_share_of_one_class_and_no_label(name: str) -> None:
    before = pictures()
    after = kind(name, 0.4, (2,))(before, 0)
    assert after.kind.equal(changed(before, after))
    assert after.kind.sum() == 12
    assert (after.labels[after.kind] == 2).all()
    assert after.labels.equal(before.labels)
    assert not after.poisoned.any()


def test_an_attack_is_written_down() -> None:
    before = pictures()
    after = attack(sticker, 0.1)(before, 0)
    assert after.poisoned.equal(changed(before, after))
    assert after.poisoned.sum() == 12
    assert (after.labels[after.poisoned] == 0).all()
    assert after.true.equal(before.labels)
    covered = attack(attacks.AdaptiveBlend(), 0.1, covers=0.1)(before, 0)
    assert covered.covers.sum() == 12
    assert covered.labels[covered.covers].equal(before.labels[covered.covers])


def test_wrong_labels_are_those_that_differ_from_the_truth() -> None:
    before = pictures()
    for change, wrong in ((label_noise(0.1), 12), (called(3, 1, 0.2), 6), (tinted(20), 20)):
        after = change(before, 0)
        assert (after.labels != after.true).sum() == wrong
        assert after.true.equal(before.labels)


def test_copies_of_an_image_are_of_one_group() -> None:
    before = pictures()
    after = near_duplicates(1, things=3, copies=5)(before, 0)
    assert after.kind.sum() == 15
    assert len(after.group[after.kind].unique()) == 3
    assert len(after.group.unique()) == len(before) - 12


def test_classes_can_be_rare_or_joined() -> None:
    assert torch.bincount(long_tail(1.5)(pictures(), 0).labels).tolist() == [30, 26, 23, 20]
    assert torch.bincount(pairs(pictures(), 0).labels).tolist() == [60, 60]
    joined = catch_all(0.1)(pictures(), 0)
    assert torch.bincount(joined.labels).tolist() == [27, 27, 66]
    assert joined.kind.sum() == 6
    assert joined.true.equal(joined.labels), "the labels are right"


def test_values_come_back_from_a_file_nearly_as_they_were(tmp_path: Path) -> None:
    samples = attack(attacks.BadNets(), 0.1)(pictures(), 0)
    column = torch.randn(len(samples), 5, generator=torch.Generator().manual_seed(1)) * torch.tensor([1, 1, 9, 99, 0])
    save(tmp_path / "a.npz", samples, {"half": column, "half_predicted": samples.true})
    found = load(tmp_path / "a.npz")
    assert found["half_predicted"].equal(samples.true)
    for field in fields(samples):
        assert field.name == "images" or found[field.name].equal(getattr(samples, field.name))
    largest = column.abs().amax(dim=0)
    assert ((found["half"] - column).abs() <= 0.01 * (column.abs() * largest).sqrt() + 1e-4 * largest).all()


def test_archives_stay_below_their_size_and_are_few(tmp_path: Path) -> None:
    paths = [tmp_path / f"{place}.npz" for place in range(4)]
    for path in paths:
        path.write_bytes(bytes(30_000))
    archives = Archives(tmp_path, largest=60_000, most=3)
    assert [archives.add(path) for path in paths] == [True, True, True, False]
    found = sorted(tmp_path.glob("*.tar"))
    assert len(found) == 3
    assert all(path.stat().st_size <= 60_000 for path in found)
    with tarfile.open(found[0]) as archive:
        assert archive.getnames() == ["0.npz"]


def test_a_case_is_trained_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(values.NETWORKS, "resnet9", lambda classes: resnet9((4, 4, 8, 8), classes))
    small = Case("digits", 60, attack(attacks.BadNets(), 0.1), epochs=4, parts=values.ALL)
    monkeypatch.setitem(values.CASES, "small", small)
    path, _ = run("small", tmp_path, tmp_path, "cpu")
    found = load(path)
    assert found["poisoned"].sum() == 6
    for part in ("early", "half", "half_shift", "end", "end_shift"):
        assert found[part].shape == (60, 8)
    assert found["units"].shape == (60, 48)
    assert found["end_predicted"].shape == found["without_predicted"].shape == (60,)


def test_the_small_network_of_the_digits_is_trained_without_augmentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "crop_and_flip", None)
    small = values.SMALL_DIGITS | {"count": 60, "epochs": 4, "parts": ("early", "units")}
    monkeypatch.setitem(values.CASES, "small-clean", Case(**small))
    found = load(run("small-clean", tmp_path, tmp_path, "cpu")[0])
    assert found["early"].shape == (60, 64)
    assert found["units"].shape[0] == 60
    rows_of = list(judged.judged("small-clean", found, Case(**small).samples(tmp_path), 0.01))
    assert [row["measured"] for row in rows_of] == ["units", "early units"]


def test_names_of_cases_are_names_of_files() -> None:
    assert len({values.file_name(name) for name in values.CASES}) == len(values.CASES)


def test_decisions_on_a_planted_group_and_on_its_clean_twin_become_rows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    samples = pictures(each=200)
    generator = torch.Generator().manual_seed(0)
    poisoned = (samples.labels == 0) & (torch.arange(800) < 160)
    clean = torch.randn(800, 16, generator=generator) + 3 * torch.nn.functional.one_hot(samples.labels, 16)
    planted = clean.clone()
    planted[poisoned, 8:] += 8
    for name, columns, bad in (("clean@1", clean, poisoned & False), ("badnets-5%", planted, poisoned)):
        found = {"units": columns, "labels": samples.labels, "poisoned": bad, "kind": poisoned & False}
        for row in judged.judged(name, {**found, "end_predicted": samples.labels}, samples, 0.01):
            assert row["with_test"]["poisons_removed"] == int(bad.sum())
            assert row["with_test"]["others_removed"] == 0
            rows.append(tmp_path / "rows.jsonl", row)
    kept = rows.read(tmp_path / "rows.jsonl")
    assert [row["taught"] for row in kept] == [None, 1.0]
    judged.print_alarms(kept)
    assert "| all | 1 | 0 | 0 | 0 | 0 |" in capsys.readouterr().out


def test_sixty_clean_trainings_have_names_of_their_own() -> None:
    assert len(set(values.CLEAN_TRAININGS)) == 60
    assert values.case_of("clean@2") == values.replace(values.CASES["clean"], seed=2)
    assert values.case_of("clean@2", tiny=True).count < 1000
