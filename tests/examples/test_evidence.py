"""The benchmark: which cells there are, how a run goes on, and what the pages say of hand-made rows."""

from __future__ import annotations

import copy
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from examples.evidence import repair, rows
from examples.evidence.__main__ import listing, main
from examples.evidence.cells import ATTACKS, BASELINES, STANDARD
from examples.evidence.cost import measured
from examples.evidence.model import RECIPES, Classifier
from examples.evidence.networks import NAME, NETWORKS
from examples.evidence.plot import draw
from examples.evidence.protocols import PROTOCOLS, SECONDS_PER_EPOCH, Cell, Setting, hours
from examples.evidence.published import CHEN_SETTING, FIGURES, ours
from examples.evidence.results import cost, detection, headline, missing, on_clean_data, page
from examples.evidence.run import checkpoint
from examples.evidence.table import DEFENCES, markdown, repair_table
from lightning_backdoor import Verdict

EVIDENCE = Path(rows.__file__).parent
OLD = {"dataset": "CIFAR-10 (JPEG)", "images": 20_000, "model": NAME, "epochs": 12, "seed": 0, "poisons": 1000}


def row(attack: str, defence: str, accuracy: float, asr: float, seconds: float = 100, **fields: Any) -> rows.Row:
    """A row as they were before recipe, rate and costs were written down."""
    poisons = {} if attack != "clean" else {"poisons": 0}
    found = {"attack": attack, "defence": defence, "clean_accuracy": accuracy, "asr": asr, "removed": 0}
    return {**OLD, **found, **poisons, "seconds": seconds, **fields}


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
    assert {cell.defence for cell in cells} == set(DEFENCES)
    assert set(BASELINES) < set(DEFENCES)
    assert {cell.setting for cell in cells} == {Setting()}
    assert hours(cells) < 12


def test_every_row_that_is_there_is_a_cell_of_mini() -> None:
    there = {rows.key(found) for found in rows.read(EVIDENCE / "results.jsonl")}
    assert len(there) >= 43
    assert there <= {rows.cell_key(cell) for protocol in PROTOCOLS.values() for cell in protocol.cells}


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


ROWS = [
    row("clean", "undefended", 0.802, 0.02),
    row("clean", "NONE", 0.797, 0.02, removed=20, fpr=0.001, tpr=None),
    row("badnets-1%", "undefended", 0.80, 0.49, poisons=200),
    row("badnets-1%", "NONE", 0.79, 0.03, poisons=200, removed=100, tpr=0.5, fpr=0.0, auroc=0.75),
    row("badnets-5%", "undefended", 0.79, 1.0, 100, hardware="two cores", epoch_equivalents=12.0, peak_memory_mb=900),
    row(
        "badnets-5%", "NONE", 0.78, 0.02, 25, removed=1000, tpr=1.0, fpr=0.0, auroc=1.0, hardware="two cores",
        epochs_shared_with_undefended=11, epoch_equivalents=13.5, peak_memory_mb=1000,
    ),
    row("badnets-5%", "undefended", 0.77, 0.98, seed=1, hardware="another"),
    row("badnets-5%", "NONE", 0.76, 0.04, seed=1, tpr=0.9, fpr=0.002, auroc=0.9, hardware="two cores"),
]  # fmt: skip


def test_the_headline_marks_what_did_not_take_and_averages_over_seeds() -> None:
    assert headline(ROWS).splitlines() == [
        "| defence | clean | badnets-1% | badnets-5% |",
        "|---|---:|---:|---:|",
        "| undefended | 80.2 / 2.0 | 80.0 / 49.0 (void) | 78.0 ± 1.4 / 99.0 ± 1.4 |",
        "| NONE | 79.7 / 2.0 | 79.0 / 3.0 (void) | 77.0 ± 1.4 / 3.0 ± 1.4 |",
    ]
    taken = [found | {"asr": 0.5} if found["asr"] == 0.49 else found for found in ROWS]
    assert "void" not in headline(taken)


def test_detection_and_clean_data_keep_to_their_rows() -> None:
    assert detection(ROWS).splitlines()[2:] == [
        "| badnets-1% (void) | NONE | 1 | 50.00 | 0.00 | 0.750 |",
        "| badnets-5% | NONE | 2 | 95.00 ± 7.07 | 0.10 ± 0.14 | 0.950 ± 0.071 |",
    ]
    assert on_clean_data(ROWS).splitlines()[2:] == [
        "| undefended | 1 | 80.2 | 0.0 | 0.00 |",
        "| NONE | 1 | 79.7 | -0.5 | 0.10 |",
    ]


def test_costs_are_ratios_on_the_same_hardware_with_the_shared_epochs() -> None:
    assert cost(ROWS).splitlines()[2:] == [
        "| undefended | 4 | 1.00 | 12.0 | 900 |",
        f"| NONE | 4 | {(25 + 11 / 12 * 100) / 100:.2f} | 13.5 | 1,000 |",
    ]


def test_the_plain_table_has_a_column_of_seeds_only_with_several() -> None:
    assert markdown(ROWS[:3]).splitlines() == [
        "| attack | poisons | defence | clean accuracy | ASR | removed | TPR | FPR | AUROC | seconds |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
        "| clean | 0 | undefended | 80.2 | 2.0 | 0 | – | – | – | 100 |",
        "| clean | 0 | NONE | 79.7 | 2.0 | 20 | – | 0.10 | – | 100 |",
        "| badnets-1% (void) | 200 | undefended | 80.0 | 49.0 | 0 | – | – | – | 100 |",
    ]
    assert "| badnets-5% | 1,000 | NONE | 1 | 76.0 | 4.0 |" in markdown(ROWS)
    lines = markdown([row(f"{name}%", "NONE", 0.8, 0.0) for name in ("sig-80", "badnets-10", "blended-1", "badnets-5")])
    assert [line.split()[1] for line in lines.splitlines()[2:]] == [
        "badnets-5%",
        "badnets-10%",
        "blended-1%",
        "sig-80%",
    ]
    other = markdown([*ROWS[:1], row("clean", "NONE", 0.5, 0.1, images=500)])
    assert other.split("\n\n")[1] == f"{NAME}, 500 images, 12 epochs, recipe one-cycle:"


def test_published_figures_stand_beside_the_same_setting_alone() -> None:
    figure = next(f for f in FIGURES if (f.attack, f.defence, f.setting) == ("badnets-10%", "D-BR", CHEN_SETTING))
    assert (figure.accuracy, figure.asr) == (92.83, 0.40)
    small = row("badnets-10%", "D-BR", 0.79, 0.02)
    same = {"model": "resnet18", "images": 50_000, "epochs": 200, "recipe": "D-BR"}
    assert ours(figure, [], "D-BR") == "not run"
    assert ours(figure, [small, small | same | {"defence": "D-ST"}], "D-BR") == "not comparable: 79.0 / 2.0"
    assert ours(figure, [small, small | same | {"asr": 0.5}], "D-BR") == "79.0 / 50.0"
    assert ours(figure, [small | same | {"images": 500}], "D-BR") == "not run"
    assert {f.attack for f in FIGURES} - {None} <= set(ATTACKS)


def test_the_page_holds_all_tables_and_what_is_missing() -> None:
    repair = {
        "attack": "badnets-5%", "row": "FCT", "clean_accuracy": 0.7, "asr": 0.9, "suspects": 1000,
        "poisons_among_suspects": 30, "poisons_among_trusted": 7,
    }  # fmt: skip
    look = {
        "attack": "badnets-5%", "model": "resnet", "row": "fresh, 200 steps", "auroc": 0.5, "auroc_within_labels": 0.25,
        "precision_of_suspects": 0.1, "poisons_among_trusted": 0.0, "rate": 0.05,
    }  # fmt: skip
    stage = {
        "attack": "sig-80%", "row": "no labels", "clean_accuracy": 0.5, "asr": 0.01, "neighbour_agreement": 0.625
    }  # fmt: skip
    written = page(ROWS, [repair], [look], [stage])
    assert "| badnets-5% | resnet | fresh, 200 steps | 0.500 | 0.250 | 10.0 | 0.00 | 5.0 |" in written
    assert "| sig-80% | no labels | 50.0 | 1.0 | 62.5 |" in written
    assert repair_table([repair]).splitlines()[2] == "| badnets-5% | FCT | 70.0 | 90.0 | 30 of 1,000 | 7 |"
    for part in (headline(ROWS), detection(ROWS), on_clean_data(ROWS), cost(ROWS), repair_table([repair])):
        assert part in written
    assert "8 rows of `results.jsonl` and those" in written
    assert "### mini: 143 of 151 cells" in written
    assert page([], [], [], []).count("Not run.") == 3


def test_missing_cells_are_told_by_setting_seed_and_defence() -> None:
    mini = PROTOCOLS["mini"]
    done = [dict(zip((*rows.IDENTITY, "defence"), rows.cell_key(cell), strict=True)) for cell in mini.cells]
    assert missing(mini, done) == "### mini: nothing is missing"
    left = {("D-ST", 0), ("NONE", 2)}
    some = [r for r in done if (r["defence"], r["seed"]) not in left or r["attack"] not in ("badnets-5%", "clean")]
    assert missing(mini, some).splitlines()[2:] == [
        f"- {NAME}, 20,000 images, 12 epochs, recipe one-cycle, seed 0:",
        "  - D-ST: clean, badnets-5%",
        f"- {NAME}, 20,000 images, 12 epochs, recipe one-cycle, seed 2:",
        "  - NONE: badnets-5%",
    ]


def test_figures_are_small(tmp_path: Path) -> None:
    paths = draw(ROWS, tmp_path)
    assert [path.name for path in paths] == ["asr.png", "rates.png"]
    assert all(1000 < path.stat().st_size < 100_000 for path in paths)


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


def pack(folder: Path, split: str, images: int, seed: int) -> None:
    """Write ``cifar10_<split>.npz`` with blurred noise in ten colours."""
    generator, files = np.random.default_rng(seed), []
    for place in range(images):
        pixels = generator.integers(0, 60, (32, 32, 3)) + np.array([20 * (place % 10), 90, 190 - 20 * (place % 10)])
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
    np.savez(
        folder / f"cifar10_{split}.npz", jpeg=np.frombuffer(b"".join(files), np.uint8),
        offsets=np.cumsum([0, *map(len, files)]), labels=(np.arange(images) % 10).astype(np.uint8),
        classes=np.array([str(label) for label in range(10)]),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    for seed, (split, images) in enumerate({"train": 260, "test": 30}.items()):
        pack(tmp_path, split, images, seed)
    results = tmp_path / "results.jsonl"
    common = f"--data {tmp_path} --results {results} --cache {tmp_path / 'cache'} --threads {threads} --device cpu"
    asked = f"run {common} --images 260 --epochs 2 --seed 0 --only badnets-5%/undefended/ badnets-5%/spectral/"

    def command(words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["examples.evidence", *words.split()])
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
    callback = SimpleNamespace(verdict=verdict, history=[SimpleNamespace(undone=(True, False))])
    made = []

    def two(*_: Any) -> dict[str, Any]:
        return {name: lambda name=name: (made.append(name), callback)[1] for name in ("unlearn", "relearn")}

    monkeypatch.setattr(repair, "treatments", two)
    monkeypatch.setattr(repair, "train_network", lambda *_: Classifier(steps=1).eval())
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    results = tmp_path / "repair.jsonl"
    words = f"--data {tmp_path} --cache {tmp_path} --results {results} --attacks badnets-5% --images"
    for images in ("200", "200", "100"):
        if images == "100":
            callback.verdict = Verdict(*(column[:100] for column in (verdict.scores, verdict.keep)), 0.5, "given",
                suspect=verdict.suspect[:100], trusted=none[:100])  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["repair", *words.split(), images])
        repair.main()
    found = rows.read(results)
    assert [(line["row"], line["images"]) for line in found] == [
        ("unlearn", 200), ("relearn", 200), ("unlearn", 100), ("relearn", 100),
    ]  # fmt: skip
    assert made == ["unlearn", "relearn"] * 2, "the second run found all done"
    assert {(line["suspects"], line["epochs_undone"], line["poisons"]) for line in found[:2]} == {(5, 1, 10)}
    assert {"dataset", "model", "seed", "hardware", "versions", "command", "epochs"} <= set(found[0])
    assert repair_table(found) in capsys.readouterr().out
