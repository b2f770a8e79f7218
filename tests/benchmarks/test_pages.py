"""What the pages of the benchmark say of hand-made rows."""

from __future__ import annotations

from benchmarks.architectures import architectures, settings
from benchmarks.legend import legend
from benchmarks.missing import missing, missing_ablations
from benchmarks.networks import NAME
from benchmarks.protocols import PROTOCOLS
from benchmarks.results import (
    beside_clean_model,
    circumstances,
    cost,
    detection,
    headline,
    on_clean_data,
    page,
    where,
    which_code,
)
from benchmarks.sections import ABLATIONS
from benchmarks.table import fractions_table, markdown, repair_table
from tests.benchmarks.helpers import OLD, row

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


def test_what_a_defence_leaves_is_told_above_a_clean_model_under_the_attacks_that_took() -> None:
    clean = [row(attack, "clean-model", 0.8, asr) for attack, asr in (("badnets-5%", 0.025), ("wanet-10%", 0.01))]
    void = row("badnets-1%", "clean-model", 0.8, 0.0)
    wanet = [row("wanet-10%", "undefended", 0.7, 0.9), row("wanet-10%", "NONE", 0.7, 0.5)]
    assert beside_clean_model([*ROWS, *clean, void, *wanet]).splitlines()[2:] == [
        "| undefended | 2 | 0 | 96.5 | badnets-5% |",
        "| NONE | 2 | 1 | 49.0 | wanet-10% |",
    ]
    assert "### Above a clean model" in page([*ROWS, *clean], {})
    assert "### Above a clean model" not in page(ROWS, {})


def test_detection_and_clean_data_keep_to_their_rows() -> None:
    assert detection(ROWS).splitlines()[2:] == [
        "| badnets-1% (void) | NONE | 1 | 50.00 | 0.00 | 0.750 |",
        "| badnets-5% | NONE | 2 | 95.00 ± 7.07 | 0.10 ± 0.14 | 0.950 ± 0.071 |",
    ]
    for name in ("random-reset", "fine-tune", "perfect", "random", "clean-model"):
        told = row("badnets-5%", name, 0.8, 1.0, tpr=1.0, fpr=0.0, auroc=1.0)
        assert detection([*ROWS, told]) == detection(ROWS)
    assert on_clean_data(ROWS).splitlines() == [
        "| defence | seeds | clean accuracy | change, points | removed, % |",
        "|---|---:|---:|---:|---:|",
        "| undefended | 1 | 80.2 | 0.0 | 0.00 |",
        "| NONE | 1 | 79.7 | -0.5 | 0.10 |",
    ]


def test_a_clean_model_is_no_defence() -> None:
    model = [row("clean", "clean-model", 0.5, 0.0), row("badnets-5%", "clean-model", 0.8, 0.03)]
    for told in (detection, on_clean_data, cost):
        assert told([*ROWS, *model]) == told(ROWS)
    assert "| clean-model | 50.0 / 0.0 | – | 80.0 / 3.0 |" in headline([*ROWS, *model])


def test_costs_are_ratios_on_the_same_hardware_with_the_shared_epochs() -> None:
    assert cost(ROWS).splitlines() == [
        "| defence | found | cells | seconds, ratio | epoch-equivalents | peak MB |",
        "|---|---|---:|---:|---:|---:|",
        "| undefended | – | 4 | 1.00 | 12.0 | 900 |",
        f"| NONE | something | 3 | {(25 + 11 / 12 * 100) / 100:.2f} | 13.5 | 1,000 |",
        "| NONE | nothing | 1 | – | – | – |",
    ]


def test_what_finds_something_costs_otherwise_than_what_finds_nothing() -> None:
    found = [
        row("badnets-5%", "ultraclean+NONE", 0.8, 0.0, epoch_equivalents=12.5),
        row("badnets-1%", "ultraclean+NONE", 0.8, 0.0, epoch_equivalents=15, units={"layer": 1}),
        row("blended-5%", "ultraclean+NONE", 0.8, 0.0, epoch_equivalents=25, units={}, removed=1),
        row("sig-80%", "ultraclean+NONE", 0.8, 0.0, epoch_equivalents=13.5, units={}),
        row("badnets-5%", "AC", 0.8, 0.0, epoch_equivalents=18),
        row("badnets-1%", "AC", 0.8, 0.0, epoch_equivalents=20, removed=1),
    ]
    assert cost(found).splitlines()[2:] == [
        "| ultraclean+NONE | something | 2 | – | 20.0 | – |",
        "| ultraclean+NONE | nothing | 2 | – | 13.0 | – |",
        "| AC | – | 2 | – | 19.0 | – |",
    ]


def test_circumstances_count_the_rows_of_each_commit() -> None:
    versions = {"torch": "2.9", "commit": "aaaaaaa"}
    found = [
        row("clean", "NONE", 0.8, 0.0, hardware="two cores", versions=versions),
        row("clean", "D-BR", 0.8, 0.0, hardware="two cores", versions=versions | {"commit": "bbbbbbb-dirty"}),
        row("clean", "D-ST", 0.8, 0.0, seed=2, hardware="a GPU", versions=versions | {"commit": "bbbbbbb-dirty"}),
        row("clean", "AC", 0.8, 0.0, versions={"torch": "2.9", "commit": None}),
        row("clean", "ABL", 0.8, 0.0, versions={"torch": "2.7"}),
    ]
    assert circumstances(found) == (
        "Hardware: a GPU; two cores. Versions: torch 2.7, torch 2.9. "
        "Commits: bbbbbbb-dirty (2), aaaaaaa (1), not recorded (2). Seeds: 0, 2."
    )
    many = [
        row("clean", "NONE", 0.8, 0.0, versions={"commit": f"commit-{i}"}) for i in range(11) for _ in range(11 - i)
    ]
    told = circumstances(many)
    assert "commit-0 (11), commit-1 (10)" in told
    assert "commit-7 (4), 3 others (6). Seeds" in told
    assert where([*found, *many[:1]]) == f"CIFAR-10 (JPEG), {NAME}, 20,000 images, 12 epochs, recipe one-cycle."


def test_the_page_says_that_rows_without_a_commit_are_of_older_code() -> None:
    named = [row("clean", "NONE", 0.8, 0.0, versions={"commit": "aaaaaaa"})]
    assert which_code([*named, *ROWS]).startswith("Which code: 1 of the 9 rows name the commit")
    assert "still being changed" in which_code([*named, *ROWS])
    assert "older" not in which_code(named)


def test_the_table_of_architectures_says_what_has_not_run() -> None:
    blended = row("blended-5%", "NONE", 0.75, 0.02, tpr=0.5, model="vit", recipe="adamw")
    void = row("badnets-5%", "undefended", 0.75, 0.25, model="vit", recipe="adamw")
    elsewhere = row("clean", "undefended", 0.5, 0.0, model="vit", recipe="adamw", dataset="CIFAR-10")
    lines = architectures([*ROWS, blended, void, elsewhere]).splitlines()
    assert lines[0] == "| network | training | attack | undefended | ultraclean | NONE | D-BR | D-ST |"
    small = "| 20,000 images, 12 epochs, one-cycle, CIFAR-10 (JPEG) |"
    assert lines[2:5] == [
        f"| {NAME} {small} clean | 80.2 / 2.0 | not run | 79.7 / 2.0 | not run | not run |",
        f"| {NAME} {small} badnets-5% | 78.0 ± 1.4 / 99.0 ± 1.4 | not run | 77.0 ± 1.4 / 3.0 ± 1.4, TPR 95.0 ± 7.1 "
        "| not run | not run |",
        f"| {NAME} {small} blended-5% | not run | not run | not run | not run | not run |",
    ]
    vit = "| vit | 20,000 images, 12 epochs, adamw, CIFAR-10"
    assert [line for line in lines if line.startswith("| vit |")] == [
        f"{vit} (JPEG) | clean | not run | not run | not run | not run | – |",
        f"{vit} (JPEG) | badnets-5% | 75.0 / 25.0 (void) | not run | not run | not run | – |",
        f"{vit} (JPEG) | blended-5% | not run | not run | 75.0 / 2.0, TPR 50.0 | not run | – |",
        f"{vit} | clean | 50.0 / 0.0 | not run | not run | not run | – |",
        f"{vit} | badnets-5% | not run | not run | not run | not run | – |",
        f"{vit} | blended-5% | not run | not run | not run | not run | – |",
    ]
    assert {setting.model for setting in settings()} == {
        NAME, "convnext", "vit", "preact-gelu",
        "resnet18", "preact-resnet18", "vgg19-bn", "convnext-atto", "vit-tiny",
    }  # fmt: skip


def test_the_plain_table_has_a_column_of_seeds_only_with_several() -> None:
    assert markdown(ROWS[:3]).splitlines() == [
        "| attack | poisons | defence | clean accuracy | ASR | removed, images | TPR | FPR | AUROC | seconds |",
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
    found = {
        "repair": repair, "consistency": look, "stages": stage, "fractions": fraction, "strip": strip, "weights": weight
    }  # fmt: skip
    ablations = {name: [OLD | one] for name, one in found.items()}
    written = page(ROWS, ablations)
    assert "| sig-80% | NLM | 5 | 50.0 | 75.0 | 0.0 |" in written
    assert "| sig-80% | 2,000 | 0.250 | 12.5 |" in written
    assert "| sig-80% | 0.01 | 50.0 | 100.0 |" in written
    assert "| badnets-5% | resnet | fresh, 200 steps | 0.500 | 0.250 | 10.0 | 0.00 | 5.0 |" in written
    assert "| sig-80% | no labels | 50.0 | 1.0 | 62.5 |" in written
    assert repair_table([repair]).splitlines()[2] == "| badnets-5% | FCT | 70.0 | 90.0 | 30 of 1,000 | 7 | 2 |"
    for part in (headline(ROWS), detection(ROWS), on_clean_data(ROWS), cost(ROWS), repair_table([repair])):
        assert part in written
    assert fractions_table([fraction]).startswith("| attack | denoised by | removed, % |")
    for part in (legend(), architectures(ROWS), which_code(ROWS), circumstances(ROWS)):
        assert part in written
    for protocol in PROTOCOLS.values():
        assert missing(protocol, ROWS) in written
    told = f"{where(ablations['consistency'])} {circumstances(ablations['consistency'])}"
    assert "CIFAR-10 (JPEG), resnet, 20,000 images, 12 epochs, recipe one-cycle. Hardware: –." in told
    assert told in written
    assert written.endswith(f"{missing_ablations(ROWS, ablations)}\n")
    assert "8 rows of `results.jsonl` and those" in written
    assert "### mini: 259 of 267 cells" in written
    assert page([], {}).count("Not run.") == len(ABLATIONS) == 7
