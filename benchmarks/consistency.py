"""``python -m benchmarks.consistency``: does FCT tell poisoned images, and what does centre repulsion do?

For every standard attack a detector is trained as D-BR and D-ST train it, from fresh weights and from a copy of
the undefended network, and every training image gets its FCT with and without centre repulsion; for Blended also by a
pre-activation network with GELU and by a small vision transformer. AUROC, the precision of the 5 % that move most, and
the share of poisons among the 20 % that move least (chance: their share of all) go to ``consistency.jsonl``, histograms
to ``figures/fct.png``. Scores are kept in the cache; a run that was interrupted goes on with the first missing one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import command, networks, rows
from benchmarks.cache import kept
from benchmarks.cases import Case, opened
from benchmarks.cells import STANDARD
from benchmarks.figures import own_style
from benchmarks.looking import look
from benchmarks.plot import DPI, histograms
from benchmarks.protocols import Setting
from benchmarks.scores import auroc
from benchmarks.table import consistency_table
from benchmarks.training import labels_of
from lightning_backdoor import functional

RESULTS = Path(__file__).with_name("consistency.jsonl")
OTHERS = ("preact-gelu", "vit")  # on Blended alone
STEPS = 200  # of the labels, and as many of centre repulsion


def fct_of(case: Case, start: str, *, steps: int = STEPS, repulsion: int) -> Tensor:
    """FCT of all training images, (N,), kept in the cache."""

    def make() -> Tensor:
        return look(
            case, start_from=case.undefended() if start == "copy" else None, what=("fct",), detector=start,
            detector_steps=steps, repulsion_steps=repulsion,
        )["fct"]  # fmt: skip

    return kept(case.shared.with_suffix(f".fct-{start}-{steps}-{repulsion}.pt"), make)


def cells(steps: int) -> list[tuple[str, str, str, int]]:
    """Attack, network, start and steps of centre repulsion."""
    attacked = [name for name in STANDARD if name != "clean"]
    main = [
        (attack, networks.NAME, start, steps * r) for attack in attacked for start in ("fresh", "copy") for r in (0, 1)
    ]
    return main + [("blended-5%", network, "fresh", steps * r) for network in OTHERS for r in (0, 1)]


def row_name(start: str, steps: int, repulsion: int) -> str:
    """How a row calls its detector."""
    return f"{start}, {steps} steps" + f", {repulsion} of centre repulsion" * (repulsion > 0)


def wanted() -> list[rows.Row]:
    """What tells apart the rows of a finished run."""
    return [
        {**rows.identity(Setting(network), attack, 0), "row": row_name(start, STEPS, repulsion)}
        for attack, network, start, repulsion in cells(STEPS)
    ]


def main() -> None:
    parser = command.setting_parser(__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the labels, and as many of centre repulsion")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=RESULTS.parent / "figures" / "fct.png")
    options = parser.parse_args()
    clean, _, setting = command.begin_setting(options)
    found = {}
    for attack, network, start, repulsion in cells(options.steps):
        case = opened(attack, clean, replace(setting, model=network), 0, options.cache)
        fct = fct_of(case, start, steps=options.steps, repulsion=repulsion)
        found[attack, network, start, repulsion] = fct, case.poisoned
        known = {**case.known, "row": row_name(start, options.steps, repulsion)}
        if rows.key(known, "row") not in {rows.key(row, "row") for row in rows.read(options.results)}:
            measured = told_apart(fct, labels_of(case.dataset), case.poisoned)
            told = rows.circumstances("benchmarks.consistency", "cpu")
            rows.append(options.results, {**known, **measured, **told})
    print(consistency_table(rows.read(options.results)))
    draw(found, options.figure)


def told_apart(fct: Tensor, labels: Tensor, poisoned: Tensor) -> rows.Row:
    """AUROC, also among the labels that poisons have; shares of poisons in the top 5 % and in the lowest 20 %."""
    trusted, suspect = functional.split_by_rank(fct)
    same = torch.isin(labels, labels[poisoned].unique())
    return {
        "auroc": auroc(fct, poisoned),
        "auroc_within_labels": auroc(fct[same], poisoned[same]),
        "precision_of_suspects": float(poisoned[suspect].float().mean()),
        "poisons_among_trusted": float(poisoned[trusted].float().mean()),
    }


def draw(found: dict[tuple[str, str, str, int], tuple[Tensor, Tensor]], path: Path) -> None:
    """Histograms of clean and poisoned images: attacks and networks down, detectors across."""
    panels = {}
    for (attack, network, start, repulsion), scores in found.items():
        line = attack if network == networks.NAME else f"{attack}\n{network}"
        panels[line, f"{start}, centre repulsion" if repulsion else start] = scores
    with own_style():
        histograms(panels, "FCT", "FCT of training images by detector").savefig(path, dpi=DPI)


if __name__ == "__main__":
    main()
