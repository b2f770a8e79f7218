"""The benchmark: which cells there are, and how a run goes on."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from benchmarks import ablation, cases, repair, rows, run, stages
from benchmarks.__main__ import listing, main
from benchmarks.cache import checkpoint
from benchmarks.cells import ATTACKS, BASELINES, STANDARD
from benchmarks.cost import measured
from benchmarks.model import RECIPES, Classifier
from benchmarks.networks import NAME, NETWORKS
from benchmarks.protocols import PROTOCOLS, SECONDS_PER_EPOCH, Cell, Setting, hours
from benchmarks.table import DEFENCES, repair_table, stages_table
from lightning_backdoor import DSTCallback, NONECallback, UltraCleanCallback, Verdict
from lightning_backdoor.events import Event
from lightning_backdoor.responses import TwoStage
from tests.benchmarks.helpers import pack, row

EVIDENCE = Path(rows.__file__).parent


def test_a_key_knows_setting_attack_defence_and_seed() -> None:
    known = {rows.key(row("badnets-5%", "NONE", 0.8, 0.0))}
    for name, other in {
        "images": 500, "epochs": 1, "model": "vit", "recipe": "adamw", "dataset": "digits", "attack": "badnets-1%",
        "defence": "D-BR", "seed": 1,
    }.items():  # fmt: skip
        known.add(rows.key(row("badnets-5%", "NONE", 0.8, 0.0) | {name: other}))
    assert len(known) == 9
    assert rows.cell_key(Cell(Setting(), "badnets-5%", "NONE")) in known
    assert rows.cell_key(Cell(Setting(images=400), "badnets-5%", "NONE")) not in known
    repaired = {**rows.identity(Setting(), "badnets-5%", 0), "row": "FCT"}
    others = [rows.identity(Setting(images=500), "badnets-5%", 0) | {"row": "FCT"}, repaired | {"row": "loss"}]
    assert len({rows.key(found, "row") for found in (repaired, *others)}) == 3


def test_rows_that_differ_in_measurement_alone_are_the_same_cell() -> None:
    assert rows.key(row("clean", "NONE", 0.8, 0.0)) == rows.key(row("clean", "NONE", 0.7, 0.1, hardware="another"))


def test_a_cut_line_does_not_count_and_swallows_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert rows.read(path) == []
    rows.append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2, "b')
    assert rows.read(path) == [{"a": 1}]
    rows.append(path, {"a": 3})
    rows.append(path, {"a": 4})
    assert rows.read(path) == [{"a": 1}, {"a": 3}, {"a": 4}]


def test_of_a_cell_that_was_measured_twice_the_last_row_counts() -> None:
    first, other, last = row("clean", "NONE", 0.7, 0.0), row("clean", "D-BR", 0.8, 0.0), row("clean", "NONE", 0.9, 0.0)
    assert rows.latest([first, other, last]) == [last, other]


def test_a_row_names_the_commit_of_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        own = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *own, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    library, data = tmp_path / "lightning_backdoor", tmp_path / "benchmarks"
    for file in (library / "a.py", data / "b.py", data / "results.jsonl"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1\n")
    for words in (["init"], ["add", "."], ["commit", "-m", "a"]):
        git(*words)
    monkeypatch.setattr(rows, "__file__", str(data / "rows.py"))
    head = git("rev-parse", "--short=7", "HEAD").strip()
    commit = rows.commit.__wrapped__
    assert commit() == head
    (data / "results.jsonl").write_text("2\n")
    assert commit() == head, "rows are no code"
    (library / "a.py").write_text("2\n")
    assert commit() == f"{head}-dirty"
    monkeypatch.setattr(rows, "__file__", str(tmp_path.parent / "rows.py"))
    assert commit() is None


def test_mini_begins_with_the_defences_under_the_standard_attacks() -> None:
    cells = PROTOCOLS["mini"].cells
    assert [cell.attack for cell in cells[: len(STANDARD)]] == list(STANDARD)
    assert {(cell.attack, cell.defence) for cell in cells[:29]} == {
        (attack, defence)
        for attack in STANDARD
        for defence in ("undefended", "ultraclean", "NONE", "D-BR", "D-ST")
        if (attack, defence) != ("all-to-all-10%", "ultraclean")
    }
    for attack in ("badnets-5%", "blended-5%"):
        for defence in ("undefended", "ultraclean", "NONE", "D-BR", "D-ST"):
            assert {c.seed for c in cells if (c.attack, c.defence) == (attack, defence)} == {0, 1, 2}
    assert len({c.seed for c in cells if (c.attack, c.defence) == ("clean", "undefended")}) == 10
    assert Cell(Setting(), "all-to-all-10%", "ultraclean+NONE") in cells
    assert {cell.defence for cell in cells} == set(DEFENCES)
    assert set(BASELINES) < set(DEFENCES)
    assert {cell.setting for cell in cells} == {Setting()}
    assert hours(cells) < 12


def test_rows_from_before_the_protocols_are_cells_of_mini() -> None:
    there = {rows.key(found) for found in rows.read(EVIDENCE / "results.jsonl")}
    assert len(there & {rows.cell_key(cell) for cell in PROTOCOLS["mini"].cells}) >= 43


def test_full_goes_through_five_architectures_at_every_rate() -> None:
    cells = [cell for cell in PROTOCOLS["full"].cells if cell.setting.epochs == 100]
    models = {"resnet18", "preact-resnet18", "vgg19-bn", "convnext-atto", "vit-tiny"}
    for model in models:
        attacks = {cell.attack for cell in cells if cell.setting.model == model}
        rates = {f"{kind}-{rate}%" for kind in ("badnets", "blended") for rate in ("10", "5", "1", "0.5", "0.1")}
        assert attacks == {"clean", *rates}
    assert {cell.setting.model for cell in cells} == models
    assert {cell.setting.images for cell in PROTOCOLS["full"].cells} == {50_000}


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_cells_can_run_and_what_they_need_comes_first(protocol: Any) -> None:
    assert len(set(protocol.cells)) == len(protocol.cells)
    undefended = set()
    for cell in protocol.cells:
        assert cell.attack in ATTACKS
        assert cell.setting.model in NETWORKS
        assert cell.setting.model in SECONDS_PER_EPOCH
        assert cell.setting.recipe in RECIPES
        undefended |= {(cell.setting, cell.attack, cell.seed)} if cell.defence == "undefended" else set()
        assert (cell.setting, cell.attack, cell.seed) in undefended
    places = {(cell.defence, cell.attack): place for place, cell in reversed(list(enumerate(protocol.cells)))}
    for attack in ATTACKS:
        for later, sooner in (("random", "ultraclean"), ("random-reset", "NONE")):
            assert places.get((later, attack), 10_000) > places.get((sooner, attack), -1)


def test_checkpoints_of_two_settings_are_two_files() -> None:
    usual = checkpoint(Path(), Setting(), "clean", 0)
    assert usual.name == "clean-20000-12-0.ckpt", "the name that the other runners of the benchmark know"
    others = [Setting(images=500), Setting(epochs=1), Setting(model="vit"), Setting(recipe="adamw")]
    assert len({usual, *(checkpoint(Path(), setting, "clean", 0) for setting in others)}) == 5


def test_the_listing_says_what_has_run() -> None:
    cells = [Cell(Setting(), "clean", "undefended"), Cell(Setting(), "clean", "NONE", 2)]
    assert listing(cells, [rows.cell_key(cells[0])]).splitlines() == [
        f"    done  {NAME}/clean/undefended/seed-0/ ({NAME}, 20,000 images, 12 epochs, recipe one-cycle)",
        f"    63 s  {NAME}/clean/NONE/seed-2/ ({NAME}, 20,000 images, 12 epochs, recipe one-cycle)",
        "1 of 2 cells are missing: about 0.0 hours.",
    ]


def test_the_meter_counts_images_through_the_network_and_its_copies() -> None:
    network, images = Classifier(steps=1), torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
    twin = copy.deepcopy(network)
    with measured("cpu") as meter:
        network(images)
        with torch.no_grad():
            twin(images[:3])
            twin.network(twin.mean.expand(2, 3, 32, 32))  # a part is not a pass
    network(images)
    assert (meter.forward, meter.backward) == (8, 5)
    assert meter.row(images=6, shared_epochs=11)["epoch_equivalents"] == 12.0
    assert meter.seconds > 0


def test_two_callbacks_are_judged_by_what_they_removed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, pictures = 200, torch.Generator().manual_seed(0)
    train = TensorDataset(
        torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8, generator=pictures), torch.arange(images) % 10
    )
    setting = Setting(images=images, epochs=1)
    poisoned = cases.opened("badnets-5%", train, setting, 0, tmp_path).poisoned
    first, second = poisoned.clone(), torch.zeros(images, dtype=torch.bool)
    first[poisoned.nonzero()[:4]] = False  # the first callback misses four, the second finds them and a clean one
    second[poisoned.nonzero()[:4]] = second[(~poisoned).nonzero()[0]] = True
    given = run._callbacks("ultraclean+NONE", train, poisoned, 0, {})
    assert [type(callback) for callback in given] == [UltraCleanCallback, NONECallback]
    for i, (callback, removed) in enumerate(zip(given, (first, second), strict=True)):
        callback._procedure.verdict = Verdict(removed.float(), ~removed, 0.5, f"by {i}")
    unit = ("layer", 3, 0, 1.0)
    given[1]._procedure.history = [Event(1, 5, 5, units=(unit,)), Event(2, 0, 5, units=(unit,))]
    monkeypatch.setattr(run, "_callbacks", lambda *_: given)
    monkeypatch.setattr(run, "train_network", lambda *_, **__: Classifier(steps=1).eval())
    found = run.run_cell(Cell(setting, "badnets-5%", "ultraclean+NONE"), train, train, reference={}, cache=tmp_path)
    assert (found["removed"], found["tpr"], found["rule"]) == (11, 1.0, "by 0, by 1")
    assert found["fpr"] == pytest.approx(1 / 190)
    assert found["removed_by"] == [6, 5]
    assert 0.99 < found["auroc"] < 1.0
    assert (found["units"], found["undone"]) == ({"layer": 1}, False)


def test_a_clean_model_has_seen_neither_the_poisons_nor_the_trigger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = TensorDataset(torch.zeros(200, 3, 32, 32, dtype=torch.uint8), torch.arange(200) % 10)
    asked: list[Any] = []

    def remember(*given: Any, **_: Any) -> Any:
        asked.append(given)
        return Classifier(steps=1).eval()

    monkeypatch.setattr(run, "undefended", lambda *given, **_: checkpoint(tmp_path, given[1], given[2], given[3]))
    monkeypatch.setattr(run, "train_network", remember)
    there = checkpoint(tmp_path, Setting(images=200), "clean", 4)
    there.touch()
    cell = Cell(Setting(images=200), "all-to-all-10%", "clean-model", 3)
    found = run.run_cell(cell, train, train, reference={}, cache=tmp_path)
    dataset, callbacks, _, seed, start = asked[0]
    assert dataset is train
    assert (callbacks, seed, start) == ([], 4, there)
    assert (found["attack"], found["seed"], found["poisons"], found["removed"]) == ("all-to-all-10%", 3, 20, 0)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    for seed, (split, images) in enumerate({"train": 260, "test": 30}.items()):
        pack(tmp_path, split, images, seed)
    results = tmp_path / "results.jsonl"
    common = f"--data {tmp_path} --results {results} --cache {tmp_path / 'cache'} --threads {threads} --device cpu"
    asked = f"run {common} --images 260 --epochs 2 --seed 0 --only badnets-5%/undefended/ badnets-5%/spectral/"

    def command(words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["benchmarks", *words.split()])
        main()

    command(f"{asked} --list")
    assert not results.exists()
    command(asked)
    undefended, spectral = rows.read(results)
    assert (undefended["defence"], spectral["defence"]) == ("undefended", "spectral")
    assert (undefended["poisons"], undefended["rate"], undefended["images"]) == (13, 0.05, 260)
    assert undefended["epoch_equivalents"] == pytest.approx(2 * 256 / 260, abs=0.01), "two batches of 128 per epoch"
    assert spectral["epochs_shared_with_undefended"] == 1
    assert spectral["images_forward"] > spectral["images_backward"] >= 256
    assert {"tpr", "fpr", "auroc", "versions", "hardware", "command", "peak_memory_mb", "recipe"} <= set(spectral)
    written = results.read_text()
    command(asked)
    assert results.read_text() == written, "finished cells do not run again"
    results.write_text(written[:-20])
    command(asked)
    again = rows.read(results)[-1]
    assert len(results.read_text().splitlines()) == 3
    for name in ("clean_accuracy", "asr", "removed", "tpr", "images_forward"):
        assert again[name] == spectral[name]
    command(f"results {common}")
    assert "260 images, 2 epochs" in (tmp_path / "RESULTS.md").read_text()
    with pytest.raises(SystemExit, match="260 training images, not 20,000"):
        command(f"run {common} --epochs 2 --only badnets-5%/undefended/seed-0")
    assert [json.loads(line)["attack"] for line in written.splitlines()] == ["badnets-5%"] * 2


def test_repairs_are_kept_and_not_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, images in {"train": 200, "test": 30}.items():
        pack(tmp_path, split, images, 0)
    none = torch.zeros(200, dtype=torch.bool)
    verdict = Verdict(torch.zeros(200), ~none, 0.5, "given", suspect=torch.arange(200) < 5, trusted=none)
    callback = SimpleNamespace(verdict=verdict, history=[SimpleNamespace(undone_steps=(True, False))])
    made = []

    def two(_: Any) -> dict[str, Any]:
        return {name: lambda name=name: (made.append(name), callback)[1] for name in ("unlearn", "relearn")}

    monkeypatch.setattr(repair, "treatments", two)
    monkeypatch.setattr(cases.Case, "undefended", lambda _: None)
    monkeypatch.setattr(cases, "train_network", lambda *_: Classifier(steps=1).eval())
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    results = tmp_path / "repair.jsonl"
    words = f"--data {tmp_path} --cache {tmp_path} --results {results} --attacks badnets-5% --images"
    for images in ("200", "200", "100"):
        if images == "100":
            callback.verdict = Verdict(*(column[:100] for column in (verdict.scores, verdict.keep)), 0.5, "given",
                suspect=verdict.suspect[:100], trusted=none[:100])  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["repair", *words.split(), images])
        ablation.ablation(None, repair.RESULTS, repair.variants, repair_table, attacks_by_default=[])
    found = rows.read(results)
    assert [(line["row"], line["images"]) for line in found] == [
        ("unlearn", 200), ("relearn", 200), ("unlearn", 100), ("relearn", 100),
    ]  # fmt: skip
    assert made == ["unlearn", "relearn"] * 2, "the second run found all done"
    assert {(line["suspects"], line["epochs_undone"], line["poisons"]) for line in found[:2]} == {(5, 1, 10)}
    assert {"dataset", "model", "seed", "hardware", "versions", "command", "epochs"} <= set(found[0])
    assert repair_table(found) in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_stages_are_trained_by_the_labels_that_are_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, images in {"train": 200, "test": 30}.items():
        pack(tmp_path, split, images, 0)
    believed, trusted, written = [], [], []
    attach = TwoStage._attach

    def spied(response: Any, session: Any) -> Any:
        running = attach(response, session)
        believed.append(int(running.flags.trusted.sum()))
        trusted.append(int(session.verdict.trusted.sum()))
        return running

    monkeypatch.setattr(TwoStage, "_attach", spied)
    quick = {"suspect": 0.1, "detector_steps": 2, "num_transforms": 1, "classifier_epochs": 1}
    made = {
        "none": lambda: stages.contrastive("none", **quick),
        "all": lambda: stages.contrastive("all", **quick),
        "nothing suspect": lambda: DSTCallback(**quick, max_removed=0.001),
    }
    monkeypatch.setattr(stages, "VARIANTS", made)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    results = tmp_path / "stages.jsonl"
    words = f"stages --data {tmp_path} --results {results} --attacks badnets-5% --images 200 --epochs 2"
    monkeypatch.setattr(sys, "argv", words.split())
    for _ in range(2):
        ablation.ablation(None, stages.RESULTS, stages.variants, stages_table, attacks_by_default=[])
        written.append(results.read_text())
    assert written[0] == written[1], "finished rows do not run again"
    assert believed == [0, 200]
    assert all(0 < count < 200 for count in trusted)
    found = rows.read(results)
    assert [line["row"] for line in found] == list(made)
    assert [line["neighbour_agreement"] is None for line in found] == [False, False, True]
    assert {"clean_accuracy", "asr", "epoch_equivalents", "poisons", "hardware", "command"} <= set(found[0])
    assert stages_table(found) in capsys.readouterr().out
