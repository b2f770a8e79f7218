"""Candidates for a combined verdict, and how one is chosen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import (
    ablation,
    candidates,
    cases,
    combined,
    fractions,
    rows,
    scores,
    strip,
    weights,
)
from benchmarks.cache import EARLY
from benchmarks.cells import ATTACKS
from benchmarks.data import cifar10, per_class
from benchmarks.protocols import Setting
from benchmarks.table import fractions_table, strip_table, weights_table
from benchmarks.training import Snapshot, train_network
from tests.benchmarks.helpers import pack

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

    names = ("susceptibility", "early susceptibility", "movement", "early movement", "bias", "raw bias")
    found = {name: score(9.0) for name in names} | {"fct": score(0.0), "disagreement": score(0.0)}
    found["early disagreement"] = 0.1 + 0.8 * poisoned  # at first they were with their true classes
    found |= {"denoised": responses(0.0), "early denoised": responses(0.0)}
    found |= {"units": responses(12.0), "detector units": responses(12.0)}
    return found | {"labels": (torch.arange(N) >= N // 2).long()}, poisoned


def test_ranks_are_shares_of_all_or_of_the_own_label_and_ties_share_one() -> None:
    values, labels = torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([0, 0, 1, 1])
    assert candidates.ranks(values).tolist() == [0.875, 0.125, 0.5, 0.5]
    assert candidates.ranks(values, labels).tolist() == [0.75, 0.25, 0.5, 0.5]


def test_the_average_of_ranks_is_that_of_a_loop() -> None:
    found, _ = planted()
    found["fct"] = found["fct"].round()
    expected = []
    for i in range(N):
        shares = []
        for name in ("susceptibility", "fct"):
            values, own = found[name], found[name][i]
            shares.append((int((values < own).sum()) + int((values == own).sum()) / 2) / N)
        expected.append(sum(shares) / 2)
    assert torch.allclose(candidates.average("susceptibility", "fct")(found), torch.tensor(expected))


def test_every_candidate_judges_and_unions_hold_their_parts() -> None:
    found, poisoned = planted()
    judged = candidates.judged(found)
    assert set(judged) == set(candidates.NAMES)
    none = torch.zeros(N, dtype=torch.bool)
    rates = candidates.rates(judged, poisoned, none)
    assert rates["modes of units"]["tpr"] == 1.0
    assert rates["modes of units"]["fpr"] == 0.0
    assert rates["modes of denoised features"]["removed"] == 0
    assert rates["modes of denoised features"]["auroc"] > 0.99, "without a mode, the order is that of the movement"
    assert rates["modes of the detector's units"]["removed"] == POISONS
    assert rates["denoised features or units"]["removed"] == POISONS
    assert rates["raw bias, gated"]["tpr"] > 0.9
    assert rates["fct, gated"]["removed"] == 0
    assert rates["fct, top 5 %"]["removed"] == N // 20
    assert candidates.rates(judged, none, none)["modes of units"]["tpr"] is None
    covers = torch.arange(N) < POISONS // 4
    half = candidates.rates(judged, poisoned & ~covers, covers)["modes of units"]
    assert (half["tpr"], half["fpr"], half["removed"], half["covers_removed"]) == (1.0, 0.0, POISONS, POISONS // 4)


def test_early_neighbors_add_modes_that_covers_hide() -> None:
    found, poisoned = planted()
    found["units"][N // 2 : N // 2 + 10, 0] += 12.0  # covers: the mode is four times as common in the first class
    names = "modes of units", "modes of units, early neighbours"
    plain, early = (candidates.judged(found)[name][1] for name in names)
    assert bool(plain.all())
    assert torch.equal(~early, poisoned)
    found["early disagreement"] = torch.full((N,), 0.3)
    _, keep = candidates.judged(found)[names[1]]
    assert bool(keep.all()), "a clean kind of image looks like its class from the start"


def line(attack: str, told: dict[str, tuple[float, float]], **further: Any) -> rows.Row:
    fields = ("tpr", "fpr", "auroc", "removed", "covers_removed")
    found = {
        name: dict(zip(fields, (*told.get(name, (0.0, 0.0)), 0.5, 0, 0), strict=True)) for name in candidates.NAMES
    }
    known = {"attack": attack, "seed": 0, "rate": ATTACKS[attack].rate, "poisons": 10, "void": False, "covers": 0}
    return {**known, "candidates": found, **further}


UNITS, DENOISED, FCT = "modes of units", "modes of denoised features", "fct, gated"


def test_the_choice_needs_quiet_on_clean_data_and_few_clean_images() -> None:
    half = [line("badnets-5%", {UNITS: (0.8, 0.0), DENOISED: (0.9, 0.0), FCT: (1.0, 0.01)})]
    clean = line("clean", {})
    assert combined.choose(half, [clean]) == DENOISED, "the third removes too many clean images"
    assert combined.choose(half, [clean], [UNITS, FCT]) == UNITS
    clean["candidates"][DENOISED]["removed"] = 1
    assert combined.choose(half, [clean]) == UNITS
    assert combined.choose(half, []) is None, "nobody knows what it does to clean data"


def test_an_attack_is_in_one_half_whatever_its_rate_and_seed_and_has_one_vote() -> None:
    found = [
        line("badnets-1%", {UNITS: (0.0, 0.0)}), line("badnets-5%", {UNITS: (1.0, 0.0)}),
        line("badnets-5%", {UNITS: (1.0, 0.0)}, seed=1), line("badnets-10%", {UNITS: (1.0, 0.0)}),
        line("sig-80%", {UNITS: (0.25, 0.0)}, rate=0.08),
    ]  # fmt: skip
    assert {combined.half_of(row["attack"]) for row in found} == {"A"}
    assert {combined.half_of(f"blended-{rate}%") for rate in (0.5, 1, 5, 10)} == {"B"}
    assert all(map(combined.counts, found))
    assert combined.mean(found, UNITS, "tpr") == 0.5
    for row in (line("clean", {}), line("badnets-0.5%", {}), line("wanet-10%", {}, void=True)):
        assert not combined.counts(row)


def test_the_tables_report_on_the_half_that_had_no_part_in_the_choice() -> None:
    found = [
        line("clean", {}), line("badnets-5%", {UNITS: (1.0, 0.0)}), line("blended-5%", {DENOISED: (0.5, 0.0)}),
        line("badnets-0.5%", {UNITS: (0.25, 0.0)}),
    ]  # fmt: skip
    written = combined.combined_tables(found)
    assert f"Chosen on half A: *{UNITS}*. On half B, which had no part in it: TPR 0.00, FPR 0.000." in written
    assert f"Chosen on half B: *{DENOISED}*. On half A, which had no part in it: TPR 0.00, FPR 0.000." in written
    assert f"| badnets-5% | 0 | A | 10 | {DENOISED} | 0.00 | 0.00 | 0 | – |" in written
    assert f"| badnets-0.5% | 0 | A, not counted | 10 | {DENOISED} | 0.00 | 0.00 | 0 | – |" in written
    assert f"| clean | 0 | –, not counted | 10 | {UNITS} | 0.00 | 0.00 | 0 | – |" in written
    assert "none qualifies" in combined.combined_tables(found[1:])


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a few packed images."""
    for split, images in {"train": 260, "test": 30}.items():
        pack(tmp_path, split, images, 0)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return tmp_path


def ask(monkeypatch: pytest.MonkeyPatch, folder: Path, words: str) -> None:
    common = f"--data {folder} --cache {folder} --results {folder / 'found.jsonl'} --images 260"
    monkeypatch.setattr(sys, "argv", ["benchmarks", *common.split(), *words.split()])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_images_that_move_most_leave_and_a_network_is_trained_on_the_rest(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []
    train = cases.train_network

    def spied(dataset: Any, *rest: Any) -> Any:
        trained.append(dataset)
        return train(dataset, *rest)

    monkeypatch.setattr(cases, "train_network", spied)
    monkeypatch.setattr(fractions, "FRACTIONS", (0.1, 0.3))
    ask(monkeypatch, data, "--epochs 4 --attacks badnets-5%")
    for _ in range(2):
        ablation.ablation(None, fractions.RESULTS, fractions.variants, fractions_table, attacks_by_default=[])
    found = rows.read(data / "found.jsonl")
    assert [row["row"] for row in found] == [f"{name}, {share} %" for share in (10, 30) for name in fractions.NAMES]
    scored = torch.load(next(data.glob("*.denoised.pt")), weights_only=True)
    assert torch.allclose(scored["both"], scored["median"] + scored["NLM"], atol=1e-3)
    for row, dataset in zip(found, trained, strict=True):
        assert len(dataset) == 260 - int(row["fraction"] * 260)
        values, kept = scored[row["denoiser"]], torch.zeros(260, dtype=torch.bool)
        kept[dataset.indices] = True
        assert values[kept].max() <= values[~kept].min()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_share_one_first_stage(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    callback = weights.DSTCallback

    def quick(**arguments: Any) -> Any:
        given.append(arguments.get("suspect_weight"))
        return callback(suspect=0.1, detector_steps=2, num_transforms=1, **arguments)

    monkeypatch.setattr(weights, "DSTCallback", quick)
    monkeypatch.setattr(weights, "WEIGHTS", (0.001, 1.0))
    ask(monkeypatch, data, "--epochs 4 --attacks badnets-5%")
    ablation.ablation(None, weights.RESULTS, weights.variants, weights_table, attacks_by_default=[])
    assert [row["weight"] for row in rows.read(data / "found.jsonl")] == [0.001, 1.0]
    assert len(list(data.glob("*.features-2.ckpt"))) == 1
    assert given == [0.001, None, 1.0], "the first stage is trained once"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_training_image_is_measured_once_and_a_missing_network_is_trained(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scores, "STEPS", 2)
    setting = Setting(images=260, epochs=EARLY + 2)
    case = cases.opened("badnets-5%", per_class(cifar10(data, "train"), 26), setting, 0, data)
    found = scores.scores_of(case)
    assert {len(column) for column in found.values()} == {260}
    assert set(planted()[0]) == set(found)
    assert all(bool(column.float().isfinite().all()) for column in found.values())
    for name in ("susceptibility", "denoised", "disagreement"):
        assert not torch.equal(found[name], found[f"early {name}"])
    assert len(list(data.glob(f"*.after-{EARLY}.ckpt"))) == 1
    monkeypatch.setattr(scores, "look", None)
    again = scores.scores_of(case)
    assert all(torch.equal(column, again[name]) for name, column in found.items())
    undefended, results = data / "undefended.jsonl", data / "combined.jsonl"
    for defence in ("undefended", "NONE"):
        rows.append(undefended, {**case.known, "defence": defence, "asr": 0.9})
    words = f"--epochs {EARLY + 2} --undefended {undefended} --figure {data / 'scores.png'}"
    ask(monkeypatch, data, f"{words} --results {results}")
    for _ in range(2):
        combined.main()
    (row,) = rows.read(results)
    assert (row["attack"], row["void"], set(row["candidates"])) == ("badnets-5%", False, set(candidates.NAMES))
    assert (data / "scores.png").stat().st_size > 10_000
    assert combined.combined_tables([row]) in capsys.readouterr().out


def test_a_network_that_is_made_alone_is_that_of_the_whole_training(data: Path) -> None:
    setting = Setting(images=260, epochs=EARLY + 2)
    case = cases.opened("badnets-5%", per_class(cifar10(data, "train"), 26), setting, 0, data)
    alone = [case.undefended(at_first=True), case.undefended()]
    during = [data / "early.ckpt", data / "late.ckpt"]
    snapshots = [Snapshot(path, epochs) for path, epochs in zip(during, (EARLY, EARLY + 1), strict=True)]
    train_network(case.dataset, snapshots, setting, 0, None)
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (*alone, *during)]
    for one, other in zip(states[:2], states[2:], strict=True):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_strip_looks_at_the_target_class_and_finds_images_that_force_the_answer(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Obedient(torch.nn.Module):
        """Sure of class 0 where the corner of the mean image has BadNets' black and white, else of nothing."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            corner = images[:, :, -3:, -3:].float().mean(dim=1).flatten(1)
            surely = 0.5 * (corner.amax(dim=1) - corner.amin(dim=1))
            return torch.nn.functional.pad(surely[:, None] - 40, (0, 9))

    network = Obedient()
    monkeypatch.setattr(strip, "restored", lambda *_: network)
    monkeypatch.setattr(cases.Case, "undefended", lambda _: None)
    ask(monkeypatch, data, "--attacks badnets-5%")
    ablation.ablation(None, strip.RESULTS, strip.variants, strip_table, attacks_by_default=[])
    (row,) = rows.read(data / "found.jsonl")
    assert row["images_of_target"] == 26 + row["poisons"]
    assert row["auroc"] > 0.95
    assert row["tpr"] > 0.5
