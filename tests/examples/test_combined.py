"""Candidates for a combined verdict, and how one is chosen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.evidence import ablation, combined, fractions, rows, scores, strip, weights
from examples.evidence.protocols import Setting
from examples.evidence.run import EARLY, checkpoint, early
from examples.evidence.table import fractions_table, strip_table, weights_table
from tests.examples.helpers import pack

N, POISONS = 400, 40


def planted() -> tuple[dict[str, Tensor], Tensor]:
    """Scores of two classes, in the first of which poisons stand out by every measure but one."""
    generator = torch.Generator().manual_seed(0)
    poisoned = torch.arange(N) < POISONS

    def score(gap: float) -> Tensor:
        return torch.randn(N, generator=generator) + gap * poisoned

    def responses(gap: float) -> Tensor:
        values = torch.randn(N, 6, generator=generator)
        values[N // 2 :, 1:] += 4.0  # what tells the second class
        values[:, 0] += gap * poisoned
        return values.half()

    names = ("susceptibility", "early susceptibility", "movement", "early movement", "bias", "raw bias", "disagreement")
    found = {name: score(9.0) for name in names} | {"fct": score(0.0)}
    found |= {"denoised": responses(0.0), "early denoised": responses(0.0)}
    found |= {"units": responses(12.0), "detector units": responses(12.0)}
    return found | {"labels": (torch.arange(N) >= N // 2).long()}, poisoned


def test_ranks_are_shares_of_all_or_of_the_own_label() -> None:
    values, labels = torch.tensor([3.0, 1.0, 2.0, 9.0]), torch.tensor([0, 0, 1, 1])
    assert combined.ranks(values).tolist() == [0.75, 0.25, 0.5, 1.0]
    assert combined.ranks(values, labels).tolist() == [1.0, 0.5, 0.5, 1.0]


def test_the_average_of_ranks_is_that_of_a_loop() -> None:
    found, _ = planted()
    expected = []
    for i in range(N):
        below = [int((found[name] <= found[name][i]).sum()) / N for name in ("susceptibility", "fct")]
        expected.append(sum(below) / 2)
    assert torch.allclose(combined.average("susceptibility", "fct")(found), torch.tensor(expected))


def test_every_candidate_judges_and_unions_hold_their_parts() -> None:
    found, poisoned = planted()
    judged = combined.judged(found)
    assert set(judged) == set(combined.NAMES)
    none = torch.zeros(N, dtype=torch.bool)
    rates = combined.rates(judged, poisoned, none)
    assert rates["modes of units"]["tpr"] == 1.0
    assert rates["modes of units"]["fpr"] == 0.0
    assert rates["modes of denoised features"]["removed"] == 0
    assert rates["denoised features or units"]["removed"] == POISONS
    assert rates["raw bias, gated"]["tpr"] > 0.9
    assert rates["fct, gated"]["removed"] == 0
    assert rates["fct, top 5 %"]["removed"] == N // 20
    assert combined.rates(judged, none, none)["modes of units"]["tpr"] is None
    covers = torch.arange(N) < POISONS // 4
    half = combined.rates(judged, poisoned & ~covers, covers)["modes of units"]
    assert (half["tpr"], half["fpr"], half["removed"], half["covers_removed"]) == (1.0, 0.0, POISONS, POISONS // 4)


def line(attack: str, rates: dict[str, tuple[float, float]], rate: float = 0.05, **further: Any) -> rows.Row:
    fields = ("tpr", "fpr", "auroc", "removed", "covers_removed")
    candidates = {
        name: dict(zip(fields, (*rates.get(name, (0.0, 0.0)), 0.5, 0, 0), strict=True)) for name in combined.NAMES
    }
    known = {"attack": attack, "seed": 0, "rate": rate, "poisons": 10, "void": False, "covers": 0}
    return {**known, "candidates": candidates, **further}


def test_the_choice_needs_quiet_on_clean_data_and_few_clean_images() -> None:
    one, two, three = "modes of units", "modes of denoised features", "fct, gated"
    half = [line("badnets-5%", {one: (0.8, 0.0), two: (0.9, 0.0), three: (1.0, 0.01)})]
    clean = line("clean", {}, rate=0.0)
    assert combined.choose(half, [clean]) == two, "the third removes too many clean images"
    clean["candidates"][two]["removed"] = 1
    assert combined.choose(half, [clean]) == one


def test_halves_take_turns_and_leave_out_what_does_not_count() -> None:
    found = [
        line("sig-80%", {}), line("clean", {}, rate=0.0), line("blended-5%", {}), line("badnets-0.5%", {}, rate=0.005),
        line("badnets-5%", {}), line("wanet-10%", {}, void=True),
    ]  # fmt: skip
    first, second = combined.halves(found)
    assert [row["attack"] for row in first] == ["badnets-5%", "sig-80%"]
    assert [row["attack"] for row in second] == ["blended-5%"]


def test_the_tables_report_on_the_half_that_had_no_part_in_the_choice() -> None:
    name, other = "modes of units", "modes of denoised features"
    found = [
        line("clean", {}, rate=0.0), line("badnets-5%", {name: (1.0, 0.0)}), line("blended-5%", {other: (0.5, 0.0)}),
    ]  # fmt: skip
    written = combined.combined_tables(found)
    assert f"Chosen on half A: *{name}*. On half B, which had no part in it: TPR 0.00, FPR 0.000." in written
    assert f"Chosen on half B: *{other}*. On half A, which had no part in it: TPR 0.00, FPR 0.000." in written


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a few packed images."""
    for split, images in {"train": 260, "test": 30}.items():
        pack(tmp_path, split, images, 0)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return tmp_path


def ask(monkeypatch: pytest.MonkeyPatch, folder: Path, words: str) -> None:
    common = f"--data {folder} --cache {folder} --results {folder / 'found.jsonl'} --images 260"
    monkeypatch.setattr(sys, "argv", ["evidence", *common.split(), *words.split()])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fractions_are_removed_and_a_network_is_trained_on_the_rest(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fractions, "FRACTIONS", (0.1, 0.3))
    ask(monkeypatch, data, "--epochs 4 --attacks badnets-5%")
    for _ in range(2):
        ablation.ablation(None, fractions.RESULTS, fractions.variants, fractions_table, attacks_by_default=[])
    found = rows.read(data / "found.jsonl")
    assert [row["row"] for row in found] == [f"{name}, {share} %" for share in (10, 30) for name in fractions.DENOISERS]
    for row in found:
        kept = 260 - int(row["fraction"] * 260)
        assert row["images_backward"] == 4 * (kept // 128) * 128
        assert 0 <= row["tpr"] <= 1
    assert early(checkpoint(data, Setting(images=260, epochs=4), "badnets-5%", 0)).exists()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_share_one_first_stage(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "WEIGHTS", (0.001, 1.0))
    quick = weights.DSTCallback
    monkeypatch.setattr(
        weights, "DSTCallback", lambda **given: quick(suspect=0.1, detector_steps=2, draws=1, **given)
    )  # fmt: skip
    ask(monkeypatch, data, "--epochs 4 --attacks badnets-5%")
    ablation.ablation(None, weights.RESULTS, weights.variants, weights_table, attacks_by_default=[])
    found = rows.read(data / "found.jsonl")
    assert [row["weight"] for row in found] == [0.001, 1.0]
    assert len(list(data.glob("*.features.ckpt"))) == 1
    assert found[0]["images_backward"] == found[1]["images_backward"]
    assert all(row["epochs_shared_with_undefended"] == 2 for row in found)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_training_image_is_measured_once_and_strip_looks_at_the_target_class(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scores, "STEPS", 2)
    setting = Setting(images=260, epochs=EARLY + 1)
    network = checkpoint(data, setting, "badnets-5%", 0)
    clean = ablation.per_class(ablation.packed_cifar10(data, "train"), 26)
    case = ablation.opened(clean, clean, setting, "badnets-5%", data)
    ablation.train_network(case.dataset, [scores.Snapshot(network, EARLY, stop=True)], setting, 0, None)
    found = scores.measured(case.dataset, setting, "badnets-5%", 0, data)
    assert {len(column) for column in found.values()} == {260}
    assert set(planted()[0]) == set(found)
    assert all(bool(column.float().isfinite().all()) for column in found.values())
    again = scores.measured(None, setting, "badnets-5%", 0, data)
    assert all(torch.equal(column, again[name]) for name, column in found.items())
    undefended, results = data / "undefended.jsonl", data / "combined.jsonl"
    for defence in ("undefended", "NONE"):
        rows.append(undefended, {**case.known, "defence": defence, "asr": 0.9})
    words = f"--epochs {EARLY + 1} --undefended {undefended} --figure {data / 'scores.png'}"
    ask(monkeypatch, data, f"{words} --results {results}")
    for _ in range(2):
        combined.main()
    (row,) = rows.read(results)
    assert (row["attack"], row["void"], set(row["candidates"])) == ("badnets-5%", False, set(combined.NAMES))
    assert (data / "scores.png").stat().st_size > 10_000
    assert combined.combined_tables([row]) in capsys.readouterr().out
    ask(monkeypatch, data, f"--epochs {EARLY + 1} --attacks badnets-5%")
    ablation.ablation(None, strip.RESULTS, strip.variants, strip_table, attacks_by_default=[])
    (row,) = rows.read(data / "found.jsonl")
    assert row["images_of_target"] == 26 + int((case.poisoned & (clean.tensors[1] != 0)).sum())
    assert 0 <= row["auroc"] <= 1
