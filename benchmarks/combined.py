"""``python -m benchmarks.combined``: does a verdict from several scores beat each of them?

For every attack with an undefended row of ``python -m benchmarks run``, every training image is measured once
(:mod:`benchmarks.scores`), and every candidate for a verdict judges all images by that
(:mod:`benchmarks.candidates`). The best one on half of the attacks is reported on the other half. One JSON line
per attack and seed in ``combined.jsonl``; a run that was interrupted goes on with the first missing one.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Collection, Iterable
from itertools import product
from pathlib import Path

from benchmarks import command, rows
from benchmarks.candidates import NAMES, SINGLES, judged, rates
from benchmarks.cases import Case, opened
from benchmarks.cells import ATTACKS, STANDARD
from benchmarks.figures import own_style
from benchmarks.plot import DPI, histograms
from benchmarks.scores import path_of, scores_of
from benchmarks.table import TOOK, number, percent, table

RESULTS = Path(__file__).with_name("combined.jsonl")
SEEDS = 10  # from 0 on, those that there are
DRAWN = ("susceptibility", "early susceptibility", "movement", "fct", "raw bias")
MOST_FPR = 0.001  # on average, of a candidate that may be chosen
LEAST_RATE = 0.01  # of attacks that count
KINDS = list(dict.fromkeys(name.rsplit("-", 1)[0] for name in ATTACKS if name != "clean"))


def half_of(attack: str) -> str | None:
    """The half that the kind of an attack belongs to, whatever its rate; ``None`` for clean data."""
    return None if attack == "clean" else "AB"[KINDS.index(attack.rsplit("-", 1)[0]) % 2]


def counts(row: rows.Row) -> bool:
    """Whether a row is of an attack that took, at a rate that counts."""
    return row["attack"] != "clean" and not row["void"] and row["rate"] >= LEAST_RATE


def mean(found: Iterable[rows.Row], name: str, rate: str) -> float:
    """Mean rate of a candidate over the kinds of attack, each the mean of its rows."""
    kinds: dict[str, list[float]] = {}
    for row in found:
        kinds.setdefault(row["attack"].rsplit("-", 1)[0], []).append(row["candidates"][name][rate])
    return statistics.fmean(statistics.fmean(values) for values in kinds.values())


def choose(half: list[rows.Row], clean: list[rows.Row], names: Collection[str] = NAMES) -> str | None:
    """The candidate with the largest mean TPR of those that are quiet on clean data and hardly remove clean images."""

    def may_be(name: str) -> bool:
        quiet = bool(clean) and all(row["candidates"][name]["removed"] == 0 for row in clean)
        return quiet and mean(half, name, "fpr") <= MOST_FPR

    return max((name for name in names if may_be(name)), key=lambda name: mean(half, name, "tpr"), default=None)


def combined_tables(found: list[rows.Row]) -> str:
    """All candidates; what the best one of each half does on the other; and each attack by that of the other half."""
    clean = [row for row in found if row["attack"] == "clean"]
    halves = {half: [row for row in found if counts(row) and half_of(row["attack"]) == half] for half in "AB"}
    if not all(halves.values()):
        return "Too few attacks have been measured for two halves."
    chosen = {half: choose(part, clean) for half, part in halves.items()}
    seeds = ", ".join(str(row["seed"]) for row in sorted(clean, key=lambda row: row["seed"]))
    parts = [
        _overview(halves, clean),
        f"Clean trainings: {len(clean)} (seeds {seeds}); the table has the most that one lost.",
    ]
    for half, other in ("AB", "BA"):
        for kind, name in (
            ("Chosen", chosen[half]), ("The best that is not put together", choose(halves[half], clean, SINGLES))
        ):  # fmt: skip
            told = "none qualifies." if name is None else f"*{name}*. {_on(halves[other], name, other)}"
            parts.append(f"{kind} on half {half}: {told}")
    lines = []
    for row in sorted(found, key=lambda row: (list(ATTACKS).index(row["attack"]), row["seed"])):
        half = half_of(row["attack"])
        name = chosen["A" if half != "A" else "B"]
        if name is not None:
            lines.append(_line(row, f"{half or '–'}{'' if counts(row) else ', not counted'}", name))
    head = ["attack", "seed", "half", "poisons", "judged by", "TPR", "FPR", "removed", "covers among them"]
    by_attack = table(head, lines, left=("attack", "half", "judged by"))
    picture = "![Scores of clean and poisoned images](figures/scores.png)"
    return "\n\n".join(
        [
            *parts,
            "By attack, by what was chosen on the half that its kind is not in (clean data: on half A):",
            by_attack,
            picture,
        ]
    )


def _overview(halves: dict[str, list[rows.Row]], clean: list[rows.Row]) -> str:
    lines = []
    for name in NAMES:
        shares = [percent([mean(part, name, rate)], 2) for part in halves.values() for rate in ("tpr", "fpr")]
        auroc = number([mean(halves["A"] + halves["B"], name, "auroc")], 3)
        removed = max((row["candidates"][name]["removed"] for row in clean), default=0)
        lines.append([name, *shares, auroc, f"{removed:,}"])
    rates = ["TPR, half A", "FPR, half A", "TPR, half B", "FPR, half B", "AUROC"]
    return table(["verdict from", *rates, "removed, clean data"], lines, left=["verdict from"])


def _on(half: list[rows.Row], name: str, label: str) -> str:
    tpr, fpr = percent([mean(half, name, "tpr")], 2), percent([mean(half, name, "fpr")], 3)
    return f"On half {label}, which had no part in it: TPR {tpr}, FPR {fpr}."


def _line(row: rows.Row, half: str, name: str) -> list[str]:
    told = row["candidates"][name]
    covers = f"{told['covers_removed']:,} of {row['covers']:,}" if row["covers"] else "–"
    return [
        f"{row['attack']}{' (void)' * row['void']}", str(row["seed"]), half, f"{row['poisons']:,}", name,
        *(percent([told[rate]], 2) for rate in ("tpr", "fpr")), f"{told['removed']:,}", covers,
    ]  # fmt: skip


def draw(cases: list[Case], path: Path) -> None:
    """Histograms of clean and poisoned images, attacks down and scores across."""
    panels = {}
    for case in cases:
        found = scores_of(case)
        panels.update({(case.attack, name): (found[name], case.poisoned) for name in DRAWN})
    with own_style():
        histograms(panels, "score", "Scores of training images").savefig(path, dpi=DPI)


def main() -> None:
    parser = command.setting_parser(__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--undefended", type=Path, default=RESULTS.with_name("results.jsonl"))
    parser.add_argument("--figure", type=Path, default=RESULTS.parent / "figures" / "scores.png")
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS))
    options = parser.parse_args()
    clean, _, setting = command.begin_setting(options)
    undefended = {rows.key(row): row for row in rows.read(options.undefended) if row["defence"] == "undefended"}
    for attack, seed in product(options.attacks, range(SEEDS)):
        known = rows.identity(setting, attack, seed)
        plain = undefended.get(rows.key({**known, "defence": "undefended"}))
        done = {rows.key(row, "row") for row in rows.read(options.results)}
        if plain is None or rows.key(known, "row") in done:
            continue
        case = opened(attack, clean, setting, seed, options.cache)
        row = {
            **case.known,
            "void": attack != "clean" and plain["asr"] < TOOK,
            "covers": int(case.covers.sum()),
            "candidates": rates(judged(scores_of(case)), case.poisoned, case.covers),
            **rows.circumstances("benchmarks.combined", "cpu"),
        }
        rows.append(options.results, row)
        print(attack, seed, file=sys.stderr, flush=True)
    cases = [opened(attack, clean, setting, 0, options.cache) for attack in STANDARD if attack != "clean"]
    if drawn := [case for case in cases if path_of(case).exists()]:
        draw(drawn, options.figure)
    print(combined_tables(rows.read(options.results)))


if __name__ == "__main__":
    main()
