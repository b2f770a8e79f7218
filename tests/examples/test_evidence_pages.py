"""What the pages of the benchmark say of hand-made rows."""

from __future__ import annotations

from examples.evidence import rows
from examples.evidence.cells import ATTACKS
from examples.evidence.networks import NAME
from examples.evidence.protocols import PROTOCOLS
from examples.evidence.published import CHEN_SETTING, FIGURES, ours
from examples.evidence.results import ABLATIONS, cost, detection, headline, missing, on_clean_data, page
from examples.evidence.table import markdown, repair_table
from tests.examples.helpers import row

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
        "The standard attacks:",
        "",
        "| defence | clean | badnets-1% | badnets-5% |",
        "|---|---:|---:|---:|",
        "| undefended | 80.2 / 2.0 | 80.0 / 49.0 (void) | 78.0 ± 1.4 / 99.0 ± 1.4 |",
        "| NONE | 79.7 / 2.0 | 79.0 / 3.0 (void) | 77.0 ± 1.4 / 3.0 ± 1.4 |",
    ]
    taken = [found | {"asr": 0.5} if found["asr"] == 0.49 else found for found in ROWS]
    assert "void" not in headline(taken)
    more = headline([row("wanet-10%", "undefended", 0.7, 0.9), row("blended-10%", "undefended", 0.7, 0.9), *ROWS])
    assert more.count("figures/asr-more.png") == 1
    assert [part.splitlines()[0] for part in more.split("\n\n") if part.startswith("|")] == [
        "| defence | clean | badnets-1% | badnets-5% |", "| defence | wanet-10% |", "| defence | blended-10% |",
    ]  # fmt: skip


def test_detection_and_clean_data_keep_to_their_rows() -> None:
    assert detection(ROWS).splitlines()[2:] == [
        "| badnets-1% (void) | NONE | 1 | 50.00 | 0.00 | 0.750 |",
        "| badnets-5% | NONE | 2 | 95.00 ± 7.07 | 0.10 ± 0.14 | 0.950 ± 0.071 |",
    ]
    told = row("badnets-5%", "random-reset", 0.8, 1.0, tpr=1.0, fpr=0.0, auroc=1.0)
    assert detection([*ROWS, told]) == detection(ROWS)
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
        "poisons_among_suspects": 30, "poisons_among_trusted": 7, "epochs_undone": 2,
    }  # fmt: skip
    look = {
        "attack": "badnets-5%", "model": "resnet", "row": "fresh, 200 steps", "auroc": 0.5, "auroc_within_labels": 0.25,
        "precision_of_suspects": 0.1, "poisons_among_trusted": 0.0, "rate": 0.05,
    }  # fmt: skip
    stage = {
        "attack": "sig-80%", "row": "no labels", "clean_accuracy": 0.5, "asr": 0.01, "neighbour_agreement": 0.625
    }  # fmt: skip
    fraction = {
        "attack": "sig-80%", "denoiser": "NLM", "fraction": 0.05, "tpr": 0.5, "clean_accuracy": 0.75, "asr": 0.0
    }  # fmt: skip
    strip = {"attack": "sig-80%", "images_of_target": 2000, "auroc": 0.25, "tpr": 0.125}
    weight = {"attack": "sig-80%", "weight": 0.01, "clean_accuracy": 0.5, "asr": 1.0}
    ablations = {
        "repair": [repair], "consistency": [look], "stages": [stage], "fractions": [fraction], "strip": [strip],
        "weights": [weight],
    }  # fmt: skip
    written = page(ROWS, ablations)
    assert "| sig-80% | NLM | 5 | 50.0 | 75.0 | 0.0 |" in written
    assert "| sig-80% | 2,000 | 0.250 | 12.5 |" in written
    assert "| sig-80% | 0.01 | 50.0 | 100.0 |" in written
    assert "| badnets-5% | resnet | fresh, 200 steps | 0.500 | 0.250 | 10.0 | 0.00 | 5.0 |" in written
    assert "| sig-80% | no labels | 50.0 | 1.0 | 62.5 |" in written
    assert repair_table([repair]).splitlines()[2] == "| badnets-5% | FCT | 70.0 | 90.0 | 30 of 1,000 | 7 | 2 |"
    for part in (headline(ROWS), detection(ROWS), on_clean_data(ROWS), cost(ROWS), repair_table([repair])):
        assert part in written
    assert "8 rows of `results.jsonl` and those" in written
    assert "### mini: 263 of 271 cells" in written
    assert page([], {}).count("Not run.") == len(ABLATIONS) == 7


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
